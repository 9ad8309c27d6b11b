"""The report of long_sources.py."""

import sys
from pathlib import Path

import numpy as np
from runner import table_of_rows

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples
import word_errors

ALL = "all"
Group = list[dict]  # the records of all seeds


def cases(group: Group) -> list[tuple[int, str, float]]:
    """Length, row and share of each test, in their order."""
    names = [(name.split(" ", 1)[0], *name.split(" ", 1)[1].rsplit(" ", 1)) for name in group[0]["results"]["right"]]
    return [(int(length), row, float(share)) for length, row, share in names]


def right_of(group: Group, length: int, row: str, share: float) -> np.ndarray:
    """Right values and those asked for, a row for each source of all seeds."""
    name = f"{length} {row} {share:g}"
    return np.concatenate([np.reshape(record["results"]["right"][name], (-1, 2)) for record in group])


def percent(group: Group, length: int, row: str, share: float) -> str:
    if (length, row, share) not in cases(group):
        return ""
    right, asked = right_of(group, length, row, share).sum(0)
    return f"{100 * right / asked:.1f}"


def difference(first: np.ndarray, second: np.ndarray) -> str:
    """In points, with an interval of 95 % of a bootstrap over sources."""
    found = word_errors.difference(second[:, 0], first[:, 0], first[:, 1])
    return f"{found['difference']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]"


def by_row(group: Group, length: int) -> str:
    tests = [case for case in cases(group) if case[0] == length]
    shares = list(dict.fromkeys(share for _, _, share in tests))
    return table_of_rows(
        [
            {"what the decoder reads": row, **{f"{share:.0%}": percent(group, length, row, share) for share in shares}}
            for row in dict.fromkeys(row for _, row, _ in tests)
        ]
    )


def by_length(group: Group) -> str:
    """A row for each way and share that was tried at all lengths."""
    tests = cases(group)
    lengths = sorted({length for length, _, _ in tests})
    rows = [(row, share) for length, row, share in tests if length == tests[-1][0]]
    return table_of_rows(
        [
            {
                "what the decoder reads": row if row == ALL else f"{row}, {share:.0%}",
                **{str(length): percent(group, length, row, share) for length in lengths},
            }
            for row, share in rows
        ]
    )


def fine_tuned(groups: dict[str, Group], tuned: dict[str, str], length: int) -> str:
    """Each fine-tuned model as it was trained, beside the plain one, and the gap between the two."""
    shares = list(dict.fromkeys(share for tested, _, share in cases(groups["reduced"]) if tested == length))
    rows = []
    for share in shares:
        read = {method: (length, ALL if share == 1 else row, share) for method, row in tuned.items()}
        cells = {f"{tuned[method]}, not trained": percent(groups["reduced"], *case) for method, case in read.items()}
        cells |= {f"{tuned[method]}, trained": percent(groups[method], *case) for method, case in read.items()}
        first, second = (right_of(groups[method], *case) for method, case in read.items())
        rows.append({"vectors": f"{share:.0%}", **cells, "difference, trained": difference(first, second)})
    return table_of_rows(rows)


def times(records: list[dict], batch: int, tokens: int) -> str:
    """Milliseconds of a batch, the whole beside the first row's, and the cache of one source."""
    rows = []
    for record in records:
        encoder, reduction, *decoding = record["seconds"]
        first_encoder, first_reduction, *first_decoding = records[0]["seconds"]
        shares = [
            (encoder + reduction + x) / (first_encoder + first_reduction + y)
            for x, y in zip(decoding, first_decoding, strict=True)
        ]
        greedy, beams = (f"{1000 * x:.0f} ({share:.2f})" for x, share in zip(decoding, shares, strict=True))
        rows.append(
            {
                "what the decoder reads": record["row"] + ("" if record["share"] == 1 else f", {record['share']:.0%}"),
                "encoder": f"{1000 * encoder:.0f}",
                "reduction": f"{1000 * reduction:.0f}",
                f"{tokens} tokens, greedy (whole)": greedy,
                "5 beams (whole)": beams,
                "cache, KB": f"{record['bytes'][0] / batch / 1000:.0f}",
                "with 5 beams": f"{record['bytes'][1] / batch / 1000:.0f}",
            }
        )
    return table_of_rows(rows)


def report(groups: dict[str, Group], tuned: dict[str, str]) -> str:
    """The tables of those methods that are there.

    Args:
        groups: records by method: the training (``"plain"``), its tests (``"reduced"``), and the fine-tunings.
        tuned: what each fine-tuning reads.
    """
    minutes = sum(record["seconds"] for group in groups.values() for record in group) / 60
    parts = [f"{minutes:.0f} minutes of one core in all."]
    if "plain" in groups:
        stages, seconds = groups["plain"][0]["results"]["stages"], groups["plain"][0]["seconds"]
        steps = ", ".join(f"{count} of {length} characters (loss {loss:.2f})" for length, count, loss in stages)
        parts.append(f"Steps of the training, by the length of the sources: {steps}; {seconds / 60:.0f} minutes.")
    if "reduced" not in groups:
        return "\n\n".join(parts)
    reduced = groups["reduced"]
    length, *_ = (length for length, _, _ in cases(reduced))
    size = right_of(reduced, length, ALL, 1)
    parts += [
        f"## Nothing trained for it\n\nValues that are right, in percent, of {size[:, 1].sum()} values in {len(size)} "
        f"sources of {length} characters:",
        by_row(reduced, length),
        "Groups of the same size have the same mass, so the mass of means of neighbours makes a difference only where "
        "the last group is smaller. All vectors of a fresh wrap have mass 1, so norms choose what is dropped.",
        "Sources of other lengths. The facts are 40 characters of each, so their share falls from 62 % to 1 %. The "
        "training had sources of up to 512 characters:",
        by_length(reduced),
    ]
    if tuned.keys() <= groups.keys():
        trained = {row: groups[method][0]["results"]["stages"][0] for method, row in tuned.items()}
        steps = [f"{count} steps for {row} (loss {loss:.2f})" for row, (_, count, loss) in trained.items()]
        parts += [
            f"## Fine-tuned\n\n{' and '.join(steps)}, with the share drawn for each step from 1, 1/2, ... 1/10. In "
            "brackets a 95 % interval of a bootstrap over sources:",
            fine_tuned(groups, tuned, length),
        ]
    timing = reduced[0]["settings"]["timing"]
    parts.append("## Time and memory")
    for timed, measured in reduced[0]["results"]["times"].items():
        parts += [
            f"Milliseconds of the processor, one thread, for {timing['batch']} sources of {timed} characters, medians "
            f"of {timing['repeats']}; in brackets all parts together as a share of the plain model's. The cache is "
            "that of cross-attention, for one source:",
            times(measured, timing["batch"], timing["tokens"]),
        ]
    return "\n\n".join(parts)
