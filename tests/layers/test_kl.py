"""Both divergences against torch.distributions, Monte Carlo and values of 80 to 10000 digits."""

import math

import pytest
import torch
from torch.distributions import Dirichlet, Normal, kl_divergence
from torch.testing import assert_close

from nvib_hf.layers.kl import _stirling_remainder, kl_dirichlet, kl_gaussian


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_latent(batch=3, length=5, width=4, dtype=torch.float64):
    """A latent as the layer returns it, batch second, with padding and with keys that the KL ignores."""
    log_alpha = torch.randn(length, batch, dtype=dtype)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[1, 3:] = True
    padding[2, 1:] = True
    return {
        "z": None,
        "pi": torch.rand(length, batch),
        "mu": torch.randn(length, batch, width, dtype=dtype),
        "logvar": torch.randn(length, batch, width, dtype=dtype),
        "alpha": log_alpha.exp(),
        "log_alpha": log_alpha,
        "memory_key_padding_mask": padding,
        "avg_num_vec": 2.0,
    }


def symmetric(log_total, k, **kwargs):
    """The log pseudo-counts (1, k) of a symmetric Dirichlet of that total."""
    return torch.full((1, k), log_total - math.log(k), dtype=torch.float64, **kwargs)


# KL_D

# k0, log alpha_0, log alpha_0^p, KL_D and its derivative by log alpha_0: the formula as it stands, evaluated
# by mpmath with up to 10000 digits.
EXACT = [
    (2, -60, 0.7, 1.149860236596313e26, -1.149860236596313e26),
    (17, -60, -40, 456626046.503332, -456626065.32686144),
    (17, -8.5, 2.25, 43875.091469118655, -43886.14425110098),
    (17, 0.5, 0.75, 0.02980069260212916, -0.25038259754343456),
    (17, 3, -20, 20.181266417663377, 0.5967462423583259),
    (513, 2.5, 6.25, 35.481805073056435, -40.53070524345675),
    (513, 9, 6.25, 0.9752979092868826, 0.47699278685123186),
    (17, 25, 30, 67.01795722761271, -69.37089840699304),
    (513, 40, 42, 2.190250217010228, -3.188300899271438),
    (17, 40, 40.125, 0.0038345661490947376, -0.06265809556085944),
    (2, 90, 60, 7.250000000000023, 0.2499999999999766),
    (17, 300, 1, 140.61144655385056, 0.47058823529411764),
    (17, 256, 256.0625, 0.0009385689025220845, -0.030350333608404438),
    (17, 4000, 4010, 10360.219197556102, -10364.925079909042),
    (17, 4000, -60, 1938.9046645231297, 0.47058823529411764),
    (17, 9984, 9984.5, 0.06998648032947206, -0.3052805979765309),
]


@pytest.mark.parametrize("k, log_total, log_prior, value, slope", EXACT)
def test_kl_dirichlet_is_accurate_at_every_scale(k, log_total, log_prior, value, slope):
    x = symmetric(log_total, k, requires_grad=True)
    kl = kl_dirichlet(log_alpha=x, prior_log_alpha=log_prior, delta=0.0, batch_first=True)
    kl.sum().backward()
    assert_close(kl.item(), value, rtol=1e-11, atol=1e-13)
    assert_close(x.grad.sum().item(), slope, rtol=2e-9, atol=1e-13)  # PyTorch's trigamma has 10 digits
    assert_close(x.grad, x.grad.mean().expand(1, k))  # alpha_0 is all that counts


@pytest.mark.parametrize("n", [1, 2, 6, 64])
@pytest.mark.parametrize("prior_alpha, delta", [(1.0, 1.0), (0.3, 0.25), (40.0, 0.0), (3000.0, 1.0)])
def test_kl_dirichlet_is_that_of_two_symmetric_dirichlets(n, prior_alpha, delta):
    alpha = torch.tensor([0.01, 0.5, 3.0, 20.0, 900.0], dtype=torch.float64)[:, None] * (torch.rand(5, n) + 0.5)
    kl = kl_dirichlet(alpha=alpha, prior_alpha=prior_alpha, delta=delta, batch_first=True)
    for b in range(5):
        if n == 1:
            assert kl[b] == 0  # nothing to distribute
            continue
        posterior = Dirichlet((alpha[b].sum() / n).expand(n))
        prior = Dirichlet(torch.tensor((prior_alpha + delta * (n - 1)) / n, dtype=torch.float64).expand(n))
        assert_close(n * kl[b], kl_divergence(posterior, prior), rtol=1e-9, atol=1e-9)


