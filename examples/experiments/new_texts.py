"""What the latents of `examples/text_vae.py` are good for, by its purposes: new texts, paths, neighbours.

    python examples/experiments/new_texts.py          # about 40 minutes on two CPU cores
    python examples/experiments/new_texts.py --quick  # everything runs, nothing is learnt

Each purpose is trained as the example trains it, on its corpus of clauses. New texts are drawn from the prior, around
held-out texts (`vary_latents`) and between them (`blend_latents`), all written greedily, beside held-out texts.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae as example
import torch
from language_model import load_or_tiny, load_smollm2
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from training import clauses, train
from transformers import set_seed

from nvib_hf import (
    NvibForConditionalGeneration,
    NvibLatents,
    decode_latents,
    encode_texts,
    latent_distance,
    reconstruct,
)
from nvib_hf.evaluation.samples import (
    copied,
    interpolation_scores,
    interpolations,
    latent_lengths,
    sample_scores,
    sample_texts,
    word_edits,
)
from nvib_hf.evaluation.texts import as_read, reconstruction_scores

FULL = {
    "texts": None,
    "held_out": 500,
    "steps": None,
    "batch_size": 64,
    "samples": 200,
    "pairs": 40,
    "judge": "smollm2",
}
QUICK = {"texts": 400, "held_out": 12, "steps": 2, "batch_size": 8, "samples": 8, "pairs": 1, "judge": "tiny"}
TEMPERATURES = (0.5, 1.0, 1.5)
SHOWN = ("from the prior", "around a text, temperature 1.0", "between 2 texts")
PARENTS = (2, 3)
WAYS = ("transport", "mixture")  # of interpolation
NEIGHBOURS = 3
# Column, name in the results, factor, digits
COLUMNS = [
    ("perplexity to real", "fluency_ratio", 1, 2),
    ("self-BLEU", "self_bleu", 1, 1),
    ("distinct-2, %", "distinct_2", 100, 1),
    ("in training, %", "copied", 100, 1),
    ("a given text, %", "given", 100, 1),
    ("words changed", "edits", 1, 1),
]
LEGEND = """
Perplexity is that of the language model, to that of as many held-out texts; in training: word for word a text of the
training; a given text: word for word one of those that the new ones are made of; words changed: from the given text.
"""


def make(model: NvibForConditionalGeneration, tokenizer, given: list[str], held_out: list[str], seed: int) -> dict:
    """New texts by the way in which they were made, as many as ``given``."""
    count = len(given)
    latents = encode_texts(model, tokenizer, given)

    def write(latents: NvibLatents) -> list[str]:
        return decode_latents(model, tokenizer, latents)

    def chance() -> torch.Generator:
        return torch.Generator(model.device).manual_seed(seed)

    texts = {"from the prior": sample_texts(model, tokenizer, count, latent_lengths(model, tokenizer, held_out), seed)}
    for temperature in TEMPERATURES:
        for redraw in (False, True):
            name = f"around a text, temperature {temperature}" + (", weights drawn" if redraw else "")
            texts[name] = write(model.vary_latents(latents, temperature, redraw, generator=chance()))
    for parents in PARENTS:
        texts[f"between {parents} texts"] = write(model.blend_latents(latents, count, parents, generator=chance()))
    return texts


def neighbours(model: NvibForConditionalGeneration, tokenizer, texts: list[str]) -> list[dict[str, str]]:
    """The texts nearest to each of the first few, by transport between latents and by the distance of their means."""
    latents, rows = encode_texts(model, tokenizer, texts), []
    means = latents.pooled()
    for i in range(5):
        by = {
            "transport": latent_distance(latents[[i]], latents),
            "means": (means - means[i]).norm(dim=-1),
        }
        near = {name: distance.argsort()[1 : NEIGHBOURS + 1].tolist() for name, distance in by.items()}
        rows.append({"text": texts[i], **{name: " / ".join(texts[j] for j in found) for name, found in near.items()}})
    return rows


def one(settings: dict, cache: Path) -> dict:
    """Train for a purpose with one seed, and make new texts."""
    seed, purpose = settings["seed"], example.PURPOSES[settings["purpose"]]
    texts, held_out = clauses(settings["texts"], settings["held_out"])
    set_seed(seed)
    model, tokenizer = example.bart(texts, **purpose.settings)
    steps = settings["steps"] or purpose.steps
    train(model, tokenizer, [purpose.steering()], texts, {**settings, "steps": steps})
    model.eval()
    judge = load_or_tiny(settings["judge"], texts, cache)
    judges = {"language_model": judge[0], "lm_tokenizer": judge[1]}

    references = as_read(tokenizer, held_out)
    given = references[: settings["samples"]]
    made = make(model, tokenizer, given, held_out, seed)
    scores = sample_scores(made, references, texts, seed=seed, **judges)
    for name, written in made.items():
        scores[name]["given"] = copied(written, given)
        if name not in SHOWN:
            del scores[name]["examples"]
        if name.startswith("around"):
            edits = [word_edits(a, b) for a, b in zip(written, given, strict=True)]
            scores[name]["edits"] = sum(edits) / len(edits)
    pairs = list(zip(references[::2], references[1::2], strict=False))[: settings["pairs"]]
    walks = {way: interpolations(model, tokenizer, pairs, method=way) for way in WAYS}
    return {
        "reconstruction": reconstruction_scores(reconstruct(model, tokenizer, held_out), references),
        "new": scores,
        "given": given[:8],
        "walks": {way: interpolation_scores(paths, **judges) for way, paths in walks.items()},
        "walk": {way: paths[0] for way, paths in walks.items()},
        "neighbours": neighbours(model, tokenizer, references),
    }


# ---------------------------------------------------------------------------------------------- report
def over_runs(group: list[dict], *names: str, factor: float = 1, digits: int = 2) -> str:
    """A number of the results, mean and deviation over the runs of a group."""
    found = []
    for record in group:
        value = record["results"]
        for name in names:
            value = value.get(name, {})
        found.append(factor * value if isinstance(value, int | float) else None)
    return cell(found, digits)


def report(groups: list[list[dict]]) -> str:
    parts = [LEGEND.strip()]
    for group in groups:
        first, purpose = group[0]["results"], group[0]["settings"]["purpose"]
        exact = over_runs(group, "reconstruction", "exact_match", factor=100, digits=1)
        bleu = over_runs(group, "reconstruction", "bleu", digits=1)
        rows = []
        for kind in ("real", *(kind for kind in first["new"] if kind != "real")):
            numbers = {
                title: over_runs(group, "new", kind, name, factor=factor, digits=digits)
                for title, name, factor, digits in COLUMNS
            }
            rows.append({"texts": "held out" if kind == "real" else kind, **numbers})
        walks = []
        for way, scores in first["walks"].items():
            last = len(scores["fluency"]) - 1
            ratios = {f"{i / last:.2f}": f"{x / scores['fluency'][0]:.2f}" for i, x in enumerate(scores["fluency"])}
            edits = over_runs(group, "walks", way, "word_edits")
            walks.append({"interpolation": way, "edits per step": edits, **ratios})
        examples = {kind: first["new"][kind]["examples"] for kind in SHOWN}
        shown = [dict(zip(examples, texts, strict=True)) for texts in zip(*examples.values(), strict=True)]
        shown = [{"text": text, **row} for text, row in zip(first["given"], shown, strict=False)]
        steps = [dict(zip(first["walk"], texts, strict=True)) for texts in zip(*first["walk"].values(), strict=True)]
        parts += [
            f"## {purpose}",
            f"{exact} % of the held-out texts exact, BLEU {bleu}.",
            table_of_rows(rows),
            "Perplexity of the texts at each weight between two held-out ones, to that of the first ends:",
            table_of_rows(walks),
            "Verbatim, of the first seed:",
            table_of_rows(shown),
            "A walk:",
            table_of_rows(steps),
            "Nearest held-out texts, by `latent_distance` and by the distance of `pooled()`:",
            table_of_rows(first["neighbours"]),
        ]
    return "\n\n".join(parts)


def main() -> None:
    args = parser(__doc__.splitlines()[0], "new_texts", example.PURPOSES).parse_args()
    cache = args.output / "smollm2"
    if not args.quick and args.jobs:
        load_smollm2(cache)  # by one process, before many want it
    size = QUICK if args.quick else FULL
    runs = {
        f"{purpose}-seed{seed}": {"purpose": purpose, "seed": seed, **size}
        for seed in args.seeds
        for purpose in args.only
    }
    groups = over_seeds(run_all(partial(one, cache=cache), runs, args.output, args.jobs))
    write_report(args, "New texts from latents", report(groups))


if __name__ == "__main__":
    main()
