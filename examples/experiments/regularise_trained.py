"""Small models regularised without training: taus tuned on one domain, tested on all.

    python examples/experiments/regularise_trained.py          # about a quarter of an hour of two CPU cores
    python examples/experiments/regularise_trained.py --quick  # everything runs, nothing is learnt

Two small encoder-decoders: one learns to pronounce common words of at most 9 letters, as in regulariser.py, and is
tested on names and long words too; the other learns to write clauses of the Bible in Basic English again, and is
tested on WordNet's examples and definitions too. Each gets NVIB in all attentions, with empirical priors from what it
was trained on; the taus are searched by the errors in validation texts of one domain, and tested on other texts of
each. It needs WordNet (`apt install wordnet-base`; without it `--quick` takes the Bible's words) and the extra
`search`.
"""

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae
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
from training import clauses
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, set_seed

from nvib_hf import NvibForConditionalGeneration, reconstruct, search_taus
from nvib_hf.evaluation.samples import word_edits
from nvib_hf.evaluation.texts import as_read
from nvib_hf.training.tau_search import IDENTITY

FULL = {"steps": 2000, "prior": 1000, "tuning": 200, "test": 800, "trials": 24}
QUICK = {"steps": 2, "prior": 20, "tuning": 10, "test": 10, "trials": 2}


# ----------------------------------------------------------------------------------------------- tasks
class Task(NamedTuple):
    """A fresh model, what it is trained on, texts to tune and test on by domain, and how these are marked."""

    model: PreTrainedModel
    tokenizer: object
    examples: list[dict]
    texts: dict[str, list[str]]
    errors: Callable[[PreTrainedModel, list[str]], dict[str, list[int]]]  # edits, and units under the name "phones"


def examples_of(tokenizer, sources: list[str], targets: list[str]) -> list[dict]:
    pairs = zip(tokenizer(sources).input_ids, tokenizer(targets).input_ids, strict=True)
    return [{"input_ids": source, "labels": target} for source, target in pairs]


def pronunciation(corpus: str, count: int) -> Task:
    said = pronunciations()
    tokenizer = make_tokenizer({phone for variants in said.values() for text in variants for phone in text.split()})
    words = word_sets(sorted(said), corpus, count)
    training = words["training"]
    examples = examples_of(tokenizer, [spelt(word) for word in training], [said[word][0] for word in training])
    return Task(
        make_model(tokenizer), tokenizer, examples, words, lambda model, some: errors(model, tokenizer, some, said)
    )


def reconstruction(corpus: str, count: int) -> Task:
    training, held_out = clauses(None, count)
    if corpus == "wordnet":
        others = wordnet.example_sentences(4, 12), wordnet.definitions(4, 12)
    else:
        others = held_out[::-1], sorted(held_out)
    texts = {"in domain": held_out}
    for name, some in zip(TASKS["reconstruction"].domains[1:], others, strict=True):
        texts[name] = random.Random(0).sample(some, min(count, len(some)))
    wrapped, tokenizer = text_vae.bart(training)

    def marked(model: PreTrainedModel, some: list[str]) -> dict[str, list[int]]:
        references = as_read(tokenizer, some)
        pairs = list(zip(reconstruct(model, tokenizer, some), references, strict=True))
        return {"edits": [word_edits(a, b) for a, b in pairs], "phones": [len(b.split()) for _, b in pairs]}

    return Task(wrapped.unwrap(), tokenizer, examples_of(tokenizer, training, training), texts, marked)


class Domains(NamedTuple):
    make: Callable[[str, int], Task]
    domains: tuple[str, ...]
    unit: str  # whose errors are counted


TASKS = {
    "pronunciation": Domains(pronunciation, TEST_SETS, "phone"),
    "reconstruction": Domains(reconstruction, ("in domain", "WordNet examples", "WordNet definitions"), "word"),
}


# ------------------------------------------------------------------------------------------------- run
def error_of(found: dict[str, list[int]]) -> float:
    return 100 * sum(found["edits"]) / sum(found["phones"])


