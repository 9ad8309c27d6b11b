"""A model of pronunciation regularised without training: taus tuned on one domain, tested on all.

    python examples/experiments/regularise_trained.py          # about a quarter of an hour of one CPU core
    python examples/experiments/regularise_trained.py --quick  # everything runs, nothing is learnt

A small encoder-decoder learns to pronounce common words of at most 9 letters, as in regulariser.py. It gets NVIB in
all attentions, with empirical priors from training words; the taus are searched by the phone error of validation words
of one domain, and tested on other words of each: in domain, names, and long words. It needs WordNet (`apt install
wordnet-base`; without it `--quick` takes words of the Bible in Basic English) and the extra `search`.
"""

import copy
import random
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the examples

import wordnet
from regulariser import (
    TEST_SETS,
    compared,
    errors,
    interval,
    make_model,
    make_tokenizer,
    pronunciations,
    spelt,
    train,
    word_sets,
)
from runner import over_seeds, parser, run_all, table_of_rows, write_report
from transformers import DataCollatorForSeq2Seq, set_seed

from nvib_hf import NvibForConditionalGeneration, search_taus
from nvib_hf.tau_search import IDENTITY

FULL = {"steps": 2000, "prior": 1000, "tuning": 200, "test": 800, "trials": 24}
QUICK = {"steps": 2, "prior": 20, "tuning": 10, "test": 10, "trials": 2}
METHODS = {f"tuned on {name}": name for name in TEST_SETS}


def phone_error(found: dict[str, list[int]]) -> float:
    return 100 * sum(found["edits"]) / sum(found["phones"])


def one(settings: dict) -> dict:
    """Train, fit priors, search on each domain; the errors of the plain model and of what each search found."""
    seed, tuning = settings["seed"], settings["tuning"]
    said = pronunciations()
    tokenizer = make_tokenizer({phone for variants in said.values() for text in variants for phone in text.split()})
    words = word_sets(sorted(said), settings["corpus"], settings["test"] + tuning)
    sources = tokenizer([spelt(word) for word in words["training"]]).input_ids
    targets = tokenizer([said[word][0] for word in words["training"]]).input_ids
    examples = [{"input_ids": x, "labels": y} for x, y in zip(sources, targets, strict=True)]

    set_seed(seed)
    plain = make_model(tokenizer)
    train(plain, tokenizer, examples, settings["steps"], 1e-3, seed)
    model = NvibForConditionalGeneration.from_base_pretrained(
        copy.deepcopy(plain), attentions=["cross", "encoder", "decoder"], evaluation="mixture"
    ).eval()
    seen, collate = random.Random(seed).sample(examples, settings["prior"]), DataCollatorForSeq2Seq(tokenizer)
    model.fit_prior(collate(seen[i : i + 50]) for i in range(0, len(seen), 50))

    def tested(model) -> dict[str, dict]:
        return {name: errors(model, tokenizer, words[name][tuning:], said) for name in TEST_SETS}

    results, searches = {"plain": tested(plain)}, {}
    for method in settings["methods"]:
        validation = words[METHODS[method]][:tuning]

        def score(model, validation=validation) -> float:
            return phone_error(errors(model, tokenizer, validation, said))

        model.set_taus(**IDENTITY)
        searches[method] = search_taus(model, score, settings["trials"], seed=seed)
        results[method] = tested(model)
    return {**results, "searches": searches, "core seconds": time.process_time()}  # of this process, which has one run


def best_trial(trials: list[dict]) -> dict[str, str]:
    """Of a search the pretrained model's score, the best one, what is between them, and the taus of the best."""
    best = min(trials, key=lambda trial: trial["score"])
    scores = sorted(trial["score"] for trial in trials[1:])
    row = {
        "pretrained, %": f"{trials[0]['score']:.1f}",
        "best, %": f"{best['score']:.1f}",
        "median of the others, %": f"{scores[len(scores) // 2]:.1f}",
    }
    taus = {f"`{name}`, {kind}": f"{value:.3g}" for name in IDENTITY for kind, value in best[name].items()}
    return row | taus


def report(records: list[dict]) -> str:
    (group,) = over_seeds(dict(enumerate(records)))
    settings, rows = group[0]["settings"], []
    for method in settings["methods"]:
        for test_set in TEST_SETS:
            table = compared(group, method, test_set)
            _, low, high = table["phone difference"]
            rows.append(
                {
                    "taus": method,
                    "test": test_set,
                    "plain": interval(*table["phone plain"]),
                    "regularised": interval(*table["phone NVIB"]),
                    "difference": interval(*table["phone difference"], sign="+"),
                    "so it is": "better" if high < 0 else "worse" if low > 0 else "not different",
                    "word error: difference": interval(*table["word difference"], sign="+"),
                }
            )
    searches = [
        {"taus": method, "seed": record["settings"]["seed"], **best_trial(trials)}
        for method in settings["methods"]
        for record in group
        for trials in [record["results"]["searches"][method]]
    ]
    minutes = sum(record["results"]["core seconds"] for record in records) / 60
    return (
        f"{settings['steps']} steps of training; priors from {settings['prior']} training words, {settings['trials']} "
        f"trials on {settings['tuning']} words (the first is the pretrained model), tests on {settings['test']} other "
        f"words of each domain; {minutes:.0f} minutes of one core. Phone error in percent, in brackets 95 % intervals "
        "of a bootstrap over test words, paired for the differences; they do not hold the chance of the training.\n\n"
        f"{table_of_rows(rows)}\n\n## The searches\n\n{table_of_rows(searches)}"
    )


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "regularise_trained", METHODS)
    arguments.set_defaults(seeds=[0])
    args = arguments.parse_args()
    size = {**(QUICK if args.quick else FULL), "corpus": wordnet.corpus_for(args.quick), "methods": args.only}
    runs = {f"pronunciation-seed{seed}": {**size, "seed": seed} for seed in args.seeds}
    records = run_all(one, runs, args.output, args.jobs)
    write_report(args, "A model of pronunciation regularised without training", report(list(records.values())))


if __name__ == "__main__":
    main()
