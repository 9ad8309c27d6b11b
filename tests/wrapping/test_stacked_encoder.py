"""Encoder layers that hand on what they dropped, and their pseudo-counts, to the layers above and to the decoder."""

import copy

import pytest
import torch
from tiny_models import checkpoint_layers, tiny_base, tiny_inputs, tiny_labels
from torch.nn import functional as F

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.wrapping.self_attention import current_pass
from nvib_hf.wrapping.stacked_encoder import encoder_layer

FAMILIES = ["bart", "t5", "umt5", "whisper", "bert2gpt2"]
THRESHOLD = 1.0


def stacked(family="bart", layers="all", **settings):
    """A tiny model in ``eval()`` each of whose encoder layers drops about a third of what the ones below left."""
    settings = {"alpha_threshold": THRESHOLD, "tau_sigma": 0.3, **settings}
    attentions = {"cross": "all", "encoder": layers}
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family), attentions=attentions, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.nvib_layers().values():
            layer.alpha_quadratic.zero_()
            layer.alpha_weight.copy_(torch.randn(layer.size_in, generator=generator) / layer.size_in**0.5)
            layer.alpha_bias.fill_(0.4)
    return model.eval()


def decoder_inputs(family):
    return tiny_labels(family).clamp(min=0)


def seen(model, inputs, **kwargs):
    """What each NVIB layer of the encoder was given, by its name, in a pass that shortens nothing."""
    given, hooks = {}, []
    for name, layer in model.nvib_layers().items():
        hooks.append(layer.register_forward_pre_hook(lambda m, args, name=name: given.__setitem__(name, args[0])))
    with torch.no_grad():
        output = model(**inputs, **kwargs)
    for hook in hooks:
        hook.remove()
    return given, output


