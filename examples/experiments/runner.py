"""Experiments made of independent runs (a method with its settings, and a seed): run, keep, tabulate them.

An experiment is a dict ``{key: settings}`` and a function ``one(settings) -> results``, both ready for JSON:

    def one(settings):
        ...
        return {"accuracy": 0.9}

    if __name__ == "__main__":
        args = parser("What it shows.", "my_experiment", METHODS).parse_args()
        runs = {f"{method}-{seed}": {"method": method, "seed": seed} for method in args.only for seed in args.seeds}
        records = run_all(one, runs, args.output, args.jobs)
        rows = [{"method": group[0]["settings"]["method"], **summary(group)} for group in over_seeds(records)]
        write_report(args, "Title", table_of_rows(rows))
"""

import argparse
import base64
import datetime
import json
import lzma
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"  # committed reports


# ------------------------------------------------------------------------------------------------ runs
def run_all(
    one: Callable[[dict], dict], runs: dict[str, dict], output_folder: Path | str, jobs: int = 1
) -> dict[str, dict]:
    """Do the runs, ``jobs`` at a time, each in a process of its own with one thread.

    A finished run is ``<output_folder>/<key>.json``: ``settings``, ``results`` and ``seconds`` of a core. A run whose
    file holds the same settings is not done again, so an interrupted experiment continues: delete it to repeat one.
    Files are small, since they are committed: see :func:`written`. Return what your report needs, and no more.

    Args:
        one: a run; a function of a module, so that another process can import it.
        runs: settings of each run by its key, which names its file.
        jobs: 0 does no run: those that are finished are all.

    Returns:
        The contents of the files by key, in the order of ``runs``.

    Raises:
        ValueError: a key that is no file name, less than no jobs, or no jobs and nothing finished.
        RuntimeError: some runs failed. It says how; the others are done and kept.
    """
    unfit = [key for key in runs if not re.fullmatch(r"[\w.=+-]+", key)]
    if unfit:
        raise ValueError(f"The key {unfit[0]!r} names a file: use letters, digits and any of _ . = + - in it.")
    if jobs < 0:
        raise ValueError(f"jobs is {jobs}. Pass the number of processes, 1 or more, or 0 for the finished runs alone.")
    folder = Path(output_folder)
    if jobs == 0:
        records = {key: finished(folder, key, settings) for key, settings in runs.items()}
        if not any(records.values()):
            raise ValueError(f"jobs is 0, and none of the {len(runs)} runs is finished in {folder}: pass 1 or more.")
        return {key: record for key, record in records.items() if record is not None}
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [key for key, settings in runs.items() if finished(folder, key, settings) is None]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done before, {jobs} at a time", flush=True)

    context = multiprocessing.get_context("spawn")  # a fork of a process with threads of torch may hang
    start, total, failures, running = time.perf_counter(), len(waiting), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(one, key, runs[key], folder, sender), daemon=True)
            process.start()
            sender.close()  # the child holds the other one: when it dies the receiver sees the end
            running[process.sentinel] = (key, process, receiver)
        for sentinel in wait(list(running)):
            key, process, receiver = running.pop(sentinel)
            process.join()
            record = finished(folder, key, runs[key])
            if record is None:
                failures[key] = _failure(receiver, process.exitcode)
            receiver.close()
            outcome = "FAILED" if record is None else f"{record['seconds']:.0f} s"
            done, minutes = total - len(waiting) - len(running), (time.perf_counter() - start) / 60
            print(f"[{done}/{total}, {minutes:.1f} min] {key}: {outcome}", flush=True)
    if failures:
        reports = "\n\n".join(f"{key}\n{report.strip()}" for key, report in failures.items())
        raise RuntimeError(f"{len(failures)} of {len(runs)} runs failed, the others are kept:\n\n{reports}")
    return {key: finished(folder, key, settings) for key, settings in runs.items()}


