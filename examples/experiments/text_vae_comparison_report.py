"""The report of the text VAE experiment: tables, the frontier as a figure, and texts verbatim."""

import argparse
import statistics
from pathlib import Path

from runner import cell, over_seeds, table_of_rows, write_report

# Column, name in the results, factor, digits
RECONSTRUCTION = [
    ("exact match, %", "exact_match", 100, 1),
    ("BLEU", "bleu", 1, 1),
    ("token error, %", "token_error", 100, 1),
    ("cross-entropy", "cross_entropy", 1, 2),
    ("of a draw", "cross_entropy_sampled", 1, 2),
    ("KL_G", "kl_gaussian", 1, 3),
    ("KL_D", "kl_dirichlet", 1, 3),
    ("rate", "rate", 1, 1),
    ("as published", "rate_published", 1, 1),
    ("vectors kept, %", "prop_vectors", 100, 1),
    ("effective", "effective_vectors", 1, 1),
    ("active units, %", "active_units", 100, 0),
    ("information", "mutual_information", 1, 2),
]
SAMPLES = [
    ("perplexity", "perplexity", 1, 0),
    ("to real", "ratio", 1, 2),
    ("reverse perplexity", "reverse_perplexity", 1, 0),
    ("self-BLEU", "self_bleu", 1, 1),
    ("distinct-2, %", "distinct_2", 100, 1),
    ("copied, %", "copied", 100, 1),
]
INTERPOLATIONS = [
    ("edits a step", "word_edits", 1, 2),
    ("largest step, %", "largest_step", 100, 0),
]
METHODS = ("transport", "mixture")  # of interpolation
# What is kept of a training's log
TRACE = ("step", "cross_entropy", "kl_gaussian", "prop_vectors", "dropping_share", "constraint_beta")
LEGEND = """
Mean ± standard deviation over seeds. Cross-entropy in nats per token, of the posterior itself and of one draw of it;
`KL_G` and `KL_D` as the loss weighs them (`KL_G` is a mean over vectors and channels); rate: nats that the latent of a
text costs, `n' P KL_G + n' KL_D` of the vectors that are drawn, which is what methods are compared by; as published:
with vectors weighted by their pseudo-counts; information: a lower bound, in nats, of what the latent tells of the
text, at most log 32 = 3.47.
"""
SAMPLES_LEGEND = """
Samples from the prior, as long as the latents of held-out texts are, each written greedily, by 4 beams and by nucleus
sampling (`top_p` 0.9). Perplexity under the language model, and its ratio to that of as many held-out texts; reverse
perplexity: of held-out texts under a small language model trained on the samples.
"""
INTERPOLATIONS_LEGEND = """
Between pairs of held-out texts at 7 weights: words edited between neighbours, the share of a path's edits that its
largest step takes (17 % is even), and the perplexity at each weight.
"""
TARGET_BLEU = 60


def values(group: list[dict], name: str, factor: float = 1) -> list[float]:
    """A number of each run of a group that has it."""
    found = (record["results"].get(name) for record in group)
    return [factor * value for value in found if value is not None]


def label(group: list[dict]) -> str:
    settings = group[0]["settings"]
    named = [f"`{name}={value}`" for name, value in settings["setting"].items()]
    return ", ".join([*named, f"{settings['steps']} steps"] if "steps" in settings else named)  # real texts take none


def row(group: list[dict], columns: list[tuple], prefix: str = "", **more: str) -> dict[str, str]:
    """What a group is, ``more`` of that, and its numbers, whose names in the results have a ``prefix``."""
    numbers = {title: cell(values(group, prefix + name, factor), digits) for title, name, factor, digits in columns}
    return {"method": group[0]["settings"]["method"], "setting": label(group), "seeds": len(group), **more, **numbers}


def samples_table(real: list[dict], groups: list[list[dict]]) -> str:
    """Real texts, then a row for each way in which the samples of a group are written."""
    rows = [row(real, SAMPLES, decoding="")]
    for group in groups:
        kinds = group[0]["results"].get("shown_samples", {})
        rows += [row(group, SAMPLES, f"{kind}_", decoding=kind) for kind in kinds]
    return table_of_rows(rows)


