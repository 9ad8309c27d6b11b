"""Every architecture, through one body of tests: wrap, compute, save, load, generate, train.

``pytest tests/wrapping/test_architectures.py --architecture-table FILE`` writes what passed as a table.
"""

import copy

import pytest
import torch
from tiny_models import (
    EOS,
    FAMILIES,
    PAD,
    checkpoint_layers,
    decoder_inputs,
    row_of,
    tiny_base,
    tiny_inputs,
    tiny_labels,
)
from tiny_nvib import generate
from torch import nn
from torch.nn import functional as F

from nvib_hf import NvibForConditionalGeneration, NvibLatents, naive_denoising_attention
from nvib_hf.layers.denoising_attention import attended_mixture, attended_points, pack
from nvib_hf.wrapping import specs
from nvib_hf.wrapping.base import base_class, run_encoder, shortened_mask
from nvib_hf.wrapping.cross_attention import DenoisingCrossAttention
from nvib_hf.wrapping.specs import find_cross_attention

# What a base model of Transformers 5.23 gets wrong by itself. Nothing else may be skipped for the base's sake.
FAULTS = {
    "without a cache it generates something else": {"fsmt", "prophetnet"},
    "with a static cache it generates something else": {"fsmt", "led", "nllb_moe"},
    "a static cache raises an error": {"prophetnet"},
    "assisted decoding raises an error": {"pop2piano", "prophetnet"},
}
FIXED_LENGTH = "its images and sounds have a fixed length: there is no padding"
TIME_NORM = "it normalises over time, padding included"
# A bottleneck at work: variances, weights and the prior's component all matter.
NONTRIVIAL = {"tau_alpha": 1.0, "tau_sigma": 0.5, "lambda_gaussian": 0.1, "lambda_dirichlet": 0.1}
EVALUATIONS = pytest.mark.parametrize("evaluation", ["means", "mixture"])

over_families = pytest.mark.parametrize("family", FAMILIES)


def wrap(family: str, **settings) -> NvibForConditionalGeneration:
    return NvibForConditionalGeneration.from_base_pretrained(tiny_base(family), **settings)


def skip_for_the_base(family: str, fault: str) -> None:
    assert family in FAULTS[fault], f"{fault}, which is news for {family}"
    pytest.skip(f"a fault of the base model: {fault}")


# ------------------------------------------------------------------------------------ the tiny models
@over_families
@torch.no_grad()
def test_cross_attention_matters(family):
    """Otherwise nothing below would prove anything: logits move by more than 1 without it, or on another source."""
    base, inputs, tokens = tiny_base(family), tiny_inputs(family), decoder_inputs()
    logits = base(**inputs, decoder_input_ids=tokens).logits
    other = base(**tiny_inputs(family, seed=1), decoder_input_ids=tokens).logits
    for module, _ in find_cross_attention(base):
        module.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]), *output[1:]))
    without = base(**inputs, decoder_input_ids=tokens).logits
    assert (logits - without).abs().max() > 1
    assert (logits - other).abs().max() > 1


# ------------------------------------------------------------------------------------ 1. the same function
@pytest.mark.capability("same as the base")
@EVALUATIONS
@over_families
@torch.no_grad()
def test_a_fresh_wrap_computes_the_base(family, evaluation):
    base, inputs, tokens = tiny_base(family), tiny_inputs(family), decoder_inputs()
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), evaluation=evaluation)
    expected = base(**inputs, decoder_input_ids=tokens).logits
    torch.testing.assert_close(model(**inputs, decoder_input_ids=tokens).logits, expected, atol=1e-3, rtol=0)
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        assert torch.equal(generate(model, inputs, **settings), generate(base, inputs, **settings))
    samples = []
    for either in (model, base):
        torch.manual_seed(3)
        samples.append(generate(either, inputs, do_sample=True, num_return_sequences=2))
    assert torch.equal(*samples)


# These make the decoder's inputs from the encoder's where none are given.
REPEATING_THE_SOURCE = {"bart", "mbart", "bigbird_pegasus", "plbart", "mvp", "led", "fsmt"}


