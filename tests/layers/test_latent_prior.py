"""The learned prior, against quadrature, Monte Carlo, and distributions that are known."""

import math

import pytest
import torch

from nvib_hf.layers.codebook import k_means, nearest
from nvib_hf.layers.latent_prior import LatentPrior
from nvib_hf.training.latent_prior_training import fit_latent_prior, held_out_loss, padded


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(width: int = 2, num_codes: int = 5, max_length: int = 4, seed: int = 0, **settings) -> LatentPrior:
    """A prior in float64 whose every part matters, as if it had been trained."""
    torch.manual_seed(seed)
    prior = LatentPrior(width, num_codes, d_model=8, num_layers=2, num_heads=2, max_length=max_length, **settings)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    prior.places.copy_(torch.randn(max_length, width))
    prior.logvar.copy_(0.5 * torch.randn(num_codes, width) - 1)
    prior.log_lengths.copy_(torch.randn(max_length).log_softmax(-1))
    return prior.double().eval()


# --------------------------------------------------------------------------------------------- density
def grid(low: float, high: float, steps: int) -> tuple[torch.Tensor, float]:
    points = torch.linspace(low, high, steps, dtype=torch.float64)
    return points, float(points[1] - points[0])


@torch.no_grad()
def test_density_of_all_sequences_integrates_to_one():
    """By quadrature: one vector in two dimensions, and two vectors of one dimension each, lengths 1 to 2."""
    prior = tiny(width=2, max_length=1)
    points, step = grid(-14, 14, 281)
    plane = torch.cartesian_prod(points, points)[:, None]  # (N, 1, 2)
    assert (prior.log_prob(plane).exp().sum() * step**2).item() == pytest.approx(1, abs=1e-4)

    prior = tiny(width=1, max_length=2)
    pairs = torch.cartesian_prod(points, points)[..., None]  # (N, 2, 1)
    of_one = prior.log_prob(points[:, None, None]).exp().sum() * step
    of_two = prior.log_prob(pairs).exp().sum() * step**2
    lengths = prior.log_lengths.exp()
    assert of_one.item() == pytest.approx(lengths[0].item(), abs=1e-4)
    assert of_two.item() == pytest.approx(lengths[1].item(), abs=2e-3)  # the density jumps where the code does


