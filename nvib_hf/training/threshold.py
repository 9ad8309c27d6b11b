"""Starts to drop vectors once the text is learnt, not before."""

from __future__ import annotations

import math
import warnings

import torch

from ..configuration_nvib import NvibConfig
from ..layers.settings import check_number, check_whole
from .control import running_mean
from .messages import ConstraintWarning, another_message, unmet_message
from .recording import MeasuringCallback

# A tolerance that is missed by less than this share counts as met.
SLACK = 0.05


class ThresholdCallback(MeasuringCallback):
    """Decides when, and in what share of the examples, ``alpha_threshold`` or a learned decision drops vectors.

    Nothing is dropped, not even in evaluation, until the running mean of the cross-entropy has come down to
    ``cross_entropy``: vectors that are dropped before the text is learned are never learned. If that takes longer than
    a third of the training, a :class:`ConstraintWarning` says what to do. Use this callback with fixed weights;
    :class:`ConstraintCallback` does the same and more.

    Args:
        cross_entropy: dropping begins at this cross-entropy of training, nats per target token.
        dropping_share: share of the training examples in which vectors are dropped after that. The other examples let
            a dropped vector come back. Evaluation drops vectors in every example.
        interval: steps between two measurements. The running mean covers about five of them.

    Raises:
        ValueError: an argument outside its range, or a model that drops nothing.
    """

    kept_in_checkpoints = (
        *MeasuringCallback.kept_in_checkpoints,
        "started",
        "average_cross_entropy",
        "average_kept",
        "last_met",
        "warned",
    )

    def __init__(self, cross_entropy: float = 0.15, dropping_share: float = 0.7, interval: int = 10) -> None:
        super().__init__({"cross_entropy": cross_entropy, "dropping_share": dropping_share, "interval": interval})
        check_number("cross_entropy", cross_entropy, above=0)
        check_number("dropping_share", dropping_share, above=0, most=1)
        check_whole("interval", interval, unit=" step")
        self.dropping_share, self.interval = dropping_share, int(interval)
        self.tolerance, self.started = cross_entropy, False
        self.average_cross_entropy: float | None = None
        self.average_kept: float | None = None
        self.last_met = 0  # step at which the tolerance was met last
        self.warned: list[str] = []
        self._written_share = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.check(self._model.config)
        self.apply()

    def check(self, config: NvibConfig) -> None:
        """Refuse a model that this callback cannot steer."""
        if not config.drops:
            raise ValueError(
                "The model has alpha_threshold=0, which drops nothing. Make it with alpha_threshold=0.1, or, if the "
                "decoder is frozen, with dropping='relaxed'."
            )

    @property
    def watched(self) -> float:
        """The cross-entropy to compare with the tolerance."""
        return self.average_cross_entropy

    @torch.no_grad()
    def apply(self) -> None:
        """Bring the model's buffers up to date."""
        self._written_share = self.dropping_share if self.started else 0.0
        for layer in self._model.nvib_layers().values():
            layer.dropping_share.fill_(self._written_share)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.interval:
            return
        means = self.measured(args.device)
        if not math.isfinite(means.get("cross_entropy", math.nan)):  # no target, or a step skipped by mixed precision
            return
        self.average_cross_entropy = running_mean(self.average_cross_entropy, means["cross_entropy"])
        self.average_kept = running_mean(self.average_kept, means["prop_vectors"])
        self.measure(args, state, means)
        if not math.isclose(self._model.nvib.dropping_share.item(), self._written_share, abs_tol=1e-6):
            self.warn("another", state, another_message(type(self).__name__))
        if self.started:
            self.steer()
        else:
            self.started = self.may_start()
        self.apply()
        self.look_for_trouble(state)

    def measure(self, args, state, means: dict[str, float]) -> None:
        """Take further measurements. ``means`` are those of training since the last time."""

    def may_start(self) -> bool:
        """Whether the text is learnt."""
        return self.watched <= self.tolerance

    def steer(self) -> None:
        """Called after each measurement once dropping has begun."""

    def look_for_trouble(self, state) -> None:
        """Warn of what keeps this callback from its work."""
        if self.watched <= (1 + SLACK) * self.tolerance:
            self.last_met = state.global_step
        elif self.has_waited_long(state):
            self.warn("unmet", state, unmet_message(type(self).__name__, state, self.watched, self.tolerance))

    def has_waited_long(self, state) -> bool:
        """Whether the tolerance has not been met for a third of the training."""
        return state.global_step - self.last_met >= max(state.max_steps / 3, 10 * self.interval)

    def warn(self, sign: str, state, message: str) -> None:
        """Warn once for each sign, in one process."""
        if sign not in self.warned:
            self.warned = [*self.warned, sign]
            if state.is_world_process_zero:
                warnings.warn(message, ConstraintWarning, stacklevel=2)

    def trace(self) -> dict[str, float]:
        return {"dropping_share": self.dropping_share if self.started else 0.0}
