"""Transformers' own tests of a model, ``ModelTesterMixin``, run on an NVIB model with a tiny BART and a tiny T5.

They are in the source package of Transformers alone, which this script fetches (or takes from ``--source``):

    python tests/run_transformers_model_tests.py [--source DIR] [further arguments of pytest, such as -k save]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
from collections import Counter
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from tiny_models import BART_LIKE, START, T5_LIKE, VOCAB_SIZE
from transformers import BartConfig, T5Config
from transformers.modeling_outputs import Seq2SeqLMOutput

from nvib_hf import NvibConfig, NvibForConditionalGeneration, NvibLatents

BASES = {"bart": lambda: BartConfig(**BART_LIKE), "t5": lambda: T5Config(**T5_LIKE)}
# Modules that Transformers' tests import and its source package lacks.
STAND_INS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
# Tests that cannot apply, with the reason.
SKIPS = {
    "test_correct_missing_keys": "loads a base checkpoint as an NVIB model, which from_pretrained refuses on purpose: "
    "its message names from_base_pretrained (shown by tests/test_hub.py)",
    "test_torch_compile_for_training": "passes position_ids, as decoder-only models take them (compiled training is "
    "shown by tests/test_integrations.py)",
}


class ModelTester:
    """What ``ModelTesterMixin`` asks for: a configuration and inputs, and the sizes to expect in the outputs."""

    batch_size, seq_length, encoder_seq_length, decoder_seq_length = 5, 7, 7, 7
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, family: str) -> None:
        self.family = family

    def get_config(self) -> NvibConfig:
        settings = {"tau_alpha": 1.0, "tau_sigma": 0.3, "lambda_gaussian": 0.1, "lambda_dirichlet": 0.1}
        return NvibConfig(base_config=BASES[self.family](), **settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[NvibConfig, dict[str, torch.Tensor]]:
        size = (self.batch_size, self.seq_length)
        source, target = torch.randint(START + 1, VOCAB_SIZE, (2, *size))
        inputs = {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "decoder_input_ids": target,
            "decoder_attention_mask": torch.ones_like(target),
        }
        return self.get_config(), inputs


class Adapted:
    """Tests that assume something that is otherwise here; the rest of what they check is run."""

    def test_attention_outputs(self) -> None:
        """Counts the output's fields and attended vectors: not NVIB's own fields here, nor the prior's component."""
        forward = NvibForConditionalGeneration.forward
        shared = {field.name for field in fields(Seq2SeqLMOutput)}

        def of_the_base(*args, **kwargs) -> Seq2SeqLMOutput:
            output = Seq2SeqLMOutput(**{k: v for k, v in forward(*args, **kwargs).items() if k in shared})
            output.cross_attentions = tuple(weights[..., 1:] for weights in output.cross_attentions)
            return output

        with patch.object(NvibForConditionalGeneration, "forward", of_the_base):
            super().test_attention_outputs()

    def test_attn_implementation_composite_models(self) -> None:
        """Writes to the decoder's part of the configuration: BART's and T5's give a copy when asked for it."""
        with patch.object(NvibConfig, "get_text_config", lambda config, **kwargs: config.base_config):
            super().test_attn_implementation_composite_models()

    def test_model_outputs_equivalence(self) -> None:
        """Subtracts all tensors in the output, which PyTorch does not do with masks: here, masks are numbers."""
        values = NvibLatents.values

        def numbers(latents: NvibLatents) -> list[torch.Tensor]:
            return [value.float() if value.dtype == torch.bool else value for value in values(latents)]

        with patch.object(NvibLatents, "values", numbers):
            super().test_model_outputs_equivalence()


def model_tests(family: str) -> type:
    """The test class for one base; Transformers' tests must be importable."""
    mixin = importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin
    generation = importlib.import_module("transformers_tests.generation.test_utils").GenerationTesterMixin

    def setUp(self) -> None:
        self.model_tester = ModelTester(family)
        self._is_composite = "non_composite" not in self._testMethodName  # of the two variants of a test, run both

    attributes = {
        "setUp": setUp,
        "all_model_classes": (NvibForConditionalGeneration,),
        "is_encoder_decoder": True,
        "test_can_init_all_missing_weights_before_2023": True,  # older models may leave that test out
    }
    for name, reason in SKIPS.items():
        attributes[name] = unittest.skip(reason)(lambda self: None)
    return type(f"Test{family.title()}", (Adapted, mixin, generation, unittest.TestCase), attributes)


def fetch_source(folder: Path) -> Path:
    """The source package of the installed Transformers, unpacked into a folder."""
    requirement = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "download", "--no-binary", "transformers", "--no-deps", "--dest", str(folder), requirement], check=True
    )
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in the first releases of 3.11
        archive.extractall(folder, **safely)
    return next(path for path in folder.glob("transformers-*") if path.is_dir())


def prepare(source: Path, folder: Path) -> None:
    """Copy the tests as the package ``transformers_tests``, with what they import beside them."""
    package = folder / "transformers_tests"
    shutil.copytree(source / "tests", package)
    for name, mixin in STAND_INS.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(f"class {mixin}:\n    pass\n")
    for path in (package, *(package / name for name in ("exporters", "generation"))):
        (path / "__init__.py").touch()
    if importlib.util.find_spec("parameterized") is None:
        pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), "parameterized"], check=True)
    lines = ["from run_transformers_model_tests import model_tests", ""]
    lines += [f"Test{family.title()} = model_tests({family!r})" for family in BASES]
    (folder / "test_nvib.py").write_text("\n".join(lines) + "\n")


class Outcomes:
    """A plugin of pytest that keeps the outcome of each test, its subtests included, and why it was skipped."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}
        self.skipped: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        _, case, name = report.nodeid.split("::")
        order = ("passed", "skipped", "failed")
        self.outcomes[case, name] = max(self.outcomes.get((case, name), "passed"), report.outcome, key=order.index)
        if report.outcome == "skipped":
            self.skipped.setdefault(report.longrepr[2].removeprefix("Skipped: "), set()).add(name)

    def show(self) -> None:
        for reason, names in sorted(self.skipped.items()):
            print(f"skipped: {reason}\n    {', '.join(sorted(names))}")
        for (case, name), outcome in self.outcomes.items():
            if outcome == "failed":
                print(f"failed: {case}::{name}")
        for case in sorted({case for case, _ in self.outcomes}):
            counts = Counter(outcome for (of, _), outcome in self.outcomes.items() if of == case)
            print(f"{case}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="an unpacked source package, in place of fetching it")
    arguments, others = parser.parse_known_args()
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(arguments.source or fetch_source(folder), folder)
        sys.path.insert(0, name)
        options = ["-q", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider"]
        files = ["-c", os.devnull, f"--rootdir={name}", str(folder / "test_nvib.py")]
        status = pytest.main([*options, *others, *files], plugins=[outcomes])
    outcomes.show()
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
