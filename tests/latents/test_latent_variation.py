"""New latents around and between old ones, against the moments that they must have."""

import pytest
import torch
from tiny_latents import INF, assert_same, components, mixture, sample
from tiny_models import tiny_inputs
from tiny_nvib import tiny_nvib

from nvib_hf import NvibLatents, latent_distance
from nvib_hf.latents.sampling import blend, vary


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------- around each of them
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_have_the_mean_and_the_deviation_of_the_posterior(temperature):
    latents = mixture(batch=3)
    latents.log_pi[1, 1] = -INF  # dropped
    draws = vary(latents[[0, 1, 2] * 4000], temperature, generator=seeded())
    assert set(draws.keys()) == {"z", "log_pi", "attention_mask"}  # points, of no text
    for row in range(3):
        of_row = draws[row::3]
        for i, (weight, mean, deviation) in enumerate(components(latents, row)):
            place = (of_row.log_pi[0] > -INF).nonzero()[i, 0]
            z = of_row.z[:, place]
            torch.testing.assert_close(of_row.log_pi[:, place].exp(), weight.expand(4000))
            torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.12 * temperature)
            torch.testing.assert_close(z.std(0), temperature * deviation, rtol=0.08, atol=0)
    assert (draws.z[~draws.attention_mask] == 0).all()
    assert torch.equal(draws.attention_mask, draws.log_pi > -INF)


def test_weights_are_redrawn_from_the_dirichlet():
    latents = mixture(batch=2)
    draws = vary(latents[[0, 1] * 50_000], 0.0, redraw_weights=True, generator=seeded())
    for row in range(2):
        seen = latents.log_pi[row] > -INF
        expected = torch.distributions.Dirichlet(latents.log_alpha[row, seen].exp())
        pi = draws.log_pi[row::2].exp()[:, seen]
        torch.testing.assert_close(pi.mean(0), expected.mean, rtol=0, atol=0.02)
        torch.testing.assert_close(pi.var(0), expected.variance, rtol=0.1, atol=0)
    assert torch.equal(draws.z[:2], latents.z)


def test_temperature_zero_leaves_the_means():
    latents = mixture()
    still = vary(latents, temperature=0.0)
    assert torch.equal(still.z, latents.z) and torch.equal(still.log_pi, latents.log_pi)


def test_temperature_one_draws_what_training_draws():
    """Weights included: the moments of 3000 draws of one text."""
    model, inputs = tiny_nvib(), {name: value[:1] for name, value in tiny_inputs("bart").items()}
    with torch.no_grad():
        ours = model.vary_latents(model.encode(**inputs)[[0] * 3000], redraw_weights=True, generator=seeded())
        repeated = {name: value.expand(3000, -1) for name, value in inputs.items()}
        theirs = model.encode(**repeated, sample=True, generator=seeded(1))
    for value in (lambda x: x.z, lambda x: x.log_pi.exp()[..., None]):
        torch.testing.assert_close(value(ours).mean(0), value(theirs).mean(0), rtol=0, atol=0.12)
        torch.testing.assert_close(value(ours).std(0), value(theirs).std(0), rtol=0.1, atol=0.01)


def test_draws_of_a_model_are_decoded_and_seeded():
    model = tiny_nvib()
    latents = model.encode(**tiny_inputs("bart"))
    latents.z.requires_grad_()
    draws = [model.vary_latents(latents, 0.5, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert_same(draws[0], draws[1])
    assert not torch.equal(draws[0].z, draws[2].z) and not draws[0].z.requires_grad
    assert model.generate(encoder_outputs=draws[0], max_new_tokens=3).shape[0] == 3


@pytest.mark.parametrize("temperature", [-0.1, INF, float("nan")])
def test_temperatures_out_of_range(temperature):
    with pytest.raises(ValueError, match="temperature must be 0 or positive, but got"):
        vary(mixture(), temperature)


def test_points_have_no_noise_and_no_pseudo_counts():
    with pytest.raises(ValueError, match=r"without logvar are points.*sample=False"):
        vary(sample())
    unknown = NvibLatents(**{name: value for name, value in mixture().items() if name != "log_alpha"})
    with pytest.raises(ValueError, match="redraw_weights needs log_alpha"):
        vary(unknown, redraw_weights=True)


# ----------------------------------------------------------------------------------------------------- between several
def test_blends_lie_between_two_of_the_corpus():
    """On a geodesic both parts add up to the whole: exactly one pair of texts explains each blend."""
    corpus = mixture(batch=5, length=6)
    blends = blend(corpus, 40, generator=seeded())
    assert blends.batch_size == 40 and torch.equal(blends.attention_mask, blends.log_pi > -INF)
    between = {(i, j): latent_distance(corpus[i], corpus[j]) for i in range(5) for j in range(i)}
    shares = []
    for row in range(40):
        to = latent_distance(blends[row], corpus)
        detour = {pair: (to[pair[0]] + to[pair[1]] - whole).item() for pair, whole in between.items()}
        best = min(detour, key=detour.get)
        assert detour[best] < 1e-3
        shares.append((to[best[0]] / between[best]).item())
    assert 0 < min(shares) < 0.15 and 0.85 < max(shares) < 1  # anywhere on the way
    assert len({tuple(row) for row in blends.z[:, 0].tolist()}) == 40


def test_blends_of_single_gaussians_are_their_weighted_mean():
    """Unit vectors: the coordinates are the weights, which are uniform on the simplex."""
    corpus = NvibLatents(z=torch.eye(3)[:, None], log_pi=torch.zeros(3, 1), attention_mask=torch.ones(3, 1).bool())
    weights = blend(corpus, 3000, num_parents=3, generator=seeded()).z[:, 0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(3000))
    assert (weights > 0).all()
    simplex = torch.distributions.Dirichlet(torch.ones(3))
    torch.testing.assert_close(weights.mean(0), simplex.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(weights.var(0).mean(), simplex.variance.mean(), rtol=0.04, atol=0)


def test_blends_of_a_model_are_decoded_and_seeded():
    model = tiny_nvib()
    latents = model.encode(**tiny_inputs("bart"))
    blends = [model.blend_latents(latents, 4, num_parents=3, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert_same(blends[0], blends[1])
    assert not torch.equal(blends[0].z[:, :5], blends[2].z[:, :5]) and not blends[0].z.requires_grad
    assert model.generate(encoder_outputs=blends[0], max_new_tokens=3).shape[0] == 4
    varied = model.vary_latents(blends[0], 0.5, generator=seeded())  # around what lies between
    assert varied.logvar is None and varied.z.shape == blends[0].z.shape


@pytest.mark.parametrize(
    "counts, message",
    [
        ((0, 2), "num_samples must be a whole number of at least 1, but got 0"),
        ((3, 1), "num_parents must be a whole number of at least 2, but got 1"),
        ((3, 2.5), "num_parents must be a whole number of at least 2, but got 2.5"),
        ((3, 5), "num_parents is 5, but there are only 4 latents"),
    ],
    ids=str,
)
def test_counts_of_blends(counts, message):
    with pytest.raises(ValueError, match=message):
        blend(mixture(), *counts)