def one(settings: dict) -> dict:
    """Train, fit priors, search on each domain; the errors of the plain model and of what each search found."""
    seed, tuning, domains = settings["seed"], settings["tuning"], TASKS[settings["task"]].domains
    set_seed(seed)
    plain, tokenizer, examples, texts, marked = TASKS[settings["task"]].make(
        settings["corpus"], settings["test"] + tuning
    )
    train(plain, tokenizer, examples, settings["steps"], 1e-3, seed)
    model = NvibForConditionalGeneration.from_base_pretrained(
        copy.deepcopy(plain), attentions=["cross", "encoder", "decoder"], evaluation="mixture"
    ).eval()
    seen, collate = random.Random(seed).sample(examples, settings["prior"]), DataCollatorForSeq2Seq(tokenizer)
    model.fit_prior(collate(seen[i : i + 50]) for i in range(0, len(seen), 50))

    def tested(model) -> dict[str, dict]:
        return {name: marked(model, texts[name][tuning:]) for name in domains}

    results, searches = {"plain": tested(plain)}, {}
    for name in domains:

        def score(model, validation=texts[name][:tuning]) -> float:
            return error_of(marked(model, validation))

        model.set_taus(**IDENTITY)
        searches[name] = summary_of(search_taus(model, score, settings["trials"], seed=seed))
        results[f"tuned on {name}"] = tested(model)
    return {**results, "searches": searches}


def summary_of(trials: list[dict]) -> dict:
    """The score of every trial, the pretrained model's first, and the best trial."""
    return {"scores": [trial["score"] for trial in trials], "best": min(trials, key=lambda trial: trial["score"])}


# ---------------------------------------------------------------------------------------------- report
def best_trial(search: dict) -> dict[str, str]:
    """Of a search the pretrained model's score, the best one, what is between them, and the taus of the best."""
    pretrained, *others = search["scores"]
    best, scores = search["best"], sorted(others)
    row = {
        "pretrained, %": f"{pretrained:.1f}",
        "best, %": f"{best['score']:.1f}",
        "median of the others, %": f"{scores[len(scores) // 2]:.1f}",
    }
    taus = {f"`{name}`, {kind}": f"{value:.3g}" for name in IDENTITY for kind, value in best[name].items()}
    return row | taus


def report(records: list[dict]) -> str:
    parts = []
    for group in over_seeds(dict(enumerate(records))):
        task = group[0]["settings"]["task"]
        rows = []
        for tuned_on in TASKS[task].domains:
            for tested_on in TASKS[task].domains:
                table = compared(group, f"tuned on {tuned_on}", tested_on)
                _, low, high = table["phone difference"]
                rows.append(
                    {
                        "tuned on": tuned_on,
                        "test": tested_on,
                        "plain": interval(*table["phone plain"]),
                        "regularised": interval(*table["phone NVIB"]),
                        "difference": interval(*table["phone difference"], sign="+"),
                        "so it is": "better" if high < 0 else "worse" if low > 0 else "not different",
                        "share not right: plain": interval(*table["word plain"]),
                        "share not right: difference": interval(*table["word difference"], sign="+"),
                    }
                )
        searches = [
            {"tuned on": name, "seed": record["settings"]["seed"], **best_trial(record["results"]["searches"][name])}
            for name in TASKS[task].domains
            for record in group
        ]
        parts += [
            f"## {task.capitalize()}\n\nThe {TASKS[task].unit} error in percent, and the share that is not right:",
            table_of_rows(rows),
            "The searches:",
            table_of_rows(searches),
        ]
    settings, minutes = records[0]["settings"], sum(record["seconds"] for record in records) / 60
    return (
        f"{settings['steps']} steps of training; priors from {settings['prior']} examples of it, {settings['trials']} "
        f"trials on {settings['tuning']} texts (the first is the pretrained model), tests on {settings['test']} other "
        f"texts of each domain; {minutes:.0f} minutes of one core. In brackets 95 % intervals of a bootstrap over "
        "test texts, paired for the differences; they do not hold the chance of the training.\n\n" + "\n\n".join(parts)
    )


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "regularise_trained", TASKS)
    arguments.set_defaults(seeds=[0])
    args = arguments.parse_args()
    size = {**(QUICK if args.quick else FULL), "corpus": wordnet.corpus_for(args.quick, args.jobs)}
    runs = {f"{task}-seed{seed}": {**size, "task": task, "seed": seed} for task in args.only for seed in args.seeds}
    records = run_all(one, runs, args.output, args.jobs)
    write_report(args, "Small models regularised without training", report(list(records.values())))


if __name__ == "__main__":
    main()