@pytest.mark.capability("same as the base")
@over_families
@torch.no_grad()
def test_without_decoder_inputs_it_does_as_the_base(family):
    base, inputs = tiny_base(family), tiny_inputs(family)
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base))
    if family not in REPEATING_THE_SOURCE:
        for either, message in ((base, ""), (model, "The decoder has nothing to read")):
            with pytest.raises((TypeError, ValueError)) as refused:
                either(**inputs)
            assert message in str(refused.value)
        return
    expected = base(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-3, rtol=0)
    latents = model.encode(**inputs)
    torch.testing.assert_close(model(**inputs, encoder_outputs=latents).logits, expected, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="The decoder has nothing to read"):
        model(encoder_outputs=latents)


@pytest.mark.capability("same as the base")
@over_families
@torch.no_grad()
def test_a_padded_batch_is_its_rows_one_by_one(family):
    if family == "moonshine":
        pytest.skip(TIME_NORM)
    model, inputs, tokens = wrap(family, **NONTRIVIAL), tiny_inputs(family), decoder_inputs()
    together = model(**inputs, decoder_input_ids=tokens)
    generated = generate(model, inputs)
    for row in range(3):
        alone = model(**row_of(inputs, row), decoder_input_ids=tokens[row : row + 1])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-3, rtol=0)
        for kl in ("kl_gaussian", "kl_dirichlet"):
            torch.testing.assert_close(together[kl][row], alone[kl][0], atol=1e-4, rtol=1e-4)
        assert together.latents.num_vectors[row] == alone.latents.num_vectors[0]
        tokens_alone = generate(model, row_of(inputs, row))[0]
        assert torch.equal(generated[row, : len(tokens_alone)], tokens_alone)
        assert (generated[row, len(tokens_alone) :] == PAD).all()


# ------------------------------------------------------------------------------------ 2. the definition
def projections(module: DenoisingCrossAttention) -> dict:
    """Matrices ``(H, E, P)`` and biases ``(H, E)`` of keys and values as functions: what they do to a basis."""
    row, width = module.nvib_spec, module.nvib_width
    head_dim = getattr(module, row.head_dim)
    basis = torch.cat([torch.zeros(1, width), torch.eye(width)])[None].double()
    if row.key_value:
        key, value = getattr(module, row.key_value)(basis)[0].chunk(2, dim=-1)
    else:
        key, value = (getattr(module, name)(basis)[0] for name in (row.key, row.value))
    result = {}
    for name, image in (("key", key), ("value", value)):
        bias, matrix = image[0], image[1:] - image[0]
        result[f"{name}_weight"] = matrix.T.unflatten(0, (-1, head_dim))
        result[f"{name}_bias"] = bias.unflatten(0, (-1, head_dim))
    return result


@pytest.mark.capability("definition in float64")
@pytest.mark.parametrize("form", ["training", "evaluation", "exact"])
@over_families
@torch.no_grad()
def test_each_layer_is_denoising_attention_by_definition(family, form):
    model = wrap(family, evaluation="mixture", exact_attention=form == "exact").double()
    modules = [module for module in model.modules() if isinstance(module, DenoisingCrossAttention)]
    assert len(modules) == 2
    batch, length, num_vectors, width = 2, 3, 5, modules[0].nvib_width
    mu = torch.randn(batch, num_vectors, width).double()
    logvar = torch.randn(batch, num_vectors, width).double() - 1
    log_pi = torch.randn(batch, num_vectors).double().log_softmax(-1)
    log_pi[1, 3:] = float("-inf")
    if form == "training":
        memory = attended_points(mu, log_pi, model.scale)
        logvar = torch.full_like(logvar, float("-inf"))
    else:
        memory = attended_mixture(mu, logvar, log_pi, model.scale)

    for module in modules:
        row = module.nvib_spec
        query_projection = getattr(module, row.query)
        hidden_states = torch.randn(batch, length, width if row.key_value else query_projection.in_features).double()
        given, packed = hidden_states, pack(memory)
        if row.time_major:
            given, packed = given.transpose(0, 1), packed.transpose(0, 1)
        output = module(**{row.hidden_states: given, row.memory: packed})[row.returns.index("output")]

        head_dim = getattr(module, row.head_dim)
        query = query_projection(hidden_states).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        matrices = projections(module)
        groups = query.shape[1] // len(matrices["key_weight"])
        matrices = {name: value.repeat_interleave(groups, dim=0) for name, value in matrices.items()}
        expected = naive_denoising_attention(
            query,
            mu,
            logvar,
            log_pi,
            scale=model.scale,
            exact=form == "exact",
            softcap=getattr(module, row.softcap) if row.softcap else None,
            **matrices,
        )
        expected = expected.transpose(1, 2).flatten(2)
        if row.output is not None:
            expected = getattr(module, row.output)(expected)
        torch.testing.assert_close(output.transpose(0, 1) if row.time_major else output, expected)


