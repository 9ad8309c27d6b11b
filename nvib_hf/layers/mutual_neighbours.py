"""Which vectors merging puts together: groups that grow by the pairs of mutually nearest vectors.

:mod:`nvib_hf.layers.merging` says what they are replaced by, and what a pair costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .denoising_attention import at_least_float32, without_autocast

# Neighbours are at most so many places apart. Some encoders write silence in kinds of vectors that take turns, which
# a reach of 1 cannot merge: Whisper base then spends most of its vectors there, and lacks them where somebody speaks.
REACH = 4
# In a round, costs within one step of their logarithm count as equal, and a pseudo-random number of each pair decides
# between equal costs. Otherwise, on a slope or among equal vectors, each pair would wait a round for its neighbour.
STEP = 0.03
LOWEST = -1000.0  # logarithm of the cost of equal vectors; below it fp32 would round the pseudo-random number away
ROUNDING = 16  # error of a distance computed from products, in units of the norms' last place
CACHED = 512  # vectors whose distances are computed at a time: they stay in a processor's cache
SPREAD = (0.754878, 0.863156)  # irrational; their sum, the golden ratio's, scatters neighbours best


def assigned(
    z: Tensor,
    log_mass: Tensor,
    present: Tensor,
    mergeable: Tensor,
    fewest: Tensor,
    highest_cost: Tensor,
    order: str,
) -> Tensor:
    """``Merged.assignment``: groups of mergeable vectors; a fixed vector is a group of its own."""
    count = mergeable.sum(-1)
    first = _to_the_front(mergeable)
    there = mergeable.gather(1, first)
    vectors = _rows(at_least_float32(z), first).masked_fill(~there[..., None], 0)
    mass = log_mass.to(vectors.dtype).gather(1, first).masked_fill(~there, float("-inf"))
    mean_mass = mass.logsumexp(-1, keepdim=True) - count[:, None].log()
    mass = torch.where(there, mass - mean_mass, 0.0)
    labels = _groups(vectors, mass, count, fewest, highest_cost, order)

    # A group has the position of its first vector: labels rise from one such vector to the next.
    labels = labels.masked_fill(~there, -1)
    highest = F.pad(labels, (1, 0), value=-1).cummax(-1).values[:, :-1]
    leads = torch.zeros_like(present).scatter(1, first, labels > highest) | (present & ~mergeable)
    place = leads.cumsum(-1) - 1  # of each vector that leads
    of_group = torch.zeros_like(place).scatter_reduce(
        1, labels.clamp(min=0), place.gather(1, first).masked_fill(labels <= highest, 0), "amax"
    )
    merged_into = place.scatter(1, first, of_group.gather(1, labels.clamp(min=0)))
    return torch.where(mergeable, merged_into, place).masked_fill(~present, -1)


def _groups(z: Tensor, log_mass: Tensor, count: Tensor, fewest: Tensor, highest_cost: Tensor, order: str) -> Tensor:
    """The groups ``(B, M)`` of each example's first ``count`` vectors, numbered by the groups' first vectors."""
    nearest = _nearest_neighbours if order == "neighbours" else _nearest_of_any
    labels = torch.arange(z.shape[1], device=z.device).expand(log_mass.shape)
    while z.shape[1] > 1:
        position = torch.arange(z.shape[1], device=z.device)
        present = position < count[:, None]
        key, partner, log_cost = nearest(z, log_mass, present, highest_cost[:, None])
        in_order = key.argsort(dim=-1, stable=True)
        rank = torch.empty_like(in_order).scatter_(1, in_order, position.expand_as(in_order))
        # The pair with the lowest key is always mutually nearest. So each round merges a pair, if any pair may merge.
        mutual = (partner.gather(1, partner) == position) & key.isfinite()
        # If few may merge, the pairs that come before all others: silence merges far before words do.
        allowed = (rank < (count - fewest)[:, None]) & (log_cost <= highest_cost[:, None])
        first = mutual & allowed & (position < partner)
        if not first.any():
            break
        second = mutual & first.gather(1, partner) & (position > partner)
        left = present & ~second
        index = (left.cumsum(-1) - 1).clamp(min=0)
        index = torch.where(second, index.gather(1, partner), index)
        labels = index.gather(1, labels)
        order_left = _to_the_front(left)
        of_partner = log_mass.gather(1, partner)
        example, place = first.nonzero(as_tuple=True)
        other = partner[example, place]
        weight = torch.sigmoid(of_partner - log_mass)[example, place]
        mean = torch.lerp(z[example, place], z[example, other], weight[:, None])
        z = _rows(z, order_left)
        z[example, index[example, place]] = mean
        log_mass = torch.where(first, torch.logaddexp(log_mass, of_partner), log_mass).gather(1, order_left)
        count = left.sum(-1)
    return labels


def _to_the_front(keep: Tensor) -> Tensor:
    """Positions ``(B, L)`` of kept vectors in order, then of others. ``L`` is the most that any example keeps."""
    return (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, : int(keep.sum(-1).max())]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b]]``: ``(B, N, P)`` and ``(B, K)`` to ``(B, K, P)``."""
    start = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + start).flatten()).view(*index.shape, x.shape[-1])


