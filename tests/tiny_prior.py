"""Latents with a grammar, and the learned prior of a tiny model that learns it in seconds."""

from __future__ import annotations

import torch

from nvib_hf import NvibLatents
from nvib_hf.latents.learned import with_prior_component

SIZES = {"num_codes": 4, "d_model": 16, "num_layers": 1, "num_heads": 2}
TRAINING = {"max_steps": 60, "evaluate_every": 20, "batch_size": 16, "learning_rate": 1e-2, "progress": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cycles(model, num: int, seed: int) -> NvibLatents:
    """Posteriors of 3 to 6 vectors, each near one of four points, and the points in turn: a grammar."""
    generator, width = seeded(seed), model.nvib.size_out
    points = 4 * torch.randn(4, width, generator=seeded(77))
    lengths = torch.randint(3, 7, (num,), generator=generator)
    code = (torch.randint(4, (num, 1), generator=generator) + torch.arange(6)) % 4
    z = points[code] + 0.1 * torch.randn(num, 6, width, generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    latents = with_prior_component(model, z.masked_fill(~mask[..., None], 0), mask, torch.tensor(-1.2))
    latents.logvar = torch.full_like(latents.z, -2.0)
    return latents


def fit(model, **settings) -> list[dict]:
    settings = {"sizes": SIZES, **TRAINING, **settings}
    return model.fit_latent_prior(cycles(model, 300, 0), cycles(model, 60, 1), **settings)