@pytest.mark.capability("training")
@over_families
@torch.no_grad()
def test_dropout_works_in_training_alone(family):
    model = wrap(family)
    for module in model.modules():
        if not isinstance(module, DenoisingCrossAttention):
            continue
        row, width = module.nvib_spec, module.nvib_width
        hidden_states = torch.randn(2, 3, width if row.key_value else getattr(module, row.query).in_features)
        mu, logvar = torch.randn(2, 2, 5, width)
        packed = pack(attended_mixture(mu, logvar, torch.zeros(2, 5), model.scale))
        if row.time_major:
            hidden_states, packed = hidden_states.transpose(0, 1), packed.transpose(0, 1)

        def output(module=module, row=row, given=hidden_states, packed=packed):
            return module(**{row.hidden_states: given, row.memory: packed})[row.returns.index("output")]

        def set_dropout(name: str, p: float, module=module) -> None:
            if isinstance(getattr(module, name), nn.Dropout):
                getattr(module, name).p = p
            else:
                assert isinstance(getattr(module, name), float)
                setattr(module, name, p)

        for name in filter(None, (row.dropout, row.output_dropout)):
            set_dropout(name, 0.5)
            module.eval()
            assert torch.equal(output(), output())
            module.train()
            assert not torch.equal(output(), output())
            if name == row.output_dropout:
                assert (output() == 0).any()
            set_dropout(name, 0.0)


# ------------------------------------------------------------------------------------ 3. save and load
@pytest.mark.capability("save and load")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@over_families
@torch.no_grad()
def test_save_and_load(family, tied, tmp_path):
    base = tiny_base(family, tie_word_embeddings=tied)
    model = NvibForConditionalGeneration.from_base_pretrained(base, **NONTRIVIAL)
    inputs, tokens = tiny_inputs(family), decoder_inputs()
    model.save_pretrained(tmp_path / "drawn")
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path / "drawn")
    assert type(loaded.base) is type(base)
    logits = model(**inputs, decoder_input_ids=tokens).logits
    assert torch.equal(loaded(**inputs, decoder_input_ids=tokens).logits, logits)

    # Each parameter gets a value of its own; tied ones are one.
    groups = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter) and value.requires_grad:
            groups.setdefault(id(value), []).append(name)
            value.fill_(list(groups).index(id(value)) + 1)
    model.save_pretrained(tmp_path / "filled")
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path / "filled").state_dict(keep_vars=True)
    assert loaded.keys() == model.state_dict().keys()
    for value, names in enumerate(groups.values(), start=1):
        assert len({id(loaded[name]) for name in names}) == 1
        for name in names:
            assert (loaded[name] == value).all(), name


# ------------------------------------------------------------------------------------ 4. generation
@pytest.mark.capability("generate")
@over_families
@torch.no_grad()
def test_generation_with_and_without_a_cache(family):
    base, inputs = tiny_base(family), tiny_inputs(family)
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), **NONTRIVIAL)

    def with_and_without(either: nn.Module, settings: dict) -> list[torch.Tensor]:
        generated = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            generated.append(generate(either, inputs, use_cache=use_cache, **settings))
        return generated

    several = {"num_return_sequences": 2}
    faults = 0
    for settings in ({}, {"num_beams": 3} | several, {"do_sample": True} | several):
        if not torch.equal(*with_and_without(base, settings)):
            faults += 1
            continue
        cached, uncached = with_and_without(model, settings)
        assert torch.equal(cached, uncached)
        assert len(cached) == 3 * settings.get("num_return_sequences", 1)
    if faults:
        skip_for_the_base(family, "without a cache it generates something else")


