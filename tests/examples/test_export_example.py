"""The example that exports a model runs to its end, and what it wrote is what the model writes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "export.py"


@pytest.mark.slow
def test_onnxruntime_writes_what_the_model_writes(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, EXAMPLE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"largest difference of a logit: (.+)", done.stdout)[1]) < 1e-4
    assert "writes too: 100%" in done.stdout
    graphs = {"encoder.onnx", "decoder.onnx", "decoder_with_cache.onnx"}
    assert graphs <= {path.name for path in tmp_path.iterdir()}
