"""Latents from the prior, and the prior fitted to a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .base_model import run_encoder
from .checks import check_counts
from .initialisation import EmpiricalPrior, empirical_prior
from .latent import NvibLatents


def sample_from_prior(
    model,
    num_samples: int,
    num_vectors: int | Sequence[int] | Tensor,
    generator: torch.Generator | None = None,
) -> NvibLatents:
    """Latents of an NVIB model from its prior, with weights from the prior's Dirichlet.

    Args:
        num_samples: how many.
        num_vectors: vectors of each, one number or one per sample, at least 1.

    Raises:
        ValueError: counts below 1, or not one per sample.

    Source: Henderson & Fehr (ICLR 2023).
    """
    counts = torch.as_tensor(num_vectors, device=model.device)
    check_counts(num_samples, num_vectors, counts)
    counts = counts.expand(num_samples)
    padding = torch.arange(int(counts.max()), device=model.device) >= counts[:, None]
    z, log_pi = model.nvib.sample_prior(padding, generator)
    return NvibLatents(z=z.to(model.dtype), log_pi=log_pi, attention_mask=~padding)


def fit_prior(model, batches: Iterable[dict[str, Tensor]]) -> EmpiricalPrior:
    """Give an NVIB model the prior of its encoder's output over a corpus, and initialise its layer for it again.

    Args:
        batches: the model's inputs, for instance a ``DataLoader``.

    Source: Fehr & Henderson (COLM 2024), empirical priors.
    """
    training = model.training

    def encoded():
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in model._encoder_arguments(batch).items()}
            outputs, padding = run_encoder(model.base, inputs)
            yield outputs.last_hidden_state, padding

    model.eval()
    try:
        prior = empirical_prior(encoded(), model.scale)
    finally:
        model.train(training)
    model.nvib.set_prior(*prior)
    model.nvib.identity_init(model.config.tau_alpha, model.config.tau_sigma, model.config.tau_mu)
    return prior
