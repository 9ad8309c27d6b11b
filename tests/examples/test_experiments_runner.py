"""The framework of the experiments: runs that resume, fail and are killed without harm to others; tables."""

import json
import os
import signal
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
import runner


def one(settings: dict) -> dict:
    """Says who ran it; dies as it is told."""
    match settings.get("die"):
        case "raise":
            raise ArithmeticError("no such number\n" + "x" * 200_000 + "the end")
        case "exit":
            raise SystemExit("too few texts")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    return {"double": 2 * settings["x"], "pid": os.getpid(), "threads": torch.get_num_threads()}


def test_runs_have_a_process_and_a_file_each(tmp_path, capsys):
    runs = {f"run-{x}": {"x": x, "pair": (x, x)} for x in (3, 1, 2)}
    records = runner.run_all(one, runs, tmp_path / "new" / "folder", jobs=2)
    assert list(records) == list(runs)
    assert [record["results"]["double"] for record in records.values()] == [6, 2, 4]
    assert {record["results"]["threads"] for record in records.values()} == {1}
    assert len({os.getpid(), *(record["results"]["pid"] for record in records.values())}) == 4
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {f"{key}.json" for key in runs}
    saved = json.loads((tmp_path / "new" / "folder" / "run-3.json").read_text())
    assert saved == records["run-3"] and saved["settings"] == {"x": 3, "pair": [3, 3]} and saved["seconds"] >= 0
    printed = capsys.readouterr().out
    assert "3 runs, 0 of them done before" in printed and all(f"{key}: " in printed for key in runs)


def test_a_finished_run_is_done_again_only_with_other_settings(tmp_path):
    runs = {"a": {"x": 1, "pair": (1, 2)}, "b": {"x": 2}}
    first = runner.run_all(one, runs, tmp_path)
    runs["b"]["x"] = 5
    again = runner.run_all(one, runs, tmp_path)
    assert again["a"] == first["a"]
    assert again["b"]["results"]["double"] == 10


def test_without_jobs_what_is_finished_is_all(tmp_path):
    with pytest.raises(ValueError, match="none of the 1 runs is finished"):
        runner.run_all(one, {"a": {"x": 1}}, tmp_path / "empty", jobs=0)
    first = runner.run_all(one, {"a": {"x": 1}}, tmp_path)
    assert runner.run_all(one, {"b": {"x": 2}, "a": {"x": 1}}, tmp_path, jobs=0) == first


def test_what_fails_is_reported_and_stops_no_other(tmp_path):
    ways = ("raise", "exit", "kill", None)
    runs = {str(way): {"x": i, "die": way} for i, way in enumerate(ways)}
    with pytest.raises(RuntimeError, match="3 of 4 runs failed") as error:
        runner.run_all(one, runs, tmp_path)
    for said in ("the end", "too few texts", "killed by signal 9"):
        assert said in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["None.json"]


@pytest.mark.parametrize(
    ("arguments", "message"), [({"runs": {"a/b": {}}}, "'a/b' names a file"), ({"runs": {}, "jobs": -1}, "jobs is -1")]
)
def test_bad_arguments_say_what_to_do(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        runner.run_all(one, output_folder=tmp_path, **arguments)


def test_records_are_small_and_come_back(tmp_path):
    """A table's digits and every whole number survive; a thousand of them take a few hundred bytes."""
    errors = [i * i % 7 for i in range(1000)]
    results = {
        "share": 1 / 3,
        "tiny": 1.23456789e-9,
        "none": None,
        "flags": [True, False],
        "text": "Grüße",
        "plain": {"edits": errors, "right": [x > 3 for x in errors]},
        "other": {"edits": errors[::-1], "short": [1, 2]},
    }
    record = {"settings": {"x": 1 / 3}, "results": results, "seconds": 1.5}
    path = tmp_path / "a.json"
    path.write_text(runner.written(record), encoding="utf-8")
    assert path.stat().st_size < 1200 and "Grüße" in path.read_text(encoding="utf-8")
    read = runner.finished(tmp_path, "a", record["settings"])
    assert read["settings"] == record["settings"] and read["seconds"] == 1.5 and set(read) == set(record)
    assert read["results"]["plain"] == results["plain"] and read["results"]["other"] == results["other"]
    assert read["results"]["share"] == 0.3333333 and read["results"]["tiny"] == pytest.approx(1.23456789e-9, rel=1e-6)
    assert [read["results"][name] for name in ("none", "flags", "text")] == [None, [True, False], "Grüße"]


def test_seeds_of_a_setting_make_one_row():
    scores = {("m", 0): 1.0, ("n", 0): 7.0, ("m", 1): 3.0, ("m", 2): 5.5}
    records = {
        f"{method}-{seed}": {"settings": {"seed": seed, "method": method}, "results": {"score": x, "text": "t"}}
        for (method, seed), x in scores.items()
    }
    of_m, of_n = runner.over_seeds(records)
    assert [record["settings"]["seed"] for record in of_m] == [0, 1, 2]
    assert runner.summary(of_m) == {"score": f"{9.5 / 3:.2f} ± {statistics.stdev([1, 3, 5.5]):.2f}"}
    assert runner.summary(of_n, {"score": 0, "other": 1}) == {"score": "7", "other": "–"}


def test_markdown_table_keeps_cells_apart():
    rows = [{"a": "x|y", "b": 1}, {"a": "two\nlines"}]
    assert runner.table_of_rows(rows) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n| two lines |  |"


def test_a_part_of_an_experiment_does_not_replace_the_committed_table(tmp_path):
    parse = runner.parser("What it shows.", "mine", ["a", "b"]).parse_args
    whole = parse(["--jobs", "3"])
    assert (whole.seeds, whole.only, whole.jobs, whole.output) == ([0, 1, 2], ["a", "b"], 3, Path("runs/mine"))
    assert whole.report == runner.RESULTS / "mine.md"
    assert parse(["--quick"]).report == Path("runs/mine_quick/mine.md")
    assert parse(["--only", "b", "--output", str(tmp_path)]).report == tmp_path / "mine.md"
    assert parse(["--only", "b", "a"]).report == whole.report
    with pytest.raises(SystemExit):
        parse(["--only", "c"])


def test_report_names_command_machine_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/mine.py", "--output", "x y", "--quick", "--jobs=1", "--seeds", "4"])
    args = runner.parser("What it shows.", "mine", ["a"]).parse_args(["--quick", "--seeds", "4"])
    args.output = tmp_path
    text = runner.write_report(args, "A title", "| a |").read_text()
    assert text.startswith("# A title\n\n- command: `python examples/experiments/mine.py --quick --seeds 4`\n")
    assert f"{os.cpu_count()} CPU cores" in text and torch.__version__.split("+")[0] in text
    assert "- seeds: 4\n" in text and text.endswith("\n\n| a |\n")


def test_a_report_of_finished_runs_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/mine.py", "--jobs", "0", "--output", "x y"])
    assert runner.command_line() == "python examples/experiments/mine.py --jobs=0"
