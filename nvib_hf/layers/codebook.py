"""Clusters of vectors: k-means, from starts that find rare clusters as well as frequent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .denoising_attention import without_autocast

CHUNK = 8192  # vectors whose distances to all centres are held at once
STEPS, SURPLUS = 32, 1.5  # in which starts are drawn, and how many are drawn for one that stays


def half_distances(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    r"""Half the squared distance of each vector to its nearest centre, less :math:`\lVert x \rVert^2 / 2`, and which.

    ``(N,)`` each, of vectors ``(N, P)`` and centres ``(K, P)``.
    """
    half_norms = 0.5 * centres.square().sum(-1)
    with without_autocast(vectors.device):  # in half precision, centres lie too close to be told apart
        found = [(half_norms - part @ centres.T).min(-1) for part in vectors.split(CHUNK)]
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """The index of the nearest centre ``(K, P)`` to each of the vectors ``(N, P)``: ``(N,)``."""
    return half_distances(vectors, centres)[1]


def spread_starts(vectors: Tensor, num_codes: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Vectors ``(K, P)`` of the ``(N, P)`` that lie far apart, so that clusters have one of them however rare.

    Some at a time are drawn with a chance of :math:`d^4`, the distance to the nearest of those before (k-means++ takes
    :math:`d^2`, which many vectors near the centre of a cluster outweigh), half as many again as are asked for; of
    these, one after another, the farthest from all that are kept.
    """
    half_norms = 0.5 * vectors.square().sum(-1)
    distances, drawn, wanted = torch.ones_like(half_norms), [], min(int(SURPLUS * num_codes), len(vectors))
    while wanted:
        open_ones = int((distances > 0).sum())
        if not open_ones:  # fewer different vectors than codes
            distances, open_ones = torch.ones_like(distances), len(distances)
        count = min(max(int(SURPLUS * num_codes) // STEPS, 1), wanted, open_ones)
        chosen = vectors[torch.multinomial((distances / distances.max()).square(), count, generator=generator)]
        drawn.append(chosen)
        wanted -= count
        to_chosen = (half_norms + half_distances(vectors, chosen)[0]).clamp(min=0)
        distances = to_chosen if len(drawn) == 1 else torch.minimum(distances, to_chosen)
    starts = torch.cat(drawn)
    kept = [int(torch.randint(len(starts), (1,), generator=generator, device=vectors.device))]
    distances = torch.full_like(starts[:, 0], float("inf"))
    while len(kept) < num_codes:
        distances = torch.minimum(distances, (starts - starts[kept[-1]]).square().sum(-1))
        kept.append(int(distances.argmax()))
    return starts[kept]


def k_means(vectors: Tensor, num_codes: int, iterations: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Centres ``(K, P)`` of vectors ``(N, P)``: :func:`spread_starts`, then the mean of what is nearest to each.

    A centre that loses all its vectors stays.

    Raises:
        ValueError: fewer vectors than centres.
    """
    if len(vectors) < num_codes:
        raise ValueError(
            f"num_codes is {num_codes}, but there are only {len(vectors)} vectors to cluster. Pass more, or take "
            "fewer codes."
        )
    centres = spread_starts(vectors, num_codes, generator)
    for _ in range(iterations):
        centres = moved_to_means(centres, vectors, nearest(vectors, centres))
    return centres


def moved_to_means(centres: Tensor, vectors: Tensor, codes: Tensor) -> Tensor:
    """Each centre at the mean of the vectors of its code; where it was if there are none."""
    sums, counts = sums_by_code(vectors, codes, len(centres))
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)


def sums_by_code(values: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sums ``(K, P)`` of the values ``(N, P)`` of each code, and how many there are, ``(K,)``."""
    sums = values.new_zeros(num_codes, values.shape[-1]).index_add_(0, codes, values)
    return sums, values.new_zeros(num_codes).index_add_(0, codes, torch.ones_like(values[:, 0]))


def shrunk_variances(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean squares ``(K, P)`` of codes from their sums ``(K, P)`` over ``counts (K,)`` vectors each.

    As if each code had 10 further vectors like all others.
    """
    pooled = (sums.sum(0) / counts.sum()).clamp(min=1e-6)
    return (sums + 10 * pooled) / (counts[:, None] + 10)
