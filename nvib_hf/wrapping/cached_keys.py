"""What attention has to know of a key beside it, as further channels of the key in a base's cache.

A cache has keys and values and nothing else: whatever is done to them (beams change places, rows are repeated or
selected, all of it goes to another device, or comes back as a tuple) is done to these channels too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.denoising_attention import HALF_PRECISION, three_summands

ALIGNED = 8  # widths are multiples of it where a kernel reads keys as a slice


def carried(key: Tensor, bias: Tensor, shrinkage: Tensor | None, multiple_of: int = 1) -> Tensor:
    """Keys ``(B, H, N, E)`` with what belongs to them in further channels.

    First the bias ``(B, N)``, in half precision as three summands that it does not round; then of the shrinkage
    ``(B, N, P)`` a slice for each head; then zeros, up to a width that is a multiple of ``multiple_of``.
    """
    heads = key.shape[1]
    channels = three_summands(bias, shift=False) if key.dtype in HALF_PRECISION else bias[..., None]
    channels = channels.clamp(min=torch.finfo(key.dtype).min).to(key.dtype)
    parts = [key, channels[:, None].expand(-1, heads, -1, -1)]
    if shrinkage is not None:
        missing = -shrinkage.shape[-1] % heads
        shrinkage = F.pad(shrinkage, (0, missing)).unflatten(-1, (heads, -1)).transpose(1, 2)
        parts.append(shrinkage.to(key.dtype))  # under autocast its own may be wider, and would be that of all channels
    wide = torch.cat(parts, dim=-1)
    return F.pad(wide, (0, -wide.shape[-1] % multiple_of))


def separated(wide: Tensor, width: int, size: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys of ``width``, bias and shrinkage (of ``size`` ``P``, ``None`` for none) of what :func:`carried` made."""
    beyond = width + (3 if wide.dtype in HALF_PRECISION else 1)
    bias = wide[:, 0, :, width:beyond]
    bias = (bias.float() if bias.dtype in HALF_PRECISION else bias).sum(-1)
    shrinkage = None
    if size is not None:
        heads = wide.shape[1]
        slices = wide[..., beyond : beyond + (size + heads - 1) // heads]  # of each head
        shrinkage = slices.transpose(1, 2).flatten(2)[..., :size]
    return wide[..., :width], bias, shrinkage
