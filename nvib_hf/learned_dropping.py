r"""A learned decision which vectors are kept: its logit, and the draws of training, relaxed or hard.

Source: this project; relaxed draws, Maddison, Mnih & Teh (ICLR 2017).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .distributions import log_dirichlet_sample, log_gamma_sample, noise
from .posterior import Posterior

# The logit that everything starts with, which keeps 95 % of the draws, and the temperature of relaxed draws.
KEEP_BIAS = 3.0
TEMPERATURE = 0.3


def learned_keep_logit(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""A learned keep logit of every vector, ``(B, Ns, H)`` to ``(B, Ns)``.

    .. math:: l_i = w^\top \mathrm{layernorm}(x_i) + b

    The norm is taken out: what can go has little to do with it, and the pseudo-counts of a pretrained model follow it.
    """
    return (F.layer_norm(hidden_states, weight.shape) * weight).sum(-1) + bias  # autocast leaves this in fp32


def relaxed_log_gate(keep_logit: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draws of what a relaxed decision adds to a vector's log weight in training, shaped as ``keep_logit``.

    .. math:: \log \mathrm{sigmoid}\bigl((l + \epsilon) / 0.3\bigr), \qquad \epsilon \sim \mathrm{Logistic}

    For a decoder that is frozen: nothing is dropped, and one that is trained learns to read weights however small,
    whereupon the probabilities go to 0 at no cost.

    Args:
        keep_logit: ``+inf`` has a weight of 1.

    Source: Maddison, Mnih & Teh (ICLR 2017).
    """
    uniform = noise(torch.rand, keep_logit, generator).clamp(min=torch.finfo(keep_logit.dtype).tiny)
    return F.logsigmoid((keep_logit + uniform.log() - torch.log1p(-uniform)) / TEMPERATURE)


def hard_draw(keep_logit: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    r"""Draws of what to keep, by :math:`p = \mathrm{sigmoid}(l)`, and of what is dropped, with a gradient.

    The expected loss is :math:`p L_1 + (1 - p) L_0` with a vector and without it, and has the gradient
    :math:`p (1 - p) (L_1 - L_0)`. Where the vector is dropped, with probability :math:`1 - p`, attention knows what
    its output would be with it (:func:`~nvib_hf.denoising_attention.denoising_attention`), and so
    :math:`L_1 - L_0` to first order in that; times :math:`p` it is the gradient here. What is kept needs none.

    The other way round, with the derivative by the weight of what is kept, the gradient is lost: it vanishes for a
    vector that a query reads alone, and where the loss is small. Measured on a decoder that needs 3 vectors of 12:
    that dropped all of them, this kept the 3.

    Args:
        keep_logit: any shape; ``+inf`` is kept always.

    Returns:
        True where kept; and 1 where dropped, 0 elsewhere, of which the derivative by :math:`l` is :math:`-p` where
        dropped, 0 elsewhere.
    """
    probability = torch.sigmoid(keep_logit.detach())
    keep = noise(torch.rand, keep_logit, generator) < probability
    logit = keep_logit.masked_fill(keep, 0)
    return keep, (~keep).to(logit.dtype) - probability * (logit - logit.detach())


def relaxed_sample(
    posterior: Posterior, spared: Tensor, kappa: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Posterior]:
    """Log weights ``(B, Nl)``, each vector's multiplied by its relaxed gate, and their parameters.

    ``spared`` ``(B, Ns + 1)`` are vectors whose gate is 1.
    """
    log_gate = relaxed_log_gate(posterior.keep_logit, generator).masked_fill(spared, 0)
    repeated = posterior.repeated(kappa)
    log_pi = log_dirichlet_sample(repeated.log_alpha, repeated.keep, generator)
    log_pi = (log_pi + log_gate.repeat_interleave(kappa, dim=1)).log_softmax(-1)
    return log_pi.masked_fill(~repeated.keep, -math.inf), repeated


def hard_sample(
    posterior: Posterior, spared: Tensor, kappa: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Posterior]:
    """Log weights ``(B, Nl)``, ``-inf`` where a hard draw drops a component, and their parameters.

    ``spared`` ``(B, Ns + 1)`` are vectors that are kept whatever is drawn.
    """
    keep, dropped = hard_draw(posterior.keep_logit, generator)
    dropped = dropped.masked_fill(spared | ~posterior.keep, 0)
    repeated = posterior._replace(keep=posterior.keep & (keep | spared), dropped=dropped).repeated(kappa)
    # Two draws, so that nothing of what is dropped reaches the weights of what is kept.
    of_dropped = log_gamma_sample(repeated.log_alpha.detach(), generator)
    log_g = log_gamma_sample(repeated.log_alpha.masked_fill(~repeated.keep, 0), generator)
    total = log_g.masked_fill(~repeated.keep, -math.inf).logsumexp(-1, keepdim=True)
    log_pi = (log_g - total).masked_fill(~repeated.keep, -math.inf)
    full_log_pi = torch.where(repeated.dropped > 0.5, of_dropped - total.detach(), log_pi)
    return log_pi, repeated._replace(full_log_pi=full_log_pi)