@pytest.mark.capability("static cache")
@over_families
@torch.no_grad()
def test_generation_with_a_static_cache(family):
    base, inputs = tiny_base(family), tiny_inputs(family)
    static = {"cache_implementation": "static"}
    try:
        expected = generate(base, inputs, **static)
    except (AssertionError, RuntimeError):
        skip_for_the_base(family, "a static cache raises an error")
    base_is_right = torch.equal(expected, generate(base, inputs))
    fresh = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base))
    assert torch.equal(generate(fresh, inputs, **static), expected)
    if not base_is_right:
        skip_for_the_base(family, "with a static cache it generates something else")
    model = wrap(family, **NONTRIVIAL)
    for seed in range(2):  # the second reuses the cache of the first, with other weights
        inputs = tiny_inputs(family, seed=seed)
        assert torch.equal(generate(model, inputs, **static), generate(model, inputs))
        for module in model.modules():
            if isinstance(module, DenoisingCrossAttention):
                row = module.nvib_spec
                getattr(module, row.value or row.key_value).weight.mul_(0.5)


@pytest.mark.capability("assisted decoding")
@over_families
@torch.no_grad()
def test_assisted_decoding(family):
    base, inputs = tiny_base(family), row_of(tiny_inputs(family), 0)
    try:
        generate(base, inputs, assistant_model=tiny_base(family, seed=1))
    except (AssertionError, RuntimeError, ValueError):
        skip_for_the_base(family, "assisted decoding raises an error")
    model = NvibForConditionalGeneration.from_base_pretrained(base, **NONTRIVIAL)
    for seed in (0, 1):  # an assistant that is right and one that is not
        assistant = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family, seed=seed), **NONTRIVIAL)
        assert torch.equal(generate(model, inputs, assistant_model=assistant), generate(model, inputs))


@pytest.mark.capability("latents")
@over_families
@torch.no_grad()
def test_latents_are_decoded_and_left_as_they_are(family):
    model, inputs = wrap(family, **NONTRIVIAL), tiny_inputs(family)
    latents = model.encode(**inputs)
    settings = {"num_beams": 2}
    expected = generate(model, inputs, **settings)
    before = copy.deepcopy(latents)
    for _ in range(2):
        assert torch.equal(generate(model, {"encoder_outputs": latents}, **settings), expected)
    assert latents.keys() == before.keys()
    assert all(torch.equal(latents[name], value) for name, value in before.items())
    logits = model(**inputs, decoder_input_ids=decoder_inputs()).logits
    torch.testing.assert_close(model(encoder_outputs=latents, decoder_input_ids=decoder_inputs()).logits, logits)

    sampled = model.sample_latents(3, [4, 1, 6])
    between = model.interpolate_latents(latents, sampled, 0.5)
    for given in (sampled, between, model.encode(**inputs, sample=True)):
        assert isinstance(given, NvibLatents)
        generated = generate(model, {"encoder_outputs": given})
        if family not in FAULTS["without a cache it generates something else"]:
            assert torch.equal(generate(model, {"encoder_outputs": given}, use_cache=False), generated)
    at_first = model.interpolate_latents(latents, sampled, 0.0)
    assert torch.equal(generate(model, {"encoder_outputs": at_first}, **settings), expected)


@pytest.mark.capability("generate")
@over_families
@torch.no_grad()
def test_attention_weights_are_a_distribution_over_the_latent(family):
    model, inputs = wrap(family, **NONTRIVIAL), tiny_inputs(family)
    expected = model(**inputs, decoder_input_ids=decoder_inputs()).logits
    model.set_attn_implementation("eager")
    output = model(**inputs, decoder_input_ids=decoder_inputs(), output_attentions=True)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    assert len(output.cross_attentions) == 2
    visible = output.latents.log_pi > float("-inf")
    for weights in output.cross_attentions:
        assert weights.shape[:2] == (3, 4)
        assert weights.shape[2] == (18 if family == "prophetnet" else 6)  # with its predicting streams
        assert weights.shape[3] == visible.shape[1]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert not weights.masked_select(~visible[:, None, None]).any()


