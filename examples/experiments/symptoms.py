"""Trainings that go wrong, each beside its remedy: what examples/README.md says of symptoms comes from here.

    python examples/experiments/symptoms.py          # about 6 minutes on two CPU cores
    python examples/experiments/symptoms.py --quick  # everything runs, nothing is learnt

Corpus and model are those of the text VAE experiment, the trainings are shorter; one seed by default.
"""

import sys
import warnings
from pathlib import Path
from textwrap import shorten

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae as example
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from training import clauses, train
from transformers import set_seed

from nvib_hf import CollapseWarning, ConstraintCallback, KLAnnealingCallback, reconstruct
from nvib_hf.evaluation.rate_distortion import rate_distortion
from nvib_hf.evaluation.samples import latent_lengths, sample_texts
from nvib_hf.evaluation.texts import as_read, reconstruction_scores

FULL = {"texts": None, "held_out": 200, "steps": 600, "batch_size": 64, "samples": 100}
QUICK = {"texts": 400, "held_out": 16, "steps": 4, "batch_size": 8, "samples": 4}

STRONG = {"lambda_gaussian": 3.0, "lambda_dirichlet": 10.0}
LEARNT = {"cross_entropy": 0.3}
# Settings beside those of the example, and the arguments of a ConstraintCallback; without it the weights are fixed.
METHODS = {
    "strong weights from the first step": (STRONG, None),
    "strong weights, annealed": (STRONG, "annealed"),
    "strong weights, free bits": ({**STRONG, "free_bits_gaussian": 0.3}, None),
    "strong weights, under a constraint": (STRONG, LEARNT),
    "relu, strong weights": ({**STRONG, "alpha_activation": "relu", "tau_alpha": 1.0}, None),
    "a threshold, weak weights": ({"alpha_threshold": 0.1}, "annealed"),
    "a threshold above what the prior allows": (
        {"alpha_threshold": 0.5, "delta": 0.05, "lambda_dirichlet": 10.0},
        "annealed",
    ),
    "a share of vectors under a constraint": (
        {"alpha_threshold": 0.1, "delta": 1.0, "lambda_vectors": 5.0},
        {**LEARNT, "rate": 0.02},
    ),
}


def one(settings: dict) -> dict:
    """Train in one of these ways, then look at reconstructions, vectors and samples."""
    texts, held_out = clauses(settings["texts"], settings["held_out"])
    set_seed(settings["seed"])
    changes, steering = METHODS[settings["method"]]
    model, tokenizer = example.bart(texts, **{**example.NVIB, **changes})
    callbacks = []
    if steering == "annealed":
        callbacks = [KLAnnealingCallback(schedule="linear", start_ratio=0.5, warmup_ratio=0.4)]
    elif steering is not None:
        callbacks = [ConstraintCallback(**steering)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CollapseWarning)
        log = train(model, tokenizer, callbacks, texts, settings)
    written = reconstruct(model, tokenizer, held_out)
    samples = sample_texts(
        model, tokenizer, settings["samples"], latent_lengths(model, tokenizer, held_out), settings["seed"]
    )
    messages = [str(w.message) for w in caught if issubclass(w.category, CollapseWarning)]
    return {
        **reconstruction_scores(written, as_read(tokenizer, held_out)),
        **rate_distortion(model, tokenizer, held_out),
        "training_cross_entropy": log[-1]["cross_entropy"],
        "different_samples": len(set(samples)) / len(samples),
        "sample": samples[0],
        "warned": [message.split(": ", 1)[1].split(" are ")[0] for message in messages],
    }


def report(groups: list[list[dict]]) -> str:
    columns = {
        "exact match, %": ("exact_match", 100, 1),
        "training cross-entropy": ("training_cross_entropy", 1, 2),
        "KL_G": ("kl_gaussian", 1, 3),
        "KL_D": ("kl_dirichlet", 1, 3),
        "vectors kept, %": ("prop_vectors", 100, 0),
        "effective": ("effective_vectors", 1, 1),
        "different samples, %": ("different_samples", 100, 0),
    }
    rows = []
    for group in groups:
        method = group[0]["settings"]["method"]
        changes, steering = METHODS[method]
        callback = {None: "none", "annealed": "`KLAnnealingCallback`"}
        steered = callback[steering] if not isinstance(steering, dict) else "`ConstraintCallback`"
        numbers = {
            title: cell((factor * record["results"][name] for record in group), digits)
            for title, (name, factor, digits) in columns.items()
        }
        first = group[0]["results"]
        rows.append(
            {
                "training": method,
                "settings": ", ".join(f"`{name}={value}`" for name, value in changes.items()),
                "callback": steered,
                **numbers,
                "warned of": ", ".join(first["warned"]) or "–",
                "a sample": shorten(first["sample"], 60),
            }
        )
    size = groups[0][0]["settings"]
    return (
        f"{size['steps']} steps of {size['batch_size']} clauses; the other settings are those of "
        f"`examples/text_vae.py`. Annealed: the weights rise from half of the training on.\n\n{table_of_rows(rows)}"
    )


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "symptoms", METHODS)
    arguments.set_defaults(seeds=[0])
    args = arguments.parse_args()
    size = QUICK if args.quick else FULL
    runs = {
        f"{method.replace(' ', '_').replace(',', '')}-seed{seed}": {"method": method, "seed": seed, **size}
        for method in args.only
        for seed in args.seeds
    }
    groups = over_seeds(run_all(one, runs, args.output, args.jobs))
    write_report(args, "Trainings that go wrong, and their remedies", report(groups))


if __name__ == "__main__":
    main()
