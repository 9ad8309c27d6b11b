"""Own decoding loops: whatever is done to a base's cache is done to what NVIB keeps in it."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, START, VOCAB_SIZE, tiny_base, tiny_inputs
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.versions import CACHE
from nvib_hf.wrapping.base import LatentOutput

NONTRIVIAL = {"tau_alpha": 1.0, "tau_sigma": 0.5}
INSIDE = {"attentions": ["cross", "decoder"]}
# They decode without a cache of their own.
WITHOUT_A_CACHE = {"fsmt", "prophetnet"}
CACHED = [family for family in FAMILIES if family not in WITHOUT_A_CACHE]
SOME = ["bart", "t5", "marian", "bert2gpt2", "whisper", "t5gemma"]
ORDER = torch.tensor([2, 0, 1])

# By name: what is done to a cache, and the same rows of what its tokens and latents were.
CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(ORDER), lambda x: x[ORDER]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, dim=0)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), lambda x: x[[1, 2]]),
    "crop": (lambda cache: cache.crop(-2), lambda x: x),
    "offload": (lambda cache: [layer.offload() for layer in cache.cross_attention_cache.layers], lambda x: x),
    "copy": (copy.deepcopy, lambda x: x),
    "tuples": (lambda cache: EncoderDecoderCache([*cache]), lambda x: x),
}


def tokens_of(batch=3, length=6):
    tokens = torch.randint(START + 1, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(7))
    tokens[:, 0] = START
    return tokens


def wrap(family, **settings):
    return NvibForConditionalGeneration.from_base_pretrained(tiny_base(family), **NONTRIVIAL, **settings).eval()


def assert_steps_go_on(model, family, change, rows):
    """After four tokens and the change, the next two score as in one pass over the rows there are then."""
    tokens = tokens_of()
    packed = model._packed_encoder_outputs(model.encode(**tiny_inputs(family)))[0]
    outputs = model(decoder_input_ids=tokens[:, :4], encoder_outputs=LatentOutput(packed), use_cache=True)
    cache = outputs[CACHE]
    cache = change(cache) if change in (CHANGES["copy"][0], CHANGES["tuples"][0]) else (change(cache), cache)[1]
    past = cache.get_seq_length()
    tokens, latent = rows(tokens), LatentOutput(rows(packed))
    expected = model(decoder_input_ids=tokens, encoder_outputs=latent, use_cache=False).logits
    for step in range(past, 6):
        token = tokens[:, step : step + 1]
        scores = model(decoder_input_ids=token, encoder_outputs=latent, use_cache=True, **{CACHE: cache}).logits
        torch.testing.assert_close(scores[:, 0], expected[:, step], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("evaluation", ["means", "mixture"])
@pytest.mark.parametrize("family", CACHED)
@torch.no_grad()
def test_rows_of_a_cache_that_change_places(family, evaluation):
    assert_steps_go_on(wrap(family, evaluation=evaluation), family, *CHANGES["reorder"])


@pytest.mark.parametrize("evaluation", ["means", "mixture"])
@pytest.mark.parametrize("change, rows", [pair for name, pair in CHANGES.items() if name != "reorder"])
@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_whatever_is_done_to_a_cache(family, change, rows, evaluation):
    assert_steps_go_on(wrap(family, evaluation=evaluation), family, change, rows)


@pytest.mark.parametrize("change, rows", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2"])
@torch.no_grad()
def test_and_with_nvib_in_the_decoder_s_self_attention(family, change, rows):
    assert_steps_go_on(wrap(family, **INSIDE), family, change, rows)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["reorder", "repeat", "select", "tuples"])
@torch.no_grad()
def test_in_half_precision(name, implementation):
    """Where the keys are cached as kernels read them."""
    model, (change, rows) = wrap("bart").bfloat16(), CHANGES[name]
    model.set_attn_implementation(implementation)
    tokens, cache = tokens_of(), None
    packed = model._packed_encoder_outputs(model.encode(**tiny_inputs("bart")))[0]
    start = {"decoder_input_ids": tokens[:, :4], "use_cache": True}
    cache = model(**start, encoder_outputs=LatentOutput(packed))[CACHE]
    changed = change(cache)
    cache = changed if name == "tuples" else cache
    tokens, latent = rows(tokens), LatentOutput(rows(packed))
    expected = model(decoder_input_ids=tokens, encoder_outputs=latent, use_cache=False).logits[:, 4]
    step = {"decoder_input_ids": tokens[:, 4:5], CACHE: cache}
    scores = model(**step, encoder_outputs=latent, use_cache=True).logits[:, 0]
    torch.testing.assert_close(scores, expected, atol=0.1, rtol=0.1)


# A static cache raises an error in the base, or is no longer than a window.
@pytest.mark.parametrize("family", [family for family in CACHED if family not in {"led", "nllb_moe"}])
@torch.no_grad()
def test_a_static_cache_of_the_length_of_the_source(family):
    """It lacks room for the prior's component, which it gets."""
    model, inputs = wrap(family), tiny_inputs(family)
    length = model.encode(**inputs).z.shape[1]
    decoder = model.config.get_text_config(decoder=True)
    for room in (length - 1, length, length + 3):
        cache = EncoderDecoderCache(
            StaticCache(config=decoder, max_cache_len=16), StaticCache(config=decoder, max_cache_len=room)
        )
        settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
        expected = model.generate(**inputs, **settings)
        assert torch.equal(model.generate(**inputs, **settings, **{CACHE: cache}), expected), room


@torch.no_grad()
def test_a_static_cache_that_was_made_too_short_says_so():
    model, inputs = wrap("bart"), tiny_inputs("bart")
    caches = [StaticCache(config=model.base.config, max_cache_len=length) for length in (16, 9)]
    caches[1].early_initialization(3, 4, 16, torch.float32, torch.device("cpu"))
    message = "holds 9 vectors, but the latents have 10.*Make it with max_cache_len=10"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2, **{CACHE: EncoderDecoderCache(*caches)})


@torch.no_grad()
def test_cached_steps_read_the_numbers_of_one_pass_to_the_bit_of_a_mask():
    """In fp32 a step adds the bias as a mask, as one pass does: no step of greedy search is rounded otherwise."""
    model, tokens = wrap("bart"), tokens_of()
    packed = model._packed_encoder_outputs(model.encode(**tiny_inputs("bart")))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first = {"decoder_input_ids": tokens[:, :1], "encoder_outputs": packed}
    with_cache = model(**first, use_cache=True, **{CACHE: cache}).logits
    torch.testing.assert_close(with_cache, model(**first, use_cache=False).logits, atol=2e-6, rtol=2e-6)
