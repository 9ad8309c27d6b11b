r"""Optimal transport between mixtures of diagonal Gaussians.

A diagonal Gaussian is the point :math:`(\mu, \sigma)` of :math:`\mathbb R^{2P}`: the squared distance of two such
points is the squared Wasserstein distance of the Gaussians, and the straight line between them is their geodesic. With
couplings that are mixtures of Gaussians themselves, transport between two mixtures is transport between the weighted
points of the one and of the other, a linear program.

Source: Delon & Desolneux, A Wasserstein-type distance in the space of Gaussian mixture models (SIAM J. Imaging
Sciences 2020).
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..layers.distributions import log_of_positive
from .checks import shared_scale
from .latents import NvibLatents, broadcast_pair, pad_latents

# An entry that is a smaller share of both of its components comes from the rounding of log-weights in fp32.
SMALLEST_SHARE = 1e-5

MAX_ITERATIONS = 10**9  # of the simplex, which stops by itself long before


class Plan(NamedTuple):
    """Entries above 0 of a batch of plans, by position in the first mixture, then in the second.

    Args:
        first, second: which components an entry joins, ``(B, K)``; ``K`` is at most ``N + M - 1``.
        log_weight: logarithm of what it moves, ``(B, K)``; they sum to 1. ``-inf`` fills shorter rows up.
    """

    first: Tensor
    second: Tensor
    log_weight: Tensor


def pot() -> ModuleType:
    """The package POT, whose network simplex is exact and the fastest measured.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "Transport between latents needs the package POT, which is not installed. Install it with "
            "`pip install 'nvib-hf[interpolation]'` or `pip install POT`."
        ) from error
    module: ModuleType = ot
    return module


def gaussian_points(mean: Tensor, logvar: Tensor | None = None) -> Tensor:
    """Diagonal Gaussians as points ``(..., 2 P)``, mean and deviation, in at least fp32; ``(..., P)`` if all are 0."""
    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    return mean if logvar is None else torch.cat([mean, torch.exp(0.5 * logvar.to(mean.dtype))], dim=-1)


@torch.no_grad()
def transport_plan(first: Tensor, first_log_pi: Tensor, second: Tensor, second_log_pi: Tensor) -> Plan:
    r"""The cheapest way to turn the one set of weighted points into the other.

    .. math::
        G = \arg\min_{G \ge 0} \sum_{ij} G_{ij} \lVert x_i - y_j \rVert^2, \qquad
        \sum_j G_{ij} = \pi_i, \quad \sum_i G_{ij} = \pi'_j

    Args:
        first, second: points ``(B, N, D)`` and ``(B, M, D)``, of any scale.
        first_log_pi, second_log_pi: log-weights ``(B, N)`` and ``(B, M)``, normalised here; ``-inf`` leaves a point
            out, whatever it is.

    Returns:
        The plan, solved in float64 on the CPU, on the points' device. No gradient passes through it.

    Raises:
        ImportError: without POT.
        ValueError: no example; one with no point left, or one that is not finite.
    """
    if not len(first):
        raise ValueError("There are no latents: a batch of 0 was given. Pass at least one.")
    plans = [_solve(*example) for example in zip(first, first_log_pi, second, second_log_pi, strict=True)]
    i, j, log_weight = map(list, zip(*plans, strict=True))
    return Plan(
        first=pad_sequence(i, batch_first=True).to(first.device),
        second=pad_sequence(j, batch_first=True).to(first.device),
        log_weight=pad_sequence(log_weight, batch_first=True, padding_value=-torch.inf).to(first_log_pi),
    )