def _log_cost(squared_distance: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The logarithm of the cost of pairs, by the log masses of both; ``-inf`` for equal vectors."""
    half_harmonic_mean = -torch.logaddexp(-first, -second)
    return squared_distance.log() + (half_harmonic_mean + math.log(2)).clamp(max=0)


def _key(log_cost: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The number that pairs are compared by: the cost in steps, plus a pseudo-random fraction of the two positions."""
    scattered = (SPREAD[0] * first + SPREAD[1] * second) % 1
    return (log_cost.clamp(min=LOWEST) / STEP).floor() + scattered


def _nearest_neighbours(
    z: Tensor, log_mass: Tensor, present: Tensor, highest_cost: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of the vectors at most ``REACH`` places away, in the form of ``_nearest_of_any``."""
    batch, length = log_mass.shape
    reach, position = min(REACH, length - 1), torch.arange(length, device=z.device)
    distance = _distances_after(z, reach)
    mass_after = F.pad(log_mass, (0, reach)).unfold(-1, length, 1)[:, 1:]
    present_after = F.pad(present, (0, reach)).unfold(-1, length, 1)[:, 1:]
    log_cost = _log_cost(distance.square_(), log_mass[:, None], mass_after)
    away = torch.arange(1, reach + 1, device=z.device)
    key = _key(log_cost, position, position + away[:, None])
    key = key.masked_fill(~present_after | (log_cost > highest_cost[:, None]), float("inf"))

    # The same pairs as their later vectors see them: row ``away`` moves so many places on.
    padded = F.pad(torch.stack([key, log_cost]), (reach, 0), value=float("inf"))
    strides = (*padded.stride()[:2], padded.shape[-1] - 1, 1)
    before = padded.as_strided((2, batch, reach, length), strides, reach - 1)
    key, which = torch.cat([key, before[0]], dim=1).min(1)
    log_cost = torch.cat([log_cost, before[1]], dim=1).gather(1, which[:, None])[:, 0]
    return key, (position + torch.cat([away, -away])[which]).clamp(0, length - 1), log_cost


def _distances_after(z: Tensor, reach: int) -> Tensor:
    """The distance of each vector to those 1, ..., ``reach`` places after it, ``(B, reach, L)``; 0 past the end."""
    length = z.shape[1]
    distance = z.new_zeros(len(z), reach, length)
    for start in range(0, length, step := max(CACHED // len(z), 1)):
        for apart in range(1, reach + 1):
            end = max(min(start + step, length - apart), start)
            difference = z[:, start + apart : end + apart] - z[:, start:end]
            distance[:, apart - 1, start:end] = torch.linalg.vector_norm(difference, dim=-1)
    return distance


def _nearest_of_any(
    z: Tensor, log_mass: Tensor, present: Tensor, highest_cost: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest other of each vector: its key (``inf`` if there is none), its position, and the log of its cost.

    The key is symmetric, so that two vectors can be mutually nearest. If keys are equal, the lower position wins. A
    vector that costs more than ``highest_cost`` ``(B, 1)`` is no partner: it could block a pair that costs less.
    """
    position = torch.arange(z.shape[1], device=z.device)
    centred = z - z.mean(1, keepdim=True)  # products have errors of the norms' size
    with without_autocast(z.device):
        products = centred @ centred.transpose(1, 2)
    norms = products.diagonal(dim1=1, dim2=2)
    both = norms[:, :, None] + norms[:, None]
    distance = (both - products - products.transpose(1, 2)).clamp(min=0)
    log_cost = _log_cost(distance, log_mass[:, :, None], log_mass[:, None])
    keys = _key(
        log_cost,
        torch.minimum(position[:, None], position),
        torch.maximum(position[:, None], position),
    )
    other = present[:, :, None] & present[:, None] & (position[:, None] != position)
    # Products cannot resolve costs below a limit. There the exact cost decides, computed for the partner only.
    resolved = distance > ROUNDING * torch.finfo(z.dtype).eps * both
    other &= ~(resolved & (log_cost > highest_cost[:, :, None]))
    key, partner = keys.masked_fill(~other, float("inf")).min(-1)
    exact = torch.linalg.vector_norm(z - _rows(z, partner), dim=-1).square()
    return key, partner, _log_cost(exact, log_mass, log_mass.gather(1, partner))
