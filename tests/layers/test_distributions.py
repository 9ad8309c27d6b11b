"""Draws against closed forms: their distribution, their gradients, their extremes and their masks."""

import math

import pytest
import torch
from torch.testing import assert_close

from nvib_hf.layers.distributions import gaussian_sample, log_dirichlet_sample, log_gamma_sample

DRAWS = 20_000


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_uniform(u):
    """Kolmogorov-Smirnov at a level of about 1e-5."""
    u = u.double().sort().values
    steps = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
    assert (u - steps).abs().max() < 2.5 / math.sqrt(len(u))


def assert_mean(draws, expected):
    """Five standard errors around the expected mean."""
    error = draws.double().std() / math.sqrt(len(draws))
    assert abs(draws.double().mean() - expected) < 5 * error + 1e-6, (draws.mean(), expected, error)


# The distribution of the draws


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, -1e-3, 0.0, 1e-3, 1.5, 6.0, 12.0, 15.0])
def test_log_gamma_is_the_log_of_a_gamma_draw(log_alpha):
    log_g = log_gamma_sample(torch.full((DRAWS,), log_alpha)).double()
    alpha = torch.tensor(log_alpha, dtype=torch.float64).exp()
    assert_uniform(torch.special.gammainc(alpha, log_g.exp()))
    assert_mean(log_g, torch.digamma(alpha))
    assert_close(log_g.var(), torch.polygamma(1, alpha), rtol=0.05, atol=0)


@pytest.mark.parametrize("log_alpha", [-10.0, -20.0, -60.0])
def test_log_gamma_of_tiny_pseudo_counts(log_alpha):
    # For alpha -> 0 the distribution function of log g is exp(alpha * log g), however negative log g is.
    log_g = log_gamma_sample(torch.full((DRAWS,), log_alpha)).double()
    assert_uniform(torch.exp(math.exp(log_alpha) * log_g.clamp(max=0)))


def test_log_dirichlet_has_the_moments_of_a_dirichlet():
    alpha = torch.tensor([0.05, 0.4, 1.0, 3.0])
    pi = log_dirichlet_sample(alpha.log().expand(DRAWS, 4)).exp()
    expected = torch.distributions.Dirichlet(alpha)
    for i in range(4):
        assert_mean(pi[:, i], expected.mean[i])
        assert_mean((pi[:, i] - expected.mean[i]).square(), expected.variance[i])
    assert_mean(pi[:, 1] * pi[:, 3], alpha[1] * alpha[3] / (alpha.sum() * (alpha.sum() + 1)))


def test_repeated_gaussians_stand_side_by_side():
    mu, logvar, mask = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.rand(2, 5) > 0.3
    repeated = [x.repeat_interleave(4, dim=1) for x in (mu, logvar, mask)]
    draws = gaussian_sample(mu, logvar, mask, torch.Generator().manual_seed(1), repeats=4)
    expected = gaussian_sample(*repeated, torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws, expected, rtol=0, atol=0)


def test_gaussian_has_the_moments_of_a_gaussian():
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[-1.0, 2.0]])
    z = gaussian_sample(mu.expand(DRAWS, 1, 2), logvar.expand(DRAWS, 1, 2)).squeeze(1)
    for i in range(2):
        assert_mean(z[:, i], mu[0, i])
        assert_mean((z[:, i] - mu[0, i]).square(), logvar[0, i].exp())
    assert_mean((z - mu).prod(-1), 0.0)


# Gradients of expectations


@pytest.mark.parametrize("log_alpha", [-60.0, -4.0, -1.0, -1e-3, 0.0, 1.0, 5.0, 15.0])
def test_gradient_of_the_expected_log(log_alpha):
    x = torch.full((DRAWS,), log_alpha, requires_grad=True)
    log_gamma_sample(x).sum().backward()
    alpha = torch.tensor(log_alpha, dtype=torch.float64).exp()
    assert_mean(x.grad, alpha * torch.polygamma(1, alpha))


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 1.0, 5.0])
def test_gradient_of_the_expected_draw(log_alpha):
    x = torch.full((DRAWS,), log_alpha, requires_grad=True)
    log_gamma_sample(x).exp().sum().backward()
    assert_mean(x.grad, math.exp(log_alpha))  # E[g] = alpha


def test_gradient_of_the_expected_weights():
    alpha = torch.tensor([0.1, 0.7, 2.0, 6.0])
    x = alpha.log().expand(DRAWS, 4).clone().requires_grad_()
    log_dirichlet_sample(x).exp()[:, 1].sum().backward()
    mean = alpha / alpha.sum()
    for i in range(4):
        assert_mean(x.grad[:, i], mean[1] * (float(i == 1) - mean[i]))