def _solve(x: Tensor, log_x: Tensor, y: Tensor, log_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions and log-weights ``(K,)`` of one example's plan."""
    seen_x, seen_y = ((log_pi > -torch.inf).nonzero()[:, 0].cpu() for log_pi in (log_x, log_y))
    if not len(seen_x) or not len(seen_y):
        raise ValueError("A latent has no vector left: all its log_pi are -inf. Leave it at least one.")
    x, log_x, y, log_y = (value.cpu().double() for value in (x, log_x, y, log_y))
    cost = torch.cdist(x[seen_x], y[seen_y]).square()
    if not cost.isfinite().all():
        raise ValueError("The vectors of a latent must be finite, but some are infinite or NaN.")
    a, b = log_x[seen_x].softmax(0), log_y[seen_y].softmax(0)
    plan = torch.from_numpy(pot().emd(a.numpy(), b.numpy(), cost.numpy(), numItermax=MAX_ITERATIONS))
    i, j = (plan > SMALLEST_SHARE * torch.minimum(a[:, None], b)).nonzero(as_tuple=True)
    return seen_x[i], seen_y[j], plan[i, j].log().log_softmax(0)


def joined(first: Tensor, second: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The points ``(B, K, D)`` that the entries of a plan join, on either side."""
    return first.take_along_dim(plan.first[..., None], dim=1), second.take_along_dim(plan.second[..., None], dim=1)


def transport_path(first: Tensor, second: Tensor, plan: Plan, weight: Tensor) -> Tensor:
    r"""The points :math:`(1 - t) x_i + t y_j` on the way, of weight :math:`G_{ij}`: ``(B, K, D)``.

    Args:
        first, second: points, as the plan was made for.
        weight: ``t`` in [0, 1], ``(B,)``. Several for a batch of one are several points of one path.
    """
    return torch.lerp(*joined(first, second, plan), weight.to(first.dtype)[:, None, None])


def transport_distance(first: Tensor, second: Tensor, plan: Plan) -> Tensor:
    r"""Root of the plan's cost, :math:`\sqrt{\sum_{ij} G_{ij} \lVert x_i - y_j \rVert^2}`, ``(B,)``.

    A metric. The plan being optimal, its gradient with respect to the points is exact.
    """
    x, y = joined(first, second, plan)
    distance: Tensor = torch.linalg.vector_norm(torch.exp(0.5 * plan.log_weight)[..., None] * (x - y), dim=(1, 2))
    return distance


def interpolate_by_transport(first: NvibLatents, second: NvibLatents, weight: float | Tensor) -> NvibLatents:
    r"""The mixture at ``weight`` on the geodesic between two: components travel, each to where it is cheapest.

    For every entry :math:`G_{ij} > 0` of the optimal plan (:func:`~nvib_hf.latents.transport.transport_plan`)

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
    scale = shared_scale(*rows)
    first, second = ends if alone else rows
    points, plan = _transport(first, second)
    width, dtype = first.z.shape[-1], torch.promote_types(first.z.dtype, second.z.dtype)
    mixture = points[0].shape[-1] > width
    moved = transport_path(*points, plan, weight[:, 0])  # (B, K, P), or with deviations (B, K, 2 P)
    between = NvibLatents(
        z=moved[..., :width].to(dtype),
        log_pi=plan.log_weight.expand(len(weight), -1),
        attention_mask=(plan.log_weight > -torch.inf).expand(len(weight), -1),
        logvar=(2 * log_of_positive(moved[..., width:])).to(dtype) if mixture else None,
        scale=scale,
    )
    return with_ends(first, second, between, weight)


def with_ends(first: NvibLatents, second: NvibLatents, between: NvibLatents, weight: Tensor) -> NvibLatents:
    """``between`` with the ends as they are, to the bit, where ``weight`` ``(B, 1)`` is 0 or 1.

    The ends are batches of one or of as many latents.
    """
    mixture = any(x.logvar is not None for x in (between, first, second))
    length = max(x.z.shape[1] for x in (between, first, second))
    between, first, second = (pad_latents(x, length, with_logvar=mixture) for x in (between, first, second))

    def chosen(name: str) -> Tensor:
        at_first, at_second = (weight == t if name == "log_pi" else (weight == t)[..., None] for t in (0, 1))
        return torch.where(at_first, first[name], torch.where(at_second, second[name], between[name]))

    log_pi = chosen("log_pi")
    keep = log_pi > -torch.inf
    return NvibLatents(
        z=chosen("z").masked_fill(~keep[..., None], 0),
        log_pi=log_pi,
        logvar=chosen("logvar").masked_fill(~keep[..., None], 0) if mixture else None,
        attention_mask=keep,
        scale=between.scale,
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
        keep = latents.log_pi > -torch.inf
        return gaussian_points(latents.z.to(dtype), latents.logvar).masked_fill(~keep[..., None], 0)

    x, y = points(first), points(second)
    return (x, y), transport_plan(x, first.log_pi, y, second.log_pi)
