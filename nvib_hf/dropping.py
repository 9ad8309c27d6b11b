r"""Which vectors are kept: a threshold under the pseudo-counts, and the relaxation that trains it.

Source: the threshold, Behjati, Fehr & Henderson (Findings of EMNLP 2023); the share of examples and the relaxed share
of vectors are this project's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .distributions import noise

# What stands for log(0), finite so that a pseudo-count of 0 has a gradient; fp32 holds exp(-69) and its inverse.
LOG_ZERO = -69.0
# The slope of `relu_log_alpha` below 0, in its gradient alone.
LEAK = 0.1


def relu_log_alpha(activation: Tensor) -> Tensor:
    r""":math:`\log \alpha` of :math:`\alpha = \mathrm{relu}(a)`, ``LOG_ZERO`` where it is 0, with a gradient there.

    A plain relu would leave a vector dead for good: neither the KLs nor the reconstruction reach its activation.
    Here :math:`d\alpha / da` is ``LEAK`` below 0, so :math:`KL_D` revives vectors while the total pseudo-count is
    below the prior's, and the value stays exact.
    """
    smallest = math.exp(LOG_ZERO)
    dead = LOG_ZERO + (LEAK / smallest) * (activation - activation.detach())
    return torch.where(activation > smallest, activation.clamp(min=smallest).log(), dead)


def kept(log_alpha: Tensor, threshold: float, share: Tensor | float, log_zero: float = -math.inf) -> Tensor:
    """Whether a component's pseudo-count is above ``threshold``, shaped as ``log_alpha``.

    Args:
        log_alpha: log pseudo-counts, any shape.
        threshold: 0 keeps whatever has a weight at all.
        share: of the training examples in which the threshold drops; at 0 it is off.
        log_zero: what stands for the logarithm of a pseudo-count of 0.
    """
    weighty = log_alpha > log_zero
    if threshold == 0:
        return weighty
    return weighty & ((log_alpha > math.log(threshold)) | (share <= 0))


def kept_first(keep: Tensor) -> Tensor | None:
    """Positions ``(B, L)`` of what is kept, in order, for the largest number ``L`` kept in a row of ``(B, N)``.

    Rows that keep fewer are filled up with what they do not keep. ``None`` where ``L`` is ``N``. Reads a length from
    the device.
    """
    length = int(keep.sum(-1).max())
    if length == keep.shape[1]:
        return None
    return (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, :length]


def spared_examples(log_alpha: Tensor, share: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws in which examples of a training batch ``(B, Nl)`` the threshold drops nothing, ``(B, 1)``."""
    draws = noise(torch.rand, log_alpha[:, :1], generator)
    return draws >= share.to(log_alpha.device)


def relaxed_share(log_alpha: Tensor, mask: Tensor, threshold: float) -> Tensor:
    r"""A differentiable stand-in for the share of vectors above the threshold :math:`t`, ``(B,)``.

    .. math::
        \frac1{N_s} \sum_i \frac{\alpha_i}{\alpha_i + t} = \frac1{N_s} \sum_i \mathrm{sigmoid}(\log\alpha_i - \log t)

    which is the share itself once every pseudo-count is far above or far below the threshold.

    Args:
        log_alpha, mask: of the source vectors, ``(B, Ns)``; True = a vector.
        threshold: ``t``, above 0.
    """
    share = torch.sigmoid(log_alpha - math.log(threshold)).masked_fill(~mask, 0)
    return share.sum(-1) / mask.sum(-1).clamp(min=1)