def test_gradient_of_the_expected_square_of_a_gaussian():
    mu = torch.full((DRAWS, 1, 1), 1.5, requires_grad=True)
    logvar = torch.full((DRAWS, 1, 1), -0.5, requires_grad=True)
    gaussian_sample(mu, logvar).square().sum().backward()  # E[z**2] = mu**2 + exp(logvar)
    assert_mean(mu.grad.flatten(), 3.0)
    assert_mean(logvar.grad.flatten(), math.exp(-0.5))


# Extremes: no floor, no ceiling, nothing that is not finite


@pytest.mark.parametrize("log_alpha", [-60.0, -100.0, -1e6])
def test_a_negligible_component_has_no_influence(log_alpha):
    x = torch.tensor([0.0, log_alpha, 2.0]).expand(2000, 3)
    assert (log_dirichlet_sample(x)[:, 1] < -1e5).all()


def test_a_negligible_component_has_no_influence_when_rand_is_zero(monkeypatch):
    # float32's rand is 0 once in 2**24 draws; u = 1 would draw an ordinary weight for any pseudo-count.
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None, **kwargs: torch.zeros(*shape, **kwargs))
    assert (log_dirichlet_sample(torch.tensor([0.0, -60.0]).expand(100, 2))[:, 1] < -1e5).all()


@pytest.mark.parametrize("level", [14.0, 20.0, 88.0, 256.0, 4096.0])
def test_large_pseudo_counts_keep_their_ratios(level):
    log_pi = log_dirichlet_sample(torch.tensor([level, level - 1.0, level - 4.0]).expand(500, 3))
    expected = torch.tensor([0.0, -1.0, -4.0]).log_softmax(-1)
    assert (log_pi - expected).abs().max() < 0.05  # deviation of a draw at exp(10): 0.007


def test_draws_and_gradients_are_finite_in_float32():
    x = torch.linspace(-60, 60, 961).repeat(20).requires_grad_()
    log_g = log_gamma_sample(x)
    log_g.sum().backward()
    assert log_g.isfinite().all() and x.grad.isfinite().all()
    far = torch.tensor([-1e6, -1e4, 1e4, 1e6], requires_grad=True)
    log_g = log_gamma_sample(far)
    log_g.sum().backward()
    assert log_g.isfinite().all() and far.grad.isfinite().all()


def test_rows_of_extremes_have_finite_weights_and_gradients():
    levels = [-1e6, -60.0, 0.0, 60.0, 1e6]
    x = torch.tensor([[a, b] for a in levels for b in levels], requires_grad=True)
    log_pi = log_dirichlet_sample(x)
    log_pi.exp().square().sum().backward()
    assert log_pi.isfinite().all() and x.grad.isfinite().all()
    assert_close(log_pi.logsumexp(-1), torch.zeros(25))


def test_a_pseudo_count_of_zero_has_a_weight_of_zero():
    x = torch.tensor([0.5, -math.inf, -1.0], requires_grad=True)
    log_pi = log_dirichlet_sample(x)
    log_pi.exp().square().sum().backward()
    assert log_pi[1] == -math.inf
    assert x.grad.isfinite().all() and x.grad[1] == 0


