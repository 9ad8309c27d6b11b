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


def refined_path(
    model: HasLatentPrior, first: NvibLatents, second: NvibLatents, weight: float | Tensor, refine: float
) -> NvibLatents:
    r"""Between two batches of latents, in the order of their texts, and brought to plausible ones on the way.

    At weight :math:`t` there are :math:`n = (1 - t) n_a + t n_b` vectors, in whole numbers. Those before the place
    :math:`t n_b` are on their way to ``second``, counted from its beginning; those behind it are still near ``first``,
    counted from its end. Without what their places explain, vector ``i``, from 0 on, starts as

    .. math::
        x_i = (1 - t_i) a_{i - n + n_a} + t_i b_i, \qquad
        t_i = \mathrm{clamp}\Bigl(\frac12 + \frac{t n_b - i - 1/2}{n / 2}, 0, 1\Bigr)

    so half of the text moves at a time; then :meth:`LatentPrior.plausible`. At 0 and 1 the result is the end itself.
    """
    prior = fitted_prior(model, "refine")
    first, second, weight = broadcast_pair(first.compact(), second.compact(), weight)
    shared_scale(first, second)
    (a, _, n_a), (b, _, n_b) = (prior.without_places(*vectors_of(latents)[:2]) for latents in (first, second))
    t = weight[:, 0].to(a)
    n = ((1 - t) * n_a + t * n_b).round().long()
    i = torch.arange(int(n.max()), device=n.device).expand(len(n), -1)
    t_i = (0.5 + ((t * n_b)[:, None] - i - 0.5) / (n[:, None] / 2)).clamp(0, 1)
    of_a = (i + (n_a - n)[:, None]).clamp(min=0).minimum(n_a[:, None] - 1)
    of_b = i.minimum(n_b[:, None] - 1)
    x = torch.lerp(a.take_along_dim(of_a[..., None], dim=1), b.take_along_dim(of_b[..., None], dim=1), t_i[..., None])
    mask = i < n[:, None]
    z = evaluated(prior, "plausible", x + prior.places[: x.shape[1]], mask, refine)
    return with_ends(first, second, with_prior_component(model, z, mask, prior.log_weight), weight)
