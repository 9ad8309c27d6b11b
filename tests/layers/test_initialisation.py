"""The identity against unmodified attention over the raw vectors, and empirical priors against torch.mean and var."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nvib_hf import DenoisingMultiheadAttention, EmpiricalPrior, Nvib, empirical_prior

BATCH, TARGETS, LENGTH = 3, 5, 7


def vectors_of_norm(norm: float, width: int, dtype=torch.float32) -> Tensor:
    """Norms from 1/2 to 1 times ``norm``, so that weights that do not undo the bias show."""
    x = torch.randn(BATCH, LENGTH, width, dtype=dtype)
    lengths = torch.empty(BATCH, LENGTH, 1, dtype=dtype).uniform_(0.5, 1)
    return norm * lengths * x / x.norm(dim=-1, keepdim=True)


def plain_and_denoising(width: int, heads: int, dtype=torch.float32):
    plain = nn.MultiheadAttention(width, heads, batch_first=True, dtype=dtype)
    with torch.no_grad():
        plain.in_proj_bias.normal_()
        plain.out_proj.bias.normal_()
    denoising = DenoisingMultiheadAttention(width, heads, batch_first=True, dtype=dtype)
    denoising.load_state_dict(plain.state_dict())
    return plain.eval(), denoising.eval()


def identity_layer(width: int, heads: int, prior: EmpiricalPrior | None = None, taus=(), **kwargs) -> Nvib:
    layer = Nvib(width, width, scale=(width // heads) ** -0.5, batch_first=True, **kwargs)
    if prior is not None:
        layer.set_prior(*prior)
    layer.identity_init(*taus)
    return layer.eval()


def deviation(layer: Nvib, x: Tensor, query: Tensor, attention) -> float:
    """Largest difference from the attention over the raw vectors, relative to its largest output."""
    plain, denoising = attention
    expected = plain(query, x, x)[0]
    output = denoising(query, layer(x)["z"])[0]
    return ((output - expected).abs().max() / expected.abs().max()).item()


# Identity initialisation


@pytest.mark.parametrize("norm, tolerance", [(0.1, 1e-5), (1, 1e-5), (10, 1e-5), (100, 1e-4), (1000, 1e-3)])
@pytest.mark.parametrize("width, heads", [(16, 1), (16, 4), (64, 8), (96, 8)])
def test_a_pretrained_model_is_an_nvib_model(width, heads, norm, tolerance):
    attention, layer = plain_and_denoising(width, heads), identity_layer(width, heads)
    x = vectors_of_norm(norm, width)
    # Some score is always above -1: the weight that this leaves to the prior is the next test's.
    query = torch.randn(BATCH, TARGETS, width) / max(1, norm / 10)
    assert deviation(layer, x, query, attention) < tolerance


@pytest.mark.parametrize("tau_alpha", [10.0, 2.0, -3.0])
@pytest.mark.parametrize("norm", [0.1, 10.0, 100.0])
def test_what_differs_from_the_pretrained_model_is_the_priors_weight(norm, tau_alpha):
    r"""w_0 / (1 - w_0) = exp(-tau_alpha) (1 + s)^(-P/2) / sum_j exp(s q.k_j), with a prior of N(0, 1), alpha 1."""
    width, heads, scale = 16, 4, 0.5
    plain, denoising = plain_and_denoising(width, heads, torch.float64)
    layer = identity_layer(width, heads, taus=(tau_alpha,)).double()
    x, query = vectors_of_norm(norm, width, torch.float64), torch.randn(BATCH, TARGETS, width, dtype=torch.float64)
    _, weights = denoising(query, layer(x)["z"], average_attn_weights=False)
    query_weight, key_weight, _ = plain.in_proj_weight.chunk(3)
    q = (query @ query_weight.T + plain.in_proj_bias[:width]).unflatten(-1, (heads, -1))
    k = (x @ key_weight.T).unflatten(-1, (heads, -1))
    scores = scale * torch.einsum("bthe,bjhe->bhtj", q, k)
    log_odds = -tau_alpha - 0.5 * width * math.log1p(scale) - scores.logsumexp(-1)
    assert_close(weights[..., 0], log_odds.sigmoid(), rtol=1e-6, atol=1e-12)
    assert_close(weights[..., 1:] / weights[..., 1:].sum(-1, keepdim=True), scores.softmax(-1), rtol=1e-6, atol=1e-9)


def test_the_scale_must_be_the_attentions():
    attention, x, query = plain_and_denoising(16, 4), vectors_of_norm(10, 16), torch.randn(BATCH, TARGETS, 16)
    layer = Nvib(16, 16, batch_first=True).eval()  # of one head as wide as the latent
    layer.identity_init()
    assert deviation(layer, x, query, attention) > 0.1
    layer.scale = 4**-0.5
    layer.identity_init()
    assert deviation(layer, x, query, attention) < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_identity_in_half_precision(dtype, tolerance):
    """A bias of s/2 ||x||^2 = 100 rounded to bf16 would be off by 0.25."""
    plain, denoising = plain_and_denoising(64, 4)
    layer, x, query = identity_layer(64, 4), vectors_of_norm(28, 64), torch.randn(BATCH, TARGETS, 64)
    expected = plain(query, x, x)[0]
    memory = layer.to(dtype)(x.to(dtype))["z"]
    assert memory.log_pi.dtype == torch.float32
    output = denoising.to(dtype)(query.to(dtype), memory)[0]
    assert (output - expected).abs().max() < tolerance * expected.abs().max()


def test_smaller_tau_alpha_and_larger_tau_sigma_regularise():
    attention, x, query = plain_and_denoising(16, 4), vectors_of_norm(5, 16), torch.randn(BATCH, TARGETS, 16)
    by_alpha = [deviation(identity_layer(16, 4, taus=(tau, 0.0)), x, query, attention) for tau in (10, 4, 0, -8)]
    by_sigma = [deviation(identity_layer(16, 4, taus=(10.0, tau)), x, query, attention) for tau in (0, 0.1, 0.5, 1)]
    for deviations in (by_alpha, by_sigma):
        assert deviations[0] < 1e-5
        assert deviations == sorted(deviations)
        assert deviations[1] > 10 * deviations[0] and deviations[-1] > 0.05


@pytest.mark.parametrize("tau_alpha, tau_sigma, tau_mu", [(10.0, 0.3, 1.0), (3.0, 1.0, 0.25), (0.0, 0.1, 0.0)])
def test_the_posterior_at_the_start_is_tau_between_input_and_prior(tau_alpha, tau_sigma, tau_mu):
    prior_mu, prior_var = torch.randn(16), torch.rand(16) + 0.5
    layer = identity_layer(16, 4, taus=(tau_alpha, tau_sigma, tau_mu), prior_mu=prior_mu, prior_var=prior_var)
    x = vectors_of_norm(3, 16)
    latent = layer(x)
    assert_close(latent["mu"][:, 1:], tau_mu * x + (1 - tau_mu) * prior_mu)
    assert_close(latent["logvar"][:, 1:], (prior_var * tau_sigma**2).log().expand_as(x))
    assert_close(latent["log_alpha"][:, 1:, 0], 0.25 * x.square().sum(-1) + tau_alpha)


def test_relu_hands_vectors_on_with_equal_counts():
    layer = Nvib(16, 16, batch_first=True, alpha_activation="relu").eval()
    layer.identity_init(tau_alpha=4.0)
    x = vectors_of_norm(3, 16)
    latent = layer(x)
    assert_close(latent["mu"][:, 1:], x)
    assert_close(latent["alpha"][:, 1:], torch.full((BATCH, LENGTH, 1), 4.0))


def test_a_layer_that_changes_the_width_has_no_identity():
    with pytest.raises(ValueError, match="needs size_in == size_out, but they are 6 and 8"):
        Nvib(6, 8).identity_init()


@pytest.mark.parametrize(
    "taus, message",
    [
        ({"tau_sigma": -0.1}, "tau_sigma must be 0 or positive, but got -0.1"),
        ({"tau_mu": 1.1}, r"tau_mu must be in \[0, 1\], but got 1.1"),
        ({"tau_mu": -0.1}, r"tau_mu must be in \[0, 1\], but got -0.1"),
        ({"tau_alpha": float("nan")}, "tau_alpha must be finite, but got nan"),
    ],
)
def test_taus_outside_their_range_are_refused(taus, message):
    with pytest.raises(ValueError, match=message):
        Nvib(8, 8).identity_init(**taus)


# Empirical priors


def corpus(kind: str, width: int = 16) -> Tensor:
    """An encoder's output ``(B, Ns, P)``."""
    x = torch.randn(20, LENGTH, width)
    if kind == "layer_norm":  # the deviation of ||x||^2 is almost 0
        return nn.functional.layer_norm(x, (width,))
    if kind == "shifted":
        return x * torch.linspace(0.1, 3, width) + torch.linspace(-4, 4, width)
    return 10 * x.abs()


