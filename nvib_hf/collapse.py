"""Signs of a decoder that has stopped listening to its latent, or that reads it in training alone, and remedies."""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration_nvib import NvibConfig

REMEDY = (
    "Lower lambda_gaussian and lambda_dirichlet or let them rise later (KLAnnealingCallback), state the "
    "reconstruction you accept (ConstraintCallback), or give the latent free_bits_gaussian and the decoder "
    "word_dropout."
)


class CollapseWarning(UserWarning):
    """The decoder ignores the latent."""


class EvaluationGapWarning(UserWarning):
    """What the decoder reads in training, it does not in evaluation."""


# A channel is active if its mean varies over the data by more than this, in units of the prior's variance.
ACTIVE_VARIANCE = 0.01


class ChannelMoments:
    """First and second moments of the posteriors' means by channel, over the vectors of all batches, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, 0.0, 0.0

    def add(self, mu: Tensor, mask: Tensor) -> None:
        """A batch ``(B, Nl, P)``; mask: ``(B, Nl)``, True = a vector that counts."""
        means = mu[mask].cpu().double()
        self.count += len(means)
        self.mean, self.square = self.mean + means.sum(0), self.square + means.square().sum(0)

    def active_units(self, prior_var: Tensor | float = 1.0) -> float:
        r"""Share of the channels whose mean varies with the data: :math:`\mathrm{Var}_x(\mu) > 0.01 \, \sigma_p^2`.

        Args:
            prior_var: the prior's variance, a number or ``(P,)``.

        Returns:
            In [0, 1]; 0 where fewer than two vectors count.

        Source: Burda, Grosse & Salakhutdinov (ICLR 2016), section 5.1, over vectors in place of examples.
        """
        if self.count < 2:
            return 0.0
        variance = self.square / self.count - (self.mean / self.count).square()
        prior_var = torch.as_tensor(prior_var).cpu().double()
        return (variance > ACTIVE_VARIANCE * prior_var).double().mean().item()


def collapse_message(step: int, what: str, value: float, unit: str, least: float) -> str:
    """What a :class:`CollapseWarning` says of a number that is below the least."""
    return (
        f"Posterior collapse at step {step}: {what} are {value:.3g} {unit}, below {least:g}. The decoder ignores the "
        f"latent. {REMEDY}"
    )


def gap_message(step: int, training: float, evaluation: float, config: NvibConfig, threshold_share: float) -> str:
    """What an :class:`EvaluationGapWarning` says of the cross-entropies of one batch."""
    return (
        f"Evaluation falls behind training at step {step}: the same batch has a cross-entropy of {training:.3g} nats "
        f"per token in training and {evaluation:.3g} decoded as in evaluation. {gap_remedy(config, threshold_share)}"
    )


def gap_remedy(config: NvibConfig, threshold_share: float) -> str:
    """What to do about a model that decodes in training alone."""
    if config.evaluation == "mixture":
        return 'Decode the means of the posterior: model.config.evaluation = "means".'
    if 0 < threshold_share < 1:
        return (
            f"Evaluation drops vectors in every example, training in {threshold_share:.0%} of them: raise the "
            "threshold_share of the model, or of the callback that sets it, and train for more steps."
        )
    return (
        "Train for more steps, or lower lambda_gaussian: the means of the posterior, which evaluation decodes, are "
        "unlike the samples that the decoder knows."
    )
