"""Pairs of source and target are measured as pairs, and what is cut is counted."""

import json
import math

import pytest
import torch
from tiny_nvib import tiny_nvib
from tiny_text import tiny_tokenizer

from nvib_hf import encode_texts, evaluate, evaluation_section
from nvib_hf.evaluation.rate_distortion import mutual_information, rate_distortion

TOKENIZER = tiny_tokenizer()
SOURCES = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w5 w5 w90", "w20 w21", "w5 w40 w41 w42"]
TARGETS = ["w50 w51", "w52 w53 w54", "w55", "w56 w57", "w58 w59 w40 w41 w42", "w42"]  # w3 stands for what is unknown
FAST = {"num_samples": 0, "num_pairs": 0, "importance_samples": 0}


def nats_by_hand(model, source: str, target: str) -> tuple[float, int]:
    ids, labels = (torch.tensor([TOKENIZER(text).input_ids]) for text in (source, target))
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).cross_entropy.item() * labels.numel(), labels.numel()


def test_the_decoder_is_scored_by_the_targets():
    model = tiny_nvib()
    results = evaluate(model, TOKENIZER, SOURCES, TARGETS, **FAST)
    nats, tokens = (sum(x) for x in zip(*map(nats_by_hand, [model] * 6, SOURCES, TARGETS), strict=True))
    assert results["rate_distortion"]["cross_entropy"] == pytest.approx(nats / tokens, rel=1e-4)
    own = rate_distortion(model, TOKENIZER, SOURCES)
    assert results["rate_distortion"]["rate"] == pytest.approx(own["rate"])  # a latent costs what it costs
    assert results["rate_distortion"]["cross_entropy"] != pytest.approx(own["cross_entropy"], rel=1e-3)
    assert json.loads(json.dumps(results)) == results


def test_what_it_writes_is_compared_with_the_targets(monkeypatch):
    written = [*TARGETS[:4], "w58", "w59"]
    monkeypatch.setattr("nvib_hf.evaluation.evaluate.reconstruct", lambda *args, **kwargs: written)
    results = evaluate(tiny_nvib(), TOKENIZER, SOURCES, TARGETS, **FAST)
    assert results["reconstruction"]["exact_match"] == pytest.approx(4 / 6)
    assert evaluate(tiny_nvib(), TOKENIZER, SOURCES, **FAST)["reconstruction"]["exact_match"] == 0


def test_samples_and_interpolations_are_texts_of_the_targets_side():
    settings = {"num_samples": 4, "num_pairs": 2, "methods": ["mixture"], "importance_samples": 2}
    targets = ["w50 w50 w50"] * 6
    results = evaluate(tiny_nvib(), TOKENIZER, SOURCES, targets, training_texts=targets, max_length=8, **settings)
    assert "embedding_distance" not in results["interpolation"]["mixture"]  # the encoder does not know that side
    assert results["samples"]["real"]["distinct_1"] < 0.1
    assert math.isfinite(results["rate_distortion"]["iw_log_likelihood"])


def test_the_information_of_shuffled_targets_is_another():
    model = tiny_nvib()
    right, wrong = (mutual_information(model, TOKENIZER, SOURCES, x) for x in (TARGETS, TARGETS[::-1]))
    assert right != wrong


@pytest.mark.parametrize(
    ("targets", "message"), [(TARGETS[:3], "3 targets, but 6 texts"), ("w5", "targets must be a")]
)
def test_refuses_targets_that_are_no_pairs(targets, message):
    for measure in (evaluate, rate_distortion, mutual_information):
        with pytest.raises(ValueError, match=message):
            measure(tiny_nvib(), TOKENIZER, SOURCES, targets)


# ---------------------------------------------------------------------------------------------------- cut texts
def test_says_how_many_texts_were_cut():
    """A source has its words and an end; 4 tokens are 3 words."""
    results = evaluate(tiny_nvib(), TOKENIZER, SOURCES, TARGETS, max_length=4, **FAST)
    assert results["settings"]["texts_cut"] == 2 and results["settings"]["targets_cut"] == 1
    assert "6 held-out texts, 2 texts and 1 targets cut to 4 tokens" in evaluation_section(results)
    whole = evaluate(tiny_nvib(), TOKENIZER, SOURCES, max_length=7, **FAST)
    assert whole["settings"]["texts_cut"] == 0 and "targets_cut" not in whole["settings"]
    assert "cut" not in evaluation_section(whole)


def test_the_length_is_that_of_the_model_unless_told():
    model = tiny_nvib()
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 5
    assert evaluate(model, tokenizer, SOURCES, **FAST)["settings"]["max_length"] == 5
    assert evaluate(model, tokenizer, SOURCES, max_length=3, **FAST)["settings"]["texts_cut"] == 4
    assert encode_texts(model, tokenizer, SOURCES).attention_mask.shape[1] == 6
