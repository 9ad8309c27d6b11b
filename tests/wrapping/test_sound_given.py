"""Whisper over the sound alone, given what users have: an extractor's features, and states and latents of before."""

import numpy as np
import pytest
import torch
from tiny_sound import FRAMES, LENGTHS, WINDOW, features, mask_of, whisper_base, wrapped
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor

from nvib_hf.wrapping import source
from nvib_hf.wrapping.sound import MARGIN, STORED, silence_of

RATE = 16_000


@pytest.fixture(scope="module")
def model():
    return wrapped(whisper_base())


def extracted(*sounds: np.ndarray) -> dict[str, torch.Tensor]:
    """What Whisper's own extractor makes of sounds of any length, for a window of 128 frames."""
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=125, n_fft=400)
    how = {"return_attention_mask": True, "truncation": False, "padding": "longest"}
    return dict(extractor(list(sounds), sampling_rate=RATE, return_tensors="pt", **how))


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32)


# ------------------------------------------------------------------------------------ features
@pytest.mark.parametrize("loudness", [1.0, 0.01, 1e-6, 0.0])
def test_silence_is_what_the_extractor_makes_of_padding(loudness):
    """Of noise, too, which is never silent itself."""
    made = extracted(loudness * noise(1.5, 0), noise(4.0, 1))
    end = int(made["attention_mask"][0].sum())
    padding = made["input_features"][0, :, end + 4 :]
    heard = made["input_features"].clone()
    heard[0, :, end:] = torch.nan
    assert_close(silence_of(heard)[0].expand_as(padding), padding, atol=1e-3, rtol=0)


@torch.no_grad()
def test_long_sound_is_heard_alone_as_in_a_batch(model, monkeypatch):
    """Alone its features end with it; in a batch silence follows, after two frames in which the sound still rings."""
    heard, sounds, length = [], [noise(1.0625, 0), noise(2.08, 1)], 136
    real = source.hear
    monkeypatch.setattr(source, "hear", lambda *given: heard.append(given[1]["input_features"][0]) or real(*given))
    settings = {"max_new_tokens": 4, "language": "en", "return_timestamps": True}
    windows = []
    for given in (sounds[:1], sounds):
        heard.clear()
        model.generate(**extracted(*given), **settings)
        windows.append(list(heard))
    alone, batched = windows[0][-1], windows[1][len(windows[0]) - 1]  # the window at the end of the first sound
    unheard = alone.isnan()
    assert torch.equal(unheard, batched.isnan()) and unheard.any()
    apart = (alone - batched).abs()[:, ~unheard[0]].amax(0)
    end = len(apart) - 2 * MARGIN
    assert 0 < end < FRAMES < length
    assert (apart[:end] < 0.01).all() and (apart[end + 2 :] < 0.01).all() and (apart[end : end + 2] < 2).all()


@torch.no_grad()
@pytest.mark.parametrize("where", [(slice(None), slice(10, 12)), (2, 10), (slice(None), slice(None))], ids=str)
def test_nan_within_the_sound_is_not_silenced(model, where):
    sound, mask = features(), mask_of(LENGTHS)
    sound[(0, *where)] = torch.nan
    latents = model.encode(input_features=sound, attention_mask=mask)
    fewer = model.encode(input_features=sound, attention_mask=mask, merge_share=0.5)
    for x in (latents, fewer, model.encode(input_features=sound, attention_mask=mask, merge_cost=1.0)):
        assert x.log_pi[0].isnan().any() and not x.log_pi[1:].isnan().any()
    with pytest.raises(ValueError, match="Latent 0 is not a distribution: log_pi holds NaN"):
        model.merge_latents(latents, share=0.5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32, torch.float16])
def test_masks_of_every_kind_are_the_same_mask(model, kind):
    expected = model.encode(input_features=features(), attention_mask=mask_of(LENGTHS))
    assert_close(model.encode(input_features=features(), attention_mask=mask_of(LENGTHS).to(kind)).z, expected.z)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "told"),
    [(mask_of(LENGTHS).tolist(), "is a list"), ((mask_of(LENGTHS) - 1.0) * 1e9, "holds other values")],
    ids=["list", "additive"],
)
def test_what_is_no_mask_is_refused(model, mask, told):
    for call in (model.encode, model.generate):
        with pytest.raises(ValueError, match=f"1 where there is sound and 0 elsewhere, but {told}. Pass what"):
            call(input_features=features(), attention_mask=mask)


