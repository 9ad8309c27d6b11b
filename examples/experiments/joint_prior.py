"""A prior of the latents trained with the VAE, beside one that is fitted to a VAE that stays as it is.

    python examples/experiments/joint_prior.py --seeds 0  # about an hour of a CPU core, after the main job
    python examples/experiments/joint_prior.py --quick    # everything runs, nothing is learnt

All start from one VAE, that of `examples/text_vae.py --output DIR/vae`, which is trained if the folder is not there;
DIR is `--output`. All then have the same number of steps:

* `frozen`: the prior of `model.fit_latent_prior`, of codes, on the means of the VAE as it is;
* `codes`: that prior, as the main job fitted it, and the VAE trained on, together. The loss charges what
  `model.rate` says. Centres and variances of the codes are moving means. The code is that of the nearest centre: no
  gradient makes it a more probable one;
* `gaussian`: the VAE and a causal prior of Gaussians, whose means and variances a transformer says after the vectors
  drawn before. It starts as the independent Gaussians that the VAE was trained with.

The loss of the last two is the model's own, with this rate in the place of the KL of the vectors. Its multiplier holds
the cross-entropy that the main job accepts, by the laws of `ConstraintCallback`.
"""

import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the examples

import latent_prior as fitted
import text_vae as example
import torch
from joint_training import CausalGaussian, MovingCodes, look, nats_of_texts, train
from language_model import load_or_tiny, load_smollm2
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report

from nvib_hf import encode_texts
from nvib_hf.evaluation.samples import sample_scores
from nvib_hf.evaluation.texts import as_read
from nvib_hf.latents.learned import vectors_of, with_prior_component

FULL = {"steps": 2000, "look_every": 250, "samples": 400, "judge": "smollm2"}
QUICK = {"steps": 2, "look_every": 1, "samples": 8, "judge": "tiny"}
LOOKS = 8  # in a record
JUDGE = ("language_model", "lm_tokenizer")
NOISES = {f"noise {noise}": noise for noise in (1.0, 0.7, 0.5)}
CODES = {
    f"temperature {t}, top-p {p}": {"temperature": t, "top_p": p} for t, p in ((1.0, 1.0), (1.0, 0.9), (0.7, 1.0))
}
SHOWN = {"frozen": fitted.SHOWN, "codes": fitted.SHOWN, "gaussian": "noise 0.7"}
BOUND = ("rate", "text_nats", "weights_nats")  # what it is the sum of
# Name in the results, column, factor, digits
COSTS = [
    ("exact_match", "exact, %", 100, 1),
    ("rate", "rate", 1, 1),
    ("codes_nats", "of it for codes", 1, 1),
    ("text_nats", "text from a draw", 1, 1),
    ("bound", "bound", 1, 1),
    ("parameters", "parameters of the prior, M", 1e-6, 2),
    ("seconds", "minutes of a core", 1 / 60, 0),
]
SCORES = [
    ("fluency_ratio", "perplexity to real", 1, 2),
    ("self_bleu", "self-BLEU", 1, 1),
    ("copied", "in training, %", 100, 1),
    ("distinct_2", "distinct-2, %", 100, 1),
]
LEGEND = """
Exact: held-out texts reconstructed exactly, decoded greedily from the means; the others in nats a held-out text. Rate:
of the vectors and their number, under the method's own prior. Text from a draw: cross-entropy of the text, from a draw
of its posterior. Bound: the sum of both and of the weights' divergence, at least as much as the text has under the
model. Perplexity is that of the language model that judges, to that of as many held-out texts; in training: word for
word a text of the training; temperature and top-p: of codes; noise: by what the deviations of the Gaussians are
multiplied.
"""


# ---------------------------------------------------------------------------------------------- the methods
def frozen(vae: fitted.Vae, settings: dict, checkpoint: Path) -> list[dict]:
    how = vae.texts, vae.watched, settings["steps"], settings["seed"]
    example.learn_prior(vae.model, vae.tokenizer, *how, checkpoint=checkpoint)
    return []


def codes(vae: fitted.Vae, settings: dict, checkpoint: Path) -> list[dict]:
    mu, mask, logvar = vectors_of(encode_texts(vae.model, vae.tokenizer, vae.texts))
    num_batches = math.ceil(len(vae.texts) / fitted.BATCH_SIZE)
    return train(vae, MovingCodes(vae.model.latent_prior, mu, logvar, mask, num_batches), settings, checkpoint)


def gaussian(vae: fitted.Vae, settings: dict, checkpoint: Path) -> list[dict]:
    sizes = {name: vae.model.config.latent_prior[name] for name in ("d_model", "num_layers", "num_heads")}
    return train(vae, CausalGaussian(vae.model.latent_prior, **sizes), settings, checkpoint)


METHODS = {"frozen": frozen, "codes": codes, "gaussian": gaussian}


