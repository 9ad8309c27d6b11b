"""mypy knows the types that users are promised (``typing_of_users.py``), and finds nothing wrong in the package."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_mypy_passes():
    """With the settings of pyproject.toml. The first run takes half a minute, the cache makes the next ones quick."""
    process = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", ROOT / ".mypy_cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.startswith("Success"), process.stdout
