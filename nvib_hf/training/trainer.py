"""The Trainer of Transformers with the terms of the loss in its logs and in the model card."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import Seq2SeqTrainer, TrainerState
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import default_compute_objective
from transformers.utils import logging

from ..evaluation.report import evaluation_of, with_evaluation
from ..files import write_whole
from ..loss import SMOOTHING
from ..wrapping.model_card import base_ids, markdown_table, model_card
from .collapse import CollapseCallback
from .constraint import ConstraintCallback
from .recording import MeasuringCallback, Recorder, nvib_model_in

NAMELESS = (
    "The NVIB model under this adapter has never been saved, so the adapter cannot name it. Call "
    "save_pretrained on the model before get_peft_model, or wrap the base again for PeftModel.from_pretrained."
)

NO_TARGET = "An evaluation had no target, because all labels were -100. So it has no eval_loss. Give it labels."

logger = logging.get_logger(__name__)

NOT_RESULTS = {"runtime", "samples_per_second", "steps_per_second", "epoch", "step", "learning_rate", "grad_norm"}

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # the class that the mixin extends
else:
    _Trainer = object


class NvibTrainerMixin(_Trainer):
    """Adds the terms of the loss to a Trainer's logs, in training and evaluation, and results to the model card.

    It warns of a posterior collapse, and of a decoder that reads its latent in training only
    (:class:`~nvib_hf.CollapseCallback`, which logs ``evaluation_cross_entropy``).

    It logs ``cross_entropy``, ``kl_gaussian`` and ``kl_dirichlet`` (nats, means over target tokens), ``num_vectors``,
    ``prop_vectors`` and ``effective_vectors`` (means over examples), since the last log, over all processes. If
    self-attentions have NVIB, it also logs each layer's ``kl_gaussian``, ``kl_dirichlet`` and ``prop_vectors``
    (``kl_gaussian_encoder.0``). Of encoders alone, it logs no more than ``Trainer`` does.

    It keeps the columns of a data set that the base takes, such as LED's ``global_attention_mask``. ``Trainer`` itself
    sees those of ``forward`` only: there, set ``remove_unused_columns=False``.

    ``eval_loss`` is a mean over target tokens too, also for plain models. (Other Trainers average the means of
    batches, which depends on the batch size.) It is the cross-entropy plus the terms times their ``lambda_*``, without
    the multipliers of callbacks, so you can compare it over a training. Select checkpoints by it if weights are fixed
    or annealed. A ``ConstraintCallback`` trades it for compression on purpose: there, take the last checkpoint, or
    select by a result of your ``compute_metrics``.

    Example:
        >>> class MyTrainer(NvibTrainerMixin, Seq2SeqTrainer): ...
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} in TrainingArguments replaces the model's "
                f"loss and drops its KL terms. {SMOOTHING}."
            )
        model = nvib_model_in(self.model)  # None for a plain model
        if model is not None and hasattr(self.model, "peft_config") and not model.name_or_path:
            warnings.warn(NAMELESS, stacklevel=2)
        callbacks = self.callback_handler.callbacks
        if not hasattr(model, "nvib"):  # an encoder alone has no latents to tell of
            model = None
        if model is not None and not any(isinstance(callback, CollapseCallback) for callback in callbacks):
            self.add_callback(CollapseCallback())
        layers = () if model is None else model.nvib_layers()
        layers = layers if len(layers) > 1 else ()  # the terms of a single layer are those of the loss
        self._nvib_recorders = {training: Recorder(layers) for training in (True, False)}
        self._nvib_records: bool | None = None  # which recorder is active: training's, evaluation's, or none
        self._nvib_hooks: dict[nn.Module, RemovableHandle] = {}
        self._nvib_loops = 0

    def _set_signature_columns_if_needed(self) -> None:
        """As in ``Trainer``, but a data set keeps every column that the base takes."""
        is_new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if is_new and (model := nvib_model_in(self.model)) is not None:
            self._signature_columns += sorted(model._argument_names)

    def training_step(self, model, *args, **kwargs):
        with self._recording(model, training=True):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        """As in ``Trainer``. In evaluation it is the mean over this process's own tokens, which are counted later."""
        items = num_items_in_batch if model.training else None
        return super().compute_loss(model, inputs, *args, num_items_in_batch=items, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        with self._recording(model, training=False):
            loss, *predicted = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and "labels" in inputs:
            self._nvib_recorders[False].add_loss(loss, inputs["labels"])
        return loss, *predicted

    @contextmanager
    def _recording(self, model: nn.Module, training: bool) -> Iterator[None]:
        """Record what the model returns, whether the Trainer or your own loss calls it."""
        with self._loop():
            if model not in self._nvib_hooks:
                self._nvib_hooks[model] = model.register_forward_hook(self._see, with_kwargs=True)
            before, self._nvib_records = self._nvib_records, training
            try:
                yield
            finally:
                self._nvib_records = before

    @contextmanager
    def _loop(self) -> Iterator[None]:
        """Keep the hooks until the outermost loop ends: new hooks at each step would compile the model each time."""
        self._nvib_loops += 1
        try:
            yield
        finally:
            self._nvib_loops -= 1
            if not self._nvib_loops:
                for hook in self._nvib_hooks.values():
                    hook.remove()
                self._nvib_hooks.clear()

    @torch.compiler.disable
    def _see(self, *seen) -> None:
        if self._nvib_records is not None:
            self._nvib_recorders[self._nvib_records].hook(*seen)

    def _read(self, training: bool) -> dict[str, float]:
        return self._nvib_recorders[training].read(self.args.device)

    def train(self, *args, **kwargs):
        self._nvib_recorders[True].clear()  # drop what an earlier training did not log
        if any(isinstance(callback, ConstraintCallback) for callback in self.callback_handler.callbacks):
            self.callback_handler.eval_dataloader = self._held_out_dataloader()
        with self._loop():
            return super().train(*args, **kwargs)

    def _held_out_dataloader(self) -> DataLoader | None:
        """The held-out data, or the first data set if there are several."""
        data = next(iter(self.eval_dataset), None) if isinstance(self.eval_dataset, dict) else self.eval_dataset
        return None if data is None else self.get_eval_dataloader(data)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As in ``Trainer``, but with another default objective. The sum of all logged numbers would make no sense.

        The default is ``eval_loss``, or the sum of what your ``compute_metrics`` returns. A search over the
        ``lambda_*`` needs an objective of your own, because they are part of the loss.
        """
        return super().hyperparameter_search(hp_space, compute_objective or self._objective, *args, **kwargs)

    def _objective(self, metrics: dict[str, float]) -> float:
        own = self._nvib_recorders[False].names - {"loss"}
        return default_compute_objective({k: v for k, v in metrics.items() if k.removeprefix("eval_") not in own})

    def log(self, logs, *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update(self._read(training=True))
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, MeasuringCallback):  # here, because trackers run before this callback
                    logs.update(callback.trace())
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        recorder = self._nvib_recorders[False]
        recorder.clear()
        with self._loop():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        read = self._read(training=False)
        if recorder.saw_no_target:
            output.metrics.pop(f"{metric_key_prefix}_loss", None)
            logger.warning_once(NO_TARGET)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in read.items()})
        return output

    def create_model_card(self, **kwargs) -> None:
        """Write the model's own card, with what the Trainer knows about its training. Arguments as in ``Trainer``."""
        if nvib_model_in(self.model) is not self.model:  # adapters and plain models have cards of their own
            return super().create_model_card(**kwargs)
        if self.is_world_process_zero():
            bases = base_ids(self.model.config)
            summary = TrainingSummary.from_trainer(self, **{"finetuned_from": "".join(bases[:1]), **kwargs})
            metadata = {**summary.create_metadata(), "base_model": kwargs.get("finetuned_from") or bases}
            if not metadata["model-index"][0]["results"]:
                del metadata["model-index"]
            name = self.hub_model_id or summary.model_name
            card = model_card(self.model, name, training_section(self.state, summary), **metadata)
            path = Path(self.args.output_dir) / "README.md"
            earlier = path.read_text(encoding="utf-8") if path.exists() else ""
            card.content = with_evaluation(card.content, evaluation_of(earlier))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, str(card))
        return None


