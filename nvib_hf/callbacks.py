"""Training that is steered by what a user can name: a reconstruction to keep, or a share of vectors to keep."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .configuration_nvib import NvibConfig
from .recording import Recorder, find_nvib_model


class MeasuringCallback(TrainerCallback, ExportableState):
    """Sees what the model says in training, with any Trainer, and keeps its own state in the checkpoints.

    Subclasses name what to keep in ``kept_in_checkpoints``, and the arguments they were made with in ``arguments``.
    """

    kept_in_checkpoints: tuple[str, ...] = ()

    def __init__(self, arguments: dict) -> None:
        self.arguments = arguments
        self._recorder, self._hook = Recorder(), None

    def state(self) -> dict:
        """What the Trainer writes to ``trainer_state.json``."""
        return {"args": self.arguments, "attributes": {name: getattr(self, name) for name in self.kept_in_checkpoints}}

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        for entry in saved if isinstance(saved, list) else [saved]:
            if entry.get("args") == self.arguments:  # a resumed training goes on where it stood
                vars(self).update(entry["attributes"])
        self.on_train_end(args, state, control)  # of a training that was broken off
        self._model = find_nvib_model(model)
        self._recorder.clear()
        self._hook = self._model.register_forward_hook(self._see, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _see(self, model: nn.Module, args: tuple, inputs: dict, outputs) -> None:
        if model.training:  # not the evaluations on the way
            self.record(model, inputs, outputs)

    def record(self, model: nn.Module, inputs: dict, outputs) -> None:
        """Take note of a forward pass of training."""
        self._recorder.hook(model, (), inputs, outputs)

    def measured(self, device: torch.device) -> dict[str, float]:
        """Means over what all processes saw since the last call."""
        return self._recorder.read(device)

    def trace(self) -> dict[str, float]:
        """What to log."""
        return {}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is not None and "loss" in logs:
            trace = self.trace()
            logs.update(trace)
            state.log_history[-1].update(trace)


class ThresholdCallback(MeasuringCallback):
    """When, and in what share of the examples, vectors are dropped: by ``alpha_threshold`` or a learned decision.

    Off, in evaluation too, until the running mean of the cross-entropy has come down to ``cross_entropy``: vectors
    that are dropped before the text is learned are never learned. For training with fixed weights;
    :class:`ConstraintCallback` does the same and more.

    Args:
        cross_entropy: of training, nats per target token, at which it begins.
        threshold_share: share of the training examples in which it drops from there on; the others let a dropped
            vector come back. In evaluation it always does.
        interval: steps between two measurements; the running mean is over about five of them.

    Raises:
        ValueError: an argument outside its range, or a model that drops nothing.
    """

    kept_in_checkpoints = ("started", "average_cross_entropy", "average_kept")

    def __init__(self, cross_entropy: float = 0.15, threshold_share: float = 0.7, interval: int = 10) -> None:
        super().__init__({"cross_entropy": cross_entropy, "threshold_share": threshold_share, "interval": interval})
        for name, value in (("cross_entropy", cross_entropy), ("interval", interval)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, but got {value}.")
        if not 0 < threshold_share <= 1:
            raise ValueError(f"threshold_share must be in (0, 1], but got {threshold_share}.")
        self.threshold_share, self.interval = threshold_share, int(interval)
        self.tolerance, self.started = cross_entropy, False
        self.average_cross_entropy: float | None = None
        self.average_kept: float | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.check(self._model.config)
        self.apply()

    def check(self, config: NvibConfig) -> None:
        """Refuse a model that this cannot steer."""
        if not config.drops:
            raise ValueError(
                "The model has alpha_threshold=0, which drops nothing. Make it with one, such as 0.1, or with "
                "dropping='hard' ('relaxed' for a frozen decoder)."
            )

    @torch.no_grad()
    def apply(self) -> None:
        """Bring the model's buffers up to date."""
        self._model.nvib.threshold_share.fill_(self.threshold_share if self.started else 0.0)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.interval or not (means := self.measured(args.device)):
            return
        self.average_cross_entropy = _average(self.average_cross_entropy, means["cross_entropy"])
        self.average_kept = _average(self.average_kept, means["prop_vectors"])
        if self.started:
            self.steer()
        else:
            self.started = self.average_cross_entropy <= self.tolerance
        self.apply()

    def steer(self) -> None:
        """After each measurement, once it has begun."""

    def trace(self) -> dict[str, float]:
        return {"threshold_share": self.threshold_share if self.started else 0.0}


