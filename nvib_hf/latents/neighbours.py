r"""Distances between many latents, and exact nearest neighbours without computing all distances.

Two lower bounds show which pairs need no transport. With the points :math:`x_i`, :math:`y_j` and the squared distances
:math:`C_{ij}` of a pair, its distance :math:`d` is at least

.. math::
    d^2 \ge \Bigl\lVert \sum_i \pi_i x_i - \sum_j \pi'_j y_j \Bigr\rVert^2, \qquad
    d^2 \ge \max \Bigl( \sum_i \pi_i \min_j C_{ij}, \; \sum_j \pi'_j \min_i C_{ij} \Bigr)

The first costs one matrix product for a whole corpus. The second is tight: every point goes to its nearest point,
whatever the weights there.

Source: Kusner et al., From word embeddings to document distances (ICML 2015), prefetch and prune.
"""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_count
from .latents import NvibLatents, pad_latents
from .transport import MAX_ITERATIONS, gaussian_points, pot

BLOCK = 128  # the second bound is computed for this many latents of a corpus at a time
SLACK = 1 - 1e-9  # factor of a bound, so that rounding prunes nothing


class Neighbours(NamedTuple):
    """For each of ``N`` latents the ``k`` nearest latents of a corpus, nearest first: both fields ``(N, k)``."""

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # in the place of tuple.index


class _Points(NamedTuple):
    """Mixtures as weighted points in float64 on the CPU: ``(N, L, D)`` and ``(N, L)``. Points of weight 0 come last.

    ``counts`` are the numbers of points with weight, ``mean`` ``(N, D)`` is the mean of the points.
    """

    points: Tensor
    weights: Tensor
    counts: list[int]
    mean: Tensor


def latent_distances(first: NvibLatents, second: NvibLatents) -> Tensor:
    """:func:`~nvib_hf.latent_distance` between each of ``N`` latents and each of ``M``, ``(N, M)``.

    No gradient passes. A pair takes about 0.2 ms. If you only need the nearest, :func:`nearest` computes few pairs.

    Raises:
        ImportError: POT is not installed. ValueError: widths do not fit; a latent has no vectors.
    """
    ours, theirs = _points_of(first, second)
    rows = []
    for row in range(len(ours.counts)):
        costs = _costs(ours, row, theirs, list(range(len(theirs.counts))))
        rows.append([_transported(ours, row, theirs, column, cost) for column, cost in enumerate(costs)])
    squared = torch.tensor(rows, dtype=torch.float64).view(len(ours.counts), len(theirs.counts))
    return _as_distance(squared, first, second)


def nearest(latents: NvibLatents, corpus: NvibLatents, k: int = 1) -> Neighbours:
    """For each latent the ``k`` nearest latents of a corpus, exactly, by :func:`~nvib_hf.latent_distance`.

    Transport is solved only if both lower bounds leave the order open: in a corpus of hundreds, for a few pairs of
    each latent. Search a corpus of millions by :meth:`NvibLatents.pooled` first, in an index for vectors, and rank
    the results with this function.

    Args:
        latents, corpus: of any batch sizes and lengths.
        k: how many neighbours, at most as many as the corpus has latents.

    Raises:
        ImportError: POT is not installed. ValueError: ``k`` is too large; widths do not fit; a latent has no vectors.

    Example:
        >>> distance, index = nearest(latents, corpus, k=5)  # doctest: +SKIP
    """
    k = check_count("k", k)
    if k > len(corpus):
        raise ValueError(f"k is {k}, but the corpus has {len(corpus)} latents. Pass a k of at most {len(corpus)}.")
    ours, theirs = _points_of(latents, corpus)
    bounds = torch.cdist(ours.mean, theirs.mean).square() * SLACK
    found = [_nearest(ours, row, theirs, bounds[row], k) for row in range(len(ours.counts))]
    squared = torch.tensor([[cost for cost, _ in best] for best in found], dtype=torch.float64).view(-1, k)
    index = torch.tensor([[column for _, column in best] for best in found], dtype=torch.long).view(-1, k)
    return Neighbours(_as_distance(squared, latents, corpus), index.to(latents.device))


