"""Whisper's own ``generate()`` on a wrapped model, against the base's: prompts, timestamps, long sound, latents."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_base, tiny_inputs
from tiny_sound import prompts, with_prompts
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperTokenizer, pipeline

from nvib_hf import NvibForConditionalGeneration

FIRST_TIMESTAMP = VOCAB_SIZE - 33  # as many as a window of 64 frames has steps, and one more
PROMPTS = prompts(FIRST_TIMESTAMP, max_length=12)


@pytest.fixture(scope="module")
def base():
    return with_prompts(tiny_base("whisper"), PROMPTS)


@pytest.fixture(scope="module")
def model(base):
    return NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base)).eval()


@pytest.fixture(scope="module")
def sound():
    return tiny_inputs("whisper")["input_features"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"language": "fr", "task": "translate"},
        {"language": ["en", "de", "fr"]},
        {"return_timestamps": True, "language": "en"},
        {"num_beams": 3, "language": "en"},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_ids": torch.tensor([35, 7, 9]), "language": "en"},
        {"temperature": (0.0, 0.2), "no_speech_threshold": 0.6, "logprob_threshold": -1.0},
    ],
    ids=lambda settings: "-".join(settings) or "detection",
)
def test_writes_what_the_base_writes(base, model, sound, settings):
    results = []
    for generate in (base.generate, model.generate):
        torch.manual_seed(0)  # temperatures above 0 draw
        results.append(generate(input_features=sound, **settings))
    assert torch.equal(*results)


def test_languages_differ(model, sound):
    """Otherwise the test above would pass with the prompts left out."""
    english, french = (model.generate(sound, language=language) for language in ("en", "fr"))
    assert not torch.equal(english, french)


def test_long_sound_is_cut_into_windows(base, model):
    sound = torch.randn(2, 8, 150, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(150) < torch.tensor([[150], [90]])).long()
    settings = {"attention_mask": mask, "return_timestamps": True, "return_segments": True, "language": "en"}
    expected, found = base.generate(sound, **settings), model.generate(sound, **settings)
    assert torch.equal(found["sequences"], expected["sequences"])
    assert len(found["segments"][0]) > 1
    times = [[float(segment["end"]) for segment in part] for part in found["segments"]]
    assert times == [[float(segment["end"]) for segment in part] for part in expected["segments"]]


@pytest.mark.parametrize("settings", [{}, {"language": "fr"}, {"num_beams": 3}], ids=str)
def test_latents_are_written_after_the_same_prompt(model, sound, settings):
    """All in one go, so the prompt is part of the result."""
    expected = model.generate(sound, **settings)
    states = model.base.get_encoder()(sound).last_hidden_state
    for source in ({"encoder_outputs": model.encode(input_features=sound)}, {"encoder_last_hidden_state": states}):
        found = model.generate(**source, **settings)
        begin = found[0].tolist().index(FIRST_TIMESTAMP - 1) + 1
        assert found[0, 0] == model.generation_config.decoder_start_token_id and begin in (3, 4)
        assert torch.equal(found[:, begin : begin + expected.shape[1]], expected)


def test_a_configuration_for_one_call_keeps_the_prompt(base, model, sound):
    settings = {"generation_config": GenerationConfig(max_new_tokens=5), "language": "en"}
    assert torch.equal(model.generate(sound, **settings), base.generate(sound, **settings))


def test_another_temperature_for_some_latents(model, sound):
    """Those that the first is good enough for are left as they are; the others are read again."""
    latents = model.encode(input_features=sound)
    greedy = model.generate(encoder_outputs=latents, language="en", return_dict_in_generate=True, output_logits=True)
    log_prob = torch.stack(greedy.logits, dim=1).log_softmax(-1).max(-1).values.mean(1)
    threshold = log_prob.sort().values[:2].mean().item()
    torch.manual_seed(0)
    settings = {"language": "en", "temperature": (0.0, 5.0), "logprob_threshold": threshold}
    found = model.generate(encoder_outputs=latents, **settings)
    same = (found == greedy.sequences[:, : found.shape[1]]).all(-1)
    assert 0 < same.sum() < 3


def test_rows_of_latents_are_their_own(model, sound):
    latents = model.encode(input_features=sound)
    settings = {"language": ["en", "de", "fr"], "num_beams": 4, "num_return_sequences": 2}
    together = model.generate(encoder_outputs=latents, **settings)
    for row, language in enumerate(settings["language"]):
        alone = model.generate(encoder_outputs=latents[[row]], **{**settings, "language": language})
        assert torch.equal(together[2 * row : 2 * row + 2, : alone.shape[1]], alone)


def test_latents_come_before_the_sound(model, sound):
    latents = model.encode(input_features=sound.flip(0))
    expected = model.generate(encoder_outputs=latents, language="en")
    assert torch.equal(model.generate(input_features=sound, encoder_outputs=latents, language="en"), expected)


def test_a_prompt_of_ones_own_is_taken(model, sound):
    start = torch.tensor([[2, 30, 33, FIRST_TIMESTAMP - 1]] * 3)
    assert torch.equal(model.generate(sound, decoder_input_ids=start)[:, :4], start)


def test_compressed_sound_is_read(base, sound):
    """The latents are really read: with vectors dropped the result is that of dropping, not the base's."""
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), dropping="relaxed").eval()
    with torch.no_grad():
        model.nvib.keep_weight.normal_(generator=torch.Generator().manual_seed(0))
        model.nvib.keep_bias.zero_()
    latents = model.encode(input_features=sound)
    assert (latents.prop_vectors < 0.9).all()
    start = torch.tensor([[model.generation_config.decoder_start_token_id, 30, 33, FIRST_TIMESTAMP - 1]] * 3)
    expected = model.generate(encoder_outputs=latents, decoder_input_ids=start, max_length=12)[:, 4:]
    found = model.generate(sound, language="en")
    length = min(found.shape[1], expected.shape[1])
    assert torch.equal(found[:, :length], expected[:, :length])
    assert not torch.equal(found, base.generate(sound, language="en"))


