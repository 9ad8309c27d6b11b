"""Latents from the prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_counts
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