def test_kl_dirichlet_against_monte_carlo():
    posterior = Dirichlet(torch.full((4,), 2.0, dtype=torch.float64))
    prior = Dirichlet(torch.full((4,), 0.625, dtype=torch.float64))
    pi = posterior.sample((40_000,))
    ratio = posterior.log_prob(pi) - prior.log_prob(pi)
    kl = kl_dirichlet(log_alpha=symmetric(math.log(8.0), 4), prior_alpha=1.0, delta=0.5, batch_first=True)
    assert abs(4 * kl.item() - ratio.mean()) < 5 * ratio.std() / 200


@pytest.mark.parametrize("log_prior", [-60.0, -3.0, 0.0, 2.0, 5.0, 8.0, 25.0, 40.0, 256.0, 1e4])
@pytest.mark.parametrize("k", [2, 33, 513])
def test_kl_dirichlet_is_zero_at_the_prior_and_positive_around_it(log_prior, k):
    distance = torch.tensor([0.0, 1e-9, -1e-9, 1e-3, -1e-3, 0.1, -0.1, 3.0, -3.0], dtype=torch.float64)
    x = (log_prior + distance[:, None] - math.log(k)).expand(-1, k).clone().requires_grad_()
    kl = kl_dirichlet(log_alpha=x, prior_log_alpha=log_prior, delta=0.0, batch_first=True)
    kl.sum().backward()
    assert (kl >= 0).all() and (kl[:3] < 1e-13).all() and (kl[3:] > 1e-9).all()
    slope = x.grad.sum(-1)
    assert abs(slope[0]) < 1e-10
    assert (slope[3:].sign() == distance[3:].sign()).all()


@pytest.mark.parametrize("log_total", [-20.0, 0.0, math.log(16 * 3) - 1e-7, math.log(16.0), 12.0, 60.0])
def test_gradient_of_kl_dirichlet_is_that_of_finite_differences(log_total):
    x = (symmetric(log_total, 3) + torch.tensor([0.5, -0.2, 0.1])).requires_grad_()
    prior = torch.tensor(max(log_total, -2.0) + 0.5, dtype=torch.float64, requires_grad=True)

    def kl(log_alpha, prior_log_alpha):
        return kl_dirichlet(log_alpha=log_alpha, prior_log_alpha=prior_log_alpha, batch_first=True)

    scale = 1 if log_total > -20 else 1e-9  # the divergence from a prior so far off is about 1e9
    torch.autograd.gradcheck(lambda *inputs: scale * kl(*inputs), (x, prior), eps=1e-5, atol=1e-6, rtol=1e-6)


def test_the_two_forms_of_the_remainder_meet():
    log_x = torch.tensor([math.log(16) - 1e-12, math.log(16) + 1e-12], dtype=torch.float64, requires_grad=True)
    for values in _stirling_remainder(log_x):
        assert_close(values[0], values[1], rtol=0, atol=1e-13)
        (slope,) = torch.autograd.grad(values.sum(), log_x, retain_graph=True)
        assert_close(slope[0], slope[1], rtol=0, atol=1e-10)