def test_the_base_is_left_as_it_is(model, sound):
    before = dict(vars(model.base)), type(model.base), list(dict(model.base.named_modules()))
    model.generate(sound, language="en")
    assert (dict(vars(model.base)), type(model.base), list(dict(model.base.named_modules()))) == before


def test_saved_and_loaded(model, sound, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path).eval()
    settings = {"language": "fr", "task": "translate"}
    assert torch.equal(loaded.generate(sound, **settings), model.generate(sound, **settings))


def test_times_of_tokens_are_refused(model, sound):
    with pytest.raises(ValueError, match="return_timestamps=True for the times of segments"):
        model.generate(sound, return_token_timestamps=True)


# ------------------------------------------------------------------------------------------------------- pipelines
WINDOW = 16_000  # samples: one second, of which the encoder makes 50 vectors
TIMES = VOCAB_SIZE - 51


@pytest.fixture(scope="module")
def listener():
    """A Whisper that hears windows of a second, and what belongs to it in a pipeline."""
    own = prompts(TIMES, max_length=12) | {"max_initial_timestamp_index": 49}
    base = with_prompts(tiny_base("whisper", max_source_positions=50), own)
    special = {0: "<|endoftext|>", 1: "<|end|>", 2: "<|startoftranscript|>", 30: "<|en|>", 31: "<|fr|>", 32: "<|de|>"}
    special |= {33: "<|transcribe|>", 34: "<|translate|>", 35: "<|startofprev|>", TIMES - 1: "<|notimestamps|>"}
    words = {token: f"\u0120{chr(ord('a') + token % 26)}{token}" for token in range(VOCAB_SIZE)}
    times = {TIMES + step: f"<|{step * 0.02:.2f}|>" for step in range(51)}
    vocabulary = {text: token for token, text in (words | special | times).items()}
    added = list(special.values())
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], additional_special_tokens=added)
    return base, {
        "tokenizer": tokenizer,
        "feature_extractor": WhisperFeatureExtractor(feature_size=8, chunk_length=1),
        "device": "cpu",
    }


@pytest.mark.parametrize(
    "settings",
    [{}, {"return_timestamps": True}, {"chunk_length_s": 1, "return_timestamps": True}, {"chunk_length_s": 1}],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_pipeline_hears_times_and_long_recordings(listener, settings):
    base, tools = listener
    wrapped = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base)).eval()
    results = []
    for model in (base, wrapped.as_whisper()):
        recognise = pipeline("automatic-speech-recognition", model=model, **tools)
        for seconds in (1,) if not settings else (1, 2.5):
            sound = np.random.default_rng(0).standard_normal(int(seconds * WINDOW)).astype(np.float32)
            results.append(recognise({"raw": sound, "sampling_rate": WINDOW}, **settings))
    middle = len(results) // 2
    assert results[middle:] == results[:middle] and all(found["text"] for found in results)
    if "return_timestamps" in settings:
        assert all(found["chunks"] for found in results)
    with pytest.raises(ValueError, match="latent lacks"):
        recognise({"raw": sound, "sampling_rate": WINDOW}, return_timestamps="word")


def test_a_model_as_whisper_is_moved_and_trains_as_a_whole(model):
    copied = copy.deepcopy(model)
    whisper = copied.as_whisper().to(torch.float64).train()
    assert copied.nvib.mu_logvar.weight.dtype == copied.base.proj_out.weight.dtype == torch.float64
    assert whisper.training and copied.nvib.training and copied.base.training


def test_only_whisper_is_whisper():
    with pytest.raises(TypeError, match="BartForConditionalGeneration"):
        NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart")).as_whisper()