def interpolations_table(groups: list[list[dict]]) -> str:
    """A row for each way to interpolate, the perplexity at each weight at its end."""
    rows = []
    for group in groups:
        for method in METHODS:
            by_weight = list(zip(*values(group, f"{method}_fluency"), strict=True))
            cells = {f"{i / (len(by_weight) - 1):.2f}": cell(column, 0) for i, column in enumerate(by_weight)}
            rows.append({**row(group, INTERPOLATIONS, f"{method}_", interpolation=method), **cells})
    return table_of_rows(rows)


def shown(groups: list[list[dict]]) -> list[list[dict]]:
    """Of each method the setting with the most fluent samples among those of BLEU 60 or more, or the best BLEU."""
    by_method: dict[str, list[list[dict]]] = {}
    for group in groups:
        by_method.setdefault(group[0]["settings"]["method"], []).append(group)

    def order(group: list[dict]) -> tuple[bool, float]:
        bleu = statistics.fmean(values(group, "bleu"))
        perplexity = values(group, "greedy_perplexity")
        good = bleu >= TARGET_BLEU and bool(perplexity)
        return not good, statistics.fmean(perplexity) if good else -bleu

    return [min(of_method, key=order) for of_method in by_method.values()]


def verbatim(group: list[dict]) -> str:
    """Reconstructions, samples and an interpolation of the first seed, as they are."""
    first = min(group, key=lambda record: record["settings"]["seed"])
    results = first["results"]
    title = f"### {first['settings']['method']} {label(group)}"
    pairs = [{"held-out text": a, "reconstruction": b} for a, b in results["shown_reconstructions"]]
    parts = [title, table_of_rows(pairs)]
    if shown_samples := results.get("shown_samples"):
        texts = zip(*shown_samples.values(), strict=True)
        titles = [f"samples from the prior, {kind}" for kind in shown_samples]
        parts.append(table_of_rows([dict(zip(titles, written, strict=True)) for written in texts]))
    steps = zip(*(results[f"{method}_shown"] for method in METHODS), strict=True)
    last = len(results[f"{METHODS[0]}_shown"]) - 1
    walk = [{"weight": f"{i / last:.2f}", **dict(zip(METHODS, texts, strict=True))} for i, texts in enumerate(steps)]
    return "\n\n".join([*parts, table_of_rows(walk)])


def draw(groups: list[list[dict]], real: list[dict], path: Path) -> None:
    """The frontiers: distortion and reconstruction against the rate, and reconstruction against samples.

    A point for each run, a diamond for their mean, a colour for each method.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {
        "rate": "rate, nats a text",
        "distortion": "distortion, nats a text (of a draw)",
        "bleu": "BLEU of reconstructions",
        "greedy_perplexity": "perplexity of samples, greedy",
        "beam_perplexity": "perplexity of samples, 4 beams",
    }
    panels = [("rate", "distortion"), ("rate", "bleu"), ("greedy_perplexity", "bleu"), ("beam_perplexity", "bleu")]
    with_rate = [group for group in groups if values(group, "rate")]
    methods = list(dict.fromkeys(group[0]["settings"]["method"] for group in with_rate))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4), layout="constrained")
    for axis, (across, up) in zip(axes, panels, strict=True):
        for group in with_rate:
            colour = f"C{methods.index(group[0]['settings']['method'])}"
            x, y = values(group, across), values(group, up)
            axis.plot(x, y, "o", color=colour, alpha=0.35, markersize=4)
            axis.plot(statistics.fmean(x), statistics.fmean(y), "D", color=colour)
        axis.set(xlabel=titles[across], ylabel=titles[up], xscale="log")
    of_real = statistics.fmean(values(real, "perplexity"))
    for axis in axes[2:]:
        axis.axvline(of_real, color="grey", linestyle=":", label="held-out texts")
        axis.axvline(2 * of_real, color="grey", linestyle="--", label="twice that")
    for axis in axes[1:]:
        axis.axhline(TARGET_BLEU, color="grey", linestyle="--")
    axes[-1].legend(fontsize=8)
    handles = [plt.Line2D([], [], marker="D", linestyle="", color=f"C{i}", label=m) for i, m in enumerate(methods)]
    axes[0].legend(handles=handles, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def entries(record: dict) -> list[dict]:
    """A training's log, an entry after the other."""
    trace = record["results"]["trace"]
    return [dict(zip(trace, numbers, strict=True)) for numbers in zip(*trace.values(), strict=True)]