def _nearest(ours: _Points, row: int, theirs: _Points, bounds: Tensor, k: int) -> list[tuple[float, int]]:
    """Squared distances and positions of one latent's nearest, in order. ``bounds`` ``(M,)`` are lower bounds."""
    best: list[tuple[float, int]] = []
    for block in bounds.argsort(stable=True).split(BLOCK):
        worst = best[k - 1][0] if len(best) >= k else math.inf
        columns: list[int] = block[bounds[block] < worst].tolist()
        if not columns:
            break
        costs = _costs(ours, row, theirs, columns)
        relaxed = _relaxed(ours, row, theirs, columns, costs) * SLACK
        order: list[int] = relaxed.argsort(stable=True).tolist()
        for i in order:
            worst = best[k - 1][0] if len(best) >= k else math.inf
            if float(relaxed[i]) >= worst:
                break
            bisect.insort(best, (_transported(ours, row, theirs, columns[i], costs[i]), columns[i]))
    return best[:k]


@torch.no_grad()
def _points_of(first: NvibLatents, second: NvibLatents) -> tuple[_Points, _Points]:
    """Both batches as points that can be compared."""
    if first.z.shape[-1] != second.z.shape[-1]:
        raise ValueError(
            f"The latents are {first.z.shape[-1]} and {second.z.shape[-1]} wide: they come from different models."
        )
    mixture = first.logvar is not None or second.logvar is not None
    both = []
    for latents in (first.detach().compact(), second.detach().compact()):
        latents = pad_latents(latents, latents.z.shape[1], with_logvar=mixture).to("cpu")
        keep = latents.log_pi > -math.inf
        if not keep.any(-1).all():
            raise ValueError("A latent has no vector left: all its log_pi are -inf. Leave at least one vector.")
        logvar = None if latents.logvar is None else latents.logvar.double()
        points = gaussian_points(latents.z.double(), logvar).masked_fill(~keep[..., None], 0)
        if not points.isfinite().all():
            raise ValueError("The vectors of a latent must be finite, but some are infinite or NaN.")
        order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
        points = points.take_along_dim(order[..., None], dim=1)
        weights = latents.log_pi.double().softmax(-1).take_along_dim(order, dim=1)
        counts: list[int] = keep.sum(-1).tolist()
        both.append(_Points(points, weights, counts, (weights[..., None] * points).sum(1)))
    return both[0], both[1]


def _costs(ours: _Points, row: int, theirs: _Points, columns: list[int]) -> Tensor:
    """Squared distances of one latent's points to the points of others, ``(len(columns), n, L)``."""
    own = ours.points[row, : ours.counts[row]]
    others = theirs.points[columns]
    squared = torch.cdist(own, others.flatten(0, 1)).square()
    by_latent: Tensor = squared.unflatten(1, others.shape[:2])
    return by_latent.transpose(0, 1)


def _relaxed(ours: _Points, row: int, theirs: _Points, columns: list[int], costs: Tensor) -> Tensor:
    """The second bound, ``(len(columns),)``: what it costs to move every point to its nearest."""
    weights = theirs.weights[columns]
    there = costs.masked_fill((weights == 0)[:, None], math.inf).amin(-1) @ ours.weights[row, : ours.counts[row]]
    back = (costs.amin(1) * weights).sum(-1)
    return torch.maximum(there, back)


def _transported(ours: _Points, row: int, theirs: _Points, column: int, costs: Tensor) -> float:
    """The cost of a pair's cheapest plan. ``costs`` ``(n, L)`` are between its points."""
    n, m = ours.counts[row], theirs.counts[column]
    cost, a, b = costs[:, :m], ours.weights[row, :n], theirs.weights[column, :m]
    if n == 1 or m == 1:  # there is only one plan
        return float(a @ cost @ b)
    cost = cost.contiguous()
    plan = torch.from_numpy(pot().emd(a.numpy(), b.numpy(), cost.numpy(), numItermax=MAX_ITERATIONS))
    return float((plan * cost).sum())


def _as_distance(squared: Tensor, first: NvibLatents, second: NvibLatents) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(first.z.dtype, second.z.dtype), torch.float32)
    return squared.clamp(min=0).sqrt().to(first.device, dtype)
