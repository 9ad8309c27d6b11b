"""Clusters of vectors: k-means, and the Gaussian of each cluster."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 8192  # vectors whose distances to all centres are held at once


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """The index of the nearest centre ``(K, P)`` to each of the vectors ``(N, P)``: ``(N,)``."""
    half_norms = 0.5 * centres.square().sum(-1)
    return torch.cat([(half_norms - part @ centres.T).argmin(-1) for part in vectors.split(CHUNK)])


def k_means(vectors: Tensor, num_codes: int, iterations: int = 15, generator: torch.Generator | None = None) -> Tensor:
    r"""Centres ``(K, P)`` that have a small mean squared distance to their nearest vectors ``(N, P)``.

    The first centres are drawn as k-means++ draws them, each with a chance in proportion to the squared distance to
    those before it, so that rare but distant vectors have one too. A centre that loses all its vectors stays.

    Raises:
        ValueError: fewer vectors than centres.

    Source: Arthur & Vassilvitskii (SODA 2007), k-means++.
    """
    if len(vectors) < num_codes:
        raise ValueError(f"num_codes is {num_codes}, but there are only {len(vectors)} vectors to cluster.")
    chance = {"generator": generator, "device": vectors.device}
    few = vectors[torch.randperm(len(vectors), **chance)[: max(20 * num_codes, 1000)]]
    centres = vectors.new_empty(num_codes, vectors.shape[-1])
    norms, distance = few.square().sum(-1), torch.ones_like(few[:, 0])
    for k in range(num_codes):
        if not distance.any():  # fewer different vectors than centres
            distance = torch.ones_like(distance)
        chosen = few[torch.multinomial(distance, 1, generator=generator)[0]]
        centres[k] = chosen
        to_chosen = (norms + chosen.square().sum() - 2 * few @ chosen).clamp(min=0)
        distance = to_chosen if k == 0 else torch.minimum(distance, to_chosen)
    for _ in range(iterations):
        codes = nearest(vectors, centres)
        sums, counts = sums_by_code(vectors, codes, num_codes)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


def sums_by_code(values: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sums ``(K, P)`` of the values ``(N, P)`` of each code, and how many there are, ``(K,)``."""
    sums = values.new_zeros(num_codes, values.shape[-1]).index_add_(0, codes, values)
    return sums, values.new_zeros(num_codes).index_add_(0, codes, torch.ones_like(values[:, 0]))
