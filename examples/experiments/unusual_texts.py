"""Unusual texts found: what latents and their learned prior say of texts that are not like those of the training.

    python examples/experiments/unusual_texts.py          # ten minutes of a CPU core a seed, after the main job
    python examples/experiments/unusual_texts.py --quick  # everything runs, nothing is learnt

The model is that of `examples/text_vae.py --output DIR/vae`, which is trained if the folder is not there; DIR is
`--output`. Usual texts are 500 of its held-out texts. Unusual ones are texts of WordNet, and what becomes of the other
held-out texts when their words or letters change places. All have as many words as held-out texts have. Scores are of

* `latents`, with a learned prior;
* `tokens`, the ceiling: the language model of tokens of `latent_prior.py`, of the same size and steps as the prior.

It needs WordNet: `apt install wordnet-base`. Without it `--quick` leaves its texts out.
"""

import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import numpy as np
import text_vae as example
import torch
import wordnet
from latent_prior import BATCH_SIZE, Vae, codes_nats, independent_rate, token_model, train_vae
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from scipy.stats import bootstrap, mannwhitneyu
from token_model import TokenModel

from nvib_hf import encode_texts
from nvib_hf.evaluation.texts import evaluating, labels_of, negative_log_likelihood

FULL = {"steps": 2000, "texts": 500, "resamples": 1000}
QUICK = {"steps": 2, "texts": 20, "resamples": 10}
ALARMS = 0.05  # of usual texts: the threshold
OF_TOKENS = ["language model", "language model, per token"]
DEFINITIONS, SENTENCES = "WordNet's definitions", "WordNet's example sentences"
LEGEND = """
AUROC: how often the score of an unusual text is above that of a usual one; 0.5 is chance. In brackets a 95 % interval
of a bootstrap over both. All scores are nats, but for the number of vectors, which is that of sub-words: in total, and
for each vector. A text is found if its score is above a threshold that 5 % of other usual texts exceed (256 of those
that steered the training of the VAE and of the prior).
"""
Scores = dict[str, np.ndarray]


# ---------------------------------------------------------------------------------------------- texts
def in_random_order(text: str, chance: random.Random, known: set[str]) -> str:
    """Its words in another order. A capital of the first place stays there, if the word is known without it."""
    words = text.split()
    if capital := words[0].lower() in known and words[0] not in known:
        words[0] = words[0].lower()
    chance.shuffle(words)
    if capital:
        words[0] = words[0][0].upper() + words[0][1:]
    return " ".join(words)


def with_a_word_exchanged(text: str, chance: random.Random, vocabulary: list[str]) -> str:
    """One word, but not the first, is any word of the vocabulary."""
    words = text.split()
    places = [i for i, word in enumerate(words) if i and word.isalpha()]
    words[chance.choice(places or [len(words) - 1])] = chance.choice(vocabulary)
    return " ".join(words)