def finished(folder: Path, key: str, settings: dict) -> dict | None:
    """The record of a run that was done with these settings, or None."""
    path = folder / f"{key}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["settings"] != json.loads(json.dumps(settings)):
        return None
    lists = unpacked(record.pop("lists", ""))
    return {**record, "results": with_lists(record["results"], lists)}


def _work(one: Callable[[dict], dict], key: str, settings: dict, folder: Path, sender) -> None:
    """One run, in its own process: a file if it succeeds, a traceback to the parent if not."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start = time.process_time()
    try:
        results = one(settings)
        record = {"settings": settings, "results": results, "seconds": round(time.process_time() - start, 1)}
        partial = folder / f"{key}.json.{os.getpid()}.partial"
        partial.write_text(written(record), encoding="utf-8")
        os.replace(partial, folder / f"{key}.json")  # whole or not at all
    except (Exception, SystemExit):
        sender.send(traceback.format_exc()[-20_000:])  # more than a pipe holds would wait for a reader


def _failure(receiver, exitcode: int) -> str:
    """The traceback that the process of a failed run left, or how it died without one."""
    try:
        return receiver.recv()
    except EOFError:
        how = f"killed by signal {-exitcode}" if exitcode < 0 else f"exit code {exitcode}"
        return f"Its process ended without a traceback ({how}); signal 9 is often a lack of memory: fewer --jobs."


# --------------------------------------------------------------------------------------------- records
LONG = 100  # numbers; a list of more whole ones is packed
DIGITS = 7  # of a float: a table shows fewer
LIST = "list"  # what a packed list has in its place: its number


def written(record: dict) -> str:
    """A record as its file holds it: a line for each result, floats of 7 digits, long lists of whole numbers packed.

    Such a list, for instance the errors in each test text, is a number in its place: where it stands among the
    ``lists``, which are compressed together because those of several methods are much alike.
    """
    lists: list[list[int]] = []

    def small(value):
        match value:
            case float():
                return float(f"{value:.{DIGITS}g}")
            case dict():
                return {name: small(x) for name, x in value.items()}
            case list() | tuple() if len(value) > LONG and all(isinstance(x, int) for x in value):
                lists.append([int(x) for x in value])
                return {LIST: len(lists) - 1}
            case list() | tuple():
                return [small(x) for x in value]
        return value

    def line(name: str, value: object) -> str:
        return f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"

    results = ",\n".join(f"  {line(name, small(value))}" for name, value in record["results"].items())
    rest = [line(name, value) for name, value in record.items() if name not in ("settings", "results")]
    rest += [line("lists", packed(lists))] if lists else []
    parts = [line("settings", record["settings"]), f'"results": {{\n{results}\n }}', *rest]
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def with_lists(value, lists: list[list[int]]):
    """Results of a file, with the lists in their places."""
    match value:
        case dict() if value.keys() == {LIST}:
            return lists[value[LIST]]
        case dict():
            return {name: with_lists(x, lists) for name, x in value.items()}
        case list():
            return [with_lists(x, lists) for x in value]
    return value


def packed(lists: list[list[int]]) -> str:
    """Lists of whole numbers as one compressed text."""
    text = json.dumps(lists, separators=(",", ":"))
    return base64.b64encode(lzma.compress(text.encode())).decode()


def unpacked(text: str) -> list[list[int]]:
    return json.loads(lzma.decompress(base64.b64decode(text))) if text else []


# ---------------------------------------------------------------------------------------------- tables
def over_seeds(records: dict[str, dict]) -> list[list[dict]]:
    """Records in groups that differ in their ``seed`` alone, in the order of the first of each."""
    groups: dict[str, list[dict]] = {}
    for record in records.values():
        settings = {name: value for name, value in record["settings"].items() if name != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(record)
    return list(groups.values())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample: n - 1) over seeds; the deviation of one value is NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def cell(values: Iterable[float | None], digits: int = 2) -> str:
    """``mean ± standard deviation``; a dash where a run has no such number."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return "–"
    mean, spread = mean_and_spread(known)
    return f"{mean:.{digits}f}" if len(known) == 1 else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def summary(group: list[dict], digits: dict[str, int] | None = None) -> dict[str, str]:
    """A cell for each number in the results of a group: all of them, or those that ``digits`` names."""
    numbers = (name for name, value in group[0]["results"].items() if isinstance(value, int | float))
    digits = digits or dict.fromkeys(numbers, 2)
    return {name: cell((r["results"].get(name) for r in group), places) for name, places in digits.items()}