@torch.no_grad()
def test_samples_have_the_density():
    """Monte Carlo: shares of samples in cells of the plane of two vectors against the integral of the density."""
    prior = tiny(width=1, max_length=2, seed=56)  # whose second vector depends most on its first
    z, mask = prior.sample(200_000, 2, generator=seeded())
    assert mask.all()
    points, step = grid(-14, 14, 561)
    points = points + step / 2
    pairs = torch.cartesian_prod(points, points)[..., None]
    density = (prior.log_prob(pairs) - prior.log_lengths[1]).exp() * step**2
    quantiles = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    edges = prior.sample(2000, 2, generator=seeded(1))[0][..., 0].quantile(quantiles, dim=0).T.contiguous()
    edges = (edges / step).round() * step  # between two points

    def cells(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        first, second = (torch.bucketize(x[:, i, 0].contiguous(), edges[i]) for i in (0, 1))
        cell = 5 * first + second
        return torch.zeros(25, dtype=torch.float64).index_add_(0, cell, weights)

    expected = cells(pairs, density)
    found = cells(z, torch.full((len(z),), 1 / len(z), dtype=torch.float64))
    assert (expected > 0.01).sum() > 15
    torch.testing.assert_close(found, expected, rtol=0, atol=0.005)


@torch.no_grad()
def test_samples_go_on_from_the_code_nearest_to_the_vector():
    """Not from the one it was drawn from, which the density cannot know: by the means of second vectors."""
    prior = tiny(width=1, max_length=2, seed=56)
    prior.logvar.fill_(1.0)  # most vectors are nearest to another code
    z, _ = prior.sample(100_000, 2, generator=seeded())
    codes, lengths = prior.codes(z)[:, 0], torch.full((5,), 2)
    chances = prior._log_chances(prior._states(torch.arange(5)[:, None].expand(-1, 2), lengths))[:, 1].exp()
    means = prior.places[1] + chances @ prior.centres
    assert means.std() > 0.5
    found = torch.stack([z[codes == k, 1].mean(0) for k in range(5)])
    torch.testing.assert_close(found, means, rtol=0, atol=0.05)


@torch.no_grad()
def test_lengths_are_drawn_as_their_chances_say():
    prior = tiny()
    _, mask = prior.sample(20_000, generator=seeded())
    shares = torch.bincount(mask.sum(-1), minlength=5)[1:] / 20_000
    torch.testing.assert_close(shares.double(), prior.log_lengths.exp(), rtol=0, atol=0.015)
    z, mask = prior.sample(3, [1, 4, 2], generator=seeded())
    assert mask.sum(-1).tolist() == [1, 4, 2] and (z[~mask] == 0).all()


@torch.no_grad()
def test_loss_is_the_density_of_the_nearest_codes():
    """With their Gaussians and the length it bounds the density, and meets it where clusters lie apart."""

    def both(prior: LatentPrior) -> tuple[torch.Tensor, torch.Tensor]:
        z, mask = prior.sample(50, generator=seeded())
        codes = prior.codes(z)
        gaussians = torch.distributions.Normal(
            prior.places[: z.shape[1]] + prior.centres[codes], (0.5 * prior.logvar[codes]).exp()
        )
        of_vectors = gaussians.log_prob(z).sum(-1).masked_fill(~mask, 0).sum(-1)
        return prior.loss(z, mask) - of_vectors - prior.log_lengths[mask.sum(-1) - 1], -prior.log_prob(z, mask)

    prior = tiny()
    bound, exact = both(prior)
    assert (bound > exact).all() and (bound - exact).max() > 1
    prior.centres.mul_(1000)
    torch.testing.assert_close(*both(prior))


@torch.no_grad()
def test_rate_bounds_the_divergence_of_draws_and_meets_it_where_clusters_lie_apart():
    """Monte Carlo over draws of one vector each, from posteriors in two dimensions, against the mixture's density."""

    def divergences(prior: LatentPrior) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(6, 1, dtype=torch.bool)
        z = prior.places[0] + prior.centres[[0, 1, 2, 3, 4, 0], None] + 0.3 * torch.randn(6, 1, 2, generator=seeded())
        logvar = 0.3 * torch.randn(6, 1, 2, dtype=torch.float64, generator=seeded(1)) - 1
        chances = prior._log_chances(prior._states(prior.codes(z), torch.ones(6, dtype=torch.long)))[0, 0]
        gaussians = torch.distributions.Normal(prior.places[0] + prior.centres, (0.5 * prior.draws_logvar).exp())
        posterior = torch.distributions.Normal(z[:, 0], (0.5 * logvar[:, 0]).exp())
        torch.manual_seed(0)
        draws = posterior.sample((50_000,))
        density = (gaussians.log_prob(draws[..., None, :]).sum(-1) + chances).logsumexp(-1)
        exact = (posterior.log_prob(draws).sum(-1) - density).mean(0) - prior.log_lengths[0]
        return prior.rate(z, logvar, mask), exact

    prior = tiny()
    prior.draws_logvar.copy_(0.3 * torch.randn(5, 2, generator=seeded(2)))
    rate, exact = divergences(prior)
    assert (rate > exact).all() and (rate - exact).max() > 0.5
    prior.centres.mul_(1000)
    rate, exact = divergences(prior)
    torch.testing.assert_close(rate, exact, rtol=0, atol=0.05)


@torch.no_grad()
def test_variances_of_draws_are_those_of_the_code():
    prior = tiny(width=2, num_codes=2)
    prior.centres.copy_(torch.tensor([[-50.0, 0.0], [50.0, 0.0]]))
    code = (torch.arange(20_000) % 2).view(-1, 4)
    deviation = torch.tensor([[0.5, 1.0], [2.0, 0.1]], dtype=torch.float64)  # of the means
    z = prior.places + prior.centres[code] + deviation[code] * torch.randn(5000, 4, 2, generator=seeded())
    logvar = torch.full_like(z, 0.25).log()
    prior.fit_draws(z, logvar, torch.ones(5000, 4, dtype=torch.bool))
    torch.testing.assert_close(prior.draws_logvar.exp(), deviation.square() + 0.25, rtol=0.05, atol=0.01)


# ------------------------------------------------------------------------------------- what sees what
@torch.no_grad()
def test_padding_is_invisible():
    prior = tiny()
    z, mask = prior.sample(6, [1, 4, 2, 3, 2, 4], generator=seeded())
    z[~mask] = 77.0
    alone = torch.cat([prior.log_prob(row[seen][None]) for row, seen in zip(z, mask, strict=True)])
    torch.testing.assert_close(prior.log_prob(z, mask), alone)


@torch.no_grad()
def test_first_vectors_do_not_see_the_last():
    prior = tiny()
    z = 3 * torch.randn(20, 4, 2, dtype=torch.float64, generator=seeded())
    lengths = torch.full((20,), 4)
    states = prior._states(prior.codes(z), lengths)
    for i in range(4):
        changed = z.clone()
        changed[:, i] -= 20  # in another code
        assert not (prior.codes(changed)[:, i] == prior.codes(z)[:, i]).all()
        differs = (prior._states(prior.codes(changed), lengths) - states).abs().amax((0, 2)) > 1e-9
        assert differs.tolist() == [j > i for j in range(4)]


@torch.no_grad()
def test_sampling_step_by_step_is_reading_the_whole():
    """The greedy sample's every code is the most probable one by the states of the whole."""
    prior = tiny()
    z, mask = prior.sample(30, temperature=0, noise=0, generator=seeded())
    lengths = mask.sum(-1)
    states = prior._states(prior.codes(z), lengths)
    code = prior._log_chances(states).argmax(-1)
    expected = prior.places[: z.shape[1]] + prior.centres[code]
    torch.testing.assert_close(z, expected.masked_fill(~mask[..., None], 0))


@torch.no_grad()
def test_transformer_reads_in_parts_what_it_reads_whole():
    transformer, cache = tiny().transformer, tiny().transformer.empty_cache()
    x = torch.randn(3, 6, 8, dtype=torch.float64, generator=seeded())
    parts = [transformer(part, cache) for part in x.split([1, 2, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), transformer(x))


# ------------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def test_temperature_and_top_p_are_those_of_the_chances():
    prior = tiny(num_codes=4)
    prior.centres.copy_(100 * torch.eye(4, 2) - 50 * torch.eye(4, 2).flip(0))  # far apart: a sample shows its code
    for parameter in prior.transformer.norm.parameters():
        parameter.zero_()  # the bias alone decides
    prior.code_bias.copy_(torch.tensor([0.0, 1.5, 0.5, 1.0]))
    state = prior._states(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]))
    chances = prior._log_chances(state)[0, 0]

    def shares(**settings) -> torch.Tensor:
        z, _ = prior.sample(20_000, 1, generator=seeded(), **settings)
        return torch.bincount(prior.codes(z).flatten(), minlength=4).double() / 20_000

    torch.testing.assert_close(shares(), chances.softmax(-1), rtol=0, atol=0.015)
    torch.testing.assert_close(shares(temperature=0.5), (2 * chances).softmax(-1), rtol=0, atol=0.015)
    first, second = chances.exp().sort(descending=True).values[:2].tolist()
    two = shares(top_p=first + second / 2)
    order = chances.argsort(descending=True)
    assert two[order[0]].item() == pytest.approx(first / (first + second), abs=0.015)
    assert two[order[2:]].sum() == 0
    assert shares(temperature=0)[order[0]] == 1