def control_table(groups: list[list[dict]]) -> str:
    """What the constraint held: no collapse, no oscillation."""
    rows = []
    for group in groups:
        after = [[e for e in entries(record) if e["dropping_share"] > 0] for record in group]
        betas = [[entry["constraint_beta"] for entry in trace] for trace in after]
        rows.append(
            {
                "method": group[0]["settings"]["method"],
                "setting": label(group),
                "first met at step": cell((trace[0]["step"] for trace in after), 0),
                "highest cross-entropy from there": cell((max(e["cross_entropy"] for e in t) for t in after), 2),
                "last cross-entropy": cell((trace[-1]["cross_entropy"] for trace in after), 2),
                "last multiplier": cell((beta[-1] for beta in betas), 2),
                "its largest to its last": cell((max(beta) / beta[-1] for beta in betas), 2),
            }
        )
    return table_of_rows(rows)


def draw_traces(groups: list[list[dict]], path: Path) -> None:
    """How the constrained trainings went: a line for each seed, a colour for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("cross_entropy", "cross-entropy of training", "log"),
        ("constraint_beta", "multiplier", "log"),
        ("kl_gaussian", "KL_G", "log"),
        ("prop_vectors", "share of vectors above the threshold", "linear"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for number, group in enumerate(groups):
        method = group[0]["settings"]["method"]
        for record in group:
            trace = record["results"]["trace"]
            for axis, (name, _, _) in zip(axes, panels, strict=True):
                axis.plot(trace["step"], trace[name], color=f"C{number}", alpha=0.7, label=f"{method} {label(group)}")
        tolerance = group[0]["settings"]["setting"]["cross_entropy"]
        axes[0].axhline(tolerance, color=f"C{number}", linestyle=":")
    for axis, (_, title, scale) in zip(axes, panels, strict=True):
        axis.set(xlabel="step", title=title, yscale=scale)
    handles, labels = axes[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes[-1].legend(once.values(), once.keys(), fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(args: argparse.Namespace, records: dict[str, dict], real: str) -> None:
    """Write the report and its figure; ``real`` is what the runs on real texts are called."""
    groups = over_seeds(records)
    of_real = next(group for group in groups if group[0]["settings"]["method"] == real)
    groups = [group for group in groups if group is not of_real]
    yardstick = statistics.fmean(values(of_real, "perplexity"))
    for record in records.values():
        results = record["results"]
        results |= {
            name.replace("perplexity", "ratio"): value / yardstick
            for name, value in results.items()
            if name.endswith("perplexity") and "reverse" not in name
        }
    size = of_real[0]["settings"]
    args.report.parent.mkdir(parents=True, exist_ok=True)
    figure = args.report.with_suffix(".png")
    draw(groups, of_real, figure)
    begun = [group for group in groups if group[0]["results"]["trace"].get("dropping_share", [0])[-1]]
    constrained = [group for group in begun if "constraint_beta" in group[0]["results"]["trace"]]
    traces = figure.with_stem(f"{figure.stem}_traces")
    if constrained:
        draw_traces(constrained, traces)
    minutes = sum(record["seconds"] for record in records.values()) / 60
    parts = [
        f"{len(records)} runs, {size['batch_size']} texts each step, "
        f"{minutes:.0f} minutes of one core in all. {size['held_out']} held-out texts, {size['samples']} samples, "
        f"judged by the language model `{size['language_model']}`.",
        "## Reconstruction and rate",
        LEGEND.strip(),
        table_of_rows([row(group, RECONSTRUCTION) for group in groups]),
        "## Samples",
        SAMPLES_LEGEND.strip(),
        samples_table(of_real, groups),
        "## Interpolations",
        INTERPOLATIONS_LEGEND.strip(),
        interpolations_table(groups),
        "## Frontier",
        f"![Distortion and BLEU against the rate, BLEU against the perplexity of samples]({figure.name})",
        "Small points are runs, diamonds means over seeds.",
        "## The constrained trainings",
        control_table(constrained) if constrained else "None.",
        f"![Cross-entropy, multiplier, KL and vectors kept over the steps]({traces.name})" if constrained else "",
        "A line for each seed; dotted: the cross-entropy that was accepted.",
        "## Texts, verbatim",
        f"From seed {min(args.seeds)}; of each method the setting with the most fluent samples among those with a "
        f"BLEU of {TARGET_BLEU} or more, or else with the best BLEU.",
        *(verbatim(group) for group in shown(groups)),
    ]
    write_report(args, "Text VAEs on clauses of 4 to 12 words", "\n\n".join(parts))
