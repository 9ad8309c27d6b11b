"""Training with the Trainer of Transformers: annealing of the KL terms, and their logs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, TrainerCallback

from .modeling_nvib import NvibForConditionalGeneration

SCHEDULES = ("constant", "linear", "cosine", "cyclic")
TERMS = ("gaussian", "dirichlet")
LOGGED = (
    "cross_entropy",
    "kl_gaussian",
    "kl_dirichlet",
    "num_vectors",
    "prop_vectors",
    "effective_num_vectors",
)


def find_nvib_model(model: nn.Module) -> NvibForConditionalGeneration:
    """The NVIB model inside whatever wraps it (PEFT, DDP, ``torch.compile``)."""
    for module in model.modules():
        if isinstance(module, NvibForConditionalGeneration):
            return module
    raise ValueError(f"{type(model).__name__} contains no NvibForConditionalGeneration. Wrap a base model first.")


def refuse_label_smoother(args) -> None:
    """Raise where the Trainer would take the labels away and with them the KL terms."""
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} in TrainingArguments replaces the model's loss "
            "and drops its KL terms. Set it to 0 and NvibConfig(label_smoothing=...) instead."
        )


class KLAnnealingCallback(TrainerCallback):
    r"""Anneals the weights of the KL terms: :math:`\beta(t)` in the loss of the model.

    With progress :math:`x` of the warm-up, from 0 at ``start_ratio`` of the training steps to 1 at
    ``start_ratio + warmup_ratio``:

    * ``"constant"``: 0 before ``start_ratio``, 1 from there;
    * ``"linear"``: :math:`x`;
    * ``"cosine"`` (monotonic): :math:`(1 - \cos \pi x) / 2`;
    * ``"cyclic"``: the steps from ``start_ratio`` are ``cycles`` equal parts, and in each :math:`\beta` rises linearly
      over the first ``warmup_ratio`` of it, then stays at 1.

    The value follows from the step alone, so it survives a resumed training.

    Args:
        schedule: one of the above.
        warmup_ratio: length of the warm-up as a share of the training steps (of a cycle, if cyclic), in [0, 1].
        start_ratio: share of the training steps before it, in [0, 1].
        cycles: number of cycles.
        terms: which KLs: ``("gaussian", "dirichlet")``, or one of them; use two callbacks for two schedules.

    Raises:
        ValueError: an argument outside its range.

    Source: Bowman et al. (CoNLL 2016); cyclic: Fu et al. (NAACL 2019).
    """

    def __init__(
        self,
        schedule: str = "linear",
        warmup_ratio: float = 0.25,
        start_ratio: float = 0.0,
        cycles: int = 4,
        terms: Sequence[str] = TERMS,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, but got {schedule!r}.")
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
        elapsed = progress - self.start_ratio
        if elapsed < 0:
            return 0.0
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cyclic":
            elapsed = elapsed * self.cycles / max(1 - self.start_ratio, 1e-12) % 1.0
        ramp = min(elapsed / self.warmup_ratio, 1.0) if self.warmup_ratio > 0 else 1.0
        return 0.5 * (1 - math.cos(math.pi * ramp)) if self.schedule == "cosine" else ramp

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        refuse_label_smoother(args)

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        beta = self.beta(state.global_step / max(state.max_steps, 1))
        weights = find_nvib_model(model).kl_beta
        with torch.no_grad():
            for term in self.terms:
                weights[TERMS.index(term)] = beta


class NvibTrainerMixin:
    """Adds the terms of the loss to a Trainer's logs, in training and evaluation.

    ``cross_entropy``, ``kl_gaussian`` and ``kl_dirichlet`` (nats, means over target tokens), ``num_vectors``,
    ``prop_vectors`` and ``effective_num_vectors`` (means over examples): since the last log, over all processes.

    Example:
        >>> class MyTrainer(NvibTrainerMixin, Seq2SeqTrainer): ...
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        refuse_label_smoother(self.args)
        self._nvib_sums: dict[bool, Tensor] = {}  # of training and of evaluation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._record(outputs, labels, model.training)
        return (loss, outputs) if return_outputs else loss

    def _record(self, outputs, labels: Tensor, training: bool) -> None:
        """Adds sums over tokens and examples, on the device: nothing is read before the next log."""
        tokens = (labels != -100).sum(-1)
        latents = outputs["latents"]
        sums = torch.stack(
            [
                outputs["cross_entropy"] * tokens.sum(),
                (tokens * latents["kl_gaussian"]).sum(),
                (tokens * latents["kl_dirichlet"]).sum(),
                latents["num_vectors"].sum(),
                latents["prop_vectors"].sum(),
                latents["effective_num_vectors"].sum(),
                tokens.sum(),
                torch.ones_like(tokens).sum(),
            ]
        ).detach()
        previous = self._nvib_sums.get(training)
        self._nvib_sums[training] = sums if previous is None else previous + sums

    def _recorded(self, training: bool) -> dict[str, float]:
        sums = self._nvib_sums.pop(training, None)
        if sums is None:
            return {}
        *terms, tokens, examples = self.accelerator.reduce(sums.float(), "sum").tolist()
        counts = [tokens] * 3 + [examples] * 3
        return {name: term / max(count, 1) for name, term, count in zip(LOGGED, terms, counts, strict=True)}

    def log(self, logs, start_time=None) -> None:
        if "loss" in logs:
            logs.update(self._recorded(training=True))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._nvib_sums.pop(False, None)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        recorded = self._recorded(training=False)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in recorded.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        if "labels" in inputs and not prediction_loss_only and getattr(self.args, "predict_with_generate", False):
            # Seq2SeqTrainer's generating step calls the model past compute_loss.
            with torch.no_grad(), self.compute_loss_context_manager():
                self.compute_loss(model, self._prepare_inputs(inputs))
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)


class NvibTrainer(NvibTrainerMixin, Seq2SeqTrainer):
    """``Seq2SeqTrainer`` that logs the cross-entropy, both KLs and the vectors kept."""
