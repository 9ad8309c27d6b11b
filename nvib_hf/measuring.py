"""What the callbacks that look at a training have in common: they measure it, log it and survive a restart."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .recording import Recorder, find_nvib_model


class MeasuringCallback(TrainerCallback, ExportableState):
    """Sees what the model says in training, with any Trainer, and keeps its own state in the checkpoints.

    Subclasses name what to keep in ``kept_in_checkpoints``, and the arguments they were made with in ``arguments``.
    """

    kept_in_checkpoints: tuple[str, ...] = ()

    def __init__(self, arguments: dict) -> None:
        self.arguments = arguments
        self._recorder, self._hook, self._model, self._is_over = Recorder(), None, None, False

    def state(self) -> dict:
        """What the Trainer writes to ``trainer_state.json``."""
        return {"args": self.arguments, "attributes": {name: getattr(self, name) for name in self.kept_in_checkpoints}}

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        model, name = find_nvib_model(model), type(self).__name__
        if self._model is None:
            self._at_start = self.state()["attributes"]
        elif self._model is not model and state.global_step == 0:  # as of a Trainer's model_init
            state.stateful_callbacks.pop(name, None)  # which are those of the model before
            vars(self).update(self._at_start)
        # What a Trainer saves has to stand there, and does not in a checkpoint of a training without this callback.
        saved = state.stateful_callbacks.setdefault(name, self.state())
        for entry in saved if isinstance(saved, list) else [saved]:
            if entry.get("args") == self.arguments:  # a resumed training goes on where it stood
                vars(self).update(entry["attributes"])
        self.on_train_end(args, state, control)  # of a training that was broken off
        self._model, self._is_over = model, False
        self._recorder.clear()
        self._hook = self._model.register_forward_hook(self._see, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._is_over = True
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
