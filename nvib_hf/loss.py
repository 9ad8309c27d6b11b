"""The training loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nvib_loss(
    logits: Tensor,
    labels: Tensor,
    weighted_kl: Tensor | None,
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Loss and cross-entropy, both scalars, in nats per target token.

    .. math::
        \frac1N \sum_b \Bigl( \sum_t \mathrm{nll}_{bt} + n_b \, k_b \Bigr), \qquad
        k_b = \beta_G \lambda_G KL_{G,b} + \beta_D \lambda_D KL_{D,b}

    with :math:`n_b` target tokens of an example and :math:`N` those of the whole optimisation step. So the KL's mean
    weights examples as the cross-entropy does, and the loss of a step is exactly the sum over its micro-batches.

    Args:
        logits: ``(B, Nt, V)``.
        labels: ``(B, Nt)``; -100 is ignored.
        weighted_kl: ``k``, ``(B,)``.
        num_items_in_batch: ``N``; by default the target tokens of this batch.
        label_smoothing: of the cross-entropy's targets.
    """
    labels = labels.to(logits.device)
    nll = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )
    tokens = (labels != -100).sum(-1)  # (B,)
    own = tokens.sum().clamp(min=1)
    total = nll if weighted_kl is None else nll + (tokens * weighted_kl.to(nll.device)).sum()
    of_step = own if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=nll.device)
    return total / of_step, nll / own