def one(settings: dict, folder: Path) -> dict:
    """A method with one seed: its costs, samples and looks."""
    vae, method, seed = fitted.Vae(folder / "vae", settings["judge"] == "tiny"), settings["method"], settings["seed"]
    torch.manual_seed(seed)
    started = time.process_time()
    looks = METHODS[method](vae, settings, folder / f"{method}-seed{seed}.pt")
    prior = getattr(vae.model.nvib, "charge", vae.model.latent_prior)
    results = {"seconds": time.process_time() - started, "parameters": sum(p.numel() for p in prior.parameters())}
    results |= look(vae, vae.held_out)
    latents, chance = encode_texts(vae.model, vae.tokenizer, vae.held_out), torch.Generator().manual_seed(seed)
    results["text_nats"] = nats_of_texts(vae, vae.held_out, sample=True, generator=chance)[0].mean().item()
    results["weights_nats"] = (latents.attention_mask.sum(-1) * latents.kl_dirichlet).mean().item()
    if method != "gaussian":
        results["codes_nats"] = fitted.average(fitted.codes_nats(vae.model), latents)
    made = {}
    for kind, how in (NOISES if method == "gaussian" else CODES).items():
        chance = torch.Generator().manual_seed(seed)
        if method == "gaussian":
            drawn = prior.sample(settings["samples"], how, chance)
            drawn = with_prior_component(vae.model, *drawn, vae.model.latent_prior.log_weight)
        else:
            drawn = vae.model.sample_latents(settings["samples"], **how, generator=chance)
        made[kind] = vae.write(drawn)
    texts = as_read(vae.tokenizer, vae.held_out), as_read(vae.tokenizer, vae.texts)
    judge = dict(zip(JUDGE, load_or_tiny(settings["judge"], vae.texts, folder / "smollm2"), strict=True))
    scores = sample_scores(made, *texts, **judge)
    results["samples"] = {kind: {name: scores[kind][name] for name, *_ in SCORES} for kind in made}
    results["examples"] = made[SHOWN[method]][:16]
    results["looks"] = looks[:: -max(len(looks) // LOOKS, 1)][::-1]
    return results


# ---------------------------------------------------------------------------------------------- report
def numbers(group: list[dict], name: str) -> list[float | None]:
    """A number of the results of each run."""
    found = [record["results"] for record in group]
    return [sum(map(x.get, BOUND)) if name == "bound" else x.get(name) for x in found]


def scaled(values: list[float | None], factor: float, digits: int) -> str:
    return cell([None if value is None else factor * value for value in values], digits)


def differences(method: str, group: list[dict], others: list[dict]) -> str:
    """What a method has more than the frozen VAE's."""
    exact, rate, bound = (
        statistics.fmean(numbers(group, name)) - statistics.fmean(numbers(others, name))
        for name in ("exact_match", "rate", "bound")
    )
    return (
        f"`{method}` beside `frozen`: {100 * exact:+.1f} points of exact reconstructions, {rate:+.1f} nats of the "
        f"rate, {bound:+.1f} nats of the bound."
    )


def report(groups: list[list[dict]]) -> str:
    costs, samples, looks, examples = [], [], {}, []
    by_method = {group[0]["settings"]["method"]: group for group in groups}
    for method, group in by_method.items():
        row = {title: scaled(numbers(group, name), factor, digits) for name, title, factor, digits in COSTS}
        costs.append({"prior": f"`{method}`", **row})
        for kind in group[0]["results"]["samples"]:
            of_kind = [record["results"]["samples"][kind] for record in group]
            row = {title: scaled([x[name] for x in of_kind], factor, digits) for name, title, factor, digits in SCORES}
            samples.append({"texts": f"`{method}`, {kind}", **row})
        for entry in group[0]["results"]["looks"]:
            row = looks.setdefault(entry["step"], {"step": entry["step"]})
            row[f"`{method}`"] = f"{entry['rate']:.1f} nats, {100 * entry['exact_match']:.1f} % exact"
        examples.append(f"The first sixteen of the first seed, `{method}`, {SHOWN[method]}:")
        examples.append("\n".join(f"- {text}" for text in group[0]["results"]["examples"]))
    parts = [LEGEND.strip()]
    if others := by_method.get("frozen"):
        joint = (differences(method, group, others) for method, group in by_method.items() if method != "frozen")
        parts.append("\n".join(joint))
    parts.append(table_of_rows(costs))
    if looks:
        looked = [row for row in looks.values() if len(row) == max(map(len, looks.values()))]
        parts += ["Rate of texts that no method trains on, in training, first seed:", table_of_rows(looked)]
    return "\n\n".join([*filter(None, parts), table_of_rows(samples), *examples])


def main() -> None:
    args = parser(__doc__.splitlines()[0], "joint_prior", METHODS).parse_args()
    if args.jobs:
        fitted.train_vae(args.output / "vae", args.quick)
        if not args.quick:
            load_smollm2(args.output / "smollm2")
    size = QUICK if args.quick else FULL
    runs = {f"{m}-seed{seed}": {"method": m, "seed": seed, **size} for m in args.only for seed in args.seeds}
    records = run_all(partial(one, folder=args.output), runs, args.output, args.jobs)
    write_report(args, "A prior trained with the VAE", report(over_seeds(records)))


if __name__ == "__main__":
    main()
