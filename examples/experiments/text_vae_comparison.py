"""Text VAEs on clauses of the Bible in Basic English: NVIB beside an autoencoder and the usual VAEs.

    python examples/experiments/text_vae_comparison.py          # all of it, two runs at a time
    python examples/experiments/text_vae_comparison.py --quick  # everything runs, nothing is learnt

Corpus, split, tokenizer, model, batches and learning rates are the same for all methods; the number of steps is what
each setting needs until its curves have stopped moving. Seeds change initial weights, batches and noise. The tables
and the figures go to ``examples/experiments/results``.
"""

import itertools
import random
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae as example
from baselines import (
    AutoencoderBottleneck,
    PooledBottleneck,
    StridedBottleneck,
    VariableBottleneck,
    with_bottleneck,
    with_stride,
)
from language_model import load_or_tiny, load_smollm2
from reverse_perplexity import reverse_perplexity
from runner import parser, run_all
from text_vae_comparison_report import METHODS, TRACE, report
from training import clauses, trace_of, train
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from nvib_hf import ConstraintCallback, KLAnnealingCallback, NvibForConditionalGeneration, reconstruct
from nvib_hf.evaluation.rate_distortion import rate_distortion
from nvib_hf.evaluation.samples import (
    DECODINGS,
    copied,
    distinct_n,
    fluency,
    interpolation_scores,
    interpolations,
    latent_lengths,
    sample_texts,
    self_bleu,
)
from nvib_hf.evaluation.texts import as_read, reconstruction_scores

SHOWN = 8  # samples and reconstructions that a report prints
FULL = {
    "texts": None,
    "held_out": 500,
    "batch_size": 64,
    "samples": 200,
    "pairs": 20,
    "reverse_steps": 150,
    "language_model": "smollm2",
}
QUICK = {
    "texts": 800,
    "held_out": 32,
    "steps": 6,
    "batch_size": 8,
    "samples": 8,
    "pairs": 2,
    "reverse_steps": 3,
    "language_model": "tiny",
}

REAL = "held-out texts"  # no method: real texts by the measures of samples

Built = tuple[NvibForConditionalGeneration, PreTrainedTokenizerBase, list[TrainerCallback]]


# ------------------------------------------------------------------------------------------------ methods
def warm_up() -> KLAnnealingCallback:
    """The weights of the KLs rise over the first fifth of the steps."""
    return KLAnnealingCallback(schedule="linear", warmup_ratio=0.2)


def baseline(bottleneck: type[VariableBottleneck], texts: list[str], **options) -> Built:
    """The example's BART with another bottleneck, initialised as NVIB's; weights fixed, or under a constraint."""
    steering = warm_up()
    if "cross_entropy" in options:
        steering = ConstraintCallback(options.pop("cross_entropy"), rate=options.pop("rate", 0.005))
        options["lambda_gaussian"] = 1.0
    wrapped, tokenizer = example.bart(texts)
    model = with_bottleneck(wrapped.unwrap(), bottleneck, tau_sigma=example.NVIB["tau_sigma"], **options)
    return model, tokenizer, [steering]


def nvib_fixed(texts: list[str], **weights) -> Built:
    model, tokenizer = example.bart(texts, **{**example.NVIB, **weights})
    return model, tokenizer, [warm_up()]


def nvib_constrained(texts: list[str], kl_weights: str = "drawn", **constraint) -> Built:
    """Vectors as near to the prior as the accepted ``cross_entropy`` allows, in nats per token; none is dropped."""
    model, tokenizer = example.bart(texts, **example.CONSTRAINED, kl_weights=kl_weights)
    return model, tokenizer, [ConstraintCallback(**constraint)]


def nvib_strided(texts: list[str], stride: int, **constraint) -> Built:
    """The same of every ``stride``-th vector: NVIB with as many vectors as ``strided`` has."""
    model, tokenizer, callbacks = nvib_constrained(texts, **constraint)
    return with_stride(model, stride), tokenizer, callbacks


def nvib_dropping(texts: list[str], **constraint) -> Built:
    """As few vectors as the accepted ``cross_entropy`` allows, or as ``target_prop_vectors`` says."""
    model, tokenizer = example.bart(texts, **example.DROPPING)
    return model, tokenizer, [ConstraintCallback(**constraint)]


BUILD = {
    "autoencoder": partial(baseline, AutoencoderBottleneck),
    "pooled": partial(baseline, PooledBottleneck),
    "strided": partial(baseline, StridedBottleneck),
    "variable": partial(baseline, VariableBottleneck),
    "nvib_fixed": nvib_fixed,
    "nvib_constrained": nvib_constrained,
    "nvib_strided": nvib_strided,
    "nvib_dropping": nvib_dropping,
}
# Each setting is a row, with its steps. The weights of all VAEs are per target token and of means over vectors and
# channels. The last of a method is the one that a quick experiment runs.
SETTINGS = {
    "autoencoder": [({}, 1600)],
    "pooled": [({"lambda_gaussian": 1.0}, 3000)],
    "strided": [
        ({"stride": 2, "cross_entropy": 1.8, "rate": 0.02}, 5000),
        ({"stride": 2, "cross_entropy": 1.4, "rate": 0.02}, 5000),
        ({"stride": 2, "cross_entropy": 0.4}, 5000),
    ],
    "variable": [({"cross_entropy": 1.8, "rate": 0.02}, 5000), ({"cross_entropy": 0.4}, 5000)],
    "nvib_fixed": [({"lambda_gaussian": 0.05, "lambda_dirichlet": 0.05}, 1600)],
    "nvib_constrained": [
        ({"cross_entropy": 1.8, "rate": 0.02}, 5000),
        ({"cross_entropy": 1.0, "rate": 0.02}, 5000),
        ({"cross_entropy": 2.1, "rate": 0.02}, 5000),
        ({"cross_entropy": 2.2, "rate": 0.02}, 5000),
        ({"cross_entropy": 0.4, "kl_weights": "pseudo_counts"}, 8000),
        ({"cross_entropy": 0.4}, 8000),
    ],
    "nvib_strided": [
        ({"stride": 2, "cross_entropy": 1.8, "rate": 0.02}, 5000),
        ({"stride": 2, "cross_entropy": 2.2, "rate": 0.02}, 5000),
        ({"stride": 2, "cross_entropy": 0.4}, 8000),
    ],
    "nvib_dropping": [({"cross_entropy": 0.3, "target_prop_vectors": 0.5}, 5000)],
}
# Whether it holds: one seed trained for longer.
FOR_DAYS = ("nvib_constrained", {"cross_entropy": 0.4}, 20_000)


