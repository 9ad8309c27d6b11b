"""The NVIB layer of a self-attention: an attention's own input in, what it reads of that out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .denoising_attention import AttendedLatent, attended_means, attended_mixture, attended_points
from .nvib_layer import NvibLayer
from .posterior import Posterior


class AttendedNvibLayer(NvibLayer):
    r"""NVIB between the vectors of a self-attention and its keys and values.

    The weights are left as they are, :math:`\log g_i` of a Gamma draw in training and :math:`\log \alpha_i` in
    evaluation: the softmax normalises over what a query may see, of which a causal mask or a window decides.

    Arguments are those of :class:`~nvib_hf.nvib_layer.NvibLayer`; ``kappa`` is 1.

    Source: Behjati, Fehr & Henderson (Findings of EMNLP 2023), section 3; Fehr & Henderson (COLM 2024).
    """

    def forward(
        self,
        hidden_states: Tensor,
        evaluation: str = "means",
        generator: torch.Generator | None = None,
        log_alpha_below: Tensor | None = None,
    ) -> tuple[AttendedLatent, Posterior]:
        """What attention reads of ``(B, N, H)``: ``N + 1`` vectors, the prior's first; and their posterior.

        Padding is not known here: the attention's mask hides it.

        Args:
            evaluation: ``"means"`` or ``"mixture"``; training reads a sample.
            generator: for the draws.
            log_alpha_below: log pseudo-counts ``(B, N)`` that are added to this layer's.
        """
        posterior = self.posterior(hidden_states, log_alpha_below=log_alpha_below)
        if not self.training:
            log_alpha = posterior.log_alpha.masked_fill(~posterior.keep, -math.inf)
            of_posterior = attended_means if evaluation == "means" else attended_mixture
            return of_posterior(posterior.mu, posterior.logvar, log_alpha, self.scale), posterior
        if posterior.keep_logit is None:
            z, log_g = posterior.draw_z(1, generator), posterior.draw_log_g(generator)
            return attended_points(z, log_g, self.scale), posterior
        z, log_pi, drawn = self.sample_posterior(posterior, generator)
        if drawn.dropped is None:
            return attended_points(z, log_pi, self.scale), drawn
        return attended_points(z, drawn.full_log_pi, self.scale)._replace(dropped=drawn.dropped), drawn
