"""Latents of a few vectors without a model, and what tests read off latents."""

from __future__ import annotations

import torch

from nvib_hf import NvibLatents

INF = float("inf")
WIDTH = 6


def mixture(batch: int = 4, length: int = 5, seed: int = 0) -> NvibLatents:
    """Latents as of texts in evaluation: row ``b`` has ``length - b % 3`` vectors."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.tensor([length - row % 3 for row in range(batch)])[:, None]
    log_alpha = torch.randn(batch, length, generator=generator).masked_fill(~mask, -INF)
    return NvibLatents(
        z=torch.randn(batch, length, WIDTH, generator=generator) * mask[..., None],
        log_pi=log_alpha.log_softmax(-1),
        logvar=torch.randn(batch, length, WIDTH, generator=generator) * mask[..., None],
        attention_mask=mask,
        log_alpha=log_alpha,
        kl_gaussian=torch.rand(batch, generator=generator),
        kl_dirichlet=torch.rand(batch, generator=generator),
        num_vectors=mask.sum(-1) - 1.0,
        prop_vectors=torch.ones(batch),
        effective_vectors=torch.rand(batch, generator=generator),
    )


def sample(batch: int = 4, length: int = 3, seed: int = 1) -> NvibLatents:
    """Latents as from the prior."""
    generator = torch.Generator().manual_seed(seed)
    return NvibLatents(
        z=torch.randn(batch, length, WIDTH, generator=generator),
        log_pi=torch.randn(batch, length, generator=generator).log_softmax(-1),
        attention_mask=torch.ones(batch, length, dtype=torch.bool),
    )


def assert_same(a: NvibLatents, b: NvibLatents) -> None:
    assert list(a.keys()) == list(b.keys())
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        torch.testing.assert_close(value, b[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def components(latents: NvibLatents, row: int) -> list[tuple]:
    """Weight, mean and deviation of each component that is seen, in order."""
    logvar = torch.full_like(latents.z, -INF) if latents.logvar is None else latents.logvar
    seen = latents.log_pi[row] > -INF
    weights = latents.log_pi[row, seen].exp()
    return list(zip(weights, latents.z[row, seen], (0.5 * logvar[row, seen]).exp(), strict=True))
