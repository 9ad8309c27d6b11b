"""Latents brought back to where texts are, by a learned prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_number, shared_scale
from .latents import NvibLatents, broadcast_pair
from .learned import HasLatentPrior, evaluated, fitted_prior, vectors_of, with_prior_component
from .transport import with_ends


def check_refine(refine: float) -> float:
    """A number of at least 0.

    Raises:
        ValueError: another one.
    """
    refine = check_number("refine", refine)
    if not 0 <= refine < math.inf:
        raise ValueError(f"refine must be 0, which refines nothing, or positive, but got {refine}.")
    return refine


def refined(model: HasLatentPrior, latents: NvibLatents, refine: float) -> NvibLatents:
    """Plausible latents near given ones, :meth:`LatentPrior.plausible`: points, of one weight all."""
    prior = fitted_prior(model, "refine")
    z, mask, _ = vectors_of(latents)
    return with_prior_component(model, evaluated(prior, "plausible", z, mask, refine), mask, prior.log_weight)


def path_in_order(a: Tensor, n_a: Tensor, b: Tensor, n_b: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Vectors between two sequences, in whose order they leave the one for the other.

    At :math:`t` there are :math:`n = (1 - t) n_a + t n_b` of them, in whole numbers. Those before the place
    :math:`t n_b` are on their way to ``b``, counted from its beginning; those behind it are still near ``a``, counted
    from its end. Half of them move at a time: vector ``i``, from 0 on, is

    .. math::
        x_i = (1 - t_i) a_{i - n + n_a} + t_i b_i, \qquad
        t_i = \mathrm{clamp}\Bigl(\frac12 + \frac{t n_b - i - 1/2}{n / 2}, 0, 1\Bigr)

    Args:
        a, b: ``(B, N, P)`` and ``(B, M, P)``.
        n_a, n_b: how many of each row are vectors, ``(B,)``.
        t: in [0, 1], ``(B,)``.

    Returns:
        ``x`` ``(B, n, P)`` and ``n`` ``(B,)``. What follows a row's end is arbitrary.
    """
    n = ((1 - t) * n_a + t * n_b).round().long()
    i = torch.arange(int(n.max()), device=n.device).expand(len(n), -1)
    t_i = (0.5 + ((t * n_b)[:, None] - i - 0.5) / (n[:, None] / 2)).clamp(0, 1)
    of_a = (i + (n_a - n)[:, None]).clamp(min=0).minimum(n_a[:, None] - 1)
    of_b = i.minimum(n_b[:, None] - 1)
    old, new = a.take_along_dim(of_a[..., None], dim=1), b.take_along_dim(of_b[..., None], dim=1)
    return torch.lerp(old, new, t_i[..., None]), n


def refined_path(
    model: HasLatentPrior, first: NvibLatents, second: NvibLatents, weight: float | Tensor, refine: float
) -> NvibLatents:
    """Between two batches of latents: :func:`path_in_order` of what their places do not explain, brought to plausible
    vectors by :meth:`LatentPrior.plausible`. At 0 and 1 the result is the end itself.
    """
    prior = fitted_prior(model, "refine")
    first, second, weight = broadcast_pair(first.compact(), second.compact(), weight)
    shared_scale(first, second)
    (a, _, n_a), (b, _, n_b) = (prior.without_places(*vectors_of(latents)[:2]) for latents in (first, second))
    x, n = path_in_order(a, n_a, b, n_b, weight[:, 0].to(a))
    mask = torch.arange(x.shape[1], device=n.device) < n[:, None]
    z = evaluated(prior, "plausible", x + prior.places[: x.shape[1]], mask, refine)
    return with_ends(first, second, with_prior_component(model, z, mask, prior.log_weight), weight)
