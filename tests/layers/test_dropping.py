"""The threshold, its share of the training examples, its relaxation, and pseudo-counts of 0 that come back."""

import math

import pytest
import torch

from nvib_hf import Nvib
from nvib_hf.layers.dropping import LEAK, LOG_ZERO, relaxed_share, relu_log_alpha

THRESHOLD = 0.1


def layer(**settings) -> Nvib:
    torch.manual_seed(0)
    return Nvib(8, 8, delta=0.5, batch_first=True, **settings)


def with_counts(layer: Nvib, bias: float) -> Nvib:
    """The layer with the same pseudo-count for every vector."""
    with torch.no_grad():
        layer.alpha_weight.zero_()
        layer.alpha_bias.fill_(bias)
    return layer


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_kept_is_what_is_above_the_threshold(share):
    alpha = [0.0, 1e-30, 0.05, 0.1, 0.11, 7.0]
    model = Nvib(1, 1, batch_first=True, alpha_activation="relu", alpha_threshold=THRESHOLD, dropping_share=share)
    with torch.no_grad():
        model.alpha_weight.fill_(1)
        model.alpha_bias.fill_(0)
    expected = [a > THRESHOLD if share > 0 else a > 1e-30 for a in alpha]
    assert model.posterior(torch.tensor(alpha)[None, :, None]).keep[0, 1:].tolist() == expected


def test_relaxed_share_by_hand():
    """Of a threshold it is the mean of alpha / (alpha + threshold) over what is not padding."""
    log_alpha, mask = torch.randn(3, 5, dtype=torch.float64), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2:] = False
    log_alpha[1, 2:] = math.nan
    expected = []
    for row, keep in zip(log_alpha.tolist(), mask.tolist(), strict=True):
        alpha = [math.exp(x) for x, k in zip(row, keep, strict=True) if k]
        expected.append(sum(a / (a + THRESHOLD) for a in alpha) / len(alpha))
    assert relaxed_share(log_alpha - math.log(THRESHOLD), mask).tolist() == pytest.approx(expected)
    model = layer(alpha_threshold=THRESHOLD).double()
    posterior = model.posterior(torch.randn(3, 5, 8, dtype=torch.float64))
    posterior = posterior._replace(
        keep_logit=torch.cat([torch.zeros(3, 1), log_alpha - math.log(THRESHOLD)], dim=1),
        mask=torch.cat([torch.ones(3, 1, dtype=torch.bool), mask], dim=1),
    )
    assert model.relaxed_share(posterior).tolist() == pytest.approx(expected)
    assert layer().relaxed_share(posterior._replace(keep_logit=None)) is None


def test_relaxed_share_nears_the_share():
    keep_logit = torch.tensor([[-30.0, 20.0, 20.0, -30.0]])
    assert relaxed_share(keep_logit, keep_logit < 100).item() == pytest.approx(0.5)


def test_relu_is_exact_and_its_gradient_leaks():
    activation = torch.tensor([-2.0, 0.5, -0.1, 3.0], requires_grad=True)
    log_alpha = relu_log_alpha(activation)
    torch.testing.assert_close(log_alpha.detach().exp(), torch.relu(activation.detach()))
    assert log_alpha.tolist()[0] == LOG_ZERO
    log_alpha.logsumexp(-1).exp().backward()  # alpha0, whose gradient is that of each alpha
    torch.testing.assert_close(activation.grad, torch.tensor([LEAK, 1.0, LEAK, 1.0]))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_the_training_examples(share):
    model = with_counts(layer(alpha_threshold=THRESHOLD, dropping_share=share), math.log(0.05)).train()
    x = torch.randn(4000, 3, 8)
    dropped = (model(x)["z"].log_pi[:, 1:] == -math.inf).float()
    assert (dropped.mean(1) % 1 == 0).all()  # an example keeps all or none of them
    assert dropped.mean().item() == pytest.approx(share, abs=0.03)
    model.eval()
    for log_pi in (model(x)["z"].log_pi, model.sample_posterior(model.posterior(x))[1]):
        dropped = log_pi[:, 1:] == -math.inf
        assert dropped.all() if share else not dropped.any()


def test_share_takes_the_generator():
    model = with_counts(layer(alpha_threshold=THRESHOLD, dropping_share=0.5), math.log(0.05)).train()
    x = torch.randn(20, 3, 8)
    one, two, other = (model(x, generator=torch.Generator().manual_seed(seed))["z"].log_pi for seed in (7, 7, 8))
    assert torch.equal(one, two)
    assert not torch.equal(one == -math.inf, other == -math.inf)


def test_the_dead_come_back():
    """Every pseudo-count 0: the KL of the Dirichlet, which then is above 0, brings them back until it is 0."""
    model = with_counts(layer(alpha_activation="relu"), -1.0).train()
    x = torch.randn(16, 6, 8)
    latent = model(x)
    assert latent["avg_num_vec"] == 0 and (latent["pi"][:, 0] == 1).all()
    before = model.kl_dirichlet(**latent).mean().item()
    optimizer = torch.optim.Adam([model.alpha_bias], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        model.kl_dirichlet(**model(x)).mean().backward()
        optimizer.step()
    latent = model(x)
    assert before > 0.05 and model.kl_dirichlet(**latent).mean() < 0.1 * before
    assert latent["avg_num_vec"] == 6


def test_dead_vectors_are_not_attended_to_and_gradients_are_finite():
    model = layer(alpha_activation="relu").train()
    with torch.no_grad():
        model.alpha_weight.normal_()
        model.alpha_bias.zero_()
    x = torch.randn(5, 7, 8, requires_grad=True)
    latent = model(x)
    dead = latent["alpha"] < 1e-20
    assert dead.any() and not dead.all() and torch.equal(latent["z"].log_pi == -math.inf, dead)
    (latent["pi"].square().sum() + model.kl_dirichlet(**latent).sum() + model.kl_gaussian(**latent).sum()).backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_refuses_a_share_outside_its_range(share):
    with pytest.raises(ValueError, match=f"dropping_share must be in .* but got {share}"):
        layer(alpha_threshold=0.1, dropping_share=share)
