"""How callbacks weigh the terms of the loss: schedules of annealing, and multipliers that follow an error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import TrainerCallback

from ..configuration_nvib import NvibConfig
from ..layers.settings import check_choice
from ..loss import TERMS
from .recording import MeasuringCallback, find_nvib_model

SCHEDULES = ("constant", "linear", "cosine", "cyclic")

# The share of vectors is extrapolated by four times what it lost against its mean over about 20 measurements, because
# vectors that are dropped come back slowly, if at all: with less, simulated trainings pass below the target.
SLOW, LEAD = 0.05, 4.0

# Above the tolerance by this much, in log, the share's multiplier does not rise any more.
MARGIN = 0.1


def annealed(
    progress: float, schedule: str, warmup_ratio: float = 0.25, start_ratio: float = 0.0, cycles: int = 4
) -> float:
    r"""The weight :math:`\beta` at a share ``progress`` in [0, 1] of the training steps.

    With progress :math:`x` of the warm-up, from 0 at ``start_ratio`` to 1 at ``start_ratio + warmup_ratio``:

    * ``"constant"``: 0 before ``start_ratio``, 1 from there;
    * ``"linear"``: :math:`x`;
    * ``"cosine"`` (monotonic): :math:`(1 - \cos \pi x) / 2`;
    * ``"cyclic"``: the steps from ``start_ratio`` are ``cycles`` equal parts, and in each :math:`\beta` rises linearly
      over the first ``warmup_ratio`` of it, then stays at 1.

    Source: Bowman et al. (CoNLL 2016); cyclic: Fu et al. (NAACL 2019).
    """
    elapsed = progress - start_ratio
    if elapsed < 0:
        return 0.0
    if schedule == "constant":
        return 1.0
    if schedule == "cyclic":
        elapsed = round(elapsed * cycles / max(1 - start_ratio, 1e-12), 9) % 1.0
    ramp = min(elapsed / warmup_ratio, 1.0) if warmup_ratio > 0 else 1.0
    return 0.5 * (1 - math.cos(math.pi * ramp)) if schedule == "cosine" else ramp


def multiplier(integral: float, error: float, gain: float) -> float:
    r"""A multiplier that follows an error by a slow integral and a proportional part.

    .. math::
        \log \beta = I + \mathrm{gain} \cdot e, \qquad I \leftarrow I + \mathrm{rate} \cdot e \text{ every step}
    """
    return math.exp(integral + gain * error)


def reconstruction_error(cross_entropy: float, tolerance: float) -> float:
    r""":math:`e = \log(\tau / \mathrm{CE})`, clipped to [-1, 1]: positive where there is room to compress."""
    return _clip(math.log(tolerance / max(cross_entropy, 1e-9)))


def share_error(kept: float, slow_kept: float, target: float, error: float) -> float:
    r"""By how much the share of vectors kept is above its target, as far as the reconstruction allows, in [-1, 1].

    .. math::
        s = \log \frac{\mathrm{kept} - 4 \max(\overline{\mathrm{kept}} - \mathrm{kept}, 0)}{\mathrm{target}}, \qquad
        e_V = \min(s, 0) + \max(s, 0) \min(\max(1 + 10 e, 0), 1) + \min(e, 0)

    So it holds back while the share still falls, does not rise while the cross-entropy is a tenth above the tolerance,
    and falls with :math:`e`: the reconstruction comes first, then the share, then the KLs.

    Args:
        kept: the share, as a mean over about five measurements.
        slow_kept: the same over about twenty.
        error: :math:`e`, of :func:`reconstruction_error`.
    """
    extrapolated = kept - LEAD * max(slow_kept - kept, 0.0)
    share = math.log(max(extrapolated, 1e-9) / target)
    allowed = min(max(1 + error / MARGIN, 0.0), 1.0)
    return _clip(min(share, 0.0) + allowed * max(share, 0.0) + min(error, 0.0))


def running_mean(mean: float | None, value: float, weight: float = 0.2) -> float:
    """The mean after one more value, over about ``1 / weight`` of them."""
    return value if mean is None else mean + weight * (value - mean)


def _clip(error: float) -> float:
    return min(max(error, -1.0), 1.0)


# ------------------------------------------------------------------------------------------------ annealing
class KLAnnealingCallback(TrainerCallback):
    r"""Anneals the weights of the KL terms: :math:`\beta(t)` in the loss of the model.

    The value follows from the step alone, so it survives a resumed training. The last one stays in the model, and is
    saved with it: what it is evaluated and trained further with.

    Args:
        schedule: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"cyclic"``, see
            :func:`~nvib_hf.training.callbacks.annealed`.
        warmup_ratio: length of the warm-up as a share of the training steps (of a cycle, if cyclic), in [0, 1].
        start_ratio: share of the training steps before it, in [0, 1].
        cycles: number of cycles.
        terms: of ``("gaussian", "dirichlet", "vectors")`` those whose ``lambda_*`` it anneals, by default all; use two
            callbacks for two schedules.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        schedule: str = "linear",
        warmup_ratio: float = 0.25,
        start_ratio: float = 0.0,
        cycles: int = 4,
        terms: Sequence[str] = TERMS,
    ) -> None:
        check_choice("schedule", schedule, SCHEDULES)
        for name, ratio in (("warmup_ratio", warmup_ratio), ("start_ratio", start_ratio)):
            if not 0 <= ratio <= 1:
                raise ValueError(f"{name} must be in [0, 1], but got {ratio}.")
        if cycles < 1:
            raise ValueError(f"cycles must be at least 1, but got {cycles}.")
        terms = (terms,) if isinstance(terms, str) else tuple(terms)
        if not terms or not set(terms) <= set(TERMS):
            raise ValueError(f"terms must be some of {', '.join(map(repr, TERMS))}, but got {terms}.")
        self.schedule, self.warmup_ratio, self.start_ratio = schedule, warmup_ratio, start_ratio
        self.cycles, self.terms = cycles, terms

    def beta(self, progress: float) -> float:
        """The weight at a share ``progress`` in [0, 1] of the training steps."""
        return annealed(progress, self.schedule, self.warmup_ratio, self.start_ratio, self.cycles)

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        beta = self.beta(state.global_step / max(state.max_steps, 1))
        weights = find_nvib_model(model).kl_beta
        with torch.no_grad():
            for term in self.terms:
                weights[TERMS.index(term)] = beta


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
                "The model has alpha_threshold=0, which drops nothing. Make it with one, such as 0.1, or, where the "
                "decoder is frozen, with dropping='relaxed'."
            )

    @torch.no_grad()
    def apply(self) -> None:
        """Bring the model's buffers up to date."""
        for layer in self._model.nvib_layers().values():
            layer.threshold_share.fill_(self.threshold_share if self.started else 0.0)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.interval or not (means := self.measured(args.device)):
            return
        if not math.isfinite(means["cross_entropy"]):  # of a step that mixed precision skips
            return
        self.average_cross_entropy = running_mean(self.average_cross_entropy, means["cross_entropy"])
        self.average_kept = running_mean(self.average_kept, means["prop_vectors"])
        if self.started:
            self.steer()
        else:
            self.started = self.average_cross_entropy <= self.tolerance
        self.apply()

    def steer(self) -> None:
        """After each measurement, once it has begun."""

    def trace(self) -> dict[str, float]:
        return {"threshold_share": self.threshold_share if self.started else 0.0}


