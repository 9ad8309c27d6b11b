"""Speech to try a recogniser on: recordings from a folder, or sentences spoken by `flite` or `espeak-ng`."""

import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from bbe import clauses
from scipy.signal import resample_poly

RATE = 16000
# Of each program: voices to train on, and others to test on. The first program that is installed speaks.
VOICES = {
    "flite": (("slt", "rms"), ("awb", "kal16")),
    "espeak-ng": (("en-us", "en-us+f3"), ("en-gb-x-rp", "en-gb-scotland+f4")),
}
NO_VOICES = (
    "There is nothing that speaks. Install flite or espeak-ng (apt-get install flite), or pass --audio FOLDER with "
    "recordings."
)


@dataclass
class Utterance:
    """Sound of 16 kHz, and what is said, where that is known."""

    sound: np.ndarray
    text: str | None = None


def spoken(train: int, test: int, seed: int) -> tuple[list[Utterance], list[Utterance]]:
    """Synthetic utterances to train and to test on: no sentence and no voice in both.

    Raises:
        SystemExit: nothing that speaks is installed.
    """
    program = next((program for program in VOICES if shutil.which(program)), None)
    if program is None:
        raise SystemExit(NO_VOICES)
    sentences = clauses(6, 14)
    random.Random(seed).shuffle(sentences)
    parts = sentences[:train], sentences[train : train + test]
    made = []
    for part, texts in enumerate(parts):
        voices = VOICES[program][part]
        made.append([Utterance(speak(text, program, voices[i % len(voices)]), text) for i, text in enumerate(texts)])
    return made[0], made[1]


def speak(text: str, program: str, voice: str) -> np.ndarray:
    """The sound of a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        options = {"flite": ["-voice", voice, "-t", text, "-o", path], "espeak-ng": ["-v", voice, "-w", path, text]}
        subprocess.run([program, *options[program]], check=True, capture_output=True)
        return read(path)


def recorded(folder: Path) -> list[Utterance]:
    """The recordings of a folder, up to 30 seconds of each.

    What is said is taken from a text file of the same name, if there is one.

    Raises:
        SystemExit: there are none.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3"))
    if not paths:
        raise SystemExit(f"{folder} has 0 recordings (.wav, .flac, .ogg, .mp3): at least one is needed.")
    made = []
    for path in paths:
        said = path.with_suffix(".txt")
        text = said.read_text(encoding="utf-8").strip() if said.exists() else None
        made.append(Utterance(read(path)[: 30 * RATE], text))
    return made


def read(path: Path) -> np.ndarray:
    """One channel at 16 kHz."""
    sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    sound = sound.mean(1)
    return sound if rate == RATE else resample_poly(sound, RATE, rate).astype(np.float32)


def with_noise(utterances: list[Utterance], decibels: float, seed: int) -> list[Utterance]:
    """White noise over each utterance, so far below its mean power."""
    draws = np.random.default_rng(seed)
    noisy = []
    for utterance in utterances:
        power = np.square(utterance.sound).mean() / 10 ** (decibels / 10)
        noise = draws.normal(0, np.sqrt(power), len(utterance.sound)).astype(np.float32)
        noisy.append(replace(utterance, sound=utterance.sound + noise))
    return noisy
