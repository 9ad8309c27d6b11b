"""Cross-entropy in single precision, of logits in any.

Logits are the largest tensor of a training step. Converted as a whole, those in half precision would cost a copy in
single precision, one more for their softmax and a third for its gradient. Here a few rows at a time are, few enough
to stay in a processor's cache, and the gradient is written in the logits' own precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .denoising_attention import at_least_float32

IGNORED = -100
# Logits in single precision at a time: few for a CPU's cache, many where each further kernel has to be launched.
AT_A_TIME = {"cpu": 2**20}
AT_A_TIME_ELSEWHERE = 2**26


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Sum over tokens, in nats, in fp32 (fp64 for logits in fp64).

    .. math::
        \sum_t \Bigl( \log \sum_v e^{x_{tv}} - (1 - \epsilon) x_{t y_t} - \frac{\epsilon}{V} \sum_v x_{tv} \Bigr)

    Args:
        logits: ``x``, ``(N, V)``.
        labels: ``y``, ``(N,)``; -100 is ignored.
        label_smoothing: :math:`\epsilon`, in [0, 1].
    """
    if torch.compiler.is_compiling():  # which makes no copies where it fuses, but would unroll a loop over rows
        return _whole(logits, labels, label_smoothing)
    return _CrossEntropy.apply(logits, labels, label_smoothing)


def _whole(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(
        at_least_float32(logits), labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.smoothing = smoothing
        ctx.rows = max(1, AT_A_TIME.get(logits.device.type, AT_A_TIME_ELSEWHERE) // logits.shape[1])
        parts = zip(logits.split(ctx.rows), labels.split(ctx.rows), strict=True)
        return torch.stack([_whole(x, y, smoothing) for x, y in parts]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        counted = (labels != IGNORED)[:, None]
        labels, weight = labels[:, None].masked_fill(~counted, 0), counted * gradient
        result = torch.empty_like(logits)
        for start in range(0, len(logits), ctx.rows):
            part = slice(start, start + ctx.rows)
            p = at_least_float32(logits[part]).softmax(-1)
            if ctx.smoothing:
                p -= ctx.smoothing / p.shape[1]
            p.scatter_add_(1, labels[part], p.new_full((len(p), 1), ctx.smoothing - 1))
            result[part] = p.mul_(weight[part])
        return result, None, None
