"""Results of :func:`~nvib_hf.evaluation.evaluate.evaluate` in Markdown, and in a model's card."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..files import write_whole
from ..wrapping.model_card import markdown_table, verbatim

BEGIN, END = "<!-- evaluation of nvib_hf: begin -->", "<!-- evaluation of nvib_hf: end -->"

EVALUATION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n?", re.DOTALL)

# For each part of the results, in the order of the tables: the title of each number, and its format.
ROWS = {
    "reconstruction": {
        "exact_match": ("exact reconstructions", "{:.1%}"),
        "bleu": ("reconstruction BLEU", "{:.1f}"),
        "token_error": ("word error of reconstructions", "{:.1%}"),
    },
    "rate_distortion": {
        "cross_entropy": ("cross-entropy, nats per token", "{:.3f}"),
        "cross_entropy_sampled": ("the same, of a sampled latent", "{:.3f}"),
        "rate": ("rate: what a latent costs, nats per text", "{:.1f}"),
        "rate_published": ("the same, by the published KL", "{:.1f}"),
        "rate_learned": ("the same, under the learned prior", "{:.1f}"),
        "kl_gaussian_per_token": ("KL of the vectors that are drawn, nats per token", "{:.2f}"),
        "kl_gaussian_published_per_token": ("the same, weighted by pseudo-counts as published", "{:.2f}"),
        "kl_dirichlet_per_token": ("KL of the weights, nats per token", "{:.2f}"),
        "kl_gaussian": ("KL of the vectors, as in the loss", "{:.3f}"),
        "kl_dirichlet": ("KL of the weights, as in the loss", "{:.3f}"),
        "elbo": ("ELBO, nats per token", "{:.2f}"),
        "iw_elbo": ("ELBO of the draws, nats per token", "{:.2f}"),
        "iw_log_likelihood": ("importance-weighted log-likelihood, nats per token", "{:.2f}"),
        "num_vectors": ("vectors kept", "{:.1f}"),
        "prop_vectors": ("share of the vectors kept", "{:.1%}"),
        "effective_vectors": ("effective number of vectors", "{:.1f}"),
        "active_units": ("active units", "{:.1%}"),
        "mutual_information": ("mutual information (lower bound), nats", "{:.2f}"),
    },
    "samples": {
        "fluency": ("perplexity under a language model", "{:.1f}"),
        "fluency_ratio": ("by that of real texts", "{:.2f}"),
        "self_bleu": ("self-BLEU", "{:.1f}"),
        "distinct_1": ("distinct words", "{:.1%}"),
        "distinct_2": ("distinct word pairs", "{:.1%}"),
        "copied": ("copies of a training text", "{:.1%}"),
    },
    "interpolation": {
        "word_edits": ("words edited between neighbours", "{:.2f}"),
        "largest_step": ("share of a path's edits in its largest step", "{:.1%}"),
        "embedding_distance": ("embedding distance between neighbours", "{:.3f}"),
        "largest_embedding_distance": ("its largest on a path", "{:.3f}"),
    },
}

KEPT = {
    "by_length": "tokens of the text",
    "by_position": "part of the text",
    "by_frequency": "how frequent the token is",
}


def result_tables(results: dict) -> list[list[tuple[str, ...]]]:
    """The measured numbers as tables. The first row of each table holds its titles.

    The tables are: reconstruction and rate; samples by decoding; interpolations by method.
    """
    of_texts = [_rows(part, [results.get(part, {})]) for part in ("reconstruction", "rate_distortion")]
    tables = [[("measure", "value"), *of_texts[0], *of_texts[1]]]
    if samples := results.get("samples"):
        kinds = [f"{kind} texts" if kind == "real" else verbatim(kind) for kind in samples]
        tables.append([("samples from the prior", *kinds), *_rows("samples", list(samples.values()))])
    if paths := results.get("interpolation"):
        tables.append([("interpolations", *map(verbatim, paths)), *_rows("interpolation", list(paths.values()))])
    return tables


def _walk(paths: dict[str, dict]) -> list[tuple[str, ...]]:
    """A table with titles: each method's example at every weight, and the perplexity at that weight."""
    steps = len(next(iter(paths.values()))["example"])
    columns = {"weight": [f"{i / (steps - 1):.2f}" for i in range(steps)]}
    for method, path in ((verbatim(name), path) for name, path in paths.items()):
        columns[method] = [verbatim(text) for text in path["example"]]
        if "fluency" in path:
            columns[f"perplexity, {method}"] = [_written(value, "{:.1f}") for value in path["fluency"]]
    return [tuple(columns), *zip(*columns.values(), strict=True)]


