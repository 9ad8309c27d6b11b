"""A prior of the latents trained with the VAE, beside one that is fitted to a VAE that stays as it is.

    python examples/experiments/joint_prior.py --seeds 0  # about 20 minutes of a CPU core, after the main job
    python examples/experiments/joint_prior.py --quick    # everything runs, nothing is learnt

Most start from one VAE, that of `examples/text_vae.py --output DIR/vae`, which is trained if the folder is not there;
DIR is `--output`.

* `frozen`: the VAE and its prior of codes as the main job leaves them. What more steps of that prior bring is in the
  record of `latent_prior.py`;
* `codes`: that VAE and that prior trained on, together (`model.unfreeze_latent_prior`). The loss charges what
  `model.rate` says. Centres and variances of the codes are moving means. The code is that of the nearest centre: no
  gradient makes it a more probable one;
* `merged`, `merged-8192`: the same from the VAE whose latents are merged to about half of the vectors, that of
  `--purpose merged --output DIR/vae_merged`, with its own prior, and with a prior of 8192 codes;
* `gaussian`: that VAE trained on with a causal prior of Gaussians, whose means and variances a transformer says after
  the vectors drawn before. It starts as the independent Gaussians that the VAE was trained with.

The loss of the last two is the model's own, with this rate in the place of the KL of the vectors. Its multiplier holds
the cross-entropy that the main job accepts, by the laws of `ConstraintCallback`.
"""

import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import latent_prior as fitted
import text_vae as example
import torch
from joint_training import CausalGaussian, JointNvib, look, nats_of_texts, train
from language_model import load_or_tiny, load_smollm2
from runner import RESULTS, cell, over_seeds, parser, run_all, table_of_rows, write_report

from nvib_hf import encode_texts
from nvib_hf.evaluation.samples import sample_scores
from nvib_hf.evaluation.texts import as_read
from nvib_hf.latents.learned import with_prior_component

