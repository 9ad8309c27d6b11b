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
    return ot


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
        ValueError: an example with no point left, or one that is not finite.
    """
    plans = [_solve(*example) for example in zip(first, first_log_pi, second, second_log_pi, strict=True)]
    i, j, log_weight = zip(*plans, strict=True)
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
    return torch.linalg.vector_norm(torch.exp(0.5 * plan.log_weight)[..., None] * (x - y), dim=(1, 2))
