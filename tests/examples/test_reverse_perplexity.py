"""The perplexity of real texts under a language model of samples."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
from reverse_perplexity import byte_level_bpe, reverse_perplexity


def test_reverse_perplexity_tells_language_from_its_words():
    real = [f"the {a} of the {b} is good" for a in ("king", "house", "field") for b in ("land", "sea", "sky", "town")]
    mixed = [" ".join(sorted(text.split())) for text in real]
    state = torch.get_rng_state()
    values = [reverse_perplexity(samples, real, steps=20, batch_size=8) for samples in (real, mixed)]
    assert values[0] < 0.7 * values[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert reverse_perplexity(real, real, steps=2) == reverse_perplexity(real, real, steps=2)
    assert reverse_perplexity(real, real, steps=2) != reverse_perplexity(real, real, 1, steps=2)


def test_any_text_passes_through_the_byte_level_bpe():
    tokenizer = byte_level_bpe(["the king of the land"] * 3, vocab_size=300)
    for text in ("the king", "Überraschung, 7 €"):
        assert tokenizer.decode(tokenizer(text).input_ids).strip() == text
