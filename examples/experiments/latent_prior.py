"""New texts from latents that reconstruct: priors of the latents of `examples/text_vae.py`, and a language model.

    python examples/experiments/latent_prior.py          # about an hour for each seed on one quiet CPU core
    python examples/experiments/latent_prior.py --quick  # everything runs, nothing is learnt

The VAE is trained as the example trains it for reconstruction. Its latents are then drawn from

* the prior that it was trained with: independent Gaussians;
* a learned prior (`model.fit_latent_prior`), trained on the means of the training texts' latents;
* real latents of held-out texts whose vectors are shuffled: the floor;

and written greedily. The ceiling is a language model on the texts' tokens, with the same transformer, the same number
of steps and the same batches.
"""

import sys
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the examples

import text_vae as example
import torch
from language_model import load_or_tiny, load_smollm2
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from torch import Tensor, nn
from torch.nn import functional as F
from training import clauses, train
from transformers import set_seed

from nvib_hf import NvibForConditionalGeneration, NvibLatents, decode_latents, encode_texts, reconstruct
from nvib_hf.evaluation.samples import sample_scores
from nvib_hf.evaluation.texts import as_read, decoded, evaluating, length_batches, reconstruction_scores
from nvib_hf.latents.learned import vectors_of, with_prior_component
from nvib_hf.layers.causal_transformer import CausalTransformer, sharpened
from nvib_hf.training.latent_prior_training import shuffled_batches

FULL = {
    "texts": None,
    "held_out": 1000,
    "vae_steps": None,
    "steps": 2400,
    "codes": 2048,
    "d_model": 192,
    "batch_size": 64,
    "samples": 400,
    "judge": "smollm2",
}
QUICK = {
    "texts": 400,
    "held_out": 12,
    "vae_steps": 2,
    "steps": 2,
    "codes": 32,
    "d_model": 16,
    "batch_size": 8,
    "samples": 8,
    "judge": "tiny",
}
# Arguments of `model.sample_latents`, and of the language model's sampling without the noise.
SAMPLINGS = [
    {"temperature": 1.0, "top_p": 1.0, "noise": 1.0},
    {"temperature": 1.0, "top_p": 1.0, "noise": 0.0},
    {"temperature": 1.0, "top_p": 0.9, "noise": 0.0},
    {"temperature": 0.8, "top_p": 1.0, "noise": 0.0},
    {"temperature": 0.7, "top_p": 1.0, "noise": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "noise": 0.0},
]
SHOWN = "learned, temperature 1.0, top-p 0.9, noise 0.0"
# Column, name in the results, factor, digits
COLUMNS = [
    ("perplexity to real", "fluency_ratio", 1, 2),
    ("self-BLEU", "self_bleu", 1, 1),
    ("distinct-2, %", "distinct_2", 100, 1),
    ("in training, %", "copied", 100, 1),
    ("words", "words", 1, 1),
    ("agreement, %", "agreement", 100, 1),
    ("ms per sample", "milliseconds", 1, 0),
]
LEGEND = """
Perplexity is that of the language model that judges, to that of as many held-out texts; in training: word for word a
text of the training; agreement: samples that come back when they are encoded and decoded; milliseconds: of drawing the
latents or the tokens, without the decoder.
"""


class TokenModel(nn.Module):
    """A language model of token ids with the transformer of the prior."""

    def __init__(self, vocabulary: int, d_model: int, num_layers: int = 4, max_length: int = 80) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, d_model), nn.Embedding(max_length, d_model)
        self.transformer, self.bias = (
            CausalTransformer(d_model, num_layers, 4, 0.1),
            nn.Parameter(torch.zeros(vocabulary)),
        )
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, cache=None, past: int = 0) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(past, past + ids.shape[1]))
        return self.transformer(F.dropout(x, 0.1, self.training), cache) @ self.tokens.weight.T + self.bias

    @torch.no_grad()
    def sample(self, num_samples: int, start: int, end: int, temperature: float, top_p: float, seed: int) -> Tensor:
        """Token ids ``(B, n)``, what follows the end included."""
        generator, cache = torch.Generator().manual_seed(seed), self.transformer.empty_cache()
        token, drawn = torch.full((num_samples, 1), start), []
        ended = torch.zeros(num_samples, 1, dtype=torch.bool)
        while not ended.all() and len(drawn) < example.MAX_LENGTH:
            log_chances = self(token, cache, len(drawn))[:, 0].log_softmax(-1)
            token = torch.multinomial(sharpened(log_chances, temperature, top_p), 1, generator=generator)
            token = token.masked_fill(ended, end)
            ended |= token == end
            drawn.append(token)
        return torch.cat(drawn, dim=1)