def test_one_extreme_row_leaves_the_others_as_they_are():
    x = torch.randn(4, 6)
    extreme = x.clone()
    extreme[-1] = torch.tensor([-1e6, 1e6, 60.0, -60.0, 0.0, math.nan])  # the last: it draws after the others
    torch.manual_seed(1)
    expected = log_dirichlet_sample(x)
    torch.manual_seed(1)
    assert_close(log_dirichlet_sample(extreme)[:-1], expected[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.tensor([[-60.0, -2.0, 0.0, 3.0, 60.0]], dtype=dtype, requires_grad=True)
    for sample in (log_gamma_sample, log_dirichlet_sample):
        torch.manual_seed(1)
        half = sample(x)
        torch.manual_seed(1)
        assert half.dtype == torch.float32
        assert_close(half, sample(x.float()), rtol=0, atol=0)
    assert log_gamma_sample(x.double()).dtype == log_dirichlet_sample(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gaussian_keeps_the_dtype_of_the_means(dtype):
    mu = torch.zeros(2, 3, 4, dtype=dtype)
    assert gaussian_sample(mu, torch.zeros(2, 3, 4)).dtype == dtype


def test_a_variance_of_zero_gives_the_mean():
    mu = torch.randn(2, 3, 4, requires_grad=True)
    logvar = torch.full((2, 3, 4), -math.inf, requires_grad=True)
    z = gaussian_sample(mu, logvar)
    z.square().sum().backward()
    assert torch.equal(z, mu)
    assert_close(mu.grad, 2 * mu.detach())
    assert torch.equal(logvar.grad, torch.zeros(2, 3, 4))


# Masks


@pytest.mark.parametrize("garbage", [0.0, 1e6, math.inf, -math.inf, math.nan])
def test_masked_components_have_no_weight_and_no_gradient(garbage):
    mask = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
    x = torch.randn(3, 4).masked_fill(~mask, garbage).requires_grad_()
    log_pi = log_dirichlet_sample(x, mask)
    (torch.arange(1.0, 5.0) * log_pi.exp()).sum().backward()
    assert (log_pi[~mask] == -math.inf).all()
    assert_close(log_pi.logsumexp(-1), torch.zeros(3))
    assert (log_pi[1, 0] == 0) and (x.grad[~mask] == 0).all()
    assert (x.grad[0, mask[0]] != 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [-0.1, 1e6, math.inf, -math.inf, math.nan])
def test_what_is_masked_does_not_disturb_the_draws_of_the_rest(garbage):
    # A Gamma draw takes as many random numbers as it rejects, which depends on its pseudo-count.
    x, mask = torch.zeros(2000), torch.arange(2000) >= 1990
    expected = log_dirichlet_sample(x, mask, torch.Generator().manual_seed(1))
    draw = log_dirichlet_sample(x.masked_fill(~mask, garbage), mask, torch.Generator().manual_seed(1))
    assert torch.equal(draw, expected)


def test_a_gradient_that_arrives_at_a_masked_component_stops_there():
    mask = torch.tensor([True, True, False])
    x = torch.zeros(3, requires_grad=True)
    log_dirichlet_sample(x, mask).backward(torch.tensor([1.0, -1.0, math.nan]))
    assert x.grad.isfinite().all() and (x.grad[mask] != 0).all() and x.grad[2] == 0


def test_the_kept_components_are_a_dirichlet_of_their_own():
    alpha, mask = torch.tensor([0.5, 50.0, 2.0, 1.0]), torch.tensor([True, False, True, True])
    pi = log_dirichlet_sample(alpha.log().expand(DRAWS, 4), mask.expand(DRAWS, 4)).exp()
    expected = torch.distributions.Dirichlet(alpha[mask])
    for i, j in enumerate([0, 2, 3]):
        assert_mean(pi[:, j], expected.mean[i])
        assert_mean((pi[:, j] - expected.mean[i]).square(), expected.variance[i])


@pytest.mark.parametrize("garbage", [1e30, math.inf, -math.inf, math.nan])
def test_masked_vectors_are_zero_and_have_no_gradient(garbage):
    mask = torch.tensor([[True, False, True], [True, False, False]])
    mu = torch.randn(2, 3, 4).masked_fill(~mask[..., None], garbage).requires_grad_()
    logvar = torch.randn(2, 3, 4).masked_fill(~mask[..., None], garbage).requires_grad_()
    z = gaussian_sample(mu, logvar, mask)
    z.square().sum().backward()
    assert (z[~mask] == 0).all() and (z[mask] != 0).all()
    for grad in (mu.grad, logvar.grad):
        assert (grad[~mask] == 0).all() and (grad[mask] != 0).all() and grad.isfinite().all()


# Randomness and purity

SAMPLERS = {
    "gamma": lambda x, **kwargs: log_gamma_sample(x, **kwargs),
    "dirichlet": lambda x, **kwargs: log_dirichlet_sample(x, x < 1, **kwargs),
    "gaussian": lambda x, **kwargs: gaussian_sample(x, x, x[..., 0] < 1, **kwargs),
}


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_a_generator_determines_the_draw(sample):
    x = torch.linspace(-2, 2, 24).reshape(2, 3, 4)
    state = torch.random.get_rng_state()
    first = sample(x, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, sample(x, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, sample(x, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_inputs_are_not_changed(sample):
    x = torch.linspace(-2, 2, 24).reshape(2, 3, 4)
    before = x.clone()
    sample(x)
    assert torch.equal(x, before) and x._version == 0


def test_samplers_compile_into_one_graph():
    def draw(log_alpha, mu, logvar, mask):
        return log_dirichlet_sample(log_alpha, mask), gaussian_sample(mu, logvar, mask)

    log_alpha, mu, logvar = torch.randn(2, 3), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    outcomes = []
    for function in (draw, torch.compile(draw, backend="aot_eager", fullgraph=True)):
        inputs = [x.clone().requires_grad_() for x in (log_alpha, mu, logvar)]
        torch.manual_seed(1)
        log_pi, z = function(*inputs, mask)
        (log_pi.exp().square().sum() + z.square().sum()).backward()
        outcomes.append([log_pi, z, *(x.grad for x in inputs)])
    assert_close(outcomes[1], outcomes[0])