@torch.no_grad()
def test_noise_scales_the_deviation_within_a_code():
    prior = tiny(num_codes=1)
    for noise in (0.0, 0.5, 2.0):
        z, _ = prior.sample(20_000, 1, noise=noise, generator=seeded())
        torch.testing.assert_close(z[:, 0].std(0), noise * (0.5 * prior.logvar[0]).exp(), rtol=0.03, atol=1e-12)


def test_sampling_leaves_the_mode_and_the_global_randomness():
    prior = tiny(dropout=0.5).train()
    before = torch.get_rng_state()
    first, second = (prior.sample(3, generator=seeded())[0] for _ in range(2))
    assert prior.training and torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------- codebook, training
def test_k_means_finds_clusters_however_rare():
    centres = 20 * torch.randn(6, 3, generator=seeded(1))
    counts = [4000, 500, 100, 30, 10, 5]
    parts = [c + 0.1 * torch.randn(n, 3, generator=seeded(n)) for c, n in zip(centres, counts, strict=True)]
    found = k_means(torch.cat(parts), 6, generator=seeded())
    torch.testing.assert_close(found[nearest(centres, found)], centres, rtol=0, atol=0.15)
    assert nearest(centres, found).unique().numel() == 6


def known(num: int, seed: int) -> list[torch.Tensor]:
    """A Markov chain over three Gaussians, each place moved: 2 to 5 vectors, lengths equally probable.

    It starts anywhere; from a state it goes on to the next with a chance of 0.8, else to the one after.
    """
    generator, rows = seeded(seed), []
    means = torch.tensor([[0.0, 6.0], [6.0, 0.0], [-6.0, -6.0]])
    for _ in range(num):
        n = int(torch.randint(2, 6, (1,), generator=generator))
        steps = 1 + (torch.rand(n, generator=generator) < 0.2).long()
        start = torch.randint(3, (1,), generator=generator)
        states = (start + steps.cumsum(0)) % 3
        place = 2.0 * torch.arange(n)[:, None] * torch.tensor([0.3, -0.2])
        rows.append(means[states] + place + 0.5 * torch.randn(n, 2, generator=generator))
    return rows