class ConstraintCallback(ThresholdCallback):
    r"""Compresses as far as the reconstruction allows that the user accepts, and no further.

    .. math::
        \min \; \beta (\lambda_G KL_G + \lambda_D KL_D) + \beta_V \lambda_V \, \mathrm{share}
        \quad \text{such that} \quad \mathrm{CE} \le \tau

    The ``lambda_*`` say what counts how much among the terms, the multipliers (the model's ``kl_beta``) how much they
    count against the cross-entropy. These are ``start_beta`` until the constraint is met for the first time; nothing
    is dropped before. From there :math:`\beta` follows the error :math:`\log(\tau / \overline{\mathrm{CE}})`
    (:func:`~nvib_hf.training.callbacks.multiplier`), and the model's ``alpha_threshold`` drops vectors in
    ``threshold_share`` of the training examples, and in all of evaluation.

    Without ``target_prop_vectors``, :math:`\beta_V = \beta`. With it, :math:`\beta_V` follows an error of its own by
    the same law (:func:`share_error`), and :math:`\beta` goes on compressing the vectors that
    are kept. The share is that of the vectors really kept, which has no gradient where a threshold decides; what
    trains the pseudo-counts towards it is ``lambda_vectors`` with the relaxed share
    (:func:`~nvib_hf.layers.dropping.relaxed_share`), so set it above 0.

    Works with any ``Trainer``. Its state is part of the checkpoints, its trace (``constraint_beta``,
    ``constraint_beta_vectors``, ``constraint_cross_entropy``, ``constraint_tolerance``, ``constraint_prop_vectors``)
    of the logs. ``kl_beta`` belongs to it: leave out ``KLAnnealingCallback``.

    Args:
        cross_entropy: :math:`\tau`, the accepted cross-entropy of training, nats per target token.
        metric, metric_target: hold this result of the Trainer's evaluations, ``"eval_exact_match"`` or
            ``"eval_bleu"``, at the target by moving :math:`\tau` after each evaluation that has it.
        target_prop_vectors: share of the source vectors to keep, in (0, 1).
        start_beta: both multipliers before the constraint is met.
        rate: of the integrals, per step.
        gain: of the proportional parts.
        threshold_share, interval: as of :class:`ThresholdCallback`.

    Raises:
        ValueError: an argument outside its range; a model that cannot drop vectors where a share is asked for;
            evaluations none of which has the metric.

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
        self._evaluated: dict[str, float] | None = {}  # without the metric; None as soon as one has it

    @property
    def beta(self) -> float:
        """The multiplier of the KLs."""
        return multiplier(self.integral, self.error, self.gain)

    @property
    def beta_vectors(self) -> float:
        """The multiplier of the share of vectors."""
        if self.target_prop_vectors is None:
            return self.beta
        return multiplier(self.integral_vectors, self.error_vectors, self.gain)

    def check(self, config: NvibConfig) -> None:
        if self.target_prop_vectors is not None and config.lambda_vectors == 0:
            raise ValueError(
                f"target_prop_vectors={self.target_prop_vectors} needs a model that learns to drop vectors. Make it "
                "with NvibConfig(alpha_threshold=0.1, lambda_vectors=1), or, where the decoder is frozen, with "
                "NvibConfig(dropping='relaxed', lambda_vectors=1)."
            )
        if config.lambda_gaussian == config.lambda_dirichlet == config.lambda_vectors == 0:
            raise ValueError("All lambda_* of the model are 0, so there is nothing to weigh. Set lambda_gaussian, ...")

    @torch.no_grad()
    def apply(self) -> None:
        super().apply()
        self._model.kl_beta.copy_(torch.tensor([self.beta, self.beta, self.beta_vectors]))

    def steer(self) -> None:
        self.error = reconstruction_error(self.average_cross_entropy, self.tolerance)
        self.integral += self.rate * self.interval * self.error
        if self.target_prop_vectors is not None:
            self.slow_average_kept = running_mean(self.slow_average_kept, self.average_kept, SLOW)
            self.error_vectors = share_error(
                self.average_kept, self.slow_average_kept, self.target_prop_vectors, self.error
            )
            self.integral_vectors += self.rate * self.interval * self.error_vectors

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.metric is not None and self._evaluated:  # of several datasets, one may have it alone
            raise ValueError(
                f"metric={self.metric!r} is not among the results of the evaluation ({', '.join(self._evaluated)}). "
                "Give the Trainer a compute_metrics that returns it."
            )
        super().on_step_end(args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if self.metric is None or self._is_over:
            return
        if metrics is None or self.metric not in metrics:
            if self._evaluated is not None:
                self._evaluated = {**self._evaluated, **(metrics or {"nothing": math.nan})}
            return
        self._evaluated = None
        error = (metrics[self.metric] - self.metric_target) / self.metric_target
        if not self.started or not math.isfinite(error):
            return
        # No further up than what the multiplier's error, which is clipped at 1, can see: the rest would be a debt.
        if error < 0 or self.tolerance < math.e * self.average_cross_entropy:
            self.tolerance *= math.exp(min(max(5 * error, -0.5), 0.5))  # a miss of a tenth moves it by about 40 %

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
