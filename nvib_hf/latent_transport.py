"""Latents as mixtures of Gaussians that are moved into each other: the path between two, and their distance."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributions import log_of_positive
from .latent import NvibLatents, broadcast_pair, pad_latents
from .transport import Plan, gaussian_points, transport_distance, transport_path, transport_plan


def interpolate_by_transport(first: NvibLatents, second: NvibLatents, weight: float | Tensor) -> NvibLatents:
    r"""The mixture at ``weight`` on the geodesic between two: components travel, each to where it is cheapest.

    For every entry :math:`G_{ij} > 0` of the optimal plan (:func:`~nvib_hf.transport.transport_plan`)

    .. math:: \pi = G_{ij}, \qquad \mu = (1 - t) \mu_i + t \mu_j, \qquad \sigma = (1 - t) \sigma_i + t \sigma_j

    which are at most ``N + M - 1`` components, by position in ``first``, then in ``second``. At 0 and 1 the result is
    the end itself.

    Args:
        first, second: latents of the same batch size, or a batch of one; lengths may differ. Padding and dropped
            vectors are left out; a sample is a mixture of variance 0.
        weight: ``t`` in [0, 1], a number or ``(B,)``; 0 is ``first``. Several for two batches of one walk from the
            one to the other, on one plan.

    Returns:
        ``logvar`` only where an end has it. Gradients reach means and variances, not the weights.

    Raises:
        ImportError: without the package POT.
        ValueError: weights outside [0, 1]; batch sizes or widths that do not fit; a latent without vectors.

    Source: Delon & Desolneux (SIAM J. Imaging Sciences 2020).
    """
    alone = first.batch_size == second.batch_size == 1
    ends = first.compact(), second.compact()
    *rows, weight = broadcast_pair(*ends, weight)
    first, second = ends if alone else rows
    points, plan = _transport(first, second)
    width, dtype = first.z.shape[-1], torch.promote_types(first.z.dtype, second.z.dtype)
    mixture = points[0].shape[-1] > width
    moved = transport_path(*points, plan, weight[:, 0])  # (B, K, P), or with deviations (B, K, 2 P)
    between = NvibLatents(
        z=moved[..., :width].to(dtype),
        log_pi=plan.log_weight.expand(len(weight), -1),
        logvar=(2 * log_of_positive(moved[..., width:])).to(dtype) if mixture else None,
    )
    # The ends as they are: the same distributions as on the path, and not a bit of rounding.
    length = max(x.z.shape[1] for x in (between, first, second))
    between, first, second = (pad_latents(x, length, with_logvar=mixture) for x in (between, first, second))

    def chosen(name: str) -> Tensor:
        at_first, at_second = (weight == t if name == "log_pi" else (weight == t)[..., None] for t in (0, 1))
        return torch.where(at_first, first[name], torch.where(at_second, second[name], between[name]))

    log_pi = chosen("log_pi")
    seen = log_pi > -torch.inf
    return NvibLatents(
        z=chosen("z").masked_fill(~seen[..., None], 0),
        log_pi=log_pi,
        logvar=chosen("logvar").masked_fill(~seen[..., None], 0) if mixture else None,
        attention_mask=seen,
    )


def latent_distance(first: NvibLatents, second: NvibLatents) -> Tensor:
    r"""How far apart two latents are as mixtures of Gaussians: the root of what transport between them costs.

    .. math::
        d^2 = \min_G \sum_{ij} G_{ij} \bigl( \lVert \mu_i - \mu_j \rVert^2 + \lVert \sigma_i - \sigma_j \rVert^2 \bigr)

    over the plans :math:`G` between both weights. A metric: 0 for the same mixture, however its components are split
    or ordered. On the path of ``interpolate_latents`` it grows evenly. Never below the distance of the means
    (:meth:`NvibLatents.pooled`), which is quick to compute for a whole corpus.

    Args:
        first, second: latents of the same batch size, or a batch of one; lengths may differ.

    Returns:
        ``(B,)``, in at least fp32. Gradients reach means and variances, not the weights.

    Raises:
        ImportError: without the package POT.
        ValueError: batch sizes or widths that do not fit; a latent without vectors.

    Example:
        >>> nearest = latent_distance(latents[0], corpus).argmin()  # doctest: +SKIP

    Source: Delon & Desolneux (SIAM J. Imaging Sciences 2020).
    """
    first, second, _ = broadcast_pair(first.compact(), second.compact(), 0)
    points, plan = _transport(first, second)
    return transport_distance(*points, plan)


def _transport(first: NvibLatents, second: NvibLatents) -> tuple[tuple[Tensor, Tensor], Plan]:
    """Components of both as points, and the plan between them."""
    mixture = first.logvar is not None or second.logvar is not None
    dtype = torch.promote_types(first.z.dtype, second.z.dtype)

    def points(latents: NvibLatents) -> Tensor:
        latents = pad_latents(latents, latents.z.shape[1], with_logvar=mixture)
        hidden = (latents.log_pi == -torch.inf)[..., None]
        return gaussian_points(latents.z.to(dtype), latents.logvar).masked_fill(hidden, 0)

    x, y = points(first), points(second)
    return (x, y), transport_plan(x, first.log_pi, y, second.log_pi)