@pytest.mark.parametrize("kind", ["layer_norm", "shifted", "large"])
@pytest.mark.parametrize("width, heads", [(16, 1), (16, 4), (128, 128)])  # the last with a scale of 1, as T5
def test_identity_holds_with_empirical_priors(width, heads, kind):
    attention, x = plain_and_denoising(width, heads), corpus(kind, width)
    prior = empirical_prior([(x, None)], (width // heads) ** -0.5)
    layer = identity_layer(width, heads, prior)
    x, query = x[:BATCH], torch.randn(BATCH, TARGETS, width) / max(1, x.abs().max().item())
    assert deviation(layer, x, query, attention) < (1e-3 if kind == "large" else 1e-4)
    with torch.no_grad():  # without the prior's own score and with the deviation as it is
        layer.alpha_bias.copy_(10 * prior.prior_log_alpha_std)
    if kind == "layer_norm":
        assert deviation(layer, x, query, attention) > 0.02


def test_set_prior_is_saved():
    prior = empirical_prior([(corpus("shifted"), None)], 0.5)
    layer, restored = identity_layer(16, 4, prior), Nvib(16, 16, scale=0.5)
    restored.load_state_dict(layer.state_dict())
    for name, value in prior._asdict().items():
        if name != "prior_var":
            assert_close(getattr(restored, name).squeeze(), value)
    assert_close(restored.prior_logvar.exp(), prior.prior_var)
    assert_close(restored.identity_parameters(), layer.identity_parameters(), rtol=0, atol=0)


def batched(x: Tensor, padding: Tensor, sizes: list[int]):
    return [(a, b) for a, b in zip(x.split(sizes), padding.split(sizes), strict=True)]


@pytest.mark.parametrize("sizes", [[20], [1] * 20, [3, 10, 7], [7, 0, 12, 1]])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_an_empirical_prior_is_mean_and_variance_whatever_the_batches(offset, sizes):
    scale = 0.3
    x = corpus("shifted") + offset
    padding = torch.rand(20, LENGTH) > 0.6
    padding[4] = padding[-1] = True  # rows, and a batch, of padding alone
    x[padding] = float("nan")
    prior = empirical_prior(batched(x, padding, sizes), scale)
    vectors = x[~padding].double()
    energies = 0.5 * scale * vectors.square().sum(-1)
    expected = (vectors.mean(0), vectors.var(0), energies.mean(), energies.std())
    assert_close(tuple(prior), tuple(value.float() for value in expected), rtol=1e-6, atol=1e-6)
    assert all(value.dtype == torch.float32 for value in prior)


def test_an_empirical_prior_of_unpadded_and_half_precision_batches():
    x = corpus("shifted").bfloat16()
    prior = empirical_prior(((batch, None) for batch in x.split(8)), 0.5)
    vectors = x.flatten(0, 1).float()
    assert_close(prior.prior_mu, vectors.mean(0), rtol=1e-5, atol=1e-5)
    assert_close(prior.prior_var, vectors.var(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_vectors_are_refused(count):
    padding = torch.ones(2, 3, dtype=torch.bool)
    padding[0, :count] = False
    with pytest.raises(ValueError, match=f"at least two source vectors, but the batches have {count}"):
        empirical_prior([(torch.randn(2, 3, 4), padding)], 0.5)


@pytest.mark.parametrize("batches", [1, 3])
def test_channels_that_never_vary_are_refused(batches):
    x = torch.randn(6, LENGTH, 4)
    x[..., 1], x[..., 3] = 0.1, 0.0
    with pytest.raises(ValueError, match="2 channels of the encoder's output never vary"):
        empirical_prior([(batch, None) for batch in x.chunk(batches)], 0.5)