def table_of_rows(rows: list[dict[str, object]]) -> str:
    """A table with a column for each key of the first row; what a row lacks is left empty."""
    from nvib_hf.wrapping.model_card import markdown_table  # here, so that the process of a run does not wait for it

    cells = ([str(row.get(name, "")).replace("|", "\\|").replace("\n", " ") for name in rows[0]] for row in rows)
    return markdown_table(list(rows[0]), *cells)


# --------------------------------------------------------------------------------- command and report
class _Namespace(argparse.Namespace):
    """Arguments of an experiment; ``report`` is where its table goes."""

    @property
    def report(self) -> Path:
        """The committed place for a whole experiment, the output folder for a part of one or a quick one."""
        whole = not self.quick and set(self.only) == set(self.methods)
        return (RESULTS if whole else self.output) / f"{self.name}.md"


class ExperimentParser(argparse.ArgumentParser):
    """The arguments that all experiments share; see :func:`parser`."""

    def parse_args(self, args=None, namespace=None):
        args = super().parse_args(args, namespace or _Namespace())
        args.output = args.output or Path("runs") / (f"{args.name}_quick" if args.quick else args.name)
        args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
        args.only = args.only or list(args.methods)
        return args


def parser(description: str, name: str, methods: Collection[str]) -> ExperimentParser:
    """``--output``, ``--jobs``, ``--seeds``, ``--quick``, ``--only`` for the experiment ``name`` with ``methods``.

    Add arguments of your own before ``parse_args()``, whose result has ``report``, the path of the table, as well.
    """
    made = ExperimentParser(description=description)
    made.set_defaults(name=name, methods=list(methods))
    made.add_argument("--output", type=Path, metavar="DIR", help=f"where runs are kept (default: runs/{name})")
    made.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2; 0: report finished ones)"
    )
    made.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: 0 1 2, with --quick 0")
    made.add_argument("--quick", action="store_true", help="everything runs, at most 2 minutes, nothing is learnt")
    made.add_argument("--only", nargs="+", choices=list(methods), metavar="METHOD", help=", ".join(methods))
    return made


def command_line() -> str:
    """The command that is running, without what changes no number."""
    words = sys.argv[1:]
    for option in ("--output", "--jobs"):
        while option in words:
            place = words.index(option)
            words[place : place + 2] = ["=".join(words[place : place + 2])]
        words = [word for word in words if not word.startswith(f"{option}=") or word == "--jobs=0"]
    return shlex.join(["python", f"examples/experiments/{Path(sys.argv[0]).name}", *words])


def write_report(args: argparse.Namespace, title: str, body: str) -> Path:
    """Write ``args.report``: the body under the command that made it, the machine, the date and the seeds."""
    machine = (
        f"{os.cpu_count()} CPU cores, one thread per run; PyTorch {torch.__version__.split('+')[0]}, "
        f"Transformers {transformers.__version__}"
    )
    made_by = [
        f"- command: `{command_line()}`",
        f"- machine: {machine}",
        f"- date: {datetime.date.today().isoformat()}",
        f"- seeds: {', '.join(map(str, args.seeds))}",
    ]
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(f"# {title}\n\n" + "\n".join(made_by) + f"\n\n{body.strip()}\n", encoding="utf-8")
    print(f"\n{body.strip()}\n\nwritten to {args.report}")
    return args.report
