"""Long texts, character by character, in fewer vectors: merged, averaged, dropped, or cut off.

    python examples/experiments/long_sources.py          # one run after another, about five minutes of one core a seed
    python examples/experiments/long_sources.py --quick  # everything runs, nothing is learnt

A small T5 with fresh weights learns to look facts up in up to 512 characters of the Bible in Basic English. Between
the letters stand eight keys, with four digits after each. The decoder is asked by a key, and writes its digits. Then
what it reads is reduced to a half, a quarter and a tenth: first without training, then after a fine-tuning that draws
the share anew at every step, once for merging and once for the mean of neighbours.
"""

import copy
import functools
import itertools
import random
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from long_sources_report import ALL, report
from runner import over_seeds, parser, run_all, write_report
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration, set_seed

from nvib_hf import NvibForConditionalGeneration, NvibLatents
from nvib_hf.versions import CACHE

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples
import bbe

PAD, END, START = range(3)
LETTERS, DIGITS = string.ascii_lowercase + " ", string.digits
OF_CHARACTER = {character: number for number, character in enumerate(LETTERS + DIGITS, start=3)}
KEYS = range(3 + len(OF_CHARACTER), 3 + len(OF_CHARACTER) + 26)
FACTS = 8  # of a source, each of five characters
SHARES = (0.5, 0.25, 0.1)
LENGTH = 512  # of the sources at the end of the training
# Characters of a source, sources in a batch, steps
STAGES = [(16, 32, 250), (64, 16, 800), (128, 8, 300), (LENGTH, 4, 200)]
LEARNT = 0.05  # a mean loss, nats per token, over 20 steps: on to the next stage
TUNING = {"merging": [(LENGTH, 4, 360)], "means": [(LENGTH, 4, 360)]}
FULL = {"sources": 60, "lengths": [LENGTH, 64, 128, 1024, 2048, 4096], "timed": [LENGTH, 2048]}
FULL["timing"] = {"batch": 4, "tokens": 32, "repeats": 2}
QUICK = {"sources": 4, "lengths": [LENGTH, 64], "timed": [LENGTH], "timing": {"batch": 2, "tokens": 2, "repeats": 1}}
QUICK_STAGES = [(64, 4, 2)]


# ------------------------------------------------------------------------------------------------ task
@functools.cache
def letters(part: str) -> str:
    """The text in lower case, without its marks: the first nine tenths for training, the last one for the test."""
    text = " ".join("".join(c for c in " ".join(bbe.verses()).lower() if c in LETTERS).split())
    cut = len(text) * 9 // 10
    return text[:cut] if part == "training" else text[cut:]


