"""Measures of samples and interpolations against loops, hand counts and known language models."""

import math

import pytest
import torch
from tiny_models import VOCAB_SIZE
from tiny_nvib import tiny_nvib
from tiny_text import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from nvib_hf.sample_quality import (
    copied,
    distinct_n,
    fluency,
    interpolation_scores,
    interpolations,
    latent_lengths,
    reverse_perplexity,
    sample_texts,
    self_bleu,
)

TOKENIZER = tiny_tokenizer()
TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w5 w5 w90"]


def language_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5)
    return GPT2LMHeadModel(config).train()


def test_fluency_is_that_of_single_texts():
    """Each text after <s>, without padding; texts without tokens are passed over."""
    model = language_model().eval()
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
    model = language_model()
    torch.nn.init.zeros_(model.transformer.wte.weight)
    assert fluency(model, TOKENIZER, TEXTS) == pytest.approx(VOCAB_SIZE)


def test_reverse_perplexity_tells_language_from_its_words():
    real = [f"the {a} of the {b} is good" for a in ("king", "house", "field") for b in ("land", "sea", "sky", "town")]
    mixed = [" ".join(sorted(text.split())) for text in real]
    state = torch.get_rng_state()
    values = [reverse_perplexity(samples, real, steps=20, batch_size=8) for samples in (real, mixed)]
    assert values[0] < 0.7 * values[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert reverse_perplexity(real, real, steps=2) == reverse_perplexity(real, real, steps=2)
    assert reverse_perplexity(real, real, steps=2) != reverse_perplexity(real, real, 1, steps=2)


def test_variety_and_copies():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(100)
    assert self_bleu(["a b c d e", "f g h i j"]) < 5
    assert distinct_n(["a b a b", "b a"], 1) == 2 / 6
    assert distinct_n(["a b a b", "b a"], 2) == 2 / 4
    assert distinct_n(["a"], 2) == 0
    assert copied(["a  b", "b a", "c", "a b"], ["a b", "x"]) == 0.5
    with pytest.raises(ValueError, match="at least two"):
        self_bleu(["a"])


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


def test_latent_lengths_count_what_the_decoder_sees():
    model = tiny_nvib(alpha_threshold=830.0)
    expected = [1 + int(model.encode(torch.tensor([TOKENIZER(text).input_ids])).num_vectors) for text in TEXTS]
    assert latent_lengths(model, TOKENIZER, TEXTS, batch_size=3) == expected
    assert expected != [1 + len(TOKENIZER(text).input_ids) for text in TEXTS]


def test_interpolations_are_those_of_single_pairs():
    model = tiny_nvib()
    paths = interpolations(model, TOKENIZER, [(TEXTS[0], TEXTS[2]), (TEXTS[1], TEXTS[3])], steps=3, max_length=6)
    for (a, b), path in zip([(0, 2), (1, 3)], paths, strict=True):
        ends = [model.encode(torch.tensor([TOKENIZER(TEXTS[i]).input_ids])) for i in (a, b)]
        for weight, text in zip((0, 0.5, 1), path, strict=True):
            latents = model.interpolate_latents(*ends, weight)
            ids = model.generate(encoder_outputs=latents, max_new_tokens=6)
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
    judged = interpolation_scores(paths, language_model=language_model(), lm_tokenizer=TOKENIZER)
    expected = [fluency(language_model(), TOKENIZER, [path[i] for path in paths]) for i in (0, 1)]
    assert judged["fluency"] == pytest.approx(expected)