def test_the_remainder_in_float32():  # for devices without float64
    log_x = torch.linspace(-60, 60, 400)
    for single, double in zip(_stirling_remainder(log_x), _stirling_remainder(log_x.double()), strict=True):
        assert_close(single.double(), double, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("log_total, log_prior", [(-1e6, 0.0), (-math.inf, 0.0), (0.0, 1e4), (100.0, 256.0)])
def test_kl_dirichlet_saturates_instead_of_overflowing(log_total, log_prior):
    x = torch.full((1, 4), log_total, requires_grad=True)
    kl = kl_dirichlet(log_alpha=x, prior_log_alpha=log_prior, batch_first=True)
    kl.sum().backward()
    assert kl.isfinite().all() and kl > 1e30 and x.grad.isfinite().all()
    assert (x.grad < -1e30).all() or log_total < -1e4  # it still says where to go


def test_the_prior_counts_as_much_as_the_source_is_long():
    latent = random_latent()
    kl = kl_dirichlet(**latent, prior_alpha=1.5, delta=0.25)
    for b, n in enumerate([5, 3, 1]):
        alone = {"log_alpha": latent["log_alpha"][:n, b : b + 1], "prior_alpha": 1.5 + 0.25 * (n - 1)}
        assert_close(kl[b : b + 1], kl_dirichlet(**alone, delta=0.0))


def test_prior_alpha_and_its_logarithm_are_one_prior():
    latent = random_latent()
    for number in (0.2, 1.0, math.exp(256)):
        expected = kl_dirichlet(**latent, prior_alpha=number)
        for log_number in (math.log(number), torch.tensor(math.log(number), dtype=torch.float64)):
            assert_close(kl_dirichlet(**latent, prior_log_alpha=log_number), expected)
        as_tensor = torch.tensor(number, dtype=torch.float64)
        assert_close(kl_dirichlet(**latent, prior_alpha=as_tensor), expected)


# KL_G


@pytest.mark.parametrize("tensors", [False, True])
def test_kl_gaussian_is_the_weighted_mean_of_normal_divergences(tensors):
    latent = random_latent()
    prior_mu = torch.randn(4, dtype=torch.float64) if tensors else 0.3
    prior_var = torch.rand(4, dtype=torch.float64) + 0.5 if tensors else 2.0
    inputs = [latent[name].clone().requires_grad_() for name in ("mu", "logvar", "log_alpha")]
    mu, logvar, log_alpha = inputs

    prior = Normal(torch.as_tensor(prior_mu), torch.as_tensor(prior_var, dtype=torch.float64).sqrt())
    divergence = kl_divergence(Normal(mu, (0.5 * logvar).exp()), prior).mean(-1)
    alpha = log_alpha.exp() * ~latent["memory_key_padding_mask"].T
    expected = (alpha * divergence).sum(0) / alpha.sum(0)

    latent.update(mu=mu, logvar=logvar, log_alpha=log_alpha)
    kl = kl_gaussian(**latent, prior_mu=prior_mu, prior_var=prior_var)
    assert_close(kl, expected)
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for got, right in zip(
        torch.autograd.grad(kl @ direction, inputs),
        torch.autograd.grad(expected @ direction, inputs),
        strict=True,
    ):
        assert_close(got, right)


def test_kl_gaussian_against_monte_carlo():
    mu, logvar = (
        torch.tensor([0.7, -1.0], dtype=torch.float64),
        torch.tensor([-1.0, 0.5], dtype=torch.float64),
    )
    posterior, prior = Normal(mu, (0.5 * logvar).exp()), Normal(0.2, math.sqrt(1.5))
    z = posterior.sample((40_000,))
    ratio = (posterior.log_prob(z) - prior.log_prob(z)).mean(-1)
    kl = kl_gaussian(mu.view(1, 1, 2), logvar.view(1, 1, 2), torch.ones(1, 1), prior_mu=0.2, prior_var=1.5)
    assert abs(kl.item() - ratio.mean()) < 5 * ratio.std() / 200


def test_kl_gaussian_is_zero_at_the_prior_and_positive_around_it():
    prior_mu, prior_var = torch.randn(4), torch.rand(4) + 0.1
    mu, logvar = prior_mu.expand(5, 1, 4), prior_var.log().expand(5, 1, 4)
    prior = {"log_alpha": torch.randn(5, 1), "prior_mu": prior_mu, "prior_var": prior_var}
    assert kl_gaussian(mu, logvar, **prior) == 0
    for step in (1e-3, -1e-3, 0.1, -0.1, 2.0, -2.0):
        assert kl_gaussian(mu + step, logvar, **prior) > 0
        assert kl_gaussian(mu, logvar + step, **prior) > 0


def test_kl_gaussian_is_finite_where_models_go():
    mu = torch.tensor([-1e3, 0.0, 1e3]).view(3, 1, 1).expand(3, 4, 8).clone().requires_grad_()
    logvar = torch.tensor([-80.0, -46.0, 0.0, 10.0]).view(1, 4, 1).expand(3, 4, 8).clone().requires_grad_()
    log_alpha = torch.tensor([-1e6, 0.0, 1e4]).view(3, 1).expand(3, 4).clone().requires_grad_()
    for kappa in (1, 3):
        kl = kl_gaussian(mu, logvar, log_alpha=log_alpha, kappa=kappa)
        kl.sum().backward()
        assert kl.isfinite().all()
        assert all(x.grad.isfinite().all() for x in (mu, logvar, log_alpha))


# KL_G of what is drawn


def drawn_nats(latent, keep, prior, kappa):
    """Of ``kappa`` draws of each vector that is neither padding nor dropped, by torch.distributions, ``(B,)``."""
    divergence = kl_divergence(Normal(latent["mu"], (0.5 * latent["logvar"]).exp()), prior).sum(-1)
    return kappa * (divergence.T * (keep & ~latent["memory_key_padding_mask"])).sum(1)


def some_kept():
    """True everywhere but for four vectors, one of which is padding anyway."""
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[0, [1, 4]] = keep[1, 2] = keep[1, 4] = False
    return keep


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("kappa", [1, 3])
def test_kl_gaussian_of_what_is_drawn(kappa, dropping, batch_first):
    """``n' P KL_G`` are the nats of the draws, from the components or from the ``kappa`` vectors of each."""
    latent, prior = random_latent(), {"prior_mu": 0.3, "prior_var": 2.0, "kappa": kappa, "weights": "drawn"}
    keep = some_kept() if dropping else None
    everything = torch.ones(3, 5, dtype=torch.bool)
    nats = drawn_nats(latent, everything if keep is None else keep, Normal(0.3, math.sqrt(2.0)), kappa)
    components = (~latent["memory_key_padding_mask"]).sum(1)
    vectors = {name: latent[name].repeat_interleave(kappa, dim=0) for name in ("mu", "logvar", "log_alpha")}
    vectors["memory_key_padding_mask"] = latent["memory_key_padding_mask"].repeat_interleave(kappa, dim=1)
    repeated_keep = None if keep is None else keep.repeat_interleave(kappa, dim=1)
    for given, kept in ((latent, keep), (vectors, repeated_keep)):
        if batch_first:
            given = {**given, **{name: given[name].transpose(0, 1) for name in ("mu", "logvar", "log_alpha")}}
        kl = kl_gaussian(**{**given, "alpha": None}, **prior, keep=kept, batch_first=batch_first)
        assert_close(components * 4 * kl, nats)


@pytest.mark.parametrize("kappa", [1, 3])
def test_what_is_drawn_learns_and_nothing_else_does(kappa):
    latent, keep = random_latent(), some_kept()
    leaves = [latent[name].requires_grad_() for name in ("mu", "logvar", "log_alpha")]
    drawn = (keep & ~latent["memory_key_padding_mask"]).T
    kl = kl_gaussian(**latent, weights="drawn", keep=keep, kappa=kappa)
    of_mu, of_logvar, of_alpha = torch.autograd.grad(kl.sum(), leaves, allow_unused=True)
    for gradient in (of_mu, of_logvar):
        assert (gradient[drawn] != 0).all() and (gradient[~drawn] == 0).all()
    assert of_alpha is None  # there is nothing to gain by a pseudo-count of nothing


def test_kl_gaussian_of_what_is_drawn_is_zero_at_the_prior_whatever_is_dropped():
    latent, keep = random_latent(), some_kept()
    prior = {"prior_mu": torch.randn(4, dtype=torch.float64), "prior_var": torch.rand(4, dtype=torch.float64) + 0.5}
    at_prior = {"mu": prior["prior_mu"].expand(5, 3, 4), "logvar": prior["prior_var"].log().expand(5, 3, 4)}
    kl = kl_gaussian(**{**latent, **at_prior}, **prior, weights="drawn", keep=keep)
    assert_close(kl, torch.zeros_like(kl))
    at_prior["mu"] = at_prior["mu"].clone()
    at_prior["mu"][4, 0] += 1.0  # dropped
    assert_close(kl_gaussian(**{**latent, **at_prior}, **prior, weights="drawn", keep=keep), kl)
    assert kl_gaussian(**{**latent, **at_prior}, **prior, weights="drawn")[0] > 0.01


def test_as_published_what_is_dropped_counts_by_its_pseudo_count():
    latent = random_latent()
    expected = kl_gaussian(**latent)
    assert_close(kl_gaussian(**latent, keep=some_kept()), expected)
    assert_close(kl_gaussian(**latent, keep=some_kept(), weights="pseudo_counts"), expected)
    assert ((kl_gaussian(**latent, weights="drawn") - expected).abs()[:2] > 0.01).all()
    with pytest.raises(ValueError, match=r"weights.*'drawn'"):
        kl_gaussian(**latent, weights="draws")


# Both


def both(latent, **kwargs):
    prior = {"prior_mu": 0.1, "prior_var": 0.8, "prior_alpha": 1.5, "delta": 0.5}
    return torch.stack([kl(**{**prior, **latent, **kwargs}) for kl in (kl_gaussian, kl_dirichlet)])  # (2, B)


def test_layouts_agree():
    latent = random_latent()
    names = ("mu", "logvar", "alpha", "log_alpha")
    first = {**latent, **{name: latent[name].transpose(0, 1) for name in names}}
    last = {**latent, **{name: latent[name].unsqueeze(-1) for name in ("alpha", "log_alpha")}}
    expected = both(latent)
    assert expected.shape == (2, 3)
    assert_close(both(first, batch_first=True), expected)
    assert_close(both({**first, "batch_first": True}), expected)  # the latent says it itself
    assert_close(both(last), expected)


def test_alpha_and_its_logarithm_agree():
    latent = random_latent()
    expected = both(latent)
    assert_close(both({**latent, "alpha": None}), expected)
    assert_close(both({**latent, "log_alpha": None}), expected)
    assert_close(both({**latent, "alpha": torch.full_like(latent["alpha"], math.inf)}), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pseudo_counts_of_zero(dtype):
    latent = random_latent(dtype=dtype)
    latent["alpha"][1] = 0  # every example's second component
    latent["alpha"][:, 2] = 0  # all of the last example
    alpha = latent["alpha"].requires_grad_()
    kl = both({**latent, "log_alpha": None})
    kl.sum().backward()
    assert kl.isfinite().all() and alpha.grad.isfinite().all()
    assert_close(both({**latent, "log_alpha": alpha.detach().log()})[:, :2], kl[:, :2].detach())

    kept = [0, 2, 3, 4]  # nothing is left of a component without a pseudo-count but its place in n'
    without = {name: latent[name][kept] for name in ("mu", "logvar")}
    assert_close(kl_gaussian(**without, alpha=alpha[kept])[0], kl_gaussian(**{**latent, "log_alpha": None})[0])


def test_only_what_is_not_padding_counts():
    latent = random_latent()
    expected = both(latent)
    for b, n in enumerate([5, 3, 1]):
        alone = {name: latent[name][:n, b : b + 1] for name in ("mu", "logvar", "log_alpha")}
        assert_close(both(alone).squeeze(-1), expected[:, b])


@pytest.mark.parametrize("garbage", [1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("absent", ["alpha", "log_alpha"])
def test_what_is_padding_contributes_nothing_and_learns_nothing(garbage, absent):
    latent = random_latent()
    expected = both(latent)
    padding = latent["memory_key_padding_mask"].T
    names = [name for name in ("mu", "logvar", "alpha", "log_alpha") if name != absent]
    for name in names:
        mask = padding.view(*padding.shape, *[1] * (latent[name].dim() - 2))
        latent[name] = latent[name].masked_fill(mask, garbage).requires_grad_()
    kl = both({**latent, absent: None})
    assert_close(kl, expected)
    kl.sum().backward()
    for name in names:
        grad = latent[name].grad
        assert (grad[padding] == 0).all() and grad.isfinite().all()
        assert (grad[:, 0] != 0).all()


def test_one_extreme_example_leaves_the_others_as_they_are():
    latent = random_latent()
    expected = both(latent)
    for name, value in (("mu", 1e30), ("logvar", 500.0), ("log_alpha", 1e4)):
        latent[name][:, 1] = value
    assert_close(both(latent)[:, [0, 2]], expected[:, [0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("kappa", [2, 5])
def test_repeats_share_the_pseudo_count_of_their_component(kappa):
    latent = random_latent()
    repeated = {name: latent[name].repeat_interleave(kappa, dim=0) for name in ("mu", "logvar", "log_alpha")}
    repeated["log_alpha"] = repeated["log_alpha"] - math.log(kappa)
    repeated["memory_key_padding_mask"] = latent["memory_key_padding_mask"].repeat_interleave(kappa, dim=1)

    assert_close(kl_gaussian(**repeated, kappa=kappa), kappa * kl_gaussian(**latent))  # k0 / n' = kappa
    kl = kl_dirichlet(**repeated, kappa=kappa, prior_alpha=1.5, delta=0.5)
    for b, n in enumerate([5, 3, 1]):
        k0 = kappa * n
        posterior = Dirichlet((latent["alpha"][:n, b].sum() / k0).expand(k0))
        prior = Dirichlet(torch.tensor((1.5 + 0.5 * (n - 1)) / k0, dtype=torch.float64).expand(k0))
        assert_close(n * kl[b], kl_divergence(posterior, prior))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    latent = random_latent(dtype=dtype)
    single = {**latent, **{name: latent[name].float() for name in ("mu", "logvar", "alpha", "log_alpha")}}
    assert both(latent).dtype == torch.float32
    assert both(random_latent()).dtype == torch.float64
    assert_close(both(latent), both(single), rtol=0, atol=0)
    assert_close(both({**latent, "log_alpha": None}), both({**single, "log_alpha": None}), rtol=0, atol=0)


def test_inputs_are_not_changed():
    latent = random_latent()
    before = {name: x.clone() for name, x in latent.items() if isinstance(x, torch.Tensor)}
    both(latent)
    both({**latent, "log_alpha": None})
    for name, x in before.items():
        assert torch.equal(latent[name], x), name


@pytest.mark.parametrize(
    "kl, argument, value",
    [
        (kl_gaussian, "kappa", 0),
        (kl_gaussian, "prior_var", 0.0),
        (kl_gaussian, "prior_var", -1.0),
        (kl_dirichlet, "kappa", -2),
        (kl_dirichlet, "delta", 1.5),
        (kl_dirichlet, "delta", -0.1),
        (kl_dirichlet, "prior_alpha", 0.0),
    ],
)
def test_errors_name_argument_value_and_remedy(kl, argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} is {value}\. Pass "):
        kl(**random_latent(), **{argument: value})


@pytest.mark.parametrize("kl", [kl_gaussian, kl_dirichlet])
def test_errors_about_the_latent(kl):
    latent = random_latent()
    with pytest.raises(ValueError, match="alpha and log_alpha are both None"):
        kl(**{**latent, "alpha": None, "log_alpha": None})
    with pytest.raises(ValueError, match=r"memory_key_padding_mask has shape \(5, 3\).*\(3, 5\).*batch_first"):
        kl(**{**latent, "memory_key_padding_mask": latent["memory_key_padding_mask"].T})


def test_both_compile_into_one_graph():
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    outcomes = []
    for function in (both, compiled):
        latent = random_latent()
        torch.manual_seed(1)
        inputs = [torch.randn_like(latent[name]).requires_grad_() for name in ("mu", "logvar", "log_alpha")]
        latent.update(zip(("mu", "logvar", "log_alpha"), inputs, strict=True))
        kl = function(latent)
        kl.sum().backward()
        outcomes.append([kl, *(x.grad for x in inputs)])
    assert_close(outcomes[1], outcomes[0])


def test_the_remainder_has_a_gradient_where_the_series_begins():
    """PyTorch 2.14 gives a clamp none at its bounds."""
    log_x = torch.tensor(math.log(16.0), dtype=torch.float64, requires_grad=True)
    r, t = _stirling_remainder(log_x)
    (gradient,) = torch.autograd.grad(r, log_x)
    torch.testing.assert_close(gradient, t.detach())  # x R'(x)
