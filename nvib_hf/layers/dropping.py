r"""Which vectors are kept: a threshold for the pseudo-counts or a learned decision, and how training moves them.

Both are a keep logit, above 0 for a vector to keep.

Source: the threshold, Behjati, Fehr & Henderson (Findings of EMNLP 2023); the learned decision, the share of examples
and the relaxed share of vectors are this project's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .distributions import Posterior, log_dirichlet_sample, noise
from .exporting import is_exporting

# Replaces log(0). It is finite, so that a pseudo-count of 0 has a gradient; fp32 holds exp(-69) and its inverse.
LOG_ZERO = -69.0

# The slope of `relu_log_alpha` below 0, in the gradient only.
LEAK = 0.1

# For a learned decision: the logit of every vector at the start, which keeps 95 % of the draws, and the temperature of
# its relaxation.
KEEP_BIAS = 3.0

TEMPERATURE = 0.3


def relu_log_alpha(activation: Tensor) -> Tensor:
    r""":math:`\log \alpha` of :math:`\alpha = \mathrm{relu}(a)`; ``LOG_ZERO`` where it is 0, with a gradient there.

    With a plain relu a dead vector would stay dead: neither the KLs nor the reconstruction reach its activation.
    Here :math:`d\alpha / da` is ``LEAK`` below 0, so :math:`KL_D` revives vectors while the total pseudo-count is
    below the prior's. The value itself is exact.
    """
    smallest = math.exp(LOG_ZERO)
    dead = LOG_ZERO + (LEAK / smallest) * (activation - activation.detach())
    return torch.where(activation > smallest, activation.clamp(min=smallest).log(), dead)


def kept(keep_logit: Tensor, share: Tensor | float) -> Tensor:
    """Whether evaluation keeps a vector: its keep logit is above 0, or dropping is off. NaN is kept, and so seen.

    Args:
        keep_logit: any shape; for a threshold :math:`t` it is :math:`\\log\\alpha - \\log t`.
        share: the share of training examples in which vectors are dropped. At 0 evaluation drops nothing either.
    """
    return ~(keep_logit <= 0) | (share <= 0)


def kept_first(keep: Tensor) -> Tensor | None:
    """Positions ``(B, L)`` of kept vectors, in order. ``L`` is the most that any example of ``keep`` ``(B, N)`` keeps.

    Examples that keep fewer are filled up with vectors that they do not keep. ``None`` if ``L`` is ``N``, and in an
    exported graph, whose lengths cannot depend on values. This reads a length from the device.
    """
    if is_exporting():
        return None
    length = int(keep.sum(-1).max())
    if length == keep.shape[1]:
        return None
    return (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, :length]


def examples_that_keep_all(keep_logit: Tensor, share: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws the examples of a training batch ``(B, Nl)`` that drop nothing, ``(B, 1)``."""
    draws = noise(torch.rand, keep_logit[:, :1], generator)
    return draws >= share.to(keep_logit.device)


def relaxed_share(keep_logit: Tensor, mask: Tensor) -> Tensor:
    r"""A differentiable stand-in for the share of vectors kept, ``(B,)``.

    .. math:: \frac1{N_s} \sum_i \mathrm{sigmoid}(l_i)

    For a threshold :math:`t` it is the mean of :math:`\alpha_i / (\alpha_i + t)`. For a learned decision it is the
    mean probability that training keeps a vector. It equals the share itself once every logit is far from 0.

    Args:
        keep_logit: of the source vectors, ``(B, Ns)``.
        mask: ``(B, Ns)``, True where a vector is no padding.
    """
    share = torch.sigmoid(keep_logit).masked_fill(~mask, 0)
    return share.sum(-1) / mask.sum(-1).clamp(min=1)


def learned_keep_logit(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""A learned keep logit of every vector, ``(B, Ns, H)`` to ``(B, Ns)``.

    .. math:: l_i = w^\top \mathrm{layernorm}(x_i) + b

    The layer norm removes the norm. It says little about which vectors can go, but a pretrained model's pseudo-counts
    follow it.
    """
    return (F.layer_norm(hidden_states, weight.shape) * weight).sum(-1) + bias  # autocast leaves this in fp32


def everything_kept(width: int) -> dict[str, Tensor]:
    """The first parameters of a learned decision, by name. It then keeps 95 % of the draws."""
    return {"keep_weight": torch.zeros(width), "keep_bias": torch.full((1,), KEEP_BIAS)}


def relaxed_log_gate(keep_logit: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draws what a relaxed decision adds to a vector's log weight in training, shaped as ``keep_logit``.

    .. math:: \log \mathrm{sigmoid}\bigl((l + \epsilon) / 0.3\bigr), \qquad \epsilon \sim \mathrm{Logistic}

    Use it with a frozen decoder. Nothing is dropped, so a decoder in training would learn to read even tiny weights,
    and the probabilities would go to 0 at no cost.

    Args:
        keep_logit: ``+inf`` gives a weight of 1.

    Source: Maddison, Mnih & Teh (ICLR 2017).
    """
    uniform = noise(torch.rand, keep_logit, generator).clamp(min=torch.finfo(keep_logit.dtype).tiny)
    return F.logsigmoid((keep_logit + uniform.log() - torch.log1p(-uniform)) / TEMPERATURE)


def draw_dropping(
    posterior: Posterior,
    dropping: str,
    share: Tensor,
    positive: Tensor,
    kappa: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Posterior]:
    """Training draws of log weights ``(B, Nl)`` for a layer that drops, and the parameters of their vectors.

    Args:
        posterior: with the keep logits.
        dropping: ``"threshold"`` or ``"relaxed"``.
        share: the share of examples in which vectors are dropped.
        positive: ``(B, Ns + 1)``, True where a component is no padding and its pseudo-count is above 0.
        kappa: vectors drawn per component.
    """
    assert posterior.keep_logit is not None, "nothing decides what this posterior drops"
    keep_all = positive & examples_that_keep_all(posterior.keep_logit, share, generator)
    if dropping == "threshold":
        drawn = posterior._replace(keep=posterior.keep | keep_all).repeated(kappa)
        return log_dirichlet_sample(drawn.log_alpha, drawn.keep, generator), drawn
    log_gate = relaxed_log_gate(posterior.keep_logit, generator).masked_fill(keep_all, 0)
    drawn = posterior._replace(keep=positive).repeated(kappa)
    log_pi = log_dirichlet_sample(drawn.log_alpha, drawn.keep, generator)
    log_pi = (log_pi + log_gate.repeat_interleave(kappa, dim=1)).log_softmax(-1)
    return log_pi.masked_fill(~drawn.keep, -math.inf), drawn