def all_runs(methods: list[str], seeds: list[int], quick: bool) -> dict[str, dict]:
    """Settings of each run by its key; a quick experiment has the last setting of each method."""
    size = QUICK if quick else FULL
    runs = {f"real-seed{seed}": {"method": REAL, "setting": {}, "seed": seed, **size} for seed in seeds}

    def add(name: str, setting: dict, steps: int, seed: int) -> None:
        label = "".join(f"-{option}{value}" for option, value in setting.items())
        runs[f"{name}{label}-{steps}-seed{seed}"] = {
            **size,
            "method": name,
            "setting": setting,
            "steps": steps,
            "seed": seed,
        }

    for seed, name in itertools.product(seeds, methods):  # a seed after the other: early results are of all methods
        for setting, steps in SETTINGS[name][-1:] if quick else SETTINGS[name]:
            add(name, setting, QUICK["steps"] if quick else steps, seed)
    if not quick and FOR_DAYS[0] in methods:
        add(*FOR_DAYS, seeds[0])
    return runs


# ---------------------------------------------------------------------------------------------- one run
def judged(samples: list[str], texts: list[str], held_out: list[str], judge: tuple, settings: dict) -> dict:
    """Texts by every measure of samples."""
    seed, steps = settings["seed"], settings["reverse_steps"]
    return {
        "perplexity": fluency(*judge, samples),
        "reverse_perplexity": reverse_perplexity(samples, held_out, seed, steps=steps),
        "self_bleu": self_bleu(samples, seed=seed),
        "distinct_2": distinct_n(samples, 2),
        "copied": copied(samples, texts),
    }


def one(settings: dict, cache: Path) -> dict:
    """Train a method with one seed and measure it on the held-out texts; ``cache`` is the language model's folder."""
    seed, method = settings["seed"], settings["method"]
    texts, held_out = clauses(settings["texts"], settings["held_out"])
    set_seed(seed)
    if method == REAL:
        some = random.Random(seed).sample(held_out, min(settings["samples"], len(held_out)))
        judge = load_or_tiny(settings["language_model"], texts, cache)
        return judged(some, texts, held_out, judge, settings)
    model, tokenizer, callbacks = BUILD[method](texts, **settings["setting"])
    log = train(model, tokenizer, callbacks, texts, settings)
    judge = load_or_tiny(settings["language_model"], texts, cache)

    references = as_read(tokenizer, held_out)
    written = reconstruct(model, tokenizer, held_out)
    results = {**reconstruction_scores(written, references), **rate_distortion(model, tokenizer, held_out, seed=seed)}
    tokens = sum(len(ids) for ids in tokenizer(held_out).input_ids) / len(held_out)
    results["distortion"] = results["cross_entropy_sampled"] * tokens
    if method == "autoencoder":  # vectors without noise have no finite cost, and no prior to sample from
        results = {name: x for name, x in results.items() if not name.startswith(("kl_", "elbo", "rate"))}
    else:
        lengths, shown = latent_lengths(model, tokenizer, held_out), {}
        for kind, options in DECODINGS.items():
            samples = sample_texts(model, tokenizer, settings["samples"], lengths, seed, **options)
            scores = judged(samples, texts, held_out, judge, settings)
            results |= {f"{kind}_{name}": value for name, value in scores.items()}
            shown[kind] = samples[:SHOWN]
        results["shown_samples"] = shown

    pairs = list(zip(references[::2], references[1::2], strict=False))[: settings["pairs"]]
    for method in METHODS:
        paths = interpolations(model, tokenizer, pairs, method=method)
        between = interpolation_scores(paths, language_model=judge[0], lm_tokenizer=judge[1])
        results |= {f"{method}_{name}": value for name, value in between.items()}
        results[f"{method}_shown"] = paths[0]
    return {
        **results,
        "shown_reconstructions": list(zip(references, written, strict=True))[:SHOWN],
        "trace": trace_of(log, TRACE),
    }


def main() -> None:
    args = parser(__doc__.splitlines()[0], "text_vae_comparison", BUILD).parse_args()
    cache = args.output / "smollm2"
    if not args.quick and args.jobs:
        load_smollm2(cache)  # by one process, before many want it
    records = run_all(partial(one, cache=cache), all_runs(args.only, args.seeds, args.quick), args.output, args.jobs)
    report(args, records, REAL)


if __name__ == "__main__":
    main()
