"""The codes that fit vectors best where a prior of sequences has its say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .latent_prior import LatentPrior

BEAMS = 4


@torch.no_grad()
def best_codes(prior: LatentPrior, fit: Tensor, lengths: Tensor, strength: float, beams: int = BEAMS) -> Tensor:
    r"""The codes ``(B, n)`` of the highest sum over each row that a beam search finds.

    .. math:: \sum_{i=1}^n \gamma \log p(k_i \mid k_{<i}, n) + f_{i k_i}

    Args:
        prior: of the codes; its dropout should be off.
        fit: :math:`f`, ``(B, n, K)``.
        lengths: ``(B,)``; what follows a row's end counts for nothing.
        strength: :math:`\gamma`.
        beams: how many beginnings of each row are kept; with as many as there are sequences the search is exact.
    """
    batch, n, num_codes = fit.shape
    cache = prior.transformer.empty_cache()
    before = torch.full((batch, 1), num_codes, device=fit.device)
    totals, codes = fit.new_zeros(batch, 1), before[:, :, None][..., :0]  # of the beams: (B, S), (B, S, i)
    rows = torch.arange(batch, device=fit.device)[:, None]
    only_first = F.one_hot(torch.zeros((), dtype=torch.long, device=fit.device), num_codes).log().to(fit)
    for i in range(n):
        width = before.shape[1]
        log_chances = prior.next_log_chances(before.flatten(), i, lengths.repeat_interleave(width), cache)
        gain = strength * log_chances.view(batch, width, num_codes) + fit[:, None, i]
        gain = torch.where((i < lengths)[:, None, None], gain, only_first)  # ended: one way on, which is free
        totals, best = (totals[..., None] + gain).flatten(1).topk(min(beams, width * num_codes))  # (B, S')
        parent, before = best // num_codes, best % num_codes
        codes = torch.cat([codes.take_along_dim(parent[..., None], dim=1), before[..., None]], dim=-1)
        kept = (rows * width + parent).flatten()
        cache[:] = [None if read is None else (read[0][kept], read[1][kept]) for read in cache]
    return codes[:, 0]


def gaussian_fit(vectors: Tensor, centres: Tensor, variance: Tensor) -> Tensor:
    r"""How well each centre explains each vector, ``(..., K)``: :math:`-\tfrac12 \lVert x - c_k \rVert^2` in units of
    the variance ``(P,)`` of each channel, of vectors ``(..., P)`` and centres ``(K, P)``.
    """
    scaled = centres / variance
    return vectors @ scaled.T - 0.5 * (vectors.square() @ (1 / variance))[..., None] - 0.5 * (centres * scaled).sum(-1)
