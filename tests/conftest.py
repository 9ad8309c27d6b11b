"""What holds for all tests: no hub, quiet logs, a fixed random state; and the table of architectures."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_random_state():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------ the table of architectures
OUTCOMES = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--architecture-table", metavar="FILE", help="write what each architecture can do as a table")


def pytest_configure(config):
    config.addinivalue_line("markers", "capability(name): a column of the table of architectures")
    config.stash[OUTCOMES] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("capability")
    if marker is not None and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else None
        cell = (item.callspec.params["family"], marker.args[0])
        item.config.stash[OUTCOMES].setdefault(cell, []).append((report.outcome, reason))
    return report


def pytest_sessionfinish(session):
    path, outcomes = session.config.getoption("--architecture-table"), session.config.stash[OUTCOMES]
    if path and outcomes:
        Path(path).write_text(architecture_table(outcomes), encoding="utf-8")


def architecture_table(outcomes: dict) -> str:
    """Markdown: a row an architecture, a column a capability; what was skipped is numbered and explained below."""
    from tiny_models import TITLES

    families, capabilities = (list(dict.fromkeys(names)) for names in zip(*outcomes, strict=True))
    notes = []

    def cell(family: str, capability: str) -> str:
        results = outcomes.get((family, capability), [])
        reasons = dict.fromkeys(reason for _, reason in results if reason)
        notes.extend(reason for reason in reasons if reason not in notes)
        kinds = {outcome for outcome, _ in results}
        sign = "**no**" if "failed" in kinds else "yes" if "passed" in kinds else "–"
        return sign + "".join(f" [{notes.index(reason) + 1}]" for reason in reasons)

    lines = [["Architecture", *capabilities], ["---", *(":-:" for _ in capabilities)]]
    lines += [[TITLES[family], *(cell(family, capability) for capability in capabilities)] for family in families]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n" + "".join(f"\n{number}. {note}" for number, note in enumerate(notes, start=1)) + "\n"
