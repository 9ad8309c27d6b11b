"""What holds for all tests: no hub, quiet logs, a fixed random state; and the table of architectures."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core (pytest -n auto): more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    config.pluginmanager.register(Outcomes(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("capability")
    if marker is not None and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else None
        report.user_properties.append(("cell", (item.callspec.params["family"], marker.args[0], reason)))
    return report


class Outcomes:
    """Gathers the cells of the table from the reports, which come from every process of ``pytest -n``."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        for family, capability, reason in (value for name, value in report.user_properties if name == "cell"):
            outcomes = self.config.stash[OUTCOMES].setdefault((family, capability), [])
            outcomes.append((report.outcome, reason))


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
