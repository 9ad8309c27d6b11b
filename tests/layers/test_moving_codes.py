"""Codes that follow posteriors: they stay, move and forget as the posteriors do; and moving means over batches."""

import torch
from test_latent_prior import tiny

from nvib_hf.layers.latent_prior import LatentPrior
from nvib_hf.layers.moving_codes import MOVING, MovingCodes

BUFFERS = ("centres", "logvar", "draws_logvar", "log_lengths")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def posteriors(num: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of 1 to 4 vectors near one of four points in two dimensions; padding is far away."""
    points = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [0.0, -3.0]])
    mu = points[torch.randint(4, (num, 4), generator=seeded(0))] + 0.3 * torch.randn(num, 4, 2, generator=seeded(1))
    mask = torch.arange(4) < torch.randint(1, 5, (num, 1), generator=seeded(2))
    logvar = 0.2 * torch.randn(num, 4, 2, generator=seeded(3)) - 2
    return torch.where(mask[..., None], mu, 99.0), logvar, mask


def fitted(num_batches: int) -> tuple[LatentPrior, MovingCodes, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    texts = mu, logvar, mask = posteriors()
    torch.manual_seed(0)
    prior = LatentPrior(2, num_codes=4, d_model=8, num_layers=1, num_heads=2, max_length=4)
    prior.fit_codebook(mu, mask, generator=seeded(0))
    prior.fit_draws(mu, logvar, mask)
    moving = MovingCodes(4, 2)
    moving.start(prior, *texts, num_batches)
    return prior, moving, texts


def followed(prior, moving, mu, logvar, mask, times: int, log_weight: float = -1.2) -> None:
    for _ in range(times):
        moving.follow(prior, mu, logvar, mask, torch.full(mask.shape, log_weight))


def test_codes_stay_where_posteriors_stay():
    prior, moving, texts = fitted(num_batches=1)
    before = {name: getattr(prior, name).clone() for name in BUFFERS}
    followed(prior, moving, *texts, times=50)
    for name, value in before.items():
        torch.testing.assert_close(getattr(prior, name), value, atol=2e-3, rtol=1e-3)


def test_a_batch_counts_as_a_hundredth():
    """Codes, by the formula, after one batch whose vectors of a code stand elsewhere."""
    prior, moving, (mu, logvar, mask) = fitted(num_batches=1)
    codes, places = prior.codes(mu), prior.places[:4]
    before, moved = prior.centres.clone(), places + 1.2 * (mu - places)
    followed(prior, moving, moved, logvar, mask, times=1)
    for k in range(4):
        here = (codes == k) & mask
        means = [(x - places)[here].mean(0) for x in (mu, moved)]
        torch.testing.assert_close(before[k], means[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(prior.centres[k], (1 - MOVING) * means[0] + MOVING * means[1])


def test_codes_follow_posteriors_that_move():
    """Farther apart, narrower, shorter and heavier: nothing that tells codes from each other changes."""
    prior, moving, (mu, logvar, mask) = fitted(num_batches=1)
    places, centres = prior.places[:4], prior.centres.clone()
    moved, narrow, shorter = places + 1.1 * (mu - places), logvar - 1, mask & (torch.arange(4) < 2)
    followed(prior, moving, moved, narrow, shorter, times=700)
    expected = LatentPrior(2, num_codes=4, d_model=8, num_layers=1, num_heads=2, max_length=4)
    expected.places.copy_(prior.places)
    expected.centres.copy_(prior.centres)
    expected.fit_draws(moved, narrow, shorter)
    torch.testing.assert_close(prior.centres, 1.1 * centres, atol=5e-2, rtol=0)
    torch.testing.assert_close(prior.draws_logvar, expected.draws_logvar, atol=2e-2, rtol=0)
    lengths = torch.bincount(shorter.sum(-1) - 1, minlength=4) / len(shorter)
    torch.testing.assert_close(prior.log_lengths.exp(), lengths, atol=1e-3, rtol=0)
    assert abs(prior.log_weight.item() + 1.2) < 2e-3


def test_a_code_that_no_vector_is_near_stays():
    prior, moving, (mu, logvar, mask) = fitted(num_batches=1)
    only = (prior.codes(mu) != 2) & mask
    mask = only.sort(dim=-1, descending=True, stable=True).values
    order = (~only).to(torch.uint8).argsort(dim=-1, stable=True)
    mu, logvar = (x.take_along_dim(order[..., None], dim=1) for x in (mu, logvar))
    moving.counts[2] = moving.sums[2] = 0.0
    before = prior.centres[2].clone()
    some = mask.any(-1)
    followed(prior, moving, mu[some], logvar[some], mask[some], times=3)
    assert torch.equal(prior.centres[2], before) and all(getattr(prior, name).isfinite().all() for name in BUFFERS)


def test_a_cast_to_half_leaves_the_means_in_single_precision():
    prior = tiny()
    prior.moving = MovingCodes(prior.num_codes, prior.width)
    assert {x.dtype for x in prior.half().moving.buffers()} == {torch.float32}
