"""Samples and interpolations, and their measures, against loops and hand counts."""

import itertools

import pytest
import torch
from tiny_nvib import tiny_nvib
from tiny_text import tiny_language_model, tiny_tokenizer

from nvib_hf.evaluation.samples import (
    DECODINGS,
    distinct_n,
    fluency,
    interpolation_scores,
    interpolations,
    latent_lengths,
    sample_scores,
    sample_texts,
    self_bleu,
)

TOKENIZER = tiny_tokenizer()
TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w5 w5 w90"]


def test_samples_are_the_models_own():
    model = tiny_nvib().train()
    texts = sample_texts(model, TOKENIZER, 5, [6], seed=3, max_length=7)
    assert model.training
    latents = model.eval().sample_latents(5, 6, generator=torch.Generator().manual_seed(3))
    ids = model.generate(encoder_outputs=latents, max_new_tokens=7)
    assert texts == [text.strip() for text in TOKENIZER.batch_decode(ids, skip_special_tokens=True)]
    assert sample_texts(model, TOKENIZER, 5, [6], seed=4, max_length=7) != texts
    with pytest.raises(ValueError, match="lengths is empty"):
        sample_texts(model, TOKENIZER, 5, [])


def test_samples_of_three_kinds():
    """The same latents, written in each way by ``generate`` itself; what it draws follows the seed alone."""
    model = tiny_nvib()
    latents = model.sample_latents(6, 5, generator=torch.Generator().manual_seed(3))
    expected = {
        "greedy": {"do_sample": False},
        "beam": {"num_beams": 4, "do_sample": False},
        "nucleus": {"do_sample": True, "top_p": 0.9, "top_k": 0},
    }
    assert set(expected) == set(DECODINGS)
    kinds = {}
    for kind, options in expected.items():
        state = torch.get_rng_state()
        kinds[kind] = sample_texts(model, TOKENIZER, 6, [5], seed=3, max_length=7, **DECODINGS[kind])
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(3)
        ids = model.generate(encoder_outputs=latents, max_new_tokens=7, **options)
        assert kinds[kind] == [text.strip() for text in TOKENIZER.batch_decode(ids, skip_special_tokens=True)]
    assert len({tuple(texts) for texts in kinds.values()}) == 3


def test_scores_of_samples():
    """Every kind by the measures of texts, and as many real texts beside them."""
    judge = {"language_model": tiny_language_model(), "lm_tokenizer": TOKENIZER}
    samples, real = {"one": TEXTS[:3], "two": ["w5 w6 w7", "w8"]}, [f"w{i} w{i + 1} w9 w{2 * i}" for i in range(5, 15)]
    scores = sample_scores(samples, real, ["w8", "w7", "w5 w90"], **judge, seed=2)
    assert set(scores) == {"one", "two", "real"}
    of_threes = [fluency(*judge.values(), list(three)) for three in itertools.combinations(real, 3)]
    assert any(value == pytest.approx(scores["real"]["fluency"], rel=1e-9) for value in of_threes)
    for kind, texts in samples.items():
        of_kind = fluency(*judge.values(), texts)
        assert scores[kind]["fluency"] == of_kind
        assert scores[kind]["fluency_ratio"] == pytest.approx(of_kind / scores["real"]["fluency"])
        assert scores[kind]["self_bleu"] == self_bleu(texts)
        assert [scores[kind][f"distinct_{n}"] for n in (1, 2)] == [distinct_n(texts, n) for n in (1, 2)]
        assert scores[kind]["num_samples"] == len(texts) and scores[kind]["examples"] == texts
    assert [scores[kind]["copied"] for kind in ("one", "two", "real")] == [1 / 3, 1 / 2, 0]
    alone = sample_scores(samples, real, seed=2)
    assert set(alone["one"]) == set(scores["one"]) - {"fluency", "fluency_ratio", "copied"}


def test_latent_lengths_count_what_the_decoder_sees():
    model = tiny_nvib(alpha_threshold=830.0)
    expected = [1 + int(model.encode(torch.tensor([TOKENIZER(text).input_ids])).num_vectors) for text in TEXTS]
    assert latent_lengths(model, TOKENIZER, TEXTS, batch_size=3) == expected
    assert expected != [1 + len(TOKENIZER(text).input_ids) for text in TEXTS]


@pytest.mark.parametrize("method", ["transport", "mixture"])
def test_interpolations_are_those_of_single_pairs(method):
    model, pairs = tiny_nvib(), [(TEXTS[0], TEXTS[2]), (TEXTS[1], TEXTS[3])]
    paths = interpolations(model, TOKENIZER, pairs, steps=3, method=method, max_length=8)
    for (a, b), path in zip([(0, 2), (1, 3)], paths, strict=True):
        ends = [model.encode(torch.tensor([TOKENIZER(TEXTS[i]).input_ids])) for i in (a, b)]
        for weight, text in zip((0, 0.5, 1), path, strict=True):
            latents = model.interpolate_latents(*ends, weight, method)
            ids = model.generate(encoder_outputs=latents, max_new_tokens=8)
            assert text == TOKENIZER.decode(ids[0], skip_special_tokens=True).strip()
    with pytest.raises(ValueError, match="steps must be at least 2"):
        interpolations(model, TOKENIZER, [("w5", "w6")], steps=1)


def test_scores_of_interpolations():
    paths = [["a b", "a b", "c d"], ["a", "a b", "a b c"]]
    embed = lambda texts: torch.tensor([[1.0, 0], [1, 0], [0, 1]]) * len(texts[0])  # noqa: E731
    scores = interpolation_scores(paths, embed=embed)
    assert scores["word_edits"] == 1.0
    assert scores["largest_step"] == pytest.approx((1 + 0.5) / 2)
    assert scores["embedding_distance"] == pytest.approx(0.5)
    assert scores["largest_embedding_distance"] == pytest.approx(1)
    paths = [[TEXTS[0], TEXTS[1]], [TEXTS[2], TEXTS[3]]]
    judged = interpolation_scores(paths, language_model=tiny_language_model(), lm_tokenizer=TOKENIZER)
    expected = [fluency(tiny_language_model(), TOKENIZER, [path[i] for path in paths]) for i in (0, 1)]
    assert judged["fluency"] == pytest.approx(expected)
