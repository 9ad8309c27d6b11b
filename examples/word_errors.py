"""Word errors of transcripts, and how sure a difference of them is."""

import re

import numpy as np
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from nvib_hf.evaluation.samples import word_edits

DRAWS = 10_000
# Without the mapping of British to American spelling, which is a file on the Hub.
normalised = EnglishTextNormalizer({})


def word_errors(references: list[str], hypotheses: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each utterance: wrong words, and words."""
    pairs = [
        (normalised(reference), normalised(given)) for reference, given in zip(references, hypotheses, strict=True)
    ]
    return np.array([word_edits(*pair) for pair in pairs]), np.array([len(pair[0].split()) for pair in pairs])


def difference(plain: np.ndarray, other: np.ndarray, words: np.ndarray) -> dict[str, float]:
    """Of two error rates, in points, with a bootstrap interval of 95 % over the utterances."""
    draws = np.random.default_rng(0).integers(0, len(words), (DRAWS, len(words)))
    low, high = np.percentile(100 * (other - plain)[draws].sum(1) / words[draws].sum(1), [2.5, 97.5])
    return {"difference": 100 * (other - plain).sum() / words.sum(), "low": low, "high": high}


def compare(references: list[str], plain: list[str], compressed: list[str]) -> dict[str, float]:
    """Word error rates in percent, and their difference."""
    of_plain, words = word_errors(references, plain)
    of_compressed, _ = word_errors(references, compressed)
    rates = {"plain": 100 * of_plain.sum() / words.sum(), "compressed": 100 * of_compressed.sum() / words.sum()}
    return rates | difference(of_plain, of_compressed, words)


def repeats(text: str) -> bool:
    """Whether the same words stand four times in a row."""
    return re.search(r"\b(\S+(?: \S+){0,7})(?: \1\b){3}", text) is not None
