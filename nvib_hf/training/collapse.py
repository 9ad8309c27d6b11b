"""Signs, with remedies, that a decoder ignores its latent, or reads it in training only."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from ..configuration_nvib import NvibConfig
from ..layers.cross_entropy import IGNORED
from ..layers.settings import check_number, check_whole
from .held_out import evaluated
from .recording import MeasuringCallback

REMEDY = (
    "Lower lambda_gaussian and lambda_dirichlet or let them rise later (KLAnnealingCallback), or give the latent "
    "free_bits_gaussian and the decoder word_dropout. ConstraintCallback avoids a collapse if texts are held out: "
    "give the Trainer an eval_dataset, and accept a lower cross_entropy."
)


class CollapseWarning(UserWarning):
    """The decoder ignores the latent."""


class EvaluationGapWarning(UserWarning):
    """The decoder reads the latent in training, but not in evaluation."""


# A channel is active if its mean varies over the data by more than this, in units of the prior's variance.
ACTIVE_VARIANCE = 0.01


class ChannelMoments:
    """First and second moments of the posteriors' means by channel, over the vectors of all batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def add(self, mu: Tensor, mask: Tensor) -> None:
        """Add a batch ``(B, Nl, P)``. ``mask``: ``(B, Nl)``, True for each vector that counts."""
        means = mu[mask].cpu().double()
        self.count += len(means)
        self.mean, self.square = self.mean + means.sum(0), self.square + means.square().sum(0)

    def active_units(self, prior_var: Tensor | float = 1.0) -> float:
        r"""Share of the channels whose mean varies with the data: :math:`\mathrm{Var}_x(\mu) > 0.01 \, \sigma_p^2`.

        Args:
            prior_var: the prior's variance, a number or ``(P,)``.

        Returns:
            In [0, 1]; 0 if fewer than two vectors count.

        Source: Burda, Grosse & Salakhutdinov (ICLR 2016), section 5.1, over vectors in place of examples.
        """
        if self.count < 2:
            return 0.0
        variance = torch.as_tensor(self.square / self.count - (self.mean / self.count) ** 2)
        prior_var = torch.as_tensor(prior_var).cpu().double()
        return (variance > ACTIVE_VARIANCE * prior_var).double().mean().item()


def collapse_message(step: int, what: str, value: float, unit: str, least: float) -> str:
    """The text of a :class:`CollapseWarning` for a number that is too small."""
    return (
        f"Posterior collapse at step {step}: {what} are {value:.3g} {unit}, below {least:g}. The decoder ignores the "
        f"latent. {REMEDY}"
    )


def gap_message(step: int, training: float, evaluation: float, config: NvibConfig, dropping_share: float) -> str:
    """Text of an :class:`EvaluationGapWarning` for the cross-entropies of one batch."""
    return (
        f"Evaluation falls behind training at step {step}: the same batch has a cross-entropy of {training:.3g} nats "
        f"per token in training and {evaluation:.3g} decoded as in evaluation. {gap_remedy(config, dropping_share)}"
    )


def gap_remedy(config: NvibConfig, dropping_share: float) -> str:
    """What to do about a model that decodes in training only."""
    if config.evaluation == "mixture":
        return 'Decode the means of the posterior: model.config.evaluation = "means".'
    if 0 < dropping_share < 1:
        return (
            f"Evaluation drops vectors in every example, training in {dropping_share:.0%} of them. Raise the "
            "dropping_share of the model, or of the callback that sets it, and train for more steps."
        )
    return (
        "Train for more steps, or lower lambda_gaussian: evaluation decodes the means of the posterior, and they are "
        "unlike the samples that the decoder knows."
    )


