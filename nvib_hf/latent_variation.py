"""New latents from those of texts: around each of them, and between several."""

from __future__ import annotations

import math

import torch

from .distributions import gaussian_sample, log_dirichlet_sample
from .latent import NvibLatents
from .latent_transport import interpolate_by_transport


def vary(
    latents: NvibLatents,
    temperature: float = 1.0,
    redraw_weights: bool = False,
    generator: torch.Generator | None = None,
) -> NvibLatents:
    r"""A draw around each latent: the posterior's own noise, weaker or stronger.

    .. math:: z_i = \mu_i + \tau \sigma_i \epsilon, \qquad \epsilon \sim \mathrm{Normal}(0, I)

    Args:
        latents: mixtures, not samples: of ``encode(sample=False)``, or between such. ``latents[[0] * 10]`` for ten
            draws around one.
        temperature: :math:`\tau \ge 0`; 1 draws what training with ``kappa=1`` draws, 0 leaves the means.
        redraw_weights: draw them too, from the posterior's Dirichlet, in place of the expected ones.
        generator: for the draws, on the latents' device.

    Raises:
        ValueError: a temperature below 0 or infinite; latents without variances, or without pseudo-counts where the
            weights shall be drawn.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or positive, but got {temperature}.")
    if latents.logvar is None:
        raise ValueError("Latents without logvar are points and have no noise to draw. Use encode(..., sample=False).")
    if redraw_weights and latents.log_alpha is None:
        raise ValueError(
            "redraw_weights needs log_alpha, which only latents of texts have. Use encode(..., sample=False), or "
            "leave the weights as they are."
        )
    latents = latents.compact()
    seen = latents.log_pi > -math.inf
    log_tau = math.log(temperature) if temperature > 0 else -math.inf
    z = gaussian_sample(latents.z, latents.logvar + 2 * log_tau, seen, generator)
    log_pi = log_dirichlet_sample(latents.log_alpha, seen, generator) if redraw_weights else latents.log_pi
    return NvibLatents(z=z, log_pi=log_pi, attention_mask=seen)


def blend(
    latents: NvibLatents, num_samples: int, num_parents: int = 2, generator: torch.Generator | None = None
) -> NvibLatents:
    r"""New latents somewhere between ``num_parents`` different ones of a corpus, by transport.

    The parents are drawn at random, their weights uniformly from the simplex (for two: :math:`t` from [0, 1]). From
    the first parent the path goes towards the second, from there towards the third, and so on, each time as far as
    makes the weights come true.

    Args:
        latents: of at least ``num_parents`` texts (:func:`~nvib_hf.concatenate_latents` joins batches).
        num_samples: how many new ones.
        num_parents: at least 2. Components add up: a blend has as many as its parents together, less one for each
            step.
        generator: for the draws, on the latents' device.

    Raises:
        ImportError: without the package POT.
        ValueError: counts that are too small, or more parents than latents.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("num_parents", num_parents, 2)):
        if value != int(value) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, but got {value}.")
    if num_parents > latents.batch_size:
        raise ValueError(
            f"num_parents is {num_parents}, but there are only {latents.batch_size} latents to choose from."
        )
    chance = {"generator": generator, "device": latents.device}
    parents = torch.stack([torch.randperm(latents.batch_size, **chance)[:num_parents] for _ in range(num_samples)])
    shares = torch.empty(num_samples, num_parents, device=latents.device).exponential_(generator=generator)
    steps = shares / shares.cumsum(-1)  # exponentials, once normalised, are uniform on the simplex
    blended = latents[parents[:, 0]]
    for parent, weight in zip(parents.T[1:], steps.T[1:], strict=True):
        blended = interpolate_by_transport(blended, latents[parent], weight)
    return blended
