"""What the examples on Whisper listen to: synthetic clauses of two lengths, and recordings that packages ship."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from bbe import clauses
from scipy.signal import resample_poly
from speech import RATE, Utterance, read, recorded, speak

# None of them has been listened to while merging was found, which was with awb and kal16.
VOICES = (("flite", "slt"), ("flite", "rms"), ("espeak-ng", "en-us"), ("espeak-ng", "en-gb-x-rp"))
TRAINING_VOICES = (("flite", "awb"), ("flite", "kal16"), ("espeak-ng", "en-us+f3"), ("espeak-ng", "en-gb-scotland+f4"))
MORE_VOICES = ("en-us+m3", "en-us+Alicia", "en-us+steph", "en-gb+f5", "en-gb-x-gbclan+m4", "en-gb-x-gbcwmd+edward")
SPEEDS = ((1, 1), (10, 11), (11, 10), (20, 21), (21, 20))  # samples for samples: pitch and tempo together
TESTED = 1000  # sentences of a seed that the tests may speak, at most


def short(count: int, seed: int) -> list[Utterance]:
    """Clauses of about three seconds, in turns of the voices."""
    return [spoken(text, i, VOICES) for i, text in enumerate(islice(_sentences(seed), count))]


def long(count: int, seed: int) -> list[Utterance]:
    """Clauses in a row, 12 to 28 seconds."""
    return list(_in_a_row(_sentences(seed + 1), count, 12.0, VOICES))


def to_train_on(count: int, seed: int) -> list[Utterance]:
    """Clauses in a row, 3 to 16 seconds: no sentence and no voice of :func:`short` or :func:`long` of this seed."""
    return list(_in_a_row(_not_tested(seed), count, 1.0, TRAINING_VOICES, longest=16.0))


def clauses_to_train_on(count: int, seed: int) -> list[Utterance]:
    """Clauses of about three seconds, in more voices and at different speeds; tested neither."""
    draw, voices = random.Random(seed), (*TRAINING_VOICES, *(("espeak-ng", voice) for voice in MORE_VOICES))
    made = [spoken(text, i, voices) for i, text in enumerate(islice(_not_tested(seed), count))]
    return [replace(x, sound=resample_poly(x.sound, *draw.choice(SPEEDS)).astype(np.float32)) for x in made]


def _not_tested(seed: int) -> Iterator[str]:
    """Sentences that :func:`short` and :func:`long` speak neither with this seed nor with the next."""
    tested = {text for of in range(seed, seed + 3) for text in islice(_sentences(of), TESTED)}
    return (text for text in _sentences(seed) if text not in tested)


def _in_a_row(
    texts: Iterator[str], count: int, shortest: float, voices: tuple[tuple[str, str], ...], longest: float = 28.0
) -> Iterator[Utterance]:
    """Utterances, each until it is as long as its place among the others asks for."""
    for i in range(count):
        wanted = shortest + (longest - shortest) * i / count
        text, utterance = "", None
        while utterance is None or len(utterance.sound) < wanted * RATE:
            text += next(texts) + ". "
            longer = spoken(text.strip(), i, voices)
            if len(longer.sound) > longest * RATE:
                break
            utterance = longer
        yield utterance


def _sentences(seed: int) -> Iterator[str]:
    texts = clauses(6, 14)
    random.Random(seed).shuffle(texts)
    return iter(texts)


def spoken(text: str, turn: int, voices: tuple[tuple[str, str], ...]) -> Utterance:
    return Utterance(speak(text, *voices[turn % len(voices)]), text)


def recordings(folder: Path | None) -> list[Utterance]:
    """Those of a folder with transcripts; or what the packages pocketsphinx-testdata and alsa-utils ship."""
    if folder is not None:
        made = [utterance for utterance in recorded(folder) if utterance.text is not None]
        if not made:
            raise SystemExit(f"No recording of {folder} has a transcript: put a .txt of the same name beside it.")
        return made
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
