"""The search for plausible codes, against all sequences one by one and against what each part is defined as."""

import itertools

import pytest
import torch
from test_latent_prior import tiny

from nvib_hf.layers.code_search import best_codes, gaussian_fit
from nvib_hf.layers.latent_prior import LatentPrior


def best_of_all(prior: LatentPrior, fit: torch.Tensor, strength: float) -> tuple[int, ...]:
    """The best codes for one row's fit ``(n, K)``: every sequence scored by the prior's loss of its centres."""
    n, num_codes = fit.shape
    sequences = torch.tensor(list(itertools.product(range(num_codes), repeat=n)))
    z = prior.places[:n] + prior.centres[sequences]
    assert torch.equal(prior.codes(z), sequences)
    scores = -strength * prior.loss(z) + fit.expand(len(sequences), -1, -1).gather(2, sequences[..., None]).sum((1, 2))
    return tuple(sequences[scores.argmax()].tolist())


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_a_search_with_beams_enough_finds_the_best_of_all_sequences(strength):
    prior, generator = tiny(num_codes=4), torch.Generator().manual_seed(1)
    fit = 4 * torch.randn(40, 4, 4, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 3, 2] * 10)
    found = best_codes(prior, fit, lengths, strength, beams=4**4)
    expected = [best_of_all(prior, row[:n], strength) for row, n in zip(fit, lengths.tolist(), strict=True)]
    assert [tuple(row[:n].tolist()) for row, n in zip(found, lengths.tolist(), strict=True)] == expected
    if strength == 0:
        assert expected == [tuple(row[:n].argmax(-1).tolist()) for row, n in zip(fit, lengths.tolist(), strict=True)]
    else:  # the prior matters, and so does looking further than the next code
        greedy = best_codes(prior, fit, lengths, strength, beams=1)
        assert not torch.equal(greedy, found) and not torch.equal(found, fit.argmax(-1))


@torch.no_grad()
def test_fit_is_the_log_density_of_gaussians_but_for_what_all_centres_share():
    generator = torch.Generator().manual_seed(0)
    vectors, centres = (torch.randn(*shape, generator=generator).double() for shape in ((2, 3, 5), (7, 5)))
    variance = torch.rand(5, generator=generator).double() + 0.5
    density = torch.distributions.Normal(centres, variance.sqrt()).log_prob(vectors[..., None, :]).sum(-1)
    at_centre = torch.distributions.Normal(centres, variance.sqrt()).log_prob(centres).sum(-1)
    torch.testing.assert_close(gaussian_fit(vectors, centres, variance), density - at_centre)


@torch.no_grad()
def test_plausible_vectors_are_places_and_centres_nearer_to_the_prior_the_stronger():
    prior, generator = tiny(num_codes=4), torch.Generator().manual_seed(2)
    z = prior.places + torch.randn(20, 4, 2, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1] * 5)[:, None]
    prior.draws_logvar.fill_(0.7)
    nearest = prior.plausible(z, mask, 0)
    codes = prior.codes(z)
    torch.testing.assert_close(nearest, (prior.places + prior.centres[codes]).masked_fill(~mask[..., None], 0))
    costs = [prior.loss(prior.plausible(z, mask, strength), mask).mean().item() for strength in (0, 0.5, 2, 8)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1] + 1
    padding = z.masked_fill(~mask[..., None], 9.0)
    assert torch.equal(prior.plausible(padding, mask, 2.0), prior.plausible(z, mask, 2.0))


@torch.no_grad()
def test_distances_are_in_units_of_what_draws_have():
    """A wider spread of draws counts distances less, as a stronger prior does."""
    prior, generator = tiny(num_codes=4), torch.Generator().manual_seed(3)
    z = prior.places + torch.randn(30, 4, 2, generator=generator, dtype=torch.float64)
    prior.draws_logvar.fill_(0.0)
    stronger = prior.plausible(z, None, 3.0)
    assert not torch.equal(prior.plausible(z, None, 1.0), stronger)
    prior.draws_logvar.fill_(torch.tensor(3.0).log().item())
    torch.testing.assert_close(prior.plausible(z, None, 1.0), stronger)
