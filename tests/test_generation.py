"""Generation from inputs and from latents, with every strategy."""

import copy

import pytest
import torch
from tiny_models import tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib
from transformers import GenerationConfig

from nvib_hf import NvibLatents, concatenate_latents
from nvib_hf.versions import CACHE

FAMILIES = ["bart", "t5", "bert2gpt2"]
LENGTH = {"min_new_tokens": 6, "max_new_tokens": 6}
STRATEGIES = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam_sampling": {"do_sample": True, "num_beams": 2},
    "static_cache": {"do_sample": False, "cache_implementation": "static"},
    "uncached": {"do_sample": False, "use_cache": False},
    "uncached_beam": {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
    "static_beam": {"num_beams": 3, "num_return_sequences": 2, "cache_implementation": "static"},
}


def generate(model, strategy="greedy", **inputs):
    """Tokens and the scores of each step: greedy tokens alone may agree by chance."""
    torch.manual_seed(0)
    settings = {**LENGTH, **STRATEGIES[strategy], "return_dict_in_generate": True, "output_logits": True}
    outputs = model.generate(**inputs, **settings)
    return outputs.sequences, torch.stack(outputs.logits)


def assert_same(first, second):
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "whisper"])
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_encoding_first_tells_how_many_vectors_are_read(family, strategy):
    """As documented. Attention has a weight for each vector that is read, and one for the prior's."""
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    latents = model.encode(**inputs, merge_share=0.4)
    assert_same(
        generate(model, strategy, encoder_outputs=latents), generate(model, strategy, **inputs, merge_share=0.4)
    )
    settings = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 2}
    model.set_attn_implementation("eager")
    read = model.generate(**inputs, **settings, merge_share=0.4).cross_attentions[0][0] > 0
    assert torch.equal(read.any(1).any(1).sum(-1) - 1, latents.num_vectors.long())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_generate_what_their_inputs_do_and_are_left_as_they_are(family, strategy):
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    latents = model.encode(**inputs)
    before = {name: value.clone() for name, value in latents.items()}
    from_inputs = generate(model, strategy, **inputs)
    assert_same(generate(model, strategy, encoder_outputs=latents), from_inputs)
    assert list(latents.keys()) == list(before)
    for name, value in before.items():
        assert torch.equal(latents[name], value), name
    assert_same(generate(model, strategy, encoder_outputs=latents), from_inputs)  # and again


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_and_static_steps_are_the_uncached_ones(family):
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    expected = generate(model, "uncached", **inputs)
    assert_same(generate(model, "greedy", **inputs), expected)
    assert_same(generate(model, "static_cache", **inputs), expected)
    assert_same(generate(model, "beam", **inputs), generate(model, "uncached_beam", **inputs))
    assert_same(generate(model, "beam", **inputs), generate(model, "static_beam", **inputs))


def as_points(model, latents):
    """The means as a sample, by way of the training form: no variance, but for what it takes off the weights."""
    log_pi = (latents.log_pi - 0.5 * model.scale * latents.logvar.exp().sum(-1)).log_softmax(-1)
    return NvibLatents(z=latents.z, log_pi=log_pi, attention_mask=latents.attention_mask)


