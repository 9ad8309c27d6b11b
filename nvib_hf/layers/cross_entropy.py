r"""Cross-entropy in single precision for logits in any precision, a few tokens at a time.

Logits are the largest tensor of a training step. To convert all logits from half precision would cost a copy in single
precision, another for the softmax and a third for its gradient. So a few tokens' logits are converted at a time, and
the gradient is written in the logits' own precision.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .denoising_attention import at_least_float32

IGNORED = -100  # the label of a position that is not a target

# Logits at a time. On a CPU as many as stay in its cache; elsewhere 64 MiB, because kernels have to be launched.
AT_A_TIME = {"cpu": 2**20}
AT_A_TIME_ELSEWHERE = 2**24


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Sum over tokens, in nats, in fp32 (fp64 for logits in fp64).

    .. math::
        \sum_t \Bigl( \log \sum_v e^{x_{tv}} - (1 - \epsilon) x_{t y_t} - \frac{\epsilon}{V} \sum_v x_{tv} \Bigr)

    Args:
        logits: ``x``, ``(N, V)``.
        labels: ``y``, ``(N,)``; -100 is ignored.
        label_smoothing: :math:`\epsilon`, in [0, 1].
    """
    if torch.compiler.is_compiling():  # the compiler fuses the copies away, but would unroll a loop
        return _sum_of_rows(at_least_float32(logits), labels, label_smoothing=label_smoothing)
    total: Tensor = _CrossEntropy.apply(logits, labels, label_smoothing)
    return total


_sum_of_rows = functools.partial(F.cross_entropy, ignore_index=IGNORED, reduction="sum")


def _gradient(logits: Tensor, labels: Tensor, weight: Tensor, smoothing: float) -> Tensor:
    """Gradient of the sum by the logits, for labels ``(N, 1)`` and weights of tokens ``(N, 1)``."""
    p = at_least_float32(logits).softmax(-1)
    target = p.new_full((1, 1), smoothing - 1).expand_as(labels)
    return weight * (p.scatter_add(1, labels, target) - smoothing / p.shape[1])


class _Context(Protocol):
    """What the forward pass leaves for the backward pass."""

    smoothing: float
    saved_tensors: tuple[Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _CrossEntropy(torch.autograd.Function):
    """The sum, with a backward that computes the softmax again, a few tokens at a time, instead of keeping it.

    Time of forward and backward for 512 x 50265 logits on one CPU core, and peak memory without the logits:

        bfloat16           float32
         62 ms,  87 MiB     70 ms, 133 MiB   this
        124 ms, 297 MiB    125 ms, 296 MiB   F.cross_entropy of logits.float()
         53 ms, 181 MiB     50 ms, 219 MiB   the loop over rows with autograd's own backward
         93 ms, 160 MiB    140 ms, 269 MiB   the same with checkpointing

    Like autograd's own backward it has a rule for ``vmap``, which ``torch.func`` needs for the gradients of single
    examples, and a second derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        rows = max(1, AT_A_TIME.get(logits.device.type, AT_A_TIME_ELSEWHERE) // logits.shape[1])
        parts = zip(logits.split(rows), labels.split(rows), strict=True)
        sums = [_sum_of_rows(at_least_float32(x), y, label_smoothing=smoothing) for x, y in parts]
        return torch.stack(sums).sum()

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        logits, labels, ctx.smoothing = inputs
        ctx.save_for_backward(logits, labels)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        counted = (labels != IGNORED)[:, None]
        labels, weight = labels[:, None].masked_fill(~counted, 0), counted * gradient
        if torch.is_grad_enabled():  # for a second derivative
            return _gradient(logits, labels, weight, ctx.smoothing).to(logits.dtype), None, None
        result = torch.empty_like(logits)
        rows = max(1, AT_A_TIME.get(logits.device.type, AT_A_TIME_ELSEWHERE) // logits.shape[1])
        for into, x, y, w in zip(*(t.split(rows) for t in (result, logits, labels, weight)), strict=True):
            into.copy_(_gradient(x, y, w, ctx.smoothing))
        return result, None, None