# ------------------------------------------------------------------------------------------------- what is dropped
@pytest.mark.parametrize("settings", [{}, {"accumulate_alpha": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_taken_out_of_the_sequence_is_what_is_hidden(family, settings):
    """Generation shortens the sequence from layer to layer, ``encode`` hides what is dropped: the same decoder."""
    model, inputs = stacked(family, **settings), tiny_inputs(family)
    with torch.no_grad():
        hidden = model.encode(**inputs)
        shortened, _ = model._encode_alone(inputs, decode_only=True)
        logits = [
            model(encoder_outputs=x, decoder_input_ids=decoder_inputs(family)).logits for x in (hidden, shortened)
        ]
    assert shortened.z.shape[1] < hidden.z.shape[1]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


# Encoders that downsample, and one whose router reads the mask, beside the usual ones.
@pytest.mark.parametrize("evaluation", ["means", "mixture"])
@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2", "speech_to_text", "wav2vec2_to_bert", "nllb_moe"])
def test_generation_from_inputs_and_from_latents(family, evaluation):
    model, inputs = stacked(family, evaluation=evaluation), tiny_inputs(family)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    expected = model.generate(encoder_outputs=model.encode(**inputs), **options)
    assert model.generate(**inputs, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_what_a_layer_drops_reaches_nothing_above_it(family, training):
    """Another vector in the place of each that the lowest layer dropped: the decoder cannot tell."""
    model, inputs = stacked(family), tiny_inputs(family)
    if training:
        model.train()
    lowest = encoder_layer(model, model._self_attention_names["encoder.0"])
    kept = []

    def replace(layer, args, output):
        attention = model._self_attentions()["encoder.0"]
        handed_on = current_pass().handed_on
        assert handed_on.by is attention
        kept.append(handed_on.keep)
        states = output if isinstance(output, torch.Tensor) else output[0]
        noise = 10 * torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
        states = torch.where(handed_on.keep[..., None], states, noise)
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])

    def logits():
        generator = torch.Generator().manual_seed(3)
        return model(**inputs, labels=tiny_labels(family), generator=generator).logits

    with torch.no_grad():
        expected = logits()
        hook = model.get_submodule(lowest).register_forward_hook(replace)
        actual = logits()
        hook.remove()
    padding = inputs["attention_mask"] == 0
    assert (~kept[0] & ~padding).any()
    # Training draws for every position, of another mean here: of what is left alone, the noise is the same.
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [False, True])
def test_pseudo_counts_and_the_share_that_is_left_follow_the_definition(accumulate):
    model, inputs = stacked(accumulate_alpha=accumulate), tiny_inputs("bart")
    given, output = seen(model, inputs, labels=tiny_labels("bart"))
    mask = inputs["attention_mask"].bool()
    left, below = mask, 0.0
    for name in ("encoder.0", "encoder.1", "cross"):
        layer = model.nvib_layers()[name]
        log_alpha = given[name] @ layer.alpha_weight + layer.alpha_bias
        if accumulate and name != "cross":
            below = log_alpha = log_alpha + below
        left = left & (log_alpha > 0)
        expected = left.sum(-1) / mask.sum(-1)
        torch.testing.assert_close(output.layer_prop_vectors[name], expected)
    assert (expected < 0.9).any()
    torch.testing.assert_close(output.prop_vectors, expected)
    torch.testing.assert_close(output.num_vectors, left.sum(-1).float())


def test_a_layer_pays_for_what_is_left_alone():
    model, inputs = stacked(), tiny_inputs("bart")
    _, output = seen(model, inputs, labels=tiny_labels("bart"))
    given, _ = seen(model, inputs, labels=tiny_labels("bart"))
    layers, mask = model.nvib_layers(), inputs["attention_mask"].bool()
    left = mask & (given["encoder.0"] @ layers["encoder.0"].alpha_weight + layers["encoder.0"].alpha_bias > 0)
    layer = layers["encoder.1"]
    posterior = layer.posterior(given["encoder.1"], ~left)
    gaussian, dirichlet = layer.kl(posterior, posterior, 1)
    torch.testing.assert_close(output.layer_kl_gaussian["encoder.1"], gaussian)
    torch.testing.assert_close(output.layer_kl_dirichlet["encoder.1"], dirichlet)


def test_everything_may_be_dropped():
    model = stacked()
    with torch.no_grad():
        model.nvib_layers()["encoder.0"].alpha_bias.fill_(-50.0)
        latents = model.encode(**tiny_inputs("bart"))
    assert latents.num_vectors.tolist() == [0, 0, 0]
    tokens = model.generate(**tiny_inputs("bart"), max_new_tokens=4, do_sample=False)
    expected = model.generate(encoder_outputs=latents, max_new_tokens=4, do_sample=False)
    assert tokens.tolist() == expected.tolist()


# --------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("settings", [{}, {"accumulate_alpha": True}])
def test_all_layers_learn(settings):
    model = stacked(lambda_gaussian=0.1, lambda_dirichlet=0.1, lambda_vectors=0.1, **settings).train()
    model(**tiny_inputs("bart"), labels=tiny_labels("bart")).loss.backward()
    for name, layer in model.nvib_layers().items():
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, parameter_name)


def test_a_fresh_stack_computes_the_base():
    base = tiny_base("bart")
    inputs = {**tiny_inputs("bart"), "decoder_input_ids": decoder_inputs("bart")}
    with torch.no_grad():
        expected = base(**inputs).logits
        model = NvibForConditionalGeneration.from_base_pretrained(
            base, attentions=["cross", "encoder"], alpha_threshold=0.1
        ).eval()
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", ["all", [1]])
def test_layer_drop_skips_layers(layers):
    """What the layers that are skipped would have dropped is not dropped."""
    model = stacked("m2m_100", layers).train()
    inputs, labels = tiny_inputs("m2m_100"), tiny_labels("m2m_100")
    encoder, dropped = model.get_encoder(), set()
    encoder.layerdrop = 0.5
    torch.manual_seed(0)
    for _ in range(12):
        output = model(**inputs, labels=labels)
        output.loss.backward()
        dropped.add(tuple(name for name in output.layer_prop_vectors or {} if name != "cross"))
    assert len(dropped) == (4 if layers == "all" else 2)
    encoder.layerdrop = 1.0
    model.nvib.dropping_share.zero_()
    assert model(**inputs, labels=labels).prop_vectors.tolist() == [1.0] * len(labels)


def test_gradient_checkpointing_is_refused():
    model = stacked().train()
    checkpoint_layers(model, {"use_reentrant": False})
    loss = model(**tiny_inputs("bart"), labels=tiny_labels("bart")).loss
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        loss.backward()


