"""Compresses until the reconstruction is as bad as you accept: multipliers that follow an error."""

from __future__ import annotations

import math

import torch
from transformers.trainer_utils import IntervalStrategy

from ..configuration_nvib import NvibConfig
from ..layers.settings import check_number, check_whole
from .control import SLOW, multiplier, reconstruction_error, running_mean, share_error
from .held_out import HeldOut, cross_entropy_of
from .messages import OTHERS, UNEVALUATED, memorised_message, runaway_message, unheld_message, unmet_message
from .recording import find_nvib_model
from .threshold import SLACK, ThresholdCallback

# A multiplier is at most this many times the one that the evidence lower bound has.
BOUND = 10.0

# The integral falls at most this far below its start, in log, so that a multiplier can still come back.
FALL = 8.0

# Without held-out texts, warn after this many passes over the training texts: the model may know them by heart.
MANY_EPOCHS = 20

# Results of evaluations, by a part of their name, that get smaller as a model gets better.
SMALLER_IS_BETTER = {"loss", "error", "errors", "wer", "cer", "ter", "perplexity", "ppl", "mse", "rmse", "mae"}

# If held-out texts cost this many nats per token more than training texts, the latter are known by heart.
GAP = 0.5


def evaluates_never(args) -> bool:
    """Whether a Trainer with these arguments never evaluates by itself."""
    return getattr(args, "eval_strategy", None) == IntervalStrategy.NO