def joined(first: str, second: str) -> str:
    """The first half of a text's words, and the second half of another's."""
    words, others = first.split(), second.split()
    return " ".join(words[: len(words) // 2] + others[len(others) // 2 :])


def with_letters_scrambled(text: str, chance: random.Random) -> str:
    """Inside each word: its first and its last letter stay."""

    def scrambled(found: re.Match) -> str:
        first, *inside, last = found[0]
        return "".join([first, *chance.sample(inside, len(inside)), last])

    return re.sub(r"[^\W\d_]{4,}", scrambled, text)


def as_long(texts: list[str], like: list[str], chance: random.Random) -> list[str]:
    """Some of the texts, with as many words as others have."""
    by_length = defaultdict(list)
    for text in chance.sample(texts, len(texts)):
        by_length[len(text.split())].append(text)
    return [by_length[len(text.split())].pop() for text in like]


def unusual(held_out: list[str], training: list[str], with_wordnet: bool, seed: int) -> dict[str, list[str]]:
    """Unusual texts by their kind, made of held-out ones or as long; without those that have come out as they were."""
    chance = random.Random(seed)
    vocabulary = sorted({word for text in training for word in text.split()[1:] if word.isalpha()})
    known = set(vocabulary)
    made = {}
    if with_wordnet:
        made[DEFINITIONS] = as_long(wordnet.definitions(), held_out, chance)
        made[SENTENCES] = as_long(wordnet.example_sentences(), held_out, chance)
    made |= {
        "words in random order": [in_random_order(text, chance, known) for text in held_out],
        "one word exchanged": [with_a_word_exchanged(text, chance, vocabulary) for text in held_out],
        "two halves joined": list(map(joined, held_out, held_out[1:] + held_out[:1])),
        "letters scrambled": [with_letters_scrambled(text, chance) for text in held_out],
    }
    usual = {*held_out, *training}
    return {kind: [text for text in texts if text not in usual] for kind, texts in made.items()}


# --------------------------------------------------------------------------------------------- scores
def of_latents(vae: Vae, texts: list[str]) -> Iterator[Scores]:
    """The scores of texts, in batches."""
    model, most = vae.model, vae.model.latent_prior.max_length
    for start in range(0, len(texts), BATCH_SIZE):
        some = texts[start : start + BATCH_SIZE]
        latents = encode_texts(model, vae.tokenizer, some, max_length=most)
        labels = labels_of(model, vae.tokenizer, some, most)
        with evaluating(model):
            distortion = negative_log_likelihood(model, labels, encoder_outputs=latents)
        rate = model.rate(latents)
        yield {
            "vectors": latents.num_vectors,
            "-log_prob": -model.log_prob(latents),
            "rate": rate,
            "codes": codes_nats(model)(latents),
            "independent rate": independent_rate(model, latents),
            "distortion": distortion,
            "rate + distortion": rate + distortion,
        }


def of_tokens(model: TokenModel, vae: Vae, texts: list[str]) -> Iterator[Scores]:
    """The same of the language model, text by text."""
    for ids in vae.ids(texts):
        yield {"tokens": torch.tensor([len(ids)]), "language model": torch.tensor([model.mean_nats([ids], 1)])}


def with_means(batches: Iterator[Scores]) -> Scores:
    """The scores of all texts, in total and for each of what the first one counts."""
    batches = list(batches)
    counted, *names = batches[0]
    found = {name: torch.cat([batch[name] for batch in batches]).double().numpy() for name in (counted, *names)}
    return found | {f"{name}, per {counted.removesuffix('s')}": found[name] / found[counted] for name in names}


def auroc(high: np.ndarray, low: np.ndarray, axis: int = -1) -> np.ndarray:
    """The share of pairs in which the first is above the second; equal ones count half."""
    return mannwhitneyu(high, low, axis=axis).statistic / (high.shape[axis] * low.shape[axis])


def interval(high: np.ndarray, low: np.ndarray, resamples: int) -> list[np.ndarray | float]:
    """The AUROC, and a 95 % interval of a bootstrap over both."""
    how = {"n_resamples": resamples, "batch": 100, "method": "percentile", "vectorized": True}
    found = bootstrap((high, low), auroc, rng=np.random.default_rng(0), **how).confidence_interval
    return [auroc(high, low), found.low, found.high]


def one(settings: dict, folder: Path) -> dict:
    """Of each score, in thousandths: usual texts above the threshold; of each kind AUROC, interval, texts found."""
    vae = Vae(folder / "vae", settings["texts"] == QUICK["texts"])
    usual, others = vae.held_out[: settings["texts"]], vae.held_out[settings["texts"] :]
    texts = unusual(others, vae.texts, settings["wordnet"], settings["seed"])
    if settings["method"] == "tokens":
        score = partial(of_tokens, token_model(vae, settings), vae)
    else:
        example.learn_prior(vae.model, vae.tokenizer, vae.texts, vae.watched, settings["steps"], settings["seed"])
        score = partial(of_latents, vae)
    chosen_on, of_usual = with_means(score(vae.watched)), with_means(score(usual))
    of_unusual = [with_means(score(some)) for some in texts.values()]
    results: dict = {"usual": len(usual), "kinds": {kind: len(some) for kind, some in texts.items()}}
    for name in OF_TOKENS if settings["method"] == "tokens" else of_usual:
        threshold, low = np.quantile(chosen_on[name], 1 - ALARMS), of_usual[name]
        rows = [[(low > threshold).mean()]]
        for high in (scores[name] for scores in of_unusual):
            rows.append([*interval(high, low, settings["resamples"]), (high > threshold).mean()])
        results[name] = [[round(1000 * float(x)) for x in row] for row in rows]
    return results


# --------------------------------------------------------------------------------------------- report
def report(groups: list[list[dict]]) -> str:
    parts = [LEGEND.strip()]
    kinds = groups[0][0]["results"]["kinds"]
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    parts.append(f"Usual texts: {groups[0][0]['results']['usual']}. Unusual ones: {counts}.")
    areas, shares = [], []
    for group in groups:
        for name in (name for name in group[0]["results"] if name not in ("usual", "kinds")):
            tables = [record["results"][name] for record in group]
            row = {"score": name}
            of_kind = {kind: [table[i] for table in tables] for i, kind in enumerate(kinds, 1)}
            areas.append(row | {kind: area(found) for kind, found in of_kind.items()})
            above = {"usual": [table[0][0] for table in tables]}
            above |= {kind: [x[3] for x in found] for kind, found in of_kind.items()}
            shares.append(row | {kind: cell([x / 10 for x in found], 0) for kind, found in above.items()})
    parts += ["AUROC:", table_of_rows(areas), "Found, in percent:", table_of_rows(shares)]
    return "\n\n".join(parts)


def area(found: list[list[int]]) -> str:
    """An AUROC with its interval; of several seeds mean and deviation."""
    interval = f" [{found[0][1] / 1000:.3f}, {found[0][2] / 1000:.3f}]" if len(found) == 1 else ""
    return cell([x[0] / 1000 for x in found], 3) + interval


def main() -> None:
    args = parser(__doc__.splitlines()[0], "unusual_texts", ["latents", "tokens"]).parse_args()
    with_wordnet = not args.quick or wordnet.is_installed()
    if args.jobs:
        if with_wordnet:
            wordnet.path("data.noun")
        train_vae(args.output / "vae", args.quick)
    size = {**(QUICK if args.quick else FULL), "wordnet": with_wordnet}
    runs = {
        f"{method}-seed{seed}": {"method": method, "seed": seed, **size} for method in args.only for seed in args.seeds
    }
    records = run_all(partial(one, folder=args.output), runs, args.output, args.jobs)
    write_report(args, "Unusual texts found", report(over_seeds(records)))


if __name__ == "__main__":
    main()
