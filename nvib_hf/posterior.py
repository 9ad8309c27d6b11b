"""The posterior that the NVIB layer makes of a batch of vector sets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import log_dirichlet_sample, log_gamma_sample
from .dropping import hard_draw, relaxed_log_gate, spared_examples

# exp of more overflows fp32; only what is reported is clamped, everything computes with log_alpha.
LOG_ALPHA_REPORTED_MAX = 85.0


class Posterior(NamedTuple):
    """Parameters of the posterior, batch-first, component 0 the prior's, which is never masked.

    ``mu``, ``logvar`` ``(B, Ns + 1, P)``; ``log_alpha`` ``(B, Ns + 1)`` in fp32 or better; ``mask``
    ``(B, Ns + 1)``, True = a component; ``keep``: as ``mask``, less what is dropped; ``keep_logit`` ``(B, Ns + 1)``:
    above 0 for what is kept, ``+inf`` for the prior's, ``None`` where nothing decides. Of hard draws in training also
    ``dropped`` ``(B, Nl)``, 1 or 0 with a gradient (:func:`~nvib_hf.dropping.hard_draw`), and ``full_log_pi``
    ``(B, Nl)``, the log weights of what is kept, and beside them those that what is dropped would have.
    """

    mu: Tensor
    logvar: Tensor
    log_alpha: Tensor
    mask: Tensor
    keep: Tensor
    keep_logit: Tensor | None = None
    dropped: Tensor | None = None
    full_log_pi: Tensor | None = None

    def repeated(self, kappa: int) -> Posterior:
        """Of each of ``kappa`` vectors a component, side by side, with ``alpha_i / kappa``."""
        if kappa == 1:
            return self
        repeated = Posterior(*(None if x is None else x.repeat_interleave(kappa, dim=1) for x in self))
        return repeated._replace(log_alpha=repeated.log_alpha - math.log(kappa))

    def log_mean_pi(self) -> Tensor:
        """Log of the expected weights ``alpha / sum(alpha)`` over the kept components, ``(B, Nl)``."""
        return self.log_alpha.masked_fill(~self.keep, float("-inf")).log_softmax(-1)

    def statistics(self) -> dict[str, Tensor]:
        """Per example ``(B,)``: ``num_vec``, ``prop_vec``, ``effective_num_vec``, ``alpha0`` (see the layer)."""
        num_vec = self.keep[:, 1:].sum(-1).float()
        length = self.mask[:, 1:].sum(-1).clamp(min=1)
        log_alpha = self.log_alpha.detach().masked_fill(~self.mask, float("-inf"))
        entropy = torch.special.entr(self.log_mean_pi().detach().exp()).sum(-1)
        return {
            "num_vec": num_vec,
            "prop_vec": num_vec / length,
            "effective_num_vec": entropy.exp(),
            "alpha0": log_alpha.logsumexp(-1).clamp(max=LOG_ALPHA_REPORTED_MAX).exp(),
        }


def dropping_sample(
    posterior: Posterior,
    dropping: str,
    share: Tensor,
    weighty: Tensor,
    kappa: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Posterior]:
    """Log weights ``(B, Nl)`` of a draw in training by a layer that drops, and its parameters.

    Args:
        dropping: ``"threshold"``, ``"relaxed"`` or ``"hard"``.
        share: of the examples in which vectors are dropped.
        weighty: ``(B, Ns + 1)``, True = a component with any weight at all.
    """
    spared = weighty & spared_examples(posterior.keep_logit, share, generator)
    if dropping == "threshold":
        repeated = posterior._replace(keep=posterior.keep | spared).repeated(kappa)
        return log_dirichlet_sample(repeated.log_alpha, repeated.keep, generator), repeated
    if dropping == "relaxed":
        log_gate = relaxed_log_gate(posterior.keep_logit, generator).masked_fill(spared, 0)
        repeated = posterior._replace(keep=weighty).repeated(kappa)
        log_pi = log_dirichlet_sample(repeated.log_alpha, repeated.keep, generator)
        log_pi = (log_pi + log_gate.repeat_interleave(kappa, dim=1)).log_softmax(-1)
        return log_pi.masked_fill(~repeated.keep, -math.inf), repeated
    keep, dropped = hard_draw(posterior.keep_logit, generator)
    dropped = dropped.masked_fill(spared | ~weighty, 0)
    repeated = posterior._replace(keep=weighty & (keep | spared), dropped=dropped).repeated(kappa)
    # Two draws, so that nothing of what is dropped reaches the weights of what is kept.
    of_dropped = log_gamma_sample(repeated.log_alpha.detach(), generator)
    log_g = log_gamma_sample(repeated.log_alpha.masked_fill(~repeated.keep, 0), generator)
    total = log_g.masked_fill(~repeated.keep, -math.inf).logsumexp(-1, keepdim=True)
    log_pi = (log_g - total).masked_fill(~repeated.keep, -math.inf)
    full_log_pi = torch.where(repeated.dropped > 0.5, of_dropped - total.detach(), log_pi)
    return log_pi, repeated._replace(full_log_pi=full_log_pi)
