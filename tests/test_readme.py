"""The README's code runs as written and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = [match.groups() for match in re.finditer(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)]
RUNNABLE = [code for language, code in BLOCKS if language == "python" and "# needs" not in code]


def run(code: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


def test_blocks_are_found_and_nothing_is_left_to_fill_in():
    assert len(RUNNABLE) == 2
    assert "@@" not in README


def test_the_first_minute_prints_what_it_says():
    following = BLOCKS[BLOCKS.index(("python", RUNNABLE[0])) + 1]
    assert following[0] == "text"
    assert run(RUNNABLE[0]) == following[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("padded", [True, False])
def test_the_plain_pytorch_walk_through_runs_in_every_mode(training, kappa, padded):
    torch.manual_seed(0)
    code = RUNNABLE[1]
    assert "kappa=1" in code and "latent = nvib(" in code
    code = code.replace("kappa=1", f"kappa={kappa}")
    mode = f"for module in (encoder, nvib, decoder):\n    module.train({training})\npadding[1, 7:] = {padded}\n"
    code = code.replace("latent = nvib(", mode + "latent = nvib(")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)

    components = 11 * (kappa if training else 1)
    assert names["latent"]["z"].z.shape == (components, 2, 64)
    assert names["latent"]["memory_key_padding_mask"].any() == padded
    assert names["sampled"].shape == (6, 3, 64) and names["sampled"].isfinite().all()
    for module in ("encoder", "nvib", "decoder"):
        assert all(parameter.grad.isfinite().all() for parameter in names[module].parameters())
    assert all(parameter.grad.any() for parameter in names["nvib"].parameters())