def train_token_model(
    model: TokenModel, rows: list[list[int]], held_out: list[list[int]], start: int, settings
) -> dict:
    """As :func:`fit_latent_prior` trains; the cross-entropy of held-out texts, in nats per text, at the best look."""
    steps, batch_size = settings["steps"], settings["batch_size"]
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == deep] for deep in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    warm_up = min(100, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1) * (1 - step / steps)
    )
    generator, waiting, best, weights = torch.Generator().manual_seed(settings["seed"]), [], float("inf"), None

    def nats(batch: list[list[int]]) -> Tensor:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], True, padding_value=-100)
        before = F.pad(ids[:, :-1].clamp(min=0), (1, 0), value=start)
        return F.cross_entropy(model(before).flatten(0, 1), ids.flatten(), reduction="sum")

    for step in range(1, steps + 1):
        waiting = waiting or list(shuffled_batches([len(row) for row in rows], batch_size, generator))
        batch = [rows[i] for i in waiting.pop()]
        model.train()
        optimizer.zero_grad()
        (nats(batch) / sum(map(len, batch))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            with evaluating(model):
                batches = length_batches([len(row) for row in held_out], batch_size)
                loss = sum(nats([held_out[i] for i in batch]).item() for batch in batches) / len(held_out)
            if loss < best:
                best, weights = loss, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    model.eval()
    return {"nats": best}


# ------------------------------------------------------------------------------------------- latents
def with_vectors(model: NvibForConditionalGeneration, latents: NvibLatents, change) -> NvibLatents:
    """Latents of as many vectors as these have, which ``change`` makes of a row's ``(n, P)``; of one weight all."""
    z, mask, _ = vectors_of(latents)
    rows = [change(row[seen]) for row, seen in zip(z, mask, strict=True)]
    return with_prior_component(model, nn.utils.rnn.pad_sequence(rows, True), mask, model.latent_prior.log_weight)


def average(function, latents: NvibLatents, batch_size: int) -> float:
    """The mean over latents of what a model says of batches of them."""
    values = [function(latents[start : start + batch_size]) for start in range(0, len(latents), batch_size)]
    return torch.cat(values).mean().item()


# ---------------------------------------------------------------------------------------------- a run
def one(settings: dict, cache: Path) -> dict:
    """Train the VAE, the prior and the language model with one seed, and draw texts."""
    seed, size, count = settings["seed"], settings["batch_size"], settings["samples"]
    purpose = example.PURPOSES["reconstruction"]
    texts, held_out = clauses(settings["texts"], settings["held_out"])
    set_seed(seed)
    model, tokenizer = example.bart(texts, **purpose.settings)
    vae_steps = settings["vae_steps"] or purpose.steps
    train(model, tokenizer, [purpose.steering()], texts, {**settings, "steps": vae_steps})
    model.eval()
    references = as_read(tokenizer, held_out)
    latents, held_out_latents = (encode_texts(model, tokenizer, x, batch_size=size) for x in (texts, held_out))

    results = {"reconstruction": reconstruction_scores(reconstruct(model, tokenizer, held_out), references)}
    started = time.process_time()
    history = model.fit_latent_prior(
        latents,
        held_out_latents,
        sizes={"num_codes": settings["codes"], "d_model": settings["d_model"]},
        max_steps=settings["steps"],
        batch_size=size,
        seed=seed,
        progress=False,
    )
    results["prior"] = {
        "seconds": time.process_time() - started,
        "steps": history[-1]["step"],
        "parameters": sum(p.numel() for p in model.latent_prior.parameters()),
        "codes_nats": min(entry["held_out_loss"] for entry in history),
        "density_nats": -average(model.log_prob, held_out_latents, size),
        "rate": average(model.rate, held_out_latents, size),
    }
    language_model = TokenModel(len(tokenizer), settings["d_model"])
    started = time.process_time()
    rows, held_out_rows = (
        tokenizer(x, truncation=True, max_length=example.MAX_LENGTH).input_ids for x in (texts, held_out)
    )
    results["language_model"] = train_token_model(
        language_model, rows, held_out_rows, tokenizer.bos_token_id, settings
    )
    results["language_model"]["seconds"] = time.process_time() - started

    def write(latents: NvibLatents) -> list[str]:
        return decode_latents(model, tokenizer, latents, batch_size=size)

    def timed(name: str, draw):
        start = time.perf_counter()
        drawn = draw()
        milliseconds[name] = 1000 * (time.perf_counter() - start) / count
        return drawn

    chance, milliseconds, made = torch.Generator().manual_seed(seed), {}, {}
    given = held_out_latents[:count]
    made["shuffled"] = write(with_vectors(model, given, lambda row: row[torch.randperm(len(row), generator=chance)]))
    made["independent"] = write(with_vectors(model, given, lambda row: torch.randn(row.shape, generator=chance)))
    for sampling in SAMPLINGS:
        setting = f"temperature {sampling['temperature']}, top-p {sampling['top_p']}"
        name = f"learned, {setting}, noise {sampling['noise']}"
        made[name] = write(timed(name, lambda s=sampling: model.sample_latents(count, generator=chance, **s)))
        name = f"language model, {setting}"
        if name not in made:
            how = (tokenizer.bos_token_id, tokenizer.eos_token_id, sampling["temperature"], sampling["top_p"], seed)
            made[name] = decoded(tokenizer, timed(name, lambda how=how: language_model.sample(count, *how)))
    judge = load_or_tiny(settings["judge"], texts, cache)
    scores = sample_scores(made, references, texts, seed=seed, language_model=judge[0], lm_tokenizer=judge[1])
    for name, written in made.items():
        again = reconstruct(model, tokenizer, [text or " " for text in written])
        scores[name]["agreement"] = sum(map(str.__eq__, again, written)) / count
        scores[name]["words"] = sum(len(text.split()) for text in written) / count
        scores[name]["examples"] = written[:16]
        if name in milliseconds:
            scores[name]["milliseconds"] = milliseconds[name]
    scores["real"]["fluency_ratio"] = 1.0
    scores["real"]["words"] = sum(len(text.split()) for text in references) / len(references)
    return {**results, "samples": scores}


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


def report(group: list[dict]) -> str:
    first = group[0]["results"]
    rows = []
    for kind in ("real", *(kind for kind in first["samples"] if kind != "real")):
        numbers = {
            title: over_runs(group, "samples", kind, name, factor=factor, digits=digits)
            for title, name, factor, digits in COLUMNS
        }
        rows.append({"texts": "held out" if kind == "real" else kind, **numbers})
    exact = over_runs(group, "reconstruction", "exact_match", factor=100, digits=1)
    rate, codes, tokens = (
        over_runs(group, *path, digits=1)
        for path in (("prior", "rate"), ("prior", "codes_nats"), ("language_model", "nats"))
    )
    parts = [
        LEGEND.strip(),
        f"{exact} % of the held-out texts are reconstructed exactly. A text costs {rate} nats under the learned "
        f"prior, of which {codes} for its codes; its tokens {tokens} nats under the language model.",
        table_of_rows(rows),
        f"The first sixteen of the first seed, {SHOWN}:",
        "\n".join(f"- {text}" for text in first["samples"][SHOWN]["examples"]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    args = parser(__doc__.splitlines()[0], "latent_prior", ["learned"]).parse_args()
    cache = args.output / "smollm2"
    if not args.quick:
        load_smollm2(cache)
    size = QUICK if args.quick else FULL
    runs = {f"learned-seed{seed}": {"seed": seed, **size} for seed in args.seeds}
    groups = over_seeds(run_all(partial(one, cache=cache), runs, args.output, args.jobs))
    write_report(args, "New texts from latents that reconstruct", report(groups[0]))


if __name__ == "__main__":
    main()