# ------------------------------------------------------------------------------------ 5. training
def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def key_bias(name: str) -> bool:
    """Attention does not see a bias of all its keys: the gradient is rounding."""
    return name.endswith((".k_proj.bias", ".key.bias", ".key_proj.bias"))


@pytest.mark.capability("training")
@over_families
def test_a_training_step_moves_every_parameter(family):
    inputs, labels = tiny_inputs(family), tiny_labels(family)
    base = tiny_base(family).train()
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family), kappa=2, **NONTRIVIAL).train()
    tokens = model.prepare_decoder_input_ids_from_labels(labels)
    logits = base(**inputs, decoder_input_ids=tokens, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    moved_by_base = {f"base.{name}" for name, gradient in gradients_of(base).items() if gradient.abs().max() > 1e-7}
    assert len(moved_by_base) > 30

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    output = model(**inputs, labels=labels)
    output.loss.backward()
    gradients = gradients_of(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    nvib = {f"nvib.{name}" for name, _ in model.nvib.named_parameters()}
    assert nvib <= moved
    assert {name for name in moved_by_base if not key_bias(name)} <= moved


# ------------------------------------------------------------------------------------ 6. learned dropping
@torch.no_grad()
def deciding(family: str, **settings) -> NvibForConditionalGeneration:
    """A model with keep logits of either sign, none close to 0."""
    model = wrap(family, **settings, **NONTRIVIAL)
    layer = model.nvib
    layer.keep_weight.normal_(generator=torch.Generator().manual_seed(11))
    states, mask = run_encoder(model.base, tiny_inputs(family))
    states = states.last_hidden_state
    if mask is not None and mask.shape[1] != states.shape[1]:
        mask = shortened_mask(model.base.get_encoder(), mask, states.shape[1])
    posterior = layer.posterior(states, None if mask is None else mask == 0)
    logits = posterior.keep_logit[:, 1:][posterior.mask[:, 1:]].sort().values
    middle = logits[len(logits) // 4 : -(len(logits) // 4)]
    widest = middle.diff().argmax()
    layer.keep_bias -= middle[widest : widest + 2].mean()
    for parameter in (layer.keep_weight, layer.keep_bias):
        parameter /= middle.diff().max()
    return model


@pytest.mark.capability("learned dropping")
@over_families
@torch.no_grad()
def test_learned_dropping_decodes_what_it_keeps(family, tmp_path):
    base, inputs, tokens = tiny_base(family), tiny_inputs(family), decoder_inputs()
    fresh = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), dropping="relaxed")
    expected = base(**inputs, decoder_input_ids=tokens).logits
    torch.testing.assert_close(fresh(**inputs, decoder_input_ids=tokens).logits, expected, atol=1e-3, rtol=0)
    model = deciding(family, dropping="relaxed")
    latents = model.encode(**inputs)
    dropped = (latents.log_pi == -float("inf")) & latents.attention_mask
    assert dropped.any() and (latents.num_vectors > 0).any()
    torch.testing.assert_close(latents.num_vectors, (latents.attention_mask & ~dropped).sum(-1) - 1.0)
    together = model(**inputs, decoder_input_ids=tokens)
    compact = model(encoder_outputs=latents.compact(), decoder_input_ids=tokens)
    torch.testing.assert_close(compact.logits, together.logits, atol=1e-4, rtol=0)
    generated = generate(model, inputs)
    if family not in FAULTS["without a cache it generates something else"]:
        assert torch.equal(generate(model, inputs, use_cache=False), generated)
    if family != "moonshine":  # TIME_NORM
        for row in range(3):
            alone = model(**row_of(inputs, row), decoder_input_ids=tokens[row : row + 1])
            torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-3, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, inputs), generated)


