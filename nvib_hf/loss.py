"""The training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration_nvib import NvibConfig
from .cross_entropy import IGNORED, cross_entropy
from .latent import NvibLatents


def regulariser(latents: NvibLatents, beta: Tensor, config: NvibConfig) -> Tensor | None:
    r"""What one target token of an example pays for its latent, ``(B,)``; ``None`` for latents of no text.

    .. math::
        k = \beta_G \lambda_G \max(KL_G, f_G) + \beta_D \lambda_D \max(KL_D, f_D) + \beta_V \lambda_V \, \mathrm{share}

    with the free bits :math:`f` and the relaxed share of vectors kept.

    Args:
        latents: with their KLs.
        beta: the current weights ``(3,)`` of the terms, which a callback anneals or controls.
        config: of the model, for ``lambda_*`` and ``free_bits_*``.

    Source: Henderson & Fehr (ICLR 2023), section 3.3; free bits, Kingma et al. (NeurIPS 2016), here by example.
    """
    if latents.kl_gaussian is None or latents.kl_dirichlet is None:
        return None
    beta = beta.to(latents.kl_gaussian.dtype)
    total = beta[0] * config.lambda_gaussian * latents.kl_gaussian.clamp(min=config.free_bits_gaussian)
    total = total + beta[1] * config.lambda_dirichlet * latents.kl_dirichlet.clamp(min=config.free_bits_dirichlet)
    if config.lambda_vectors > 0 and latents.relaxed_prop_vectors is not None:
        total = total + beta[2] * config.lambda_vectors * latents.relaxed_prop_vectors
    return total


def nvib_loss(
    logits: Tensor,
    labels: Tensor,
    regularisation: Tensor | None,
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Loss and cross-entropy, both scalars, in nats per target token.

    .. math::
        \frac1N \sum_b \Bigl( \sum_t \mathrm{nll}_{bt} + n_b \, k_b \Bigr)

    with :math:`n_b` target tokens of an example and :math:`N` those of the whole optimisation step. So the KL's mean
    weights examples as the cross-entropy does, and the loss of a step is exactly the sum over its micro-batches.

    Args:
        logits: ``(B, Nt, V)``.
        labels: ``(B, Nt)``; -100 is ignored.
        regularisation: ``k``, ``(B,)``, of :func:`regulariser`.
        num_items_in_batch: ``N``; by default the target tokens of this batch.
        label_smoothing: of the cross-entropy's targets.
    """
    labels = labels.to(logits.device)
    nll = cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing)
    tokens = (labels != IGNORED).sum(-1)  # (B,)
    own = tokens.sum().clamp(min=1)
    total = nll if regularisation is None else nll + (tokens * regularisation.to(nll.device)).sum()
    of_step = own if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=nll.device)
    return total / of_step, nll / own