@torch.no_grad()
def test_a_model_as_whisper_merges_too(model):
    given = {"input_features": features(), "attention_mask": mask_of(LENGTHS), "language": "en"}
    settings = {"return_dict_in_generate": True, "output_scores": True}
    scores = [
        m.generate(**given, **settings, **limit)["scores"][0]
        for m in (model, model.as_whisper())
        for limit in ({}, {"merge_cost": 1e9})
    ]
    assert_close(scores[0], scores[2])
    assert_close(scores[1], scores[3])
    assert not torch.allclose(scores[0], scores[1])


# ------------------------------------------------------------------------------------ states of an earlier call
@torch.no_grad()
@pytest.mark.parametrize("mask", [mask_of(LENGTHS), mask_of([FRAMES, 20, 3]), mask_of([FRAMES] * 3), None])
def test_states_of_an_earlier_call_are_read_as_then(model, mask):
    tokens = torch.tensor([[1, 7, 8]] * 3)
    masked = {} if mask is None else {"attention_mask": mask}
    expected = model(input_features=features(), decoder_input_ids=tokens, **masked)
    states = {"encoder_last_hidden_state": expected.encoder_last_hidden_state, **masked}
    assert_close(model(**states, decoder_input_ids=tokens).logits, expected.logits)
    latents = model.encode(**states, merge_share=0.5)
    assert_close(latents.z, model.encode(input_features=features(), merge_share=0.5, **masked).z)
    written = model.generate(features(), decoder_input_ids=tokens[:, :1], max_new_tokens=5, **masked)
    assert torch.equal(model.generate(**states, decoder_input_ids=tokens[:, :1], max_new_tokens=5), written)


@torch.no_grad()
def test_their_mask_may_be_one_of_vectors(model):
    made = model(input_features=features(), attention_mask=mask_of(LENGTHS), decoder_input_ids=torch.ones(3, 2).long())
    states = made.encoder_last_hidden_state
    numbers = [length // 2 + length % 2 + MARGIN for length in LENGTHS]
    found = model.encode(encoder_last_hidden_state=states, attention_mask=mask_of(numbers, states.shape[1]))
    assert_close(found.log_pi, model.encode(input_features=features(), attention_mask=mask_of(LENGTHS)).log_pi)


@torch.no_grad()
def test_states_whose_sound_is_not_known_are_refused(model):
    states = torch.randn(3, WINDOW - 4, 32)
    with pytest.raises(ValueError, match=r"60 vectors for a window of 64.*Pass the attention_mask"):
        model.encode(encoder_last_hidden_state=states)
    with pytest.raises(ValueError, match=r"sound of up to 64 vectors with its margin, but .* has 60"):
        model.encode(encoder_last_hidden_state=states, attention_mask=mask_of([FRAMES, 20, 20]))
    with pytest.raises(ValueError, match=r"shape \(3, 77\).*needs \(3, 60\), or \(3, 128\)"):
        model.encode(encoder_last_hidden_state=states, attention_mask=torch.ones(3, 77))


# ------------------------------------------------------------------------------------ latents of an earlier call
@torch.no_grad()
@pytest.mark.parametrize("lengths", [LENGTHS, [FRAMES, 20, 3]])
def test_latents_are_merged_as_when_encoding(model, lengths):
    """Stored silence is not merged; after saving, in another order and a longer batch neither."""
    inputs = {"input_features": features(), "attention_mask": mask_of(lengths)}
    latents, expected = model.encode(**inputs), model.encode(**inputs, merge_share=0.3)
    assert latents.num_stored.tolist() == [0 if length == FRAMES else STORED for length in lengths]
    longer = model.encode(input_features=features()[:1], attention_mask=mask_of([FRAMES - 2 * MARGIN - 4]))
    for given, row in ((latents, 1), (latents.compact(), 1), (latents[[2, 1]], 1)):
        fewer = model.merge_latents(given, share=0.3)[row]
        assert_close(fewer.compact().z, expected[1].compact().z)
        assert_close(fewer.compact().z[0, -STORED:], model.silence)
        assert fewer.num_vectors == expected.num_vectors[1] and fewer.num_stored == STORED
    draws = wrapped(whisper_base(), kappa=2).encode(**inputs, sample=True)
    of_draws = wrapped(whisper_base(), kappa=2).merge_latents(draws, cost=1e9)
    assert of_draws.num_vectors.tolist() == [0.5 if length == FRAMES else 0.5 + STORED for length in lengths]
    again = model.merge_latents(model.merge_latents(latents, cost=1e9), cost=1e9)
    assert again.num_vectors.tolist() == [1 if length == FRAMES else 1 + STORED for length in lengths]
    assert longer.num_stored.tolist() == [STORED]
