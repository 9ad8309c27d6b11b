r"""A latent packed for its way through a decoder, and unpacked in each cross-attention.

The only tensor that reaches every cross-attention of every architecture is ``encoder_hidden_states``. What
attention reads of a latent therefore travels as its last axis:

    [ vectors (P) | bias (3, padded to 8) ]                       points: a sample, or the means
    [ vectors (P) | shrinkage (P) | bias (3, padded to 8) ]       a mixture of Gaussians

The bias is split in three summands that a cast to half precision does not round, so the packed tensor can have
the model's dtype and survives autocast and mixed-precision wrappers. The channel after them is 1 where a draw in
training dropped a vector, and carries the gradient of that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .denoising_attention import AttendedLatent, split_bias

BIAS_WIDTH = 8  # three channels, or four, padded so that the packed rows stay aligned


def pack(latent: AttendedLatent) -> Tensor:
    """One tensor ``(B, Nl, P + 8)``, or ``(B, Nl, 2 P + 8)`` with shrinkage, in the vectors' dtype."""
    dtype = latent.vectors.dtype
    channels = split_bias(latent.bias)
    if latent.dropped is not None:
        channels = torch.cat([channels, latent.dropped[..., None].to(channels.dtype)], dim=-1)
    bias = F.pad(channels, (0, BIAS_WIDTH - channels.shape[-1])).to(dtype)
    parts = [latent.vectors, bias] if latent.shrinkage is None else [latent.vectors, latent.shrinkage, bias]
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, width: int, dropped: bool = False) -> AttendedLatent:
    """What :func:`pack` was given, for latent vectors of ``width`` ``P``; with ``dropped``, that is read too.

    Raises:
        ValueError: the last axis is neither ``P + 8`` nor ``2 P + 8``.
    """
    size = packed.shape[-1]
    if size not in (width + BIAS_WIDTH, 2 * width + BIAS_WIDTH):
        raise ValueError(
            f"The decoder of an NVIB model reads latents, but encoder_hidden_states is {size} wide where a latent "
            f"of this model is {width + BIAS_WIDTH} or {2 * width + BIAS_WIDTH}. Pass the model's inputs, or "
            "encoder_outputs from encode(), sample_latents() or interpolate_latents() of this model."
        )
    three = packed[..., -BIAS_WIDTH : -BIAS_WIDTH + 3]
    bias = (three if three.dtype == torch.float64 else three.float()).sum(-1)
    shrinkage = None if size == width + BIAS_WIDTH else packed[..., width : 2 * width]
    mark = packed[..., -BIAS_WIDTH + 3] if dropped else None
    return AttendedLatent(packed[..., :width], bias, shrinkage, mark)