# --------------------------------------------------------------------------------------------------- the model
def test_a_pass_leaves_nothing_behind():
    """The encoder alone does the same whatever ran before, and the model can be copied after it."""
    model, inputs = stacked(), tiny_inputs("bart")
    before = model.get_encoder()(**inputs).last_hidden_state
    model.generate(**inputs, max_new_tokens=3)
    torch.testing.assert_close(model.get_encoder()(**inputs).last_hidden_state, before)
    with pytest.raises(IndexError):  # a word that is not in the vocabulary: it fails before the layers
        model.generate(input_ids=torch.tensor([[10**6]]), max_new_tokens=3)
    torch.testing.assert_close(model.get_encoder()(**inputs).last_hidden_state, before)
    assert before.shape[1] == inputs["input_ids"].shape[1] and before.requires_grad
    copy.deepcopy(model)


def test_a_copy_has_hooks_of_its_own():
    model, inputs = stacked(), tiny_inputs("bart")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.nvib_layers()["encoder.0"].alpha_bias.fill_(-50.0)
    assert twin.generate(**inputs, max_new_tokens=5, do_sample=False).tolist() == expected.tolist()


def test_saved_and_loaded(tmp_path):
    model, inputs = stacked(accumulate_alpha=True), tiny_inputs("bart")
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path).eval()
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert loaded.generate(**inputs, max_new_tokens=5, do_sample=False).tolist() == expected.tolist()


def test_unwrapping_removes_the_hooks():
    base = tiny_base("bart")
    names = set(base.state_dict())
    unwrapped = NvibForConditionalGeneration.from_base_pretrained(
        base, attentions=["cross", "encoder"], alpha_threshold=0.5
    ).unwrap()
    for module in unwrapped.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._forward_hooks_always_called
    assert set(unwrapped.state_dict()) == names
    assert not [name for module in unwrapped.modules() for name in vars(module) if name.startswith("nvib")]


def test_encoder_states_in_place_of_inputs_are_refused():
    model, inputs = stacked(), tiny_inputs("bart")
    states = model(**inputs, labels=tiny_labels("bart")).encoder_last_hidden_state
    with pytest.raises(ValueError, match="what this encoder's layers dropped"):
        model.encode(encoder_last_hidden_state=states, attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize(
    ("attentions", "settings", "message"),
    [
        (
            {"cross": "all", "encoder": [0]},
            {"alpha_threshold": 0.1},
            r"what it drops, merges or accumulates on to all layers.*\[0, 1\]",
        ),
        (
            {"cross": "all", "encoder": [0]},
            {"accumulate_alpha": True},
            "what it drops, merges or accumulates on to all layers",
        ),
        (["cross", "encoder"], {"dropping": "relaxed"}, "Set dropping='threshold' and an alpha_threshold"),
        (["cross", "encoder"], {"accumulate_alpha": True, "alpha_activation": "relu"}, "alpha_activation='exp'"),
    ],
)
def test_what_a_stack_cannot_do_is_refused(attentions, settings, message):
    with pytest.raises(ValueError, match=message):
        NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), attentions=attentions, **settings)


def test_an_adapter_that_shortens_after_the_layers_is_refused():
    """When wrapping, for it would refuse every forward; where nothing is dropped it works."""
    with pytest.raises(ValueError, match=r"Wav2Vec2Model has an adapter .*add_adapter=False"):
        stacked("wav2vec2_to_mbart")
    inputs = tiny_inputs("wav2vec2_to_mbart")
    NvibForConditionalGeneration.from_base_pretrained(
        tiny_base("wav2vec2_to_mbart"), attentions=["cross", "encoder"]
    ).encode(**inputs)


def test_padding_is_never_seen():
    model, inputs = stacked(), tiny_inputs("bart")
    longer = {name: F.pad(value, (0, 3)) for name, value in inputs.items()}
    with torch.no_grad():
        logits = [model(**x, decoder_input_ids=decoder_inputs("bart")).logits for x in (inputs, longer)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_a_generator_determines_the_draws_of_the_encoder_s_layers():
    model, inputs = stacked().train(), tiny_inputs("bart")
    draws = [model.encode(**inputs, generator=torch.Generator().manual_seed(seed)).z for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