class ConstraintCallback(ThresholdCallback):
    r"""Compresses as long as the reconstruction is as good as you ask for, and no further.

    .. math::
        \min \; \beta (\lambda_G KL_G + \lambda_D KL_D) + \beta_V \lambda_V \, \mathrm{share}
        \quad \text{such that} \quad \mathrm{CE} \le \tau

    The ``lambda_*`` weigh the terms against each other. The multipliers (the model's ``kl_beta``) weigh the terms
    against the cross-entropy. They stay at ``start_beta`` until the constraint is met for the first time; nothing is
    dropped before that. Then :math:`\beta` follows the error :math:`\log(\tau / \mathrm{CE})`
    (:func:`~nvib_hf.training.control.multiplier`), and the model's ``alpha_threshold`` drops vectors in
    ``dropping_share`` of the training examples, and in all of evaluation.

    CE is the larger of two cross-entropies: the running mean of training, and that of held-out texts, decoded as in
    evaluation every ``held_out_interval`` steps. So nothing is compressed if only training texts known by heart meet
    the constraint. The held-out texts are up to ``held_out_examples`` of the ``eval_dataset``. ``NvibTrainer`` gives
    them from the start; another ``Trainer`` gives them at its first evaluation. If there are none, the last training
    batch replaces them.

    Without ``target_prop_vectors``, :math:`\beta_V = \beta`. With it, :math:`\beta_V` follows its own error by the
    same law (:func:`~nvib_hf.training.control.share_error`), and :math:`\beta` goes on compressing the vectors that
    are kept. The error of :math:`\beta_V` uses the share of vectors really kept, which has no gradient if a threshold
    decides. The pseudo-counts learn from ``lambda_vectors`` and the relaxed share
    (:func:`~nvib_hf.layers.dropping.relaxed_share`), so set ``lambda_vectors`` above 0.

    A multiplier never exceeds ``max_beta``, and does not rise while vectors say less than ``min_nats``. A
    :class:`ConstraintWarning` appears, once for each cause: the constraint has not been met for a third of the
    training; training texts are learnt by heart; no text is held out; a multiplier ran away; something else sets the
    multipliers.

    The callback works with any ``Trainer``. Checkpoints hold its state. Logs hold its trace (``constraint_beta``,
    ``constraint_beta_vectors``, ``constraint_cross_entropy``, ``constraint_held_out_cross_entropy``,
    ``constraint_tolerance``, ``constraint_prop_vectors``). Leave out ``KLAnnealingCallback``, since both would set
    ``kl_beta``.

    Args:
        cross_entropy: :math:`\tau`, the accepted cross-entropy, nats per target token; 0.15 unless there is a metric.
        metric, metric_target: hold this result of the Trainer's evaluations, such as ``"eval_exact_match"`` or
            ``"eval_bleu"``, at the target. A larger result must be a better one. Then the metric alone decides.
            Compression begins at the first evaluation that reaches the target, whatever the cross-entropy.
            :math:`\tau` starts at ``cross_entropy``, or at the cross-entropy of training so far, and moves after each
            evaluation. CE is the one of training.
        target_prop_vectors: share of the source vectors to keep, in (0, 1).
        start_beta: both multipliers before the constraint is met. ``None`` starts from those of the model, to go on
            where a training ended.
        rate: rate of the integrals, per step.
        gain: gain of the proportional parts.
        dropping_share, interval: as in :class:`ThresholdCallback`.
        held_out_interval: steps between two measurements on held-out texts.
        held_out_examples: how many of them at most. 0 means none, so that only training counts.
        max_beta: the largest multiplier. The default is ten times the multiplier of the evidence lower bound, whose
            ``KL_G`` is a sum over channels: ``10 * width / lambda_gaussian``.
        min_nats: if ``P * KL_G + KL_D``, nats per latent vector, is below this, a multiplier does not rise.

    Raises:
        ValueError: an argument outside its range; a target share for a model that cannot drop vectors; the first
            evaluation lacks the metric; a metric that is better if smaller.

    Source: Rezende & Viola, *Taming VAEs* (2018), with the multiplier on the other side of the sum. The second
    multiplier and the held-out texts are this project's own.
    """

    kept_in_checkpoints = (
        *ThresholdCallback.kept_in_checkpoints,
        "start_beta",
        "tolerance",
        "integral",
        "error",
        "integral_vectors",
        "error_vectors",
        "slow_average_kept",
        "average_nats",
        "held_out_cross_entropy",
        "has_held_out",
    )

    def __init__(
        self,
        cross_entropy: float | None = None,
        metric: str | None = None,
        metric_target: float | None = None,
        target_prop_vectors: float | None = None,
        start_beta: float | None = 0.03,
        rate: float = 0.005,
        gain: float = 1.0,
        dropping_share: float = 0.7,
        interval: int = 10,
        held_out_interval: int = 50,
        held_out_examples: int = 256,
        max_beta: float | None = None,
        min_nats: float = 1.0,
    ) -> None:
        super().__init__(0.15 if cross_entropy is None else cross_entropy, dropping_share, interval)
        self.arguments.update(
            cross_entropy=cross_entropy,
            metric=metric,
            metric_target=metric_target,
            target_prop_vectors=target_prop_vectors,
            start_beta=start_beta,
            rate=rate,
            gain=gain,
            held_out_interval=held_out_interval,
            held_out_examples=held_out_examples,
            max_beta=max_beta,
            min_nats=min_nats,
        )
        if start_beta is not None:
            check_number("start_beta", start_beta, above=0)
        check_number("rate", rate, above=0)
        check_number("gain", gain, least=0)
        check_number("min_nats", min_nats, least=0)
        check_whole("held_out_interval", held_out_interval, unit=" step")
        check_whole("held_out_examples", held_out_examples, least=0)
        if max_beta is not None:
            check_number("max_beta", max_beta, **({"above": 0} if start_beta is None else {"least": start_beta}))
        if (metric is None) != (metric_target is None):
            raise ValueError(f"metric={metric!r} and metric_target={metric_target} belong together. Give both.")
        if metric is not None:
            if not isinstance(metric, str):
                raise ValueError(f"metric must be the name of a result, such as 'eval_bleu', but got {metric!r}.")
            check_number("metric_target", metric_target, above=0)
            if SMALLER_IS_BETTER & set(metric.lower().split("_")):
                raise ValueError(
                    f"metric={metric!r} is better if smaller, but the constraint holds results that are better if "
                    "larger. Return such a one from compute_metrics too, for instance 1 - wer as 'words_right'."
                )
        if target_prop_vectors is not None:
            check_number("target_prop_vectors", target_prop_vectors, above=0, below=1)
        self.metric, self.metric_target, self.target_prop_vectors = metric, metric_target, target_prop_vectors
        self.start_beta, self.rate, self.gain = start_beta, rate, gain
        self.max_beta, self.min_nats = max_beta, min_nats
        self.held_out_interval, self.held_out_examples = int(held_out_interval), int(held_out_examples)
        self.integral = self.integral_vectors = None if start_beta is None else math.log(start_beta)
        self.error = self.error_vectors = 0.0
        self.slow_average_kept: float | None = None
        self.average_nats: float | None = None
        self.held_out_cross_entropy: float | None = None
        self.has_held_out = False  # also in a resumed training whose Trainer has not given its texts yet
        self._held_out: HeldOut | None = None
        self._evaluated: dict[str, float] | None = {}  # results without the metric; None once an evaluation has it
        self._last_metric: float | None = None
        self._last: dict | None = None  # the inputs of the last training batch
        self._written: torch.Tensor | None = None  # the multipliers that this callback wrote
        self._in_force: torch.Tensor | None = None  # the multipliers of the last step

    # ---------------------------------------------------------------------------------------------- multipliers
    @property
    def beta(self) -> float:
        """The multiplier of the KLs."""
        return min(multiplier(self.integral, self.error, self.gain), self.bound)

    @property
    def beta_vectors(self) -> float:
        """The multiplier of the share of vectors."""
        if self.target_prop_vectors is None:
            return self.beta
        return min(multiplier(self.integral_vectors, self.error_vectors, self.gain), self.bound)

    @property
    def bound(self) -> float:
        """The largest multiplier."""
        if self.max_beta is not None or self._model is None:
            return self.max_beta or math.inf
        config = self._model.config
        weight = config.lambda_gaussian or max(config.lambda_dirichlet, config.lambda_vectors)
        return max(BOUND * self._model.nvib.size_out / weight, self.start_beta)

    def check(self, config: NvibConfig) -> None:
        if self.target_prop_vectors is not None and config.lambda_vectors == 0:
            raise ValueError(
                f"target_prop_vectors={self.target_prop_vectors} needs a model that learns to drop vectors. Make it "
                "with NvibConfig(alpha_threshold=0.1, lambda_vectors=1), or, where the decoder is frozen, with "
                "NvibConfig(dropping='relaxed', lambda_vectors=1)."
            )
        if config.lambda_gaussian == config.lambda_dirichlet == config.lambda_vectors == 0:
            raise ValueError(
                "All lambda_* of the model are 0, so there is nothing to weigh. Set lambda_gaussian above 0."
            )

    @torch.no_grad()
    def apply(self) -> None:
        super().apply()
        multipliers = self._model.kl_beta
        multipliers.copy_(torch.tensor([self.beta, self.beta, self.beta_vectors]))
        self._written = multipliers.clone()

    def steer(self) -> None:
        self.error = self.compressing(reconstruction_error(self.watched, self.tolerance))
        self.integral = self.moved(self.integral, self.error)
        if self.target_prop_vectors is not None:
            self.slow_average_kept = running_mean(self.slow_average_kept, self.average_kept, SLOW)
            self.error_vectors = share_error(
                self.average_kept, self.slow_average_kept, self.target_prop_vectors, self.error
            )
            self.integral_vectors = self.moved(self.integral_vectors, self.error_vectors)

    def compressing(self, error: float) -> float:
        """The error, or at most 0 if the vectors say next to nothing already: then nothing more is compressed."""
        is_empty = self.average_nats is not None and self.average_nats < self.min_nats
        return min(error, 0.0) if is_empty else error

    def moved(self, integral: float, error: float) -> float:
        """An integral after one interval, within its bounds."""
        low, high = math.log(self.start_beta) - FALL, math.log(self.bound)
        return min(max(integral + self.rate * self.interval * error, low), high)

    # --------------------------------------------------------------------------------------------- measurements
    @property
    def watched(self) -> float:
        if self.metric is not None or self.held_out_cross_entropy is None:
            return self.average_cross_entropy
        return max(self.average_cross_entropy, self.held_out_cross_entropy)

    def restore(self, attributes: dict) -> None:
        # Without start_beta, what a Trainer notes before the training does not have the model's multipliers yet.
        early = {"start_beta", "integral", "integral_vectors"}
        super().restore({name: x for name, x in attributes.items() if x is not None or name not in early})

    def on_train_begin(self, args, state, control, model=None, eval_dataloader=None, **kwargs) -> None:
        self._held_out, self._in_force = HeldOut.of(eval_dataloader, self.held_out_examples), None
        if self.start_beta is None:
            beta, _, beta_vectors = find_nvib_model(model).kl_beta.tolist()
            check_number("start_beta=None, the model's kl_beta,", min(beta, beta_vectors), above=0)
            self.start_beta, self.integral, self.integral_vectors = beta, math.log(beta), math.log(beta_vectors)
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.has_held_out = self.has_held_out or self._held_out is not None
        if self.metric is not None and evaluates_never(args):
            self.warn("unevaluated", state, UNEVALUATED)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._last = None

    def record(self, model, inputs: dict, outputs) -> None:
        super().record(model, inputs, outputs)
        self._last = inputs

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.metric is not None and self._evaluated:  # only one of several datasets may have it
            raise ValueError(
                f"metric={self.metric!r} is not among the results of the evaluation ({', '.join(self._evaluated)}). "
                "Give the Trainer a compute_metrics that returns it."
            )
        self._in_force = self._model.kl_beta.clone()
        super().on_step_end(args, state, control, **kwargs)
        self._last = None  # no batch is held beyond its step

    def measure(self, args, state, means: dict[str, float]) -> None:
        if not torch.equal(self._in_force, self._written):
            self.warn("others", state, OTHERS)
        if "kl_gaussian" in means:
            nats = self._model.nvib.size_out * means["kl_gaussian"] + means["kl_dirichlet"]
            self.average_nats = running_mean(self.average_nats, nats)
        before = state.global_step - self.interval
        is_due = state.global_step // self.held_out_interval > before // self.held_out_interval
        is_due = is_due or self.held_out_cross_entropy is None  # measure held-out texts before compression starts
        awaited = self.has_held_out and self._held_out is None and not evaluates_never(args)
        if is_due and self.metric is None and self.held_out_examples and not awaited:
            batches = (
                [self._last] * (self._last is not None) if self._held_out is None else self._held_out.batches(args)
            )
            measured = cross_entropy_of(self._model, batches, args)
            if measured is not None and math.isfinite(measured):
                self.held_out_cross_entropy = measured

    def may_start(self) -> bool:
        return self.metric is None and super().may_start()

    def on_evaluate(self, args, state, control, metrics=None, eval_dataloader=None, **kwargs) -> None:
        if self._is_over:
            return
        if self._held_out is None:  # this Trainer gives its held-out texts only now
            self._held_out = HeldOut.of(eval_dataloader, self.held_out_examples)
            self.has_held_out = self._held_out is not None
        if self.metric is None:
            return
        if metrics is None or self.metric not in metrics:
            if self._evaluated is not None:
                self._evaluated = {**self._evaluated, **(metrics or {"nothing": math.nan})}
            return
        self._evaluated = None
        error = (metrics[self.metric] - self.metric_target) / self.metric_target
        if not math.isfinite(error):
            return
        self._last_metric = metrics[self.metric]
        if not self.started and (error < 0 or self.average_cross_entropy is None):
            return
        if not self.started:
            self.started = True
            if self.arguments["cross_entropy"] is None:
                self.tolerance = self.average_cross_entropy
        # The multiplier's error is clipped at 1. A higher tolerance would have no effect now, and have to fall later.
        if error < 0 or self.tolerance < math.e * self.average_cross_entropy:
            self.tolerance *= math.exp(min(max(5 * error, -0.5), 0.5))  # a miss of a tenth moves it by about 40 %

    # ------------------------------------------------------------------------------------------------- warnings
    def look_for_trouble(self, state) -> None:
        training, held_out = self.average_cross_entropy, self.held_out_cross_entropy
        has_gap = self._held_out is not None and held_out is not None and held_out > training + GAP
        if self.metric is not None:
            if self._last_metric is None:
                if self.has_waited_long(state):
                    self.warn("unevaluated", state, UNEVALUATED)
            elif self._last_metric >= (1 - SLACK) * self.metric_target:
                self.last_met = state.global_step
            elif self.has_waited_long(state):
                what = (self._last_metric, self.metric_target, self.metric)
                self.warn("unmet", state, unmet_message(type(self).__name__, state, *what))
        elif has_gap and held_out > self.tolerance:
            if self.has_waited_long(state) or training < 0.5 * self.tolerance:
                self.warn("memorised", state, memorised_message(state, training, held_out, self.tolerance))
        else:
            super().look_for_trouble(state)
        if self.started:
            is_empty = self.average_nats is not None and self.average_nats < self.min_nats
            if is_empty or (max(self.beta, self.beta_vectors) >= self.bound and self.max_beta is None):
                numbers = {"training": training, "held_out": held_out if self._held_out else None}
                self.warn("runaway", state, runaway_message(state, self.beta, self.average_nats, **numbers))
            elif self.metric is None and self._held_out is None and (state.epoch or 0) >= MANY_EPOCHS:
                self.warn("unheld", state, unheld_message(state, training))

    def trace(self) -> dict[str, float]:
        beta, _, beta_vectors = [self.beta] * 3 if self._in_force is None else self._in_force.tolist()
        trace = {
            **super().trace(),
            "constraint_beta": beta,
            "constraint_beta_vectors": beta_vectors,
            "constraint_tolerance": self.tolerance,
        }
        if self.average_cross_entropy is not None:
            trace["constraint_cross_entropy"] = self.average_cross_entropy
            trace["constraint_prop_vectors"] = self.average_kept
        if self.held_out_cross_entropy is not None:
            trace["constraint_held_out_cross_entropy"] = self.held_out_cross_entropy
        return trace