class CollapseCallback(MeasuringCallback):
    """Warns when a training shows, twice in a row, that evaluation will be useless. Each sign warns once.

    A :class:`CollapseWarning` says that the decoder ignores the latent. Its signs are: both KLs together are below
    ``min_nats`` per vector (the posterior is the prior); the share of vectors kept is below ``min_prop_vectors``; the
    share of active channels is below ``min_active_units``. The first two are means over the steps since the last log,
    the third is measured every ``interval`` steps.

    An :class:`EvaluationGapWarning` says that the decoder reads the latent in training, but not in evaluation. Every
    ``interval`` steps the last batch is also decoded as in evaluation. The sign is that its cross-entropy (the logs'
    ``evaluation_cross_entropy``) is more than ``max_gap`` above the one in training, and more than twice as large.
    This costs one forward pass without gradients, under 1 % of the training by default. It draws no random numbers,
    so it does not change the training.

    ``NvibTrainer`` adds this callback by itself. With another ``Trainer``, add it to the callbacks.

    Args:
        min_nats: least ``P * KL_G + KL_D``, nats per latent vector.
        min_prop_vectors: least share of the source vectors kept.
        min_active_units: least share of the latent channels that are active.
        max_gap: nats per target token.
        interval: steps between two measurements on a batch.

    Raises:
        ValueError: an argument outside its range.
    """

    kept_in_checkpoints = (*MeasuringCallback.kept_in_checkpoints, "warned", "seen", "evaluation_cross_entropy")

    def __init__(
        self,
        min_nats: float = 0.1,
        min_prop_vectors: float = 0.02,
        min_active_units: float = 0.01,
        max_gap: float = 0.5,
        interval: int = 50,
    ) -> None:
        super().__init__(
            {
                "min_nats": min_nats,
                "min_prop_vectors": min_prop_vectors,
                "min_active_units": min_active_units,
                "max_gap": max_gap,
                "interval": interval,
            }
        )
        for name in ("min_nats", "min_prop_vectors", "min_active_units", "max_gap"):
            check_number(name, self.arguments[name], least=0)
        check_whole("interval", interval, unit=" step")
        self.min_nats, self.min_prop_vectors = min_nats, min_prop_vectors
        self.min_active_units, self.max_gap, self.interval = min_active_units, max_gap, interval
        self.warned: list[str] = []
        self.seen: list[str] = []  # the last time
        self.evaluation_cross_entropy: float | None = None  # since the last log
        self._last: tuple[dict, Tensor | None] | None = None

    def on_train_end(self, args, state, control, **kwargs) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._last = None

    def record(self, model: nn.Module, inputs: dict, outputs) -> None:
        super().record(model, inputs, outputs)
        cross_entropy = outputs.get("cross_entropy") if hasattr(outputs, "get") else None
        self._last = inputs, None if cross_entropy is None else cross_entropy.detach().mean()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        last, self._last = self._last, None  # no batch is held beyond its step
        if state.global_step % self.interval == 0:
            self._evaluate(args, state, *(last or ({}, None)))

    def _evaluate(self, args, state, inputs: dict, cross_entropy: Tensor | None) -> None:
        """Decode a batch as in evaluation, to compare with its cross-entropy in training."""
        from accelerate.utils import reduce

        sums = torch.zeros(3, device=args.device)
        if (
            cross_entropy is not None and inputs.get("encoder_outputs") is None
        ):  # else the batch gives latents instead of texts
            outputs = evaluated(self._model, inputs, args)
            units = self._active_units(outputs.latents)
            self._warn_below(state, "active units", "of the channels", units, self.min_active_units)
            both = torch.stack([cross_entropy.to(args.device), outputs.cross_entropy.to(args.device)]).float()
            tokens = (inputs["labels"] != IGNORED).sum().to(args.device)
            sums = torch.cat([both * tokens, tokens[None]])
        training, evaluation, tokens = reduce(sums, "sum").tolist()
        if tokens and math.isfinite(training) and math.isfinite(evaluation):
            training, self.evaluation_cross_entropy = training / tokens, evaluation / tokens
            self._warn_of_gap(state, training, self.evaluation_cross_entropy)

    def _active_units(self, latents) -> float:
        source = latents.attention_mask.clone()
        source[:, 0] = False  # the prior's own component
        moments = ChannelMoments()
        moments.add(latents.z, source)
        return moments.active_units(self._model.nvib.prior_logvar.exp())

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        if logs is None or "loss" not in logs:
            return
        self.evaluation_cross_entropy = None
        if means := self.measured(args.device):
            if "kl_gaussian" in means:  # a mean over targets: there were some
                nats = self._model.nvib.size_out * means["kl_gaussian"] + means["kl_dirichlet"]
                self._warn_below(state, "KL terms", "nats per vector", nats, self.min_nats)
            self._warn_below(state, "vectors kept", "of the source", means["prop_vectors"], self.min_prop_vectors)

    def trace(self) -> dict[str, float]:
        value = self.evaluation_cross_entropy
        return {} if value is None else {"evaluation_cross_entropy": value}

    def _warn_below(self, state, what: str, unit: str, value: float, least: float) -> None:
        if self._is_due(what, value < least) and state.is_world_process_zero:
            message = collapse_message(state.global_step, what, value, unit, least)
            warnings.warn(message, CollapseWarning, stacklevel=2)

    def _warn_of_gap(self, state, training: float, evaluation: float) -> None:
        shown = evaluation > max(training + self.max_gap, 2 * training)
        if self._is_due("evaluation", shown) and state.is_world_process_zero:
            share = self._model.nvib.dropping_share.item()
            message = gap_message(state.global_step, training, evaluation, self._model.config, share)
            warnings.warn(message, EvaluationGapWarning, stacklevel=2)

    def _is_due(self, sign: str, shown: bool) -> bool:
        """Whether to warn of a sign: it shows twice in a row, and there was no warning yet."""
        due = shown and sign in self.seen and sign not in self.warned
        self.seen = [other for other in self.seen if other != sign] + [sign] * shown
        self.warned += [sign] * due
        return due