@pytest.mark.parametrize("strategy", ["greedy", "beam", "static_cache", "uncached"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_by_the_means_decodes_points(family, strategy):
    inputs, settings = tiny_inputs(family), {"tau_sigma": 1.5}
    model = tiny_nvib(family, evaluation="means", **settings)
    latents = model.encode(**inputs)
    expected = generate(model, strategy, encoder_outputs=as_points(model, latents))
    together = concatenate_latents([latents[:1], latents[1:]])
    for given in (inputs, {"encoder_outputs": latents}, {"encoder_outputs": together}):
        assert_same(generate(model, strategy, **given), expected)
    mixture = tiny_nvib(family, evaluation="mixture", **settings)
    by_mixture = generate(mixture, strategy, **inputs)
    assert (by_mixture[1][0] - expected[1][0]).abs().max() > 0.01
    assert_same(generate(mixture, strategy, encoder_outputs=mixture.encode(**inputs)), by_mixture)
    without_variance = NvibLatents(**{**latents, "logvar": torch.full_like(latents.logvar, float("-inf"))})
    assert_same(*(generate(either, strategy, encoder_outputs=without_variance) for either in (model, mixture)))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy_search_by_forward(family):
    """Step by step with ``forward``, which knows nothing of caches and of ``generate``."""
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    sequences, scores = generate(model, **inputs)
    tokens = sequences[:, :1]
    with torch.no_grad():
        for step in range(6):
            step_logits = model(**inputs, decoder_input_ids=tokens).logits[:, -1]
            torch.testing.assert_close(scores[step], step_logits, rtol=1e-4, atol=1e-4)
            tokens = torch.cat([tokens, sequences[:, step + 1 : step + 2]], dim=1)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_one_by_one(family, strategy):
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    together, _ = generate(model, strategy, **inputs)
    latents = model.encode(**inputs)
    alone, by_row = [], []
    for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
        alone.append(generate(model, strategy, input_ids=inputs["input_ids"][row : row + 1, :length])[0])
        by_row.append(generate(model, strategy, encoder_outputs=latents[row])[0])
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(torch.cat(by_row), together)


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sampling"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_samples_and_interpolations_in_one_batch(family, strategy):
    model = tiny_nvib(family)
    texts = model.encode(**tiny_inputs(family))
    drawn = model.sample_latents(2, [3, 5], generator=torch.Generator().manual_seed(3))
    between = model.interpolate_latents(texts[:2], drawn, 0.4)
    parts = [texts, drawn, between]
    sequences, scores = generate(model, strategy, encoder_outputs=concatenate_latents(parts))
    assert sequences.shape[0] == 7 * STRATEGIES[strategy].get("num_return_sequences", 1)
    assert scores.isfinite().all()
    if strategy != "sampling":
        alone = torch.cat([generate(model, strategy, encoder_outputs=part)[0] for part in parts])
        assert torch.equal(sequences, alone)


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_interpolation_ends_generate_the_ends(strategy, weight):
    model = tiny_nvib()
    ends = [model.encode(**tiny_inputs("bart")), model.encode(**tiny_inputs("bart", seed=1)).compact()]
    between = model.interpolate_latents(*ends, weight)
    assert_same(
        generate(model, strategy, encoder_outputs=between), generate(model, strategy, encoder_outputs=ends[weight])
    )


def test_generation_in_training_mode_decodes_a_draw():
    model, inputs = tiny_nvib().train(), tiny_inputs("bart")
    _, first = generate(model, **inputs)
    torch.manual_seed(0)
    latents = model.encode(**inputs, sample=True)
    assert_same(generate(model, encoder_outputs=latents), generate(model, **inputs))
    assert not torch.allclose(first, generate(model.eval(), **inputs)[1])


def test_one_encoding_is_decoded_many_times():
    """What ``generate`` returned the encoder's outputs in is not what it repeats for its beams."""
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    packed = model._packed_encoder_outputs(model.encode(**inputs))
    shape = packed.last_hidden_state.shape
    first = generate(model, "beam", encoder_outputs=packed)
    assert packed.last_hidden_state.shape == shape
    assert_same(generate(model, "beam", encoder_outputs=packed), first)


def test_generated_attention_spans_the_latent():
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    model.set_attn_implementation("eager")
    settings = {**LENGTH, "return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    outputs = model.generate(**inputs, **settings)
    assert outputs.cross_attentions[0][0].shape == (3, 4, 1, 10)
    assert len(outputs.encoder_hidden_states) == 3 and outputs.encoder_attentions[0].shape == (3, 4, 9, 9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_keys_in_half_precision_are_those_of_one_pass(implementation):
    """Steps read keys to which the bias was appended once; one pass over all tokens appends it by itself."""
    model, inputs = tiny_nvib().bfloat16(), tiny_inputs("bart")
    model.set_attn_implementation(implementation)
    packed = model._packed_encoder_outputs(model.encode(**inputs))
    tokens, cache, logits = tiny_labels("bart").clamp(min=1), None, []
    with torch.no_grad():
        for token in tokens.T:
            step = model(decoder_input_ids=token[:, None], encoder_outputs=packed, use_cache=True, **{CACHE: cache})
            cache = step[CACHE]
            logits.append(step.logits)
        expected = model(decoder_input_ids=tokens, encoder_outputs=packed, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0.05, atol=0.05)


def test_vectors_that_a_threshold_drops_are_not_cached():
    model, inputs = tiny_nvib(alpha_threshold=1.0), tiny_inputs("bart")
    log_alpha = model.encode(**inputs).log_alpha.detach()
    model.nvib.alpha_threshold = float(log_alpha[log_alpha > -float("inf")].quantile(0.7).exp())
    latents = model.encode(**inputs)
    kept = int((latents.log_pi > -float("inf")).sum(-1).max())
    assert kept < latents.z.shape[1]
    outputs = model.generate(**inputs, **LENGTH, return_dict_in_generate=True)
    assert outputs[CACHE].cross_attention_cache.layers[0].keys.shape[2] == kept
    with torch.no_grad():  # against all vectors, by forward
        scores = model(**inputs, decoder_input_ids=outputs.sequences[:, :-1]).logits
    assert torch.equal(scores.argmax(-1)[:, 0], outputs.sequences[:, 1])


@pytest.mark.parametrize("activation", ["exp", "relu"])
@pytest.mark.parametrize("share", [0.6, 0.8, 1.0])
def test_nothing_is_computed_for_vectors_that_decoding_drops(share, activation):
    """From inputs they are dropped before the projection, from latents after it: the scores are the same."""
    model, inputs = tiny_nvib(alpha_threshold=1.0, alpha_activation=activation), tiny_inputs("bart")
    torch.nn.init.normal_(model.nvib.alpha_weight)
    log_alpha = model.encode(**inputs).log_alpha[:, 1:].detach()
    log_alpha = log_alpha[inputs["attention_mask"].bool()]
    model.nvib.alpha_threshold = float(log_alpha.quantile(share).exp())
    latents, widths = model.encode(**inputs), []
    kept = latents.num_vectors.max()
    assert kept < inputs["attention_mask"].sum(-1).max()
    with_latents = generate(model, encoder_outputs=latents)
    model.nvib.mu_logvar.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    assert_same(generate(model, **inputs), with_latents)
    assert widths == [kept]


def test_a_generation_configuration_and_its_overrides():
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    config = GenerationConfig(**LENGTH, num_beams=2, decoder_start_token_id=2, pad_token_id=0, eos_token_id=1)
    expected = model.generate(**inputs, **LENGTH, num_beams=2)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)
    model.generation_config = copy.deepcopy(config)
    assert torch.equal(model.generate(**inputs), expected)
    assert torch.equal(model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"]), expected)


def test_a_prompt_for_the_decoder():
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    prompt = torch.cat([torch.full((3, 1), 2), tiny_labels("bart")[:, :2].clamp(min=3)], dim=1)
    latents = model.encode(**inputs)
    tokens = model.generate(encoder_outputs=latents, decoder_input_ids=prompt, **LENGTH)
    assert torch.equal(tokens[:, :3], prompt)
    with torch.no_grad():
        scores = model(**inputs, decoder_input_ids=prompt).logits[:, -1]
    scores[:, 1] = -float("inf")  # not EOS: min_new_tokens
    assert torch.equal(tokens[:, 3], scores.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, dtype):
    model = tiny_nvib(family)
    reference = model.encode(**tiny_inputs(family))
    model.base.to(dtype)
    model.nvib.mu_logvar.to(dtype)
    with torch.no_grad():  # as generate does: T5's attention takes another kernel, hence rounding, with gradients
        texts = model.encode(**tiny_inputs(family))
    drawn = model.sample_latents(3, 4)
    between = model.interpolate_latents(texts, drawn, 0.5)
    for latents in (texts, drawn, between):
        assert isinstance(latents, NvibLatents)
        assert latents.z.dtype == dtype and latents.log_pi.dtype == torch.float32
        _, scores = generate(model, "beam", encoder_outputs=latents)
        assert scores.isfinite().all()
    torch.testing.assert_close(texts.kl_gaussian, reference.kl_gaussian, rtol=0.01, atol=0.01)
    torch.testing.assert_close(texts.kl_dirichlet, reference.kl_dirichlet, rtol=0.01, atol=0.01)
    assert_same(generate(model, encoder_outputs=texts), generate(model, **tiny_inputs(family)))
