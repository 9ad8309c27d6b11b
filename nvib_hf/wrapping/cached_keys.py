"""What else attention needs for a key, as further channels of the key in a base's cache.

A cache has only keys and values. Whatever happens to them happens to these channels too: beams change places, examples
are repeated or selected, the cache moves to another device or comes back as a tuple.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.denoising_attention import HALF_PRECISION, three_summands

ALIGNED = 8  # widths are multiples of it if a kernel reads keys as a slice


def carried(key: Tensor, bias: Tensor, shrinkage: Tensor | None, multiple_of: int = 1) -> Tensor:
    """Keys ``(B, H, N, E)`` with further channels for bias and shrinkage.

    First comes the bias ``(B, N)``; in half precision it is split into three summands, so that it is not rounded. Then
    each head gets a slice of the shrinkage ``(B, N, P)``. Then zeros fill up the width to a multiple of
    ``multiple_of``.
    """
    heads = key.shape[1]
    channels = three_summands(bias, shift=False) if key.dtype in HALF_PRECISION else bias[..., None]
    channels = channels.clamp(min=torch.finfo(key.dtype).min).to(key.dtype)
    parts = [key, channels[:, None].expand(-1, heads, -1, -1)]
    if shrinkage is not None:
        missing = -shrinkage.shape[-1] % heads
        shrinkage = F.pad(shrinkage, (0, missing)).unflatten(-1, (heads, -1)).transpose(1, 2)
        parts.append(
            shrinkage.to(key.dtype)
        )  # under autocast its dtype may be wider, and cat would widen all channels
    wide = torch.cat(parts, dim=-1)
    return F.pad(wide, (0, -wide.shape[-1] % multiple_of))


def separated(wide: Tensor, width: int, size: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of :func:`carried`: keys of ``width``, bias, and shrinkage of ``size`` ``P`` (``None`` for none)."""
    beyond = width + (3 if wide.dtype in HALF_PRECISION else 1)
    bias = wide[:, 0, :, width:beyond]
    bias = (bias.float() if bias.dtype in HALF_PRECISION else bias).sum(-1)
    shrinkage = None
    if size is not None:
        heads = wide.shape[1]
        slices = wide[..., beyond : beyond + (size + heads - 1) // heads]  # of each head
        shrinkage = slices.transpose(1, 2).flatten(2)[..., :size]
    return wide[..., :width], bias, shrinkage