STEPS = {"frozen": 0, "codes": 2000, "merged": 2000, "merged-8192": 2000, "gaussian": 2000}  # at most
FULL = {"steps": max(STEPS.values()), "look_every": 250, "samples": 400, "judge": "smollm2"}
QUICK = {"steps": 2, "look_every": 1, "samples": 8, "judge": "tiny"}
LONGER = "`frozen`, with more steps of its prior"
LOOKS = 8  # in a record
JUDGE = ("language_model", "lm_tokenizer")
NOISES = {f"noise {noise}": {"noise": noise} for noise in (1.0, 0.7, 0.5)}
CODES = {
    f"temperature {t}, top-p {p}": {"temperature": t, "top_p": p} for t, p in ((1.0, 1.0), (1.0, 0.9), (0.7, 1.0))
}
BOUND = ("rate", "text_nats", "weights_nats")  # what it is the sum of
# Name in the results, column, factor, digits
COSTS = [
    ("exact_match", "exact, %", 100, 1),
    ("prop_vectors", "vectors, %", 100, 1),
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
    return []


def codes(vae: fitted.Vae, settings: dict, checkpoint: Path, purpose: str = "reconstruction") -> list[dict]:
    vae.model.unfreeze_latent_prior(encode_texts(vae.model, vae.tokenizer, vae.texts), fitted.BATCH_SIZE)
    looks = train(vae, example.PURPOSES[purpose], settings, checkpoint)
    vae.model.freeze_latent_prior()
    return looks


def merged(vae: fitted.Vae, settings: dict, checkpoint: Path, num_codes: int | None = None) -> list[dict]:
    vae.model.config.training_merge_share = 1.0  # but by the same cost as in evaluation
    if num_codes is not None:
        latents, held_out = (encode_texts(vae.model, vae.tokenizer, texts) for texts in (vae.texts, vae.watched))
        how = {"max_steps": min(settings["steps"], 1000), "seed": settings["seed"]}
        num_codes = 16 if settings["judge"] == "tiny" else num_codes  # the quick form has few vectors
        kept = Path(f"{checkpoint}.prior")
        vae.model.fit_latent_prior(latents, held_out, sizes={"num_codes": num_codes}, checkpoint=kept, **how)
    return codes(vae, settings, checkpoint, "merged")


def gaussian(vae: fitted.Vae, settings: dict, checkpoint: Path) -> list[dict]:
    prior, layer = vae.model.latent_prior, vae.model.nvib
    sizes = {name: vae.model.config.latent_prior[name] for name in ("d_model", "num_layers", "num_heads")}
    layer.__class__, layer.charge = JointNvib, CausalGaussian(prior, **sizes)  # it keeps its settings and parameters
    looks = train(vae, example.PURPOSES["reconstruction"], settings, checkpoint)
    latents = encode_texts(vae.model, vae.tokenizer, vae.texts).compact()
    seen = latents.log_pi[:, 1:] > -math.inf
    prior.log_weight.copy_((latents.log_pi[:, 1:] - latents.log_pi[:, :1])[seen].mean())
    return looks


METHODS = {
    "frozen": frozen,
    "codes": codes,
    "merged": merged,
    "merged-8192": partial(merged, num_codes=8192),
    "gaussian": gaussian,
}


def vae_of(method: str) -> str:
    return "merged" if method.startswith("merged") else "learned"


def shown_of(method: str) -> str:
    """The kind of texts of which some are shown."""
    return "noise 0.7" if method == "gaussian" else fitted.SHOWN


def written(vae: fitted.Vae, settings: dict, how: dict) -> list[str]:
    """Texts from draws of the prior."""
    model, chance = vae.model, torch.Generator().manual_seed(settings["seed"])
    if settings["method"] != "gaussian":
        return vae.write(model.sample_latents(settings["samples"], **how, generator=chance))
    z, mask = model.nvib.charge.sample(settings["samples"], **how, generator=chance)
    return vae.write(with_prior_component(model, z, mask, model.latent_prior.log_weight))


def one(settings: dict, folder: Path) -> dict:
    """A method with one seed: its costs, samples and looks."""
    method, seed = settings["method"], settings["seed"]
    vae = fitted.Vae(fitted.vae_of(vae_of(method), folder), settings["judge"] == "tiny")
    torch.manual_seed(seed)
    started = time.process_time()
    looks = METHODS[method](vae, settings, folder / f"{method}-seed{seed}.pt")
    prior = getattr(vae.model.nvib, "charge", vae.model.latent_prior)
    results = {"seconds": time.process_time() - started, "parameters": sum(p.numel() for p in prior.parameters())}
    results |= look(vae, vae.held_out)
    latents, chance = encode_texts(vae.model, vae.tokenizer, vae.held_out), torch.Generator().manual_seed(seed)
    results["prop_vectors"] = latents.prop_vectors.mean().item()
    results["text_nats"] = nats_of_texts(vae, vae.held_out, sample=True, generator=chance)[0].mean().item()
    results["weights_nats"] = (latents.attention_mask.sum(-1) * latents.kl_dirichlet).mean().item()
    if method != "gaussian":
        results["codes_nats"] = fitted.average(fitted.codes_nats(vae.model), latents)
    kinds = {"frozen": {}, "gaussian": NOISES}.get(method, CODES)
    made = {kind: written(vae, settings, how) for kind, how in kinds.items()}
    if made:
        texts = as_read(vae.tokenizer, vae.held_out), as_read(vae.tokenizer, vae.texts)
        judge = dict(zip(JUDGE, load_or_tiny(settings["judge"], vae.texts, folder / "smollm2"), strict=True))
        scores = sample_scores(made, *texts, **judge)
        results["samples"] = {kind: {name: scores[kind][name] for name, *_ in SCORES} for kind in made}
        results["examples"] = made[shown_of(method)][:16]
    results["looks"] = looks[:: -max(len(looks) // LOOKS, 1)][::-1]
    return results


# ---------------------------------------------------------------------------------------------- report
def numbers(group: list[dict], name: str) -> list[float | None]:
    """A number of the results of each run."""
    found = [record["results"] for record in group]
    return [sum(map(x.get, BOUND)) if name == "bound" and "text_nats" in x else x.get(name) for x in found]


def row_of(found: dict[str, list[float | None]], columns: list[tuple[str, str, float, int]]) -> dict[str, str]:
    """The columns of a table, each with the mean of its numbers."""
    return {
        title: cell([None if value is None else factor * value for value in found[name]], digits)
        for name, title, factor, digits in columns
    }


def of_latent_prior() -> list[dict]:
    """The record of a prior with more steps; nothing if it is not there."""
    path = RESULTS / "runs" / "latent_prior" / "learned-seed0.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    return [{**record, "results": record["results"] | {"looks": []}}]


def report(groups: list[list[dict]]) -> str:
    by_name = {f"`{group[0]['settings']['method']}`": group for group in groups}
    if longer := of_latent_prior():
        by_name[LONGER] = longer
    costs, samples, looks, examples = [], [], {}, []
    for name, group in by_name.items():
        results = group[0]["results"]
        steps = {"prior": name, "further steps": group[0]["settings"]["steps"]}
        costs.append({**steps, **row_of({key: numbers(group, key) for key, *_ in COSTS}, COSTS)})
        for kind in [kind for kind in results.get("samples", {}) if kind in {**CODES, **NOISES}]:
            of_kind = [record["results"]["samples"][kind] for record in group]
            found = {key: [scores[key] for scores in of_kind] for key, *_ in SCORES}
            samples.append({"texts": f"{name}, {kind}", **row_of(found, SCORES)})
        for entry in results["looks"]:
            looks.setdefault(entry["step"], {})[name] = f"{entry['rate']:.1f} ({100 * entry['exact_match']:.1f} %)"
        if "examples" in results:
            shown = shown_of(group[0]["settings"]["method"])
            examples.append(f"The first sixteen of the first seed, {name}, {shown}:")
            examples.append("\n".join(f"- {text}" for text in results["examples"]))
    parts = [LEGEND.strip(), facts(by_name), table_of_rows(costs)]
    if looks:
        looked = sorted({name for row in looks.values() for name in row})
        rows = [{"step": step, **{name: looks[step].get(name, "–") for name in looked}} for step in sorted(looks)]
        parts += ["Rate (exact) of the texts that steer the multiplier, in training, first seed:", table_of_rows(rows)]
    return "\n\n".join([*parts, *([table_of_rows(samples)] if samples else []), *examples])


def facts(by_name: dict[str, list[dict]]) -> str:
    """What came out, in sentences."""

    def mean(name: str, key: str) -> float:
        return statistics.fmean(numbers(by_name[name], key))

    sentences = [
        f"{name} reconstructs {100 * mean(name, 'exact_match'):.1f} % exactly at {mean(name, 'rate'):.1f} nats"
        + (f", with a bound of {mean(name, 'bound'):.1f}." if None not in numbers(by_name[name], "bound") else ".")
        for name in by_name
    ]
    return " ".join(sentences)


def main() -> None:
    args = parser(__doc__.splitlines()[0], "joint_prior", METHODS).parse_args()
    if args.jobs:
        for vae in {vae_of(method) for method in args.only}:
            fitted.train_vae(fitted.vae_of(vae, args.output), args.quick, fitted.ON_OTHERS.get(vae, ()))
        if not args.quick:
            load_smollm2(args.output / "smollm2")
    size = QUICK if args.quick else FULL
    runs = {
        f"{method}-seed{seed}": {"method": method, "seed": seed, **size, "steps": min(size["steps"], most)}
        for method, most in STEPS.items()
        if method in args.only
        for seed in args.seeds
    }
    records = run_all(partial(one, folder=args.output), runs, args.output, args.jobs)
    write_report(args, "A prior trained with the VAE", report(over_seeds(records)))


if __name__ == "__main__":
    main()
