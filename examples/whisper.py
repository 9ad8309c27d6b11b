"""Whisper on fewer vectors without training: what is merged where that costs least, and what that does to the words.

    python examples/whisper.py                             # Whisper tiny.en of a package, synthetic speech
    python examples/whisper.py --model base                # the multilingual base, of packages, too
    python examples/whisper.py --model openai/whisper-tiny # another, from the Hub or a folder
    python examples/whisper.py --audio RECORDINGS          # speech of your own, with transcripts as .txt
    python examples/whisper.py --trained FOLDER            # also what experiments/whisper_training.py has trained
    python examples/whisper.py --rows "cost"               # only rows of the table with this in their names
    python examples/whisper.py --times                     # seconds and memory, as a share of plain Whisper's

Whisper's decoder reads 1500 vectors for every 30 seconds, most of them of silence. Here they are merged with their
mass, after the encoder or inside it; or the encoder runs over the sound only, and stored vectors stand for silence.
Needs the extra `examples` (pip install nvib-hf[examples]), flite and espeak-ng (apt-get install flite espeak-ng). A
run that is cut off goes on where it was. `MERGING.md` explains what is done.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import os
import re
import shlex
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
import transformers
from speech import RATE, Utterance, with_noise
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor, GenerationMixin, WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging
from whisper_base import FILES, load_packaged_whisper
from whisper_figure import draw
from whisper_speech import long, recordings, short
from word_errors import difference, normalised, repeats

from nvib_hf import NvibForConditionalGeneration, NvibLatents
from nvib_hf.evaluation.samples import word_edits
from nvib_hf.files import write_whole
from nvib_hf.versions import CACHE
from nvib_hf.wrapping.model_card import markdown_table
from nvib_hf.wrapping.sound import MARGIN, STORED

BATCH = 8
TOKENS_PER_SECOND = 8  # more than anybody speaks
SPEAKERS = ("flite", "espeak-ng")
COSTS = (100, 150, 200, 300)  # the highest of a pair


# ------------------------------------------------------------------------------------ what the decoder reads
class Recogniser:
    """One Whisper, wrapped four times: ``whole``, over the ``sound`` only, with NVIB ``inside`` its encoder, with
    ``both``; and models that were trained, by the name of their folder."""

    def __init__(self, base: WhisperForConditionalGeneration, processor: WhisperProcessor, *trained: Path) -> None:
        if getattr(base.generation_config, "is_multilingual", False):
            processor.tokenizer.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
        self.base, self.processor = base, processor
        wraps = {
            "whole": {},
            "sound": {"encode_sound_only": True},
            "inside": halves_inside(base.config.encoder_layers),
            "both": {"encode_sound_only": True, **halves_inside(base.config.encoder_layers)},
        }
        self.models = {
            name: NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), **settings).eval()
            for name, settings in wraps.items()
        } | {folder.name: NvibForConditionalGeneration.from_pretrained(folder).eval() for folder in trained}

    def inputs(self, utterances: list[Utterance]) -> dict[str, Tensor]:
        sounds = [utterance.sound for utterance in utterances]
        return self.processor(sounds, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)

    def generate(self, model: NvibForConditionalGeneration, latents: NvibLatents, seconds: float, **options):
        return model.generate(encoder_outputs=latents, **self.settings(len(latents), seconds), **options)

    def generate_plainly(self, batch: "Batch", seconds: float, **options):
        """By the base as it is, from sound to tokens."""
        features = batch.inputs["input_features"]
        settings = self.settings(len(features), seconds)
        return GenerationMixin.generate(self.base, input_features=features, **settings, **options)

    def settings(self, count: int, seconds: float) -> dict:
        """At most as many tokens as anybody speaks: a model that begins to repeat itself would not end."""
        return {
            "decoder_input_ids": torch.tensor([self.processor.tokenizer.prefix_tokens]).expand(count, -1),
            "max_new_tokens": int(TOKENS_PER_SECOND * seconds) + 8,
            "do_sample": False,
        }

    def transcribe(self, model: NvibForConditionalGeneration, latents: NvibLatents, seconds: float) -> list[str]:
        return self.processor.batch_decode(self.generate(model, latents, seconds), skip_special_tokens=True)


class Batch:
    """Sounds to transcribe. What the plain model encodes is kept, for all rows that merge it."""

    def __init__(self, recogniser: Recogniser, utterances: list[Utterance]) -> None:
        self.models, self.inputs = recogniser.models, recogniser.inputs(utterances)

    @cached_property
    def plain(self) -> NvibLatents:
        return self.models["whole"].encode(**self.inputs)


# A model and what it has encoded.
Read = tuple[NvibForConditionalGeneration, NvibLatents]
Reading = Callable[[Batch], Read]


def halves_inside(layers: int) -> dict:
    """Half of the vectors left after the second layer of an encoder, and half of those after the last."""
    return {"attentions": ["cross", "encoder"], "encoder_merge_share": {1: 0.5, layers - 1: 0.5}}


def encoded(batch: Batch, model: str, **options) -> Read:
    return batch.models[model], batch.models[model].encode(**batch.inputs, **options)


def merged(batch: Batch, model: str = "whole", **limit) -> Read:
    """What `encode(**inputs, merge_share=...)` returns, from what is encoded already.

    A trained model has the same encoder.
    """
    return batch.models[model], batch.models["whole"].merge_latents(batch.plain, **limit)


def trimmed(batch: Batch, margin: int) -> Read:
    """The encoder over the sound and a margin, and no more: the mass of what is left out is lost."""
    place = torch.arange(batch.inputs["attention_mask"].shape[-1])
    frames = (batch.inputs["attention_mask"].sum(-1) + 2 * margin).clamp(max=len(place))
    mask = place < frames[:, None] - 2 * MARGIN  # the model adds its own margin
    model = batch.models["sound"]
    latents = model.encode(**{**batch.inputs, "attention_mask": mask.long()})
    log_pi = latents.log_pi.clone()
    if (frames < len(place)).any():
        log_pi[:, -STORED:] = -torch.inf
    return model, dataclasses.replace(latents, log_pi=log_pi.log_softmax(-1)).compact()


ROWS: dict[str, Reading] = {
    "plain": lambda batch: (batch.models["whole"], batch.plain),
    "encoder cut to the sound and 64 frames": partial(trimmed, margin=64),
    "encoder cut to the sound and 128 frames": partial(trimmed, margin=128),
    "encoder over the sound, and stored silence": partial(encoded, model="sound"),
    "the same, the sound merged to a quarter": partial(encoded, model="sound", merge_share=0.25),
    "the same, the sound merged where a pair costs at most 200": partial(encoded, model="sound", merge_cost=200),
    "the same, a quarter of the sound left inside the encoder": partial(encoded, model="both"),
    "a quarter left inside the encoder": partial(encoded, model="inside"),
    "the same, merged to 5 % of 1500": partial(encoded, model="inside", merge_share=0.2),
    **{f"all 1500 merged to {percent} %": partial(merged, share=percent / 100) for percent in (15, 10, 7, 5, 3)},
    **{f"all 1500 merged where a pair costs at most {cost}": partial(merged, cost=cost) for cost in COSTS},
}


def rows_of(folder: Path) -> dict[str, Reading]:
    """Of a trained model: it drops, or reads merged vectors."""
    if NvibForConditionalGeneration.config_class.from_pretrained(folder).dropping == "relaxed":
        return {f"{folder.name}, what it keeps": partial(encoded, model=folder.name)}
    limits = {f"to {percent} %": {"share": percent / 100} for percent in (5, 3, 2, 1)}
    limits |= {f"where a pair costs at most {cost}": {"cost": cost} for cost in (200, 300, 400)}
    return {
        f"{folder.name}, all 1500 merged {how}": partial(merged, model=folder.name, **limit)
        for how, limit in limits.items()
    }


# ------------------------------------------------------------------------------------ what it writes
def judged(utterance: Utterance, vectors: int, text: str) -> dict:
    said, written = normalised(utterance.text), normalised(text)
    return {
        "said": utterance.text,
        "written": text,
        "vectors": vectors,
        "edits": word_edits(said, written),
        "words": len(said.split()),
        "repeats": repeats(written) and not repeats(said),
    }


@torch.no_grad()
def run(recogniser: Recogniser, speech: dict, rows: dict[str, Reading], path: Path) -> dict:
    """Every row of every kind of speech: results by kind, row and number of the utterance."""
    results = json.loads(path.read_text()) if path.exists() else {}
    for kind, utterances in speech.items():
        by_length = iter(sorted(range(len(utterances)), key=lambda i: len(utterances[i].sound)))
        batches = list(iter(lambda: list(islice(by_length, BATCH)), []))  # noqa: B023  (used up in this turn)
        for batch in tqdm(batches, kind):
            sounds = [utterances[i] for i in batch]
            read = Batch(recogniser, sounds)
            for row in rows:
                done = results.setdefault(kind, {}).setdefault(row, {})
                before = {i: done[str(i)]["said"] for i in batch if str(i) in done}
                if any(said != utterances[i].text for i, said in before.items()):
                    raise SystemExit(f"{path} is of other utterances: pass another --output, or --seed as it was.")
                if len(before) == len(batch):
                    continue
                model, latents = rows[row](read)
                texts = recogniser.transcribe(model, latents, max(len(x.sound) for x in sounds) / RATE)
                numbers = (latents.log_pi > -torch.inf).sum(-1) - 1  # without the prior's component
                done.update(zip(map(str, batch), map(judged, sounds, numbers.tolist(), texts), strict=True))
            write_whole(path, json.dumps(results, indent=0))
    return results


# ------------------------------------------------------------------------------------ what came of it
def summary(rows: dict[str, dict], row: str) -> dict[str, float]:
    """Word error in percent, its difference to plain with a bootstrap interval of 95 %; loops, vectors."""
    plain, these = rows["plain"], [rows[row][i] for i in rows["plain"]]
    of_plain = np.array([x["edits"] for x in plain.values()])
    words, edits = (np.array([x[name] for x in these]) for name in ("words", "edits"))
    return difference(of_plain, edits, words) | {
        "error": 100 * edits.sum() / words.sum(),
        "repeats": sum(x["repeats"] for x in these),
        "vectors": np.mean([x["vectors"] for x in these]),
    }


def complete(rows: dict[str, dict]) -> list[str]:
    """The rows that hold every utterance of the plain model, in the order above, others last."""
    return [row for row in dict.fromkeys([*ROWS, *rows]) if row in rows and rows[row].keys() >= rows["plain"].keys()]


def table(results: dict, kind: str) -> str:
    rows, lines = results[kind], []
    for row in complete(rows):
        of = summary(rows, row)
        gap = f"{of['difference']:+.1f} ({of['low']:+.1f} to {of['high']:+.1f})"
        lines.append((row, f"{of['vectors']:.0f}", f"{of['error']:.1f}", gap, of["repeats"]))
    title = f"{kind}: {len(rows['plain'])} utterances"
    return markdown_table((title, "vectors", "word error, %", "difference, 95 % interval", "loops"), *lines)


TIMED = (
    "encoder over the sound, and stored silence",
    "the same, the sound merged to a quarter",
    "the same, the sound merged where a pair costs at most 200",
    "the same, a quarter of the sound left inside the encoder",
)


@torch.no_grad()
def times(recogniser: Recogniser, speech: list[list[Utterance]], repeats: int) -> str:
    """Seconds from features to tokens, and the cache of cross-attention, as shares of plain Whisper's.

    Seconds are medians of runs that take turns.
    """
    lines = []
    for utterances in speech:
        by_length = sorted(utterances, key=lambda x: len(x.sound))
        for size, beams in product((1, 8), (1, 5)):
            start = max(len(by_length) - size, 0) // 2
            sounds = by_length[start : start + size]  # those of middling length
            seconds = max(len(x.sound) for x in sounds) / RATE
            taken, cached = defaultdict(list), {}
            for _, row in product(range(repeats + 1), ("plain", *TIMED)):  # the first is warming up
                batch = Batch(recogniser, sounds)
                start = time.perf_counter()
                how = {"num_beams": beams, "return_dict_in_generate": True}
                if row == "plain":
                    made = recogniser.generate_plainly(batch, seconds, **how)
                else:
                    made = recogniser.generate(*ROWS[row](batch), seconds, **how)
                taken[row].append(time.perf_counter() - start)
                layers = made[CACHE].cross_attention_cache.layers
                cached[row] = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values)) / 2**20
            title = f"{seconds:.0f} s, batch {size}, beams {beams}"
            medians = {row: statistics.median(x[1:]) for row, x in taken.items()}
            print(title, medians, file=sys.stderr, flush=True)  # a long run may be cut off
            lines += [
                (f"{title}: {what}", f"{of['plain']:.2f} {unit}", *(f"{of[row] / of['plain']:.2f}" for row in TIMED))
                for what, of, unit in (("seconds", medians, "s"), ("cache", cached, "MiB"))
            ]
    return markdown_table(("", "plain", *TIMED), *lines)


def page(results: dict) -> str:
    """The tables, under what made them."""
    command = shlex.join(["python", "examples/whisper.py", *sys.argv[1:]])
    threads = f"{os.cpu_count()} CPU cores, of which PyTorch used {torch.get_num_threads()}"
    versions = f"PyTorch {torch.__version__.split('+')[0]}, Transformers {transformers.__version__}"
    made_by = f"- command: `{command}`\n- machine: {threads}; {versions}\n- date: {datetime.date.today().isoformat()}"
    tables = "\n\n".join(table(results, kind) for kind in results)
    return f"# Whisper on merged vectors\n\n{made_by}\n\n{tables}\n\n![What is merged](whisper.png)\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny.en", help="tiny.en or base of packages; or of the Hub, or a folder")
    parser.add_argument("--audio", type=Path, help="a folder of recordings with transcripts as .txt beside them")
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="folders of trained models, for more rows")
    parser.add_argument("--rows", default="", help="a regular expression: only rows that it finds, and the plain one")
    parser.add_argument("--short", type=int, default=120, help="synthetic utterances of 3 seconds (%(default)s)")
    parser.add_argument("--long", type=int, default=30, help="and of 12 to 28 seconds (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("whisper_merged"), help="folder of results (%(default)s)")
    parser.add_argument("--times", action="store_true", help="measure seconds and memory instead of words")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (%(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=[24], help="of sentences; several: so many of each")
    return parser.parse_args(arguments)


def load(name: str) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    if name in FILES:
        return load_packaged_whisper(name)
    return WhisperForConditionalGeneration.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.set_verbosity_error()
    speech = {"recordings": recordings(options.audio)}
    if missing := [program for program in SPEAKERS if shutil.which(program) is None]:
        if not speech["recordings"]:
            raise SystemExit(
                f"{' and '.join(missing)} is missing, which speaks (apt-get install {' '.join(missing)}), and so are "
                "recordings: install it, or pass --audio FOLDER."
            )
    else:
        clean = [utterance for seed in options.seed for utterance in short(options.short, seed)]
        speech = {
            "3 seconds": clean,
            "12 to 28 seconds": [utterance for seed in options.seed for utterance in long(options.long, seed)],
            **speech,
            "3 seconds, noise of 10 dB": with_noise(clean, 10, options.seed[0]),
            "3 seconds, noise of 5 dB": with_noise(clean, 5, options.seed[0]),
        }
    speech = {kind: utterances for kind, utterances in speech.items() if utterances}
    recogniser = Recogniser(*load(options.model), *options.trained)
    if options.times:
        print(times(recogniser, list(speech.values())[:2], options.repeats))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    rows = ROWS | {row: reading for folder in options.trained for row, reading in rows_of(folder).items()}
    rows = {row: reading for row, reading in rows.items() if row == "plain" or re.search(options.rows, row)}
    if len(rows) == 1:
        raise SystemExit(f"--rows {options.rows!r} is in the name of no row. The rows are: {', '.join(ROWS)}.")
    results = run(recogniser, speech, rows, options.output / "results.json")
    (options.output / "whisper.md").write_text(page(results), encoding="utf-8")
    print(page(results))
    first = next(iter(speech))
    errors = {row: summary(results[first], row) for row in complete(results[first])}
    draw(recogniser, speech[first][0], errors, options.output / "whisper.png")


if __name__ == "__main__":
    main()