@pytest.mark.capability("gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@over_families
def test_gradient_checkpointing(family, use_reentrant):
    inputs, labels = tiny_inputs(family), tiny_labels(family)
    if not tiny_base(family).supports_gradient_checkpointing:
        pytest.skip("the base model has none")
    if "inputs_embeds" in inputs:
        inputs["inputs_embeds"].requires_grad_()  # the reentrant kind needs one input that does

    def step(checkpointing: bool) -> tuple[dict, int]:
        model = wrap(family, **NONTRIVIAL).train()
        if checkpointing:
            checkpoint_layers(model, {"use_reentrant": use_reentrant})
        calls = []
        for module in model.modules():
            if isinstance(module, DenoisingCrossAttention):
                module.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(11)
        model(**inputs, labels=labels).loss.backward()
        return gradients_of(model), len(calls)

    (expected, calls), (gradients, calls_with_checkpointing) = step(False), step(True)
    assert (calls, calls_with_checkpointing) == (2, 4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------ 6. batch and padding
@pytest.mark.capability("batch order and padding")
@over_families
@torch.no_grad()
def test_permuting_the_batch_permutes_the_output(family):
    model, inputs, tokens = wrap(family, **NONTRIVIAL), tiny_inputs(family), decoder_inputs()
    order = torch.tensor([2, 0, 1])
    logits = model(**inputs, decoder_input_ids=tokens).logits
    permuted = {name: value[order] for name, value in inputs.items()}
    torch.testing.assert_close(
        model(**permuted, decoder_input_ids=tokens[order]).logits, logits[order], atol=1e-4, rtol=1e-4
    )
    assert torch.equal(generate(model, permuted), generate(model, inputs)[order])


@pytest.mark.capability("batch order and padding")
@over_families
@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(family):
    inputs, tokens = tiny_inputs(family), decoder_inputs()
    if "attention_mask" not in inputs:
        pytest.skip(FIXED_LENGTH)
    if family == "moonshine":
        pytest.skip(TIME_NORM)
    model = wrap(family, **NONTRIVIAL)
    name = next(name for name in inputs if name in ("input_ids", "inputs_embeds", "input_features", "input_values"))
    mask = inputs["attention_mask"].bool()
    other = tiny_inputs(family, batch=1, seed=9)[name]  # as long as the longest: no padding
    changed = torch.where(mask[..., None] if other.dim() == 3 else mask, inputs[name], other)
    assert not torch.equal(changed, inputs[name])
    output = model(**inputs, decoder_input_ids=tokens)
    other = model(**{**inputs, name: changed}, decoder_input_ids=tokens)
    for field in ("logits", "kl_gaussian", "kl_dirichlet"):
        torch.testing.assert_close(other[field], output[field], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------ the decoder's positions
@pytest.mark.capability("training")
@over_families
@torch.no_grad()
def test_labels_are_refused_where_the_decoder_has_no_position(family):
    base, inputs = tiny_base(family), tiny_inputs(family)
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base))

    def labels(length: int) -> torch.Tensor:
        return torch.full((3, length), EOS)

    limit = model._decoder_positions
    if limit is None:
        assert model(**inputs, labels=labels(80)).loss.isfinite()
        return
    assert model(**inputs, labels=labels(limit)).loss.isfinite()
    with pytest.raises(ValueError, match=f"labels are {limit + 1} tokens long, but the decoder has {limit} positions"):
        model(**inputs, labels=labels(limit + 1))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        base(**inputs, decoder_input_ids=labels(limit + 1))


@over_families
def test_the_class_of_the_base_follows_from_its_configuration(family):
    """So that a base checkpoint can be wrapped by its name."""
    base = tiny_base(family)
    assert base_class(base.config) is type(base)


def test_the_families_are_all_in_the_table_of_cross_attention():
    """A row that no family uses would be untested."""
    used = {type(module).__name__ for family in FAMILIES for module, _ in find_cross_attention(tiny_base(family))}
    rows = {name.rsplit(".", 1)[-1] for kind, name in specs._REGISTRY if kind == "cross"}
    assert rows <= used