# The share of vectors is extrapolated by four times what it lost against its mean over about 20 measurements, because
# vectors that are dropped come back slowly, if at all: with less, simulated trainings pass below the target.
SLOW, LEAD = 0.05, 4.0
# Above the tolerance by this much, in log, the share's multiplier does not rise any more.
MARGIN = 0.1


class ConstraintCallback(ThresholdCallback):
    r"""Compresses as far as the reconstruction allows that the user accepts, and no further.

    .. math::
        \min \; \beta (\lambda_G KL_G + \lambda_D KL_D) + \beta_V \lambda_V \, \mathrm{share}
        \quad \text{such that} \quad \mathrm{CE} \le \tau

    The ``lambda_*`` say what counts how much among the terms, the multipliers (the model's ``kl_beta``) how much they
    count against the cross-entropy. These are ``start_beta`` until the constraint is met for the first time; nothing
    is dropped before. From there :math:`\beta` follows the error :math:`e = \log(\tau / \overline{\mathrm{CE}})`,
    clipped to [-1, 1], by a slow integral and a proportional part:

    .. math::
        \log \beta = I + \mathrm{gain} \cdot e, \qquad I \leftarrow I + \mathrm{rate} \cdot e \text{ every step}

    The model's ``alpha_threshold`` drops vectors in ``threshold_share`` of the training examples from the same moment
    on, and in all of evaluation.

    Without ``target_prop_vectors``, :math:`\beta_V = \beta`. With it, :math:`\beta_V` follows an error of its own by
    the same law, and :math:`\beta` goes on compressing the vectors that are kept:

    .. math::
        s = \log \frac{\overline{\mathrm{kept}} - 4 \max(\overline{\overline{\mathrm{kept}}}
        - \overline{\mathrm{kept}}, 0)}{\mathrm{target}}, \qquad
        e_V = \min(s, 0) + \max(s, 0) \min(\max(1 + 10 e, 0), 1) + \min(e, 0)

    with the slower mean :math:`\overline{\overline{\mathrm{kept}}}`, so it holds back while the share still falls. It
    does not rise while the cross-entropy is a tenth above the tolerance, and falls with :math:`e`: the
    reconstruction comes first, then the share, then the KLs. The share is that of the vectors really kept, which has
    no gradient where a threshold decides; what trains the pseudo-counts towards it is ``lambda_vectors`` with the
    relaxed share (:func:`~nvib_hf.dropping.relaxed_share`), so set it above 0.

    Works with any ``Trainer``. Its state is part of the checkpoints, its trace (``constraint_beta``,
    ``constraint_beta_vectors``, ``constraint_cross_entropy``, ``constraint_tolerance``, ``constraint_prop_vectors``)
    of the logs. ``kl_beta`` belongs to it: leave out ``KLAnnealingCallback``.

    Args:
        cross_entropy: :math:`\tau`, the accepted cross-entropy of training, nats per target token.
        metric, metric_target: hold this result of the Trainer's evaluations, ``"eval_exact_match"`` or
            ``"eval_bleu"``, at the target by moving :math:`\tau` after each evaluation.
        target_prop_vectors: share of the source vectors to keep, in (0, 1).
        start_beta: both multipliers before the constraint is met.
        rate: of the integrals, a step.
        gain: of the proportional parts.
        interval: steps between two measurements; the means are over about five of them.
        threshold_share: share of the training examples in which the threshold drops vectors; the others let a dropped
            vector come back.

    Raises:
        ValueError: an argument outside its range; a model that cannot drop vectors where a share is asked for; an
            evaluation without the metric.

    Source: Rezende & Viola, *Taming VAEs* (2018), with the multiplier on the other side of the sum; the second
    multiplier is this project's own.
    """

    kept_in_checkpoints = (
        *ThresholdCallback.kept_in_checkpoints,
        "tolerance",
        "integral",
        "error",
        "integral_vectors",
        "error_vectors",
        "slow_average_kept",
    )

    def __init__(
        self,
        cross_entropy: float = 0.15,
        metric: str | None = None,
        metric_target: float | None = None,
        target_prop_vectors: float | None = None,
        start_beta: float = 0.03,
        rate: float = 0.005,
        gain: float = 1.0,
        threshold_share: float = 0.7,
        interval: int = 10,
    ) -> None:
        super().__init__(cross_entropy, threshold_share, interval)
        self.arguments.update(
            metric=metric,
            metric_target=metric_target,
            target_prop_vectors=target_prop_vectors,
            start_beta=start_beta,
            rate=rate,
            gain=gain,
        )
        for name, value in (("start_beta", start_beta), ("rate", rate)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, but got {value}.")
        if not 0 <= gain < math.inf:
            raise ValueError(f"gain must be 0 or positive, but got {gain}.")
        if (metric is None) != (metric_target is None):
            raise ValueError(f"metric={metric!r} and metric_target={metric_target} belong together: give both.")
        if metric_target is not None and not metric_target > 0:
            raise ValueError(
                f"metric_target must be positive, of a result that is better if more: got {metric_target}."
            )
        if target_prop_vectors is not None and not 0 < target_prop_vectors < 1:
            raise ValueError(f"target_prop_vectors must be in (0, 1), but got {target_prop_vectors}.")
        self.metric, self.metric_target, self.target_prop_vectors = metric, metric_target, target_prop_vectors
        self.start_beta, self.rate, self.gain = start_beta, rate, gain
        self.integral = self.integral_vectors = math.log(start_beta)
        self.error = self.error_vectors = 0.0
        self.slow_average_kept: float | None = None

    @property
    def beta(self) -> float:
        """The multiplier of the KLs."""
        return math.exp(self.integral + self.gain * self.error)

    @property
    def beta_vectors(self) -> float:
        """The multiplier of the share of vectors."""
        if self.target_prop_vectors is None:
            return self.beta
        return math.exp(self.integral_vectors + self.gain * self.error_vectors)

    def check(self, config: NvibConfig) -> None:
        if self.target_prop_vectors is not None and config.lambda_vectors == 0:
            raise ValueError(
                f"target_prop_vectors={self.target_prop_vectors} needs a model that learns to drop vectors. Make it "
                "with NvibConfig(dropping='hard', lambda_vectors=1) ('relaxed' for a frozen decoder), or with "
                "NvibConfig(alpha_threshold=0.1, lambda_vectors=1)."
            )
        if config.lambda_gaussian == config.lambda_dirichlet == config.lambda_vectors == 0:
            raise ValueError("All lambda_* of the model are 0, so there is nothing to weigh. Set lambda_gaussian, ...")

    @torch.no_grad()
    def apply(self) -> None:
        super().apply()
        self._model.kl_beta.copy_(torch.tensor([self.beta, self.beta, self.beta_vectors]))

    def steer(self) -> None:
        self.error = _clip(math.log(self.tolerance / max(self.average_cross_entropy, 1e-9)))
        self.integral += self.rate * self.interval * self.error
        if self.target_prop_vectors is not None:
            self.error_vectors = _clip(self._share_error())
            self.integral_vectors += self.rate * self.interval * self.error_vectors

    def _share_error(self) -> float:
        self.slow_average_kept = _average(self.slow_average_kept, self.average_kept, SLOW)
        kept = self.average_kept - LEAD * max(self.slow_average_kept - self.average_kept, 0.0)
        share = math.log(max(kept, 1e-9) / self.target_prop_vectors)
        allowed = min(max(1 + self.error / MARGIN, 0.0), 1.0)
        return min(share, 0.0) + allowed * max(share, 0.0) + min(self.error, 0.0)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if self.metric is None:
            return
        if metrics is None or self.metric not in metrics:
            raise ValueError(
                f"metric={self.metric!r} is not among the results of the evaluation ({', '.join(metrics or ())}). "
                "Give the Trainer a compute_metrics that returns it."
            )
        if self.started:  # a miss of a tenth moves the tolerance by about 40 %
            error = (metrics[self.metric] - self.metric_target) / self.metric_target
            self.tolerance *= math.exp(min(max(5 * error, -0.5), 0.5))

    def trace(self) -> dict[str, float]:
        trace = {
            **super().trace(),
            "constraint_beta": self.beta,
            "constraint_beta_vectors": self.beta_vectors,
            "constraint_tolerance": self.tolerance,
        }
        if self.average_cross_entropy is not None:
            trace["constraint_cross_entropy"] = self.average_cross_entropy
            trace["constraint_prop_vectors"] = self.average_kept
        return trace


def _average(average: float | None, value: float, weight: float = 0.2) -> float:
    """A running mean, over about five values by default."""
    return value if average is None else average + weight * (value - average)


def _clip(error: float) -> float:
    return min(max(error, -1.0), 1.0)
