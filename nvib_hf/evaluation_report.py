"""Results of :func:`~nvib_hf.evaluation.evaluate` in Markdown, and in a model's card."""

from __future__ import annotations

import os
import re
from pathlib import Path

BEGIN, END = "<!-- evaluation of nvib_hf: begin -->", "<!-- evaluation of nvib_hf: end -->"

# What a number is called, and how it is written: of each part of the results, in the order of the table.
ROWS = {
    "reconstruction": {
        "exact_match": ("exact reconstructions", "{:.1%}"),
        "bleu": ("reconstruction BLEU", "{:.1f}"),
        "token_error": ("word error of reconstructions", "{:.1%}"),
    },
    "rate_distortion": {
        "cross_entropy": ("cross-entropy, nats per token", "{:.3f}"),
        "cross_entropy_sampled": ("the same, of a sampled latent", "{:.3f}"),
        "kl_gaussian": ("KL of the vectors, as in the loss", "{:.3f}"),
        "kl_dirichlet": ("KL of the weights, as in the loss", "{:.3f}"),
        "kl_gaussian_per_token": ("KL of the vectors, nats per token", "{:.2f}"),
        "kl_dirichlet_per_token": ("KL of the weights, nats per token", "{:.2f}"),
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
        "fluency": ("perplexity of samples under a language model", "{:.1f}"),
        "reverse_perplexity": ("perplexity of real texts, learnt from samples", "{:.1f}"),
        "self_bleu": ("self-BLEU of samples", "{:.1f}"),
        "distinct_1": ("distinct words of samples", "{:.1%}"),
        "distinct_2": ("distinct word pairs of samples", "{:.1%}"),
        "copied": ("samples that copy a training text", "{:.1%}"),
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


def table_rows(results: dict) -> list[tuple[str, str, str]]:
    """The numbers: what it is, its value, and the same of real texts where there is one."""
    rows = []
    for part, names in ROWS.items():
        values = results.get(part, {})
        for name, (title, form) in names.items():
            if name in values:
                real = values.get("real", {}).get(name)
                rows.append((title, _written(values[name], form), "" if real is None else _written(real, form)))
    return rows


def evaluation_section(results: dict) -> str:
    """Results in Markdown, without a heading of their own."""
    settings, samples, path = results["settings"], results.get("samples", {}), results.get("interpolation", {})
    parts = [
        f"Over {settings['texts']} held-out texts"
        + (f" and {samples['num_samples']} samples from the prior" if samples else "")
        + f" (greedy decoding, seed {settings['seed']}):",
        _table(("measure", "value", "real texts"), table_rows(results)),
    ]
    for name, title in KEPT.items():
        if groups := results.get("kept", {}).get(name):
            rows = [(g["group"], f"{g['kept']:.1%}", f"{g['log_alpha']:.2f}", str(g["tokens"])) for g in groups]
            parts.append(_table((title, "kept", "mean log pseudo-count", "tokens"), rows))
    if "example" in path:
        texts = path["example"]
        weights = [f"{i / (len(texts) - 1):.2f}" for i in range(len(texts))]
        columns = {"weight": weights, "between two held-out texts": [_cell(text) for text in texts]}
        if "fluency" in path:
            columns["perplexity at this weight"] = [_written(value, "{:.1f}") for value in path["fluency"]]
        parts.append(_table(tuple(columns), zip(*columns.values(), strict=True)))
    if samples.get("examples"):
        parts.append("Samples from the prior:\n\n" + "\n".join(f"- {_cell(text)}" for text in samples["examples"]))
    return "\n\n".join(parts)


def add_to_model_card(folder: str | os.PathLike, results: dict) -> None:
    """Put results into ``folder/README.md``, in the place of earlier ones; the rest of the card stays as it is.

    Raises:
        FileNotFoundError: no card; ``save_pretrained`` of an NVIB model writes one.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. model.save_pretrained({str(folder)!r}) writes a card.")
    card = path.read_text(encoding="utf-8")
    section = f"{BEGIN}\n## Evaluation\n\n{evaluation_section(results)}\n{END}\n"
    earlier = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n?", re.DOTALL)
    if earlier.search(card):
        card = earlier.sub(lambda _: section, card, count=1)
    elif "\n## Citation\n" in card:
        card = card.replace("\n## Citation\n", f"\n{section}\n## Citation\n", 1)
    else:
        card = f"{card.rstrip()}\n\n{section}"
    path.write_text(card, encoding="utf-8")


def _written(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _cell(text: str) -> str:
    """Text of a model on one line of Markdown, as it stands."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split())) or "*(nothing)*"


def _table(titles: tuple[str, ...], rows) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