def _rows(part: str, columns: list[dict]) -> list[tuple[str, ...]]:
    """A row for each number that at least one column has."""
    return [
        (title, *(_written(column[name], form) if name in column else "" for column in columns))
        for name, (title, form) in ROWS[part].items()
        if any(name in column for column in columns)
    ]


def evaluation_section(results: dict) -> str:
    """Results in Markdown, without a heading of their own."""
    settings, samples, paths = results["settings"], results.get("samples", {}), results.get("interpolation", {})
    first, *others = result_tables(results)
    parts = [
        f"Over {settings['texts']} held-out texts{_cut(settings)} (greedy decoding, seed {settings['seed']}):",
        markdown_table(*first),
    ]
    for name, title in KEPT.items():
        if groups := results.get("kept", {}).get(name):
            rows = [
                (verbatim(g["group"]), f"{g['kept']:.1%}", f"{g['log_alpha']:.2f}", str(g["tokens"])) for g in groups
            ]
            parts.append(markdown_table((title, "kept", "mean log pseudo-count", "tokens"), *rows))
    parts += [markdown_table(*table) for table in others]
    if paths:
        parts += [
            "Between two held-out texts, and the perplexity of all interpolations:",
            markdown_table(*_walk(paths)),
        ]
    for kind, of_kind in samples.items():
        if texts := of_kind.get("examples"):
            listed = "\n".join(f"- {verbatim(text)}" for text in texts)
            parts.append(f"Samples from the prior, {verbatim(kind)}:\n\n{listed}")
    return "\n\n".join(parts)


def _cut(settings: dict) -> str:
    """Says how many texts lost their end."""
    counts = {what: settings.get(f"{what}_cut") for what in ("texts", "targets")}
    said = [f"{count} {what}" for what, count in counts.items() if count]
    return f", {' and '.join(said)} cut to {settings['max_length']} tokens" if said else ""


def add_to_model_card(folder: str | os.PathLike, results: dict) -> None:
    """Write results into ``folder/README.md``, in place of earlier ones. The rest of the card does not change.

    ``huggingface_hub.upload_folder`` publishes the card with the folder. If a repository has no card yet,
    ``model.push_to_hub`` writes a new one.

    Raises:
        FileNotFoundError: there is no card. ``save_pretrained`` of an NVIB model writes one.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Call model.save_pretrained({str(folder)!r}): it writes a card."
        )
    card = path.read_text(encoding="utf-8")
    section = f"{BEGIN}\n## Evaluation\n\n{evaluation_section(results)}\n{END}\n"
    write_whole(path, with_evaluation(card, section))


def with_evaluation(card: str, section: str | None) -> str:
    """A card with this evaluation section (see :func:`evaluation_of`), in place of an earlier one."""
    if section is None:
        return card
    if EVALUATION.search(card):
        return EVALUATION.sub(lambda _: section, card, count=1)
    if "\n## Citation\n" in card:
        return card.replace("\n## Citation\n", f"\n{section}\n## Citation\n", 1)
    return f"{card.rstrip()}\n\n{section}"


def evaluation_of(card: str) -> str | None:
    """The section that :func:`add_to_model_card` wrote into a card; ``None`` if there is none."""
    found = EVALUATION.search(card)
    return None if found is None else found[0]


def _written(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
