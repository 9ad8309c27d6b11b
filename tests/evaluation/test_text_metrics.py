"""Measures of texts against loops, hand counts and known language models."""

import functools
import math

import pytest
import torch
from tiny_models import VOCAB_SIZE
from tiny_text import tiny_language_model, tiny_tokenizer

from nvib_hf.evaluation.samples import copied, distinct_n, fluency, self_bleu, word_edits

TOKENIZER = tiny_tokenizer()
TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w5 w5 w90"]


def test_word_edits_against_the_definition():
    @functools.cache
    def distance(a: tuple, b: tuple) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    texts = ["", "a", "a b c", "b c", "c b a", "a b b a c", "x y"]
    for a in texts:
        for b in texts:
            assert word_edits(a, b) == distance(tuple(a.split()), tuple(b.split()))


def test_fluency_is_that_of_single_texts():
    """Each text after <s>, without padding; texts without tokens are passed over."""
    model = tiny_language_model().eval()
    nll, count = 0.0, 0
    for text in TEXTS:
        ids = [2, *TOKENIZER(text, add_special_tokens=False).input_ids]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nll -= sum(log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        count += len(ids) - 1
    model.train()
    assert fluency(model, TOKENIZER, [*TEXTS, ""], batch_size=3) == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert model.training
    assert math.isnan(fluency(model, TOKENIZER, ["", ""]))


def test_a_language_model_that_knows_nothing():
    model = tiny_language_model()
    torch.nn.init.zeros_(model.transformer.wte.weight)
    assert fluency(model, TOKENIZER, TEXTS) == pytest.approx(VOCAB_SIZE)


def test_variety_and_copies():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(100)
    assert self_bleu(["a b c d e", "f g h i j"]) < 5
    assert distinct_n(["a b a b", "b a"], 1) == 2 / 6
    assert distinct_n(["a b a b", "b a"], 2) == 2 / 4
    assert distinct_n(["a"], 2) == 0
    assert copied(["a  b", "b a", "c", "a b"], ["a b", "x"]) == 0.5
    with pytest.raises(ValueError, match="at least two"):
        self_bleu(["a"])