def training_section(state: TrainerState, summary: TrainingSummary) -> str:
    """A training in Markdown: the last results, the evaluations on the way, the hyperparameters."""
    data = [summary.dataset] if isinstance(summary.dataset, str) else [x for x in summary.dataset or [] if x]
    on_data = f" on {' and '.join(data)}" if data else ""
    training = next((_results(entry) for entry in reversed(state.log_history) if "loss" in entry), {})
    evaluations = {entry["step"]: _results(entry) for entry in state.log_history if "eval_loss" in entry}
    evaluation = next(reversed(evaluations.values()), {})
    last = [
        (name, *(_rounded(results.get(name, "")) for results in (training, evaluation)))
        for name in dict.fromkeys([*training, *evaluation])
    ]
    on_the_way = [
        (step, *(_rounded(results.get(name, "")) for name in evaluation)) for step, results in evaluations.items()
    ]
    hyperparameters = [f"- `{name}`: {value}" for name, value in (summary.hyperparameters or {}).items()]
    parts = [
        f"{state.global_step} steps{on_data}. At the end:\n\n{markdown_table(('', 'training', 'evaluation'), *last)}",
        f"Evaluations:\n\n{markdown_table(('step', *evaluation), *on_the_way)}" if len(on_the_way) > 1 else "",
        "Hyperparameters:\n\n" + "\n".join(hyperparameters),
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def _results(entry: dict[str, float]) -> dict[str, float]:
    """The numbers in a log that describe the model, by name."""
    entry = {name.removeprefix("eval_"): value for name, value in entry.items()}
    return {name: value for name, value in entry.items() if name not in NOT_RESULTS}


def _rounded(value: object) -> str:
    """A number with at most four decimal places."""
    text = str(value)
    return f"{value:.4f}" if isinstance(value, float) and len(text.partition(".")[2]) > 4 else text


class NvibTrainer(NvibTrainerMixin, Seq2SeqTrainer):
    """``Seq2SeqTrainer`` that logs the cross-entropy, both KLs and the vectors kept."""