@pytest.fixture(scope="module")
def fitted() -> LatentPrior:
    torch.manual_seed(0)
    prior = LatentPrior(2, num_codes=3, d_model=16, num_layers=1, num_heads=2, max_length=8, dropout=0.0)
    fit_latent_prior(prior, known(2000, 0), known(200, 1), max_steps=250, evaluate_every=50, progress=False)
    return prior


@torch.no_grad()
def test_prior_fitted_to_a_known_mixture_has_its_samples_and_its_density(fitted):
    z, mask = fitted.sample(4000, generator=seeded())
    real, seen = padded(known(4000, 2))
    lengths = torch.bincount(mask.sum(-1), minlength=9) / 4000
    torch.testing.assert_close(lengths[2:6], torch.full((4,), 0.25), rtol=0, atol=0.03)
    for place in range(5):
        ours, theirs = z[:, place][mask[:, place]], real[:, place][seen[:, place]]
        torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.9)
        torch.testing.assert_close(ours.T.cov(), theirs.T.cov(), rtol=0.1, atol=2.0)
    steps = (fitted.codes(z)[:, 1:], fitted.codes(z)[:, :-1])
    codes = fitted.codes(real)
    follow = torch.zeros(3, 3).index_put_((codes[:, 0], codes[:, 1]), torch.ones(4000), accumulate=True).argmax(-1)
    share = (follow[steps[1]] == steps[0])[mask[:, 1:]].float().mean()
    assert share.item() == pytest.approx(0.8, abs=0.03)

    rows = known(300, 3)
    of_step, of_vector = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)), 1 + math.log(2 * math.pi * 0.25)
    nats = [math.log(4) + math.log(3) + (len(row) - 1) * of_step + len(row) * of_vector for row in rows]
    expected = -sum(nats) / len(nats)
    found = fitted.log_prob(*padded(rows)).mean().item()
    assert found == pytest.approx(expected, abs=0.3)
    salad = [row[torch.randperm(len(row), generator=seeded())] for row in rows]
    assert fitted.log_prob(*padded(salad)).mean().item() < found - 3


def test_places_never_seen_are_those_of_the_last_seen(fitted):
    assert (fitted.places[5:] == fitted.places[4]).all()
    assert fitted.log_prob(torch.zeros(1, 7, 2)).isfinite().all()


def test_training_goes_on_where_it_was_cut(tmp_path):
    training, held_out = known(100, 0), known(20, 1)

    def fresh() -> LatentPrior:
        torch.manual_seed(0)
        return LatentPrior(2, 3, d_model=8, num_layers=1, num_heads=1, max_length=8, dropout=0.2)

    class Cut(Exception):
        pass

    def cut(z, mask):
        nonlocal calls
        calls += 1
        if calls > 10:  # with two held-out batches at each look: in the third round
            raise Cut
        return LatentPrior.loss(prior, z, mask)

    settings = {"max_steps": 12, "batch_size": 16, "evaluate_every": 3, "progress": False}
    whole = fresh()
    history = fit_latent_prior(whole, training, held_out, **settings)
    assert [entry["step"] for entry in history] == [3, 6, 9, 12]
    prior = fresh()
    prior.loss, calls = cut, 0
    with pytest.raises(Cut):
        fit_latent_prior(prior, training, held_out, **settings, checkpoint=tmp_path / "prior.pt")
    continued = fresh()
    again = fit_latent_prior(continued, training, held_out, **settings, checkpoint=tmp_path / "prior.pt")
    assert again == history
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


