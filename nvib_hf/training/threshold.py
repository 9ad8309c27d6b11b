"""When vectors begin to be dropped: not before the text is learnt."""

from __future__ import annotations

import math
import warnings

import torch

from ..configuration_nvib import NvibConfig
from ..layers.settings import check_number, check_whole
from .control import running_mean
from .messages import ConstraintWarning, unmet_message
from .recording import MeasuringCallback

# Where the tolerance is missed by less than this share, it counts as met.
SLACK = 0.05


class ThresholdCallback(MeasuringCallback):
    """When, and in what share of the examples, vectors are dropped: by ``alpha_threshold`` or a learned decision.

    Off, in evaluation too, until the running mean of the cross-entropy has come down to ``cross_entropy``: vectors
    that are dropped before the text is learned are never learned. For training with fixed weights;
    :class:`ConstraintCallback` does the same and more. Where that takes longer than a third of the training, a
    :class:`ConstraintWarning` says what there is to do.

    Args:
        cross_entropy: of training, nats per target token, at which it begins.
        dropping_share: share of the training examples in which it drops from there on; the others let a dropped
            vector come back. In evaluation it always does.
        interval: steps between two measurements; the running mean is over about five of them.

    Raises:
        ValueError: an argument outside its range, or a model that drops nothing.
    """

    kept_in_checkpoints: tuple[str, ...] = ("started", "average_cross_entropy", "average_kept", "last_met", "warned")

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

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.check(self._model.config)
        self.apply()

    def check(self, config: NvibConfig) -> None:
        """Refuse a model that this cannot steer."""
        if not config.drops:
            raise ValueError(
                "The model has alpha_threshold=0, which drops nothing. Make it with one, such as 0.1, or, where the "
                "decoder is frozen, with dropping='relaxed'."
            )

    @property
    def watched(self) -> float:
        """The cross-entropy that is held against the tolerance."""
        return self.average_cross_entropy

    @torch.no_grad()
    def apply(self) -> None:
        """Bring the model's buffers up to date."""
        for layer in self._model.nvib_layers().values():
            layer.dropping_share.fill_(self.dropping_share if self.started else 0.0)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.interval:
            return
        means = self.measured(args.device)
        if not math.isfinite(means.get("cross_entropy", math.nan)):  # no target, or a step that mixed precision skips
            return
        self.average_cross_entropy = running_mean(self.average_cross_entropy, means["cross_entropy"])
        self.average_kept = running_mean(self.average_kept, means["prop_vectors"])
        self.measure(args, state, means)
        if self.started:
            self.steer()
        else:
            self.started = self.may_start()
        self.apply()
        self.look_for_trouble(state)

    def measure(self, args, state, means: dict[str, float]) -> None:
        """Take further measurements, of which ``means`` are those of training since the last time."""

    def may_start(self) -> bool:
        """Whether the text is learnt."""
        return self.watched <= self.tolerance

    def steer(self) -> None:
        """After each measurement, once it has begun."""

    def look_for_trouble(self, state) -> None:
        """Warn of what keeps this from its work."""
        if self.watched <= (1 + SLACK) * self.tolerance:
            self.last_met = state.global_step
        elif self.has_waited_long(state):
            self.warn("unmet", state, unmet_message(type(self).__name__, state, self.watched, self.tolerance))

    def has_waited_long(self, state) -> bool:
        """Whether the tolerance has not been met for a third of the training."""
        return state.global_step - self.last_met >= max(state.max_steps / 3, 10 * self.interval)

    def warn(self, sign: str, state, message: str) -> None:
        """Once for each sign, by one process."""
        if sign not in self.warned:
            self.warned = [*self.warned, sign]
            if state.is_world_process_zero:
                warnings.warn(message, ConstraintWarning, stacklevel=2)

    def trace(self) -> dict[str, float]:
        return {"dropping_share": self.dropping_share if self.started else 0.0}
