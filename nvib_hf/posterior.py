"""The posterior that the NVIB layer makes of a batch of vector sets: what is drawn from it, told and charged of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import gaussian_sample, log_dirichlet_sample, log_gamma_sample
from .dropping import hard_draw, relaxed_log_gate, spared_examples
from .kl import component_weights, gaussian_divergence, kl_dirichlet

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
        """Of each of ``kappa`` vectors per component, side by side, with ``alpha_i / kappa``."""
        if kappa == 1:
            return self
        repeated = Posterior(*(None if x is None else x.repeat_interleave(kappa, dim=1) for x in self))
        return repeated._replace(log_alpha=repeated.log_alpha - math.log(kappa))

    def log_mean_pi(self) -> Tensor:
        """Log of the expected weights ``alpha / sum(alpha)`` over the kept components, ``(B, Nl)``."""
        return self.log_alpha.masked_fill(~self.keep, float("-inf")).log_softmax(-1)

    def draw_z(self, kappa: int, generator: torch.Generator | None = None) -> Tensor:
        """``kappa`` vectors per component, side by side: ``(B, kappa * (Ns + 1), P)``."""
        return gaussian_sample(self.mu, self.logvar, self.mask, generator, repeats=kappa)

    def draw_log_pi(self, kappa: int, generator: torch.Generator | None = None) -> tuple[Tensor, Posterior]:
        """Log weights ``(B, Nl)`` of ``Nl = kappa * (Ns + 1)`` vectors, and :meth:`repeated`."""
        repeated = self.repeated(kappa)
        return log_dirichlet_sample(repeated.log_alpha, repeated.keep, generator), repeated

    def draw_log_g(self, generator: torch.Generator | None = None) -> Tensor:
        """Log weights ``(B, Ns + 1)`` before they are normalised, which the softmax of an attention does as well.

        So those of a position do not depend on the positions that come later.
        """
        log_g = log_gamma_sample(self.log_alpha.masked_fill(~self.keep, 0), generator)
        return log_g.masked_fill(~self.keep, -math.inf)

    def draw_dropping(
        self,
        dropping: str,
        share: Tensor,
        weighty: Tensor,
        kappa: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Posterior]:
        """As :meth:`draw_log_pi`, in training by a layer that drops: the parameters are those of what was kept.

        Args:
            dropping: ``"threshold"``, ``"relaxed"`` or ``"hard"``.
            share: of the examples in which vectors are dropped.
            weighty: ``(B, Ns + 1)``, True = a component with any weight at all.
        """
        spared = weighty & spared_examples(self.keep_logit, share, generator)
        if dropping == "threshold":
            return self._replace(keep=self.keep | spared).draw_log_pi(kappa, generator)
        if dropping == "relaxed":
            log_gate = relaxed_log_gate(self.keep_logit, generator).masked_fill(spared, 0)
            log_pi, repeated = self._replace(keep=weighty).draw_log_pi(kappa, generator)
            log_pi = (log_pi + log_gate.repeat_interleave(kappa, dim=1)).log_softmax(-1)
            return log_pi.masked_fill(~repeated.keep, -math.inf), repeated
        keep, dropped = hard_draw(self.keep_logit, generator)
        dropped = dropped.masked_fill(spared | ~weighty, 0)
        repeated = self._replace(keep=weighty & (keep | spared), dropped=dropped).repeated(kappa)
        # Two draws, so that nothing of what is dropped reaches the weights of what is kept.
        of_dropped = log_gamma_sample(repeated.log_alpha.detach(), generator)
        log_g = repeated.draw_log_g(generator)
        total = log_g.logsumexp(-1, keepdim=True)
        log_pi = (log_g - total).masked_fill(~repeated.keep, -math.inf)
        full_log_pi = torch.where(repeated.dropped > 0.5, of_dropped - total.detach(), log_pi)
        return log_pi, repeated._replace(full_log_pi=full_log_pi)

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

    def kl_gaussian(self, prior_mu: Tensor, prior_var: Tensor, weights: str, keep: Tensor, kappa: int) -> Tensor:
        """:func:`~nvib_hf.kl.kl_gaussian` ``(B,)``, with ``keep`` ``(B, Ns + 1)``, what a draw kept, for this one's.

        Computed once per component: its ``kappa`` vectors share one Gaussian and one pseudo-count.
        """
        log_alpha = self.log_alpha.masked_fill(~self.mask, -math.inf)
        w = component_weights(weights, log_alpha, self.mask, keep)
        return kappa * (w * gaussian_divergence(self.mu, self.logvar, prior_mu, prior_var)).sum(-1)

    def kl_dirichlet(self, prior_log_alpha: Tensor, delta: float, kappa: int) -> Tensor:
        """:func:`~nvib_hf.kl.kl_dirichlet` ``(B,)`` of the pseudo-counts of ``kappa`` vectors per component."""
        return kl_dirichlet(
            log_alpha=self.log_alpha,
            memory_key_padding_mask=~self.mask,
            prior_log_alpha=prior_log_alpha,
            delta=delta,
            kappa=kappa,
            batch_first=True,
        )


class NvibOutput(NamedTuple):
    """What the layer makes of a batch.

    Args:
        z: vectors ``(B, Nl, P)``: a sample, or the means.
        log_pi: their log weights ``(B, Nl)``: a sample, or the expected ones.
        posterior: parameters of the ``Ns + 1`` components.
        drawn: those of the ``Nl`` vectors; of the means the posterior itself.
        kappa: vectors drawn per component, ``Nl = kappa * (Ns + 1)``; ``None`` of the means, one per component.
        kl_gaussian, kl_dirichlet: ``(B,)``, as the layer weighs them; ``None`` where they were not asked for.
        relaxed_share: ``(B,)``, :func:`~nvib_hf.dropping.relaxed_share`; ``None`` likewise, and where nothing decides.
    """

    z: Tensor
    log_pi: Tensor
    posterior: Posterior
    drawn: Posterior
    kappa: int | None = None
    kl_gaussian: Tensor | None = None
    kl_dirichlet: Tensor | None = None
    relaxed_share: Tensor | None = None