def test_the_best_of_the_looks_is_kept_and_waiting_ends():
    torch.manual_seed(0)
    prior = LatentPrior(2, 3, d_model=16, num_layers=1, num_heads=1, max_length=8, dropout=0.0)
    held_out = known(30, 1)
    history = fit_latent_prior(
        prior,
        known(12, 0),
        held_out,
        max_steps=400,
        evaluate_every=10,
        patience=2,
        learning_rate=0.02,
        progress=False,
    )
    losses = [entry["held_out_loss"] for entry in history]
    assert len(losses) < 40 and losses.index(min(losses)) == len(losses) - 3
    assert held_out_loss(prior, held_out) == pytest.approx(min(losses), rel=1e-6)
    assert not prior.training


@torch.no_grad()
def test_saved_is_loaded(tmp_path):
    prior = tiny()
    torch.save(prior.state_dict(), tmp_path / "prior.pt")
    other = LatentPrior(2, 5, d_model=8, num_layers=2, num_heads=2, max_length=4).double().eval()
    other.load_state_dict(torch.load(tmp_path / "prior.pt", weights_only=True))
    z, mask = prior.sample(5, generator=seeded())
    assert torch.equal(other.sample(5, generator=seeded())[0], z)
    assert torch.equal(other.log_prob(z, mask), prior.log_prob(z, mask))


# -------------------------------------------------------------------------------------------- errors
VECTORS, MASK = torch.zeros(2, 3, 2), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: LatentPrior(0), "width must be a whole number of at least 1, but got 0"),
        (lambda p: LatentPrior(2, d_model=10, num_heads=4), "d_model must be a multiple of num_heads, but got 10"),
        (lambda p: LatentPrior(2, dropout=1.0), r"dropout must be in \[0, 1\), but got 1.0"),
        (lambda p: p.log_prob(torch.zeros(2, 3, 5)), r"z must be \(B, n, 2\), but has shape \(2, 3, 5\)"),
        (lambda p: p.log_prob(VECTORS, MASK[:, :2]), r"mask must be \(2, 3\) as z has it, but has shape \(2, 2\)"),
        (lambda p: p.log_prob(VECTORS, MASK & torch.tensor([False, True, True])), "Put the vectors of each row first"),
        (lambda p: p.log_prob(torch.zeros(2, 6, 2)), "z has 6 vectors a row, padding included, but .* is 4"),
        (lambda p: p.log_prob(VECTORS, ~MASK), "mask has a row without any vector"),
        (lambda p: p.sample(0), "num_samples must be a whole number of at least 1, but got 0"),
        (lambda p: p.sample(2, 5), "num_vectors must be from 1 to 4, but got 5"),
        (lambda p: p.sample(2, [0, 3]), r"num_vectors must be from 1 to 4, but got \[0, 3\]"),
        (lambda p: p.sample(2, [1, 2, 3]), r"num_vectors must be a whole number or 2 of them, but got \[1, 2, 3\]"),
        (lambda p: p.sample(2, temperature=-1.0), "temperature must be 0 or positive, but got -1.0"),
        (lambda p: p.sample(2, noise=math.inf), "noise must be 0 or positive, but got inf"),
        (lambda p: p.sample(2, top_p=0.0), r"top_p must be in \(0, 1\], but got 0.0"),
        (lambda p: p.fit_codebook(VECTORS[:1, :1], MASK[:1, :1]), "num_codes is 5, but there are only 1 vectors"),
        (lambda p: fit_latent_prior(p, [], [VECTORS[0]]), "training is empty"),
        (lambda p: fit_latent_prior(p, [VECTORS[0]], [VECTORS[0]], patience=0), "patience must be a whole number"),
    ],
)
def test_what_is_refused_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())