def facts(text: str, length: int, draw: random.Random) -> tuple[list[int], dict[int, list[int]]]:
    """A source with up to eight facts at random places of the text; what follows each key, in another order."""
    known = {key: encoded(draw.choices(DIGITS, k=4)) for key in draw.sample(KEYS, min(FACTS, length // 8))}
    left = length - 5 * len(known)
    start, places = draw.randrange(len(text) - left), sorted(draw.choices(range(left + 1), k=len(known)))
    source, before = [], 0
    for place, (key, value) in zip(places, known.items(), strict=True):
        source += [*encoded(text[start + before : start + place]), key, *value]
        before = place
    source += encoded(text[start + before : start + left])
    return source, {key: known[key] for key in draw.sample(list(known), len(known))}


def encoded(characters: Iterable[str]) -> list[int]:
    return [OF_CHARACTER[character] for character in characters]


def batches(part: str, length: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end.

    The decoder is asked for one key after another: it reads a key, and its labels are the value and the end. A key
    has no label.
    """
    text, draw = letters(part), random.Random(seed)
    while True:
        sources, known = zip(*(facts(text, length, draw) for _ in range(size)), strict=True)
        asked = [[x for key, value in of.items() for x in (key, *value, END)] for of in known]
        read, labels = torch.tensor([[START, *row] for row in asked]), torch.tensor([[*row, PAD] for row in asked])
        labels = labels.masked_fill((labels >= KEYS[0]) | (labels == PAD), -100)
        yield {"input_ids": torch.tensor(sources), "decoder_input_ids": read, "labels": labels}


# ------------------------------------------------------------------------------ what the decoder reads
def log_masses(latents: NvibLatents) -> Tensor:
    """``(B, N)`` without the prior's component; ``-inf`` where there is no vector."""
    return latents.attended(float(latents.scale[0]), "means").bias[:, 1:]


def with_masses(z: Tensor, log_mass: Tensor, scale: Tensor) -> NvibLatents:
    """Vectors ``(B, N, P)`` of these masses, without the prior's component."""
    log_pi = log_mass + scale[:, None] / 2 * z.square().sum(-1)  # attention takes the norm off
    return NvibLatents(z, log_pi.log_softmax(-1), log_mass > -torch.inf, scale=scale)


def without_mass(latents: NvibLatents) -> NvibLatents:
    """The same vectors, of mass 1 each."""
    log_mass = log_masses(latents)
    return with_masses(latents.z[:, 1:], log_mass.masked_fill(log_mass > -torch.inf, 0), latents.scale)


def mean_of_neighbours(latents: NvibLatents, share: float, with_mass: bool = False) -> NvibLatents:
    """The means of groups of ``1 / share`` neighbours: of mass 1 each, or weighted by mass, with that of the group."""
    size, log_mass = round(1 / share), log_masses(latents)
    if not with_mass:
        log_mass = log_mass.masked_fill(log_mass > -torch.inf, 0)
    missing = -log_mass.shape[1] % size
    groups = F.pad(log_mass, (0, missing), value=-torch.inf).unflatten(1, (-1, size))
    z = F.pad(latents.z[:, 1:], (0, 0, 0, missing)).unflatten(1, (-1, size))
    mean = (groups.softmax(-1)[..., None] * z).sum(2)  # all sources of a batch have the same length
    total = groups.logsumexp(-1)
    return with_masses(mean, total if with_mass else torch.zeros_like(total), latents.scale)


def dropped(latents: NvibLatents, share: float, score: Callable[[Tensor], Tensor]) -> NvibLatents:
    """The vectors of the highest score, and nothing of the others."""
    z, log_mass = latents.z[:, 1:], log_masses(latents)
    rank = score(z).argsort(dim=-1, descending=True).argsort(dim=-1)
    kept = rank < round(share * z.shape[1])
    return with_masses(z, log_mass.masked_fill(~kept, -torch.inf), latents.scale).compact()


def cut_off(model, source: Tensor, share: float) -> NvibLatents:
    return model.encode(source[:, : round(share * source.shape[1])])


def at_random(z: Tensor) -> Tensor:
    return torch.rand(z.shape[:2], generator=torch.Generator().manual_seed(0))


# Of a model, its source, the latents of it and the share that is left.
ROWS: dict[str, Callable[..., NvibLatents]] = {
    "merged": lambda model, _, latents, share: model.merge_latents(latents, share=share),
    'merged, `order="any"`': lambda model, _, latents, share: model.merge_latents(latents, share=share, order="any"),
    "merged, without mass": lambda model, _, latents, share: without_mass(model.merge_latents(latents, share=share)),
    "means of neighbours": lambda model, _, latents, share: mean_of_neighbours(latents, share),
    "means of neighbours, with mass": lambda model, _, latents, share: mean_of_neighbours(latents, share, True),
    "dropped, the largest norms kept": lambda model, _, latents, share: dropped(
        latents, share, lambda z: z.norm(dim=-1)
    ),
    "dropped at random": lambda model, _, latents, share: dropped(latents, share, at_random),
    "the source cut off": lambda model, source, _, share: cut_off(model, source, share),
}
MERGED, ANY, MERGED_ALONE, MEANS, WITH_MASS, *_ = ROWS
LONGER = [row for row in ROWS if row not in (ANY, MERGED_ALONE, WITH_MASS)]  # for sources of other lengths


# --------------------------------------------------------------------------------------------- one run
def train(model, stages: list, seed: int, rate: float, encode: Callable | None = None) -> list[list]:
    """Adam, one stage after another; a stage but the last ends when it is learnt. Its steps and mean loss at the end.

    The rate rises in the first hundred steps, and falls to 0 in the last stage.
    """
    optimizer, steps, told = torch.optim.Adam(model.parameters(), lr=rate), 0, []
    model.train()
    for number, (length, size, count) in enumerate(stages):
        is_last, losses = number == len(stages) - 1, []
        for inputs in itertools.islice(batches("training", length, size, 1000 * seed + number), count):
            if encode is not None:
                inputs["encoder_outputs"] = encode(inputs.pop("input_ids"))
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps += 1
            for group in optimizer.param_groups:
                left = 1 - len(losses) / count if is_last else 1
                group["lr"] = rate * min(steps / 100, left)
            optimizer.step()
            losses.append(loss.item())
            if not is_last and len(losses) >= 20 and statistics.fmean(losses[-20:]) < LEARNT:
                break
        told.append([length, len(losses), statistics.fmean(losses[-20:])])
        print(f"{length} characters: {len(losses)} steps, loss {told[-1][-1]:.3f}", flush=True)
    model.eval()
    return told


def fresh_model() -> T5ForConditionalGeneration:
    """Of 0.8M parameters. Relative positions let it read sources that are longer than those of its training.

    Its heads begin by looking one to four tokens back, which would take it minutes to find.
    """
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.0}
    special = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": START}
    model = T5ForConditionalGeneration(T5Config(vocab_size=KEYS[-1] + 1, **sizes, **special))
    for half in (model.encoder, model.decoder):
        bias = half.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # by distance and head
        with torch.no_grad():
            bias[1:5] += 5 * torch.eye(4)
    return model


def wrapped(base: T5ForConditionalGeneration) -> NvibForConditionalGeneration:
    return NvibForConditionalGeneration.from_base_pretrained(base, lambda_gaussian=0.0, lambda_dirichlet=0.0).eval()


@torch.no_grad()
def right(model, labels: Tensor, **inputs) -> list[int]:
    """Two numbers for each source: how many values are right, all tokens and the end, and how many were asked for.

    A token is right if it is the likeliest one after what is right before it: if greedy decoding writes it.
    """
    wrong = (model(**inputs).logits.argmax(-1) != labels) & (labels >= 0)
    counts: list[int] = []
    for row, ends in zip(wrong, labels == END, strict=True):
        value = ends.cumsum(-1) - ends.long()  # the number of the value that a token is part of
        asked = int(ends.sum())
        counts += [asked - len(set(value[row].tolist())), asked]
    return counts


@torch.no_grad()
def looked_up(model, length: int, sources: int, seed: int, rows: Iterable[str]) -> dict[str, list]:
    """By ``length row share``: the right values and those asked for, of each source. Longer sources are fewer."""
    found: dict[str, list] = {}
    size = max(1, 4 * LENGTH // length)
    count = max(sources * min(LENGTH, length) // length // size, 1)
    for inputs in itertools.islice(batches("test", length, size, 1000 * seed + 999), count):
        source = inputs.pop("input_ids")
        latents = model.encode(source)
        found.setdefault(f"{length} {ALL} 1", []).extend(right(model, **inputs, encoder_outputs=latents))
        for row, share in itertools.product(rows, SHARES):
            counts = right(model, **inputs, encoder_outputs=ROWS[row](model, source, latents, share))
            found.setdefault(f"{length} {row} {share}", []).extend(counts)
    return found


def totals(counts: list[int]) -> list[int]:
    """Of all sources together."""
    return [sum(counts[::2]), sum(counts[1::2])]


# Rows in the table of times, and their shares. The base is the plain model, without a wrap.
BASE, CUT = "the plain model", list(ROWS)[-1]
TIMED = ((BASE, 1), (ALL, 1), *((MERGED, share) for share in SHARES), (ANY, 0.25), (MEANS, 0.25), (CUT, 0.25))


@torch.no_grad()
def times(base, model, length: int, batch: int, tokens: int, repeats: int) -> list[dict]:
    """Seconds of the processor for a batch: medians of rounds in which the rows take turns; bytes of the cache."""
    made = next(batches("test", length, batch, 0))
    source, asked = made["input_ids"], made["decoder_input_ids"][:, :2]
    rows = [case for case in TIMED if case[0] != ANY or length == LENGTH]
    taken: dict[tuple, list[list[float]]] = {case: [] for case in rows}
    cache: dict[tuple, list[int]] = {}
    for _, (row, share) in itertools.product(range(repeats + 1), rows):  # the first round is warming up
        marks = [time.process_time()]
        if row == BASE:
            latents = base.get_encoder()(source)
        else:
            latents = cut_off(model, source, share) if row == CUT else model.encode(source)
        marks.append(time.process_time())
        if row not in (BASE, ALL, CUT):
            latents = ROWS[row](model, source, latents, share)
        marks.append(time.process_time())
        cache[row, share] = []
        for beams in (1, 5):
            written = (base if row == BASE else model).generate(
                encoder_outputs=copy.copy(latents),
                decoder_input_ids=asked,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                num_beams=beams,
                return_dict_in_generate=True,
            )
            marks.append(time.process_time())
            layers = written[CACHE].cross_attention_cache.layers
            cache[row, share].append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
        taken[row, share].append(np.diff(marks).tolist())
    return [
        {"row": row, "share": share, "seconds": np.median(taken[row, share][1:], axis=0).tolist(), "bytes": sizes}
        for (row, share), sizes in cache.items()
    ]


# Each needs the checkpoint of the first: its training, its tests, and the fine-tunings by what they read.
PLAIN, REDUCED, TUNED = "plain", "reduced", {"merging": MERGED, "means": MEANS}


def one(settings: dict, folder: Path) -> dict:
    """A training, or tests of one that was done before, whose checkpoint is in the folder."""
    method, seed = settings["method"], settings["seed"]
    checkpoint = folder / "checkpoints" / f"seed{seed}"
    set_seed(seed)
    if method == PLAIN:
        base = fresh_model()
        stages = train(base, settings["stages"], seed, 1e-3)
        base.save_pretrained(checkpoint)
        return {"stages": stages}
    base = T5ForConditionalGeneration.from_pretrained(checkpoint).eval()
    model, found = wrapped(copy.deepcopy(base)), {}
    if method == REDUCED:
        for length in settings["lengths"]:
            found |= looked_up(model, length, settings["sources"], seed, ROWS if length == LENGTH else LONGER)
        found = {name: counts if name == f"{LENGTH} {ALL} 1" else totals(counts) for name, counts in found.items()}
        timed = settings["timed"] if seed == settings["timed_seed"] else []  # the report tells one seed's
        tables = {length: times(base, model, length, **settings["timing"]) for length in timed}
        return {"right": found, "times": tables}
    row, draw = ROWS[TUNED[method]], random.Random(seed)

    def encode(source: Tensor) -> NvibLatents:
        share = 1 / draw.randint(1, 10)
        if TUNED[method] == MERGED:  # the posterior says what is merged, and not its draws
            return model.encode(source, merge_share=share)
        return row(model, source, model.encode(source), share)

    stages = train(model, settings["stages"], seed + 500, 5e-4, encode)
    return {"stages": stages, "right": looked_up(model, LENGTH, settings["sources"], seed, TUNED.values())}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "long_sources", [PLAIN, REDUCED, *TUNED])
    arguments.set_defaults(seeds=[0], jobs=1)
    args = arguments.parse_args()
    tests = QUICK if args.quick else FULL
    stages = dict.fromkeys(args.methods, QUICK_STAGES) if args.quick else {PLAIN: STAGES, **TUNING}
    settings = {PLAIN: {"stages": stages[PLAIN]}, REDUCED: {**tests, "timed_seed": args.seeds[0]}}
    settings |= {method: {"stages": stages[method], "sources": tests["sources"]} for method in TUNED}
    runs = {
        f"{method}-seed{seed}": {"method": method, "seed": seed, **settings[method]}
        for method in args.only
        for seed in args.seeds
    }
    run = functools.partial(one, folder=args.output)
    if args.jobs:  # the others need the checkpoints
        run_all(run, {key: of for key, of in runs.items() if of["method"] == PLAIN}, args.output, args.jobs)
    groups = {
        group[0]["settings"]["method"]: group for group in over_seeds(run_all(run, runs, args.output, args.jobs))
    }
    write_report(args, "Long texts in fewer vectors", report(groups, TUNED))


if __name__ == "__main__":
    main()
