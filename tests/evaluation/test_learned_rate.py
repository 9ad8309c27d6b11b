"""The rate under a learned prior, in `rate_distortion`, `evaluate` and the card, against each of its parts."""

import json
import math

import pytest
import torch
from test_evaluate import TEXTS, TOKENIZER, encode
from tiny_nvib import tiny_nvib
from tiny_prior import SIZES
from torch.distributions import Dirichlet, Normal, kl_divergence

from nvib_hf import add_to_model_card, encode_texts, evaluate
from nvib_hf.evaluation.rate_distortion import rate_distortion

FEWER = {"num_samples": 4, "num_pairs": 0, "importance_samples": 0}


@pytest.fixture(scope="module")
def fitted():
    model = tiny_nvib(delta=0.5, prior_alpha=2.0)
    latents = encode_texts(model, TOKENIZER, TEXTS)
    model.fit_latent_prior(latents, latents, sizes=SIZES, max_steps=20, progress=False)
    return model


@torch.no_grad()
def test_it_is_the_length_the_codes_the_vectors_and_the_weights(fitted):
    prior, total = fitted.latent_prior, 0.0
    for text in TEXTS:
        latents = encode(fitted, text)
        z, n = latents.z[:, 1:], latents.z.shape[1] - 1
        codes = prior.codes(z)
        own = Normal(z[0], (0.5 * latents.logvar[0, 1:]).exp())
        of_code = Normal(prior.places[:n] + prior.centres[codes[0]], (0.5 * prior.draws_logvar[codes[0]]).exp())
        alpha, ones = latents.log_alpha[0].exp().double(), torch.ones(n + 1, dtype=torch.double)
        weights = kl_divergence(Dirichlet(alpha.sum() / (n + 1) * ones), Dirichlet((2.0 + 0.5 * n) / (n + 1) * ones))
        total += prior.loss(z)[0] - prior.log_lengths[n - 1] + kl_divergence(own, of_code).sum() + weights
    found = rate_distortion(fitted, TOKENIZER, TEXTS)
    assert found["rate_learned"] == pytest.approx(float(total) / len(TEXTS), rel=1e-4)
    assert found["rate_learned"] != pytest.approx(found["rate"], rel=0.01)
    assert "rate_learned" not in rate_distortion(tiny_nvib(), TOKENIZER, TEXTS)
    assert "rate_learned" not in rate_distortion(tiny_nvib(latent_prior=SIZES), TOKENIZER, TEXTS)  # never fitted


def test_it_stands_beside_the_rate_in_the_card_and_samples_are_the_priors(fitted, tmp_path):
    results = evaluate(fitted, TOKENIZER, TEXTS, decodings={"greedy": {}}, **FEWER)
    again = rate_distortion(fitted, TOKENIZER, TEXTS)
    assert results["rate_distortion"]["rate_learned"] == pytest.approx(again["rate_learned"])
    assert results["samples"]["greedy"]["num_samples"] == 4
    fitted.save_pretrained(tmp_path)
    add_to_model_card(tmp_path, results)
    card = (tmp_path / "README.md").read_text()
    assert f"| the same, under the learned prior | {again['rate_learned']:.1f} |" in card
    assert card.index("| rate: what a latent costs") < card.index("under the learned prior")


def test_of_longer_texts_than_the_prior_knows_there_is_none(fitted):
    """And samples do not follow their lengths, which it could not draw."""
    longer = [*TEXTS, "w5 w6 w7 w8 w9 w10 w11 w12 w13"]
    assert math.isnan(rate_distortion(fitted, TOKENIZER, longer)["rate_learned"])
    results = evaluate(fitted, TOKENIZER, longer[-1:] * 3, decodings={"greedy": {}}, **FEWER)
    assert json.loads(json.dumps(results, allow_nan=False))["rate_distortion"]["rate_learned"] is None
