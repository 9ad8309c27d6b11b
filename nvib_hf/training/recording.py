"""Sums of what a model reports during training. They stay on the device until you read them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..layers.cross_entropy import IGNORED

# Means, by what they divide by.
COUNTED = {
    "tokens": ("cross_entropy", "kl_gaussian", "kl_dirichlet"),
    "examples": ("num_vectors", "prop_vectors", "effective_vectors"),
    "tokens_of_loss": ("loss",),
}

# For each layer, if self-attentions have NVIB.
OF_LAYERS = {"kl_gaussian": "tokens", "kl_dirichlet": "tokens", "prop_vectors": "examples"}


def nvib_model_in(model: nn.Module) -> nn.Module | None:
    """The NVIB model inside any wrapper (PEFT, DDP, ``torch.compile``), with code of this package or of the Hub."""
    # By the type's name, because code from the Hub has another class object.
    configs = ((module, getattr(type(module), "config_class", None)) for module in model.modules())
    return next((module for module, config in configs if getattr(config, "model_type", None) == "nvib"), None)


def find_nvib_model(model: nn.Module) -> nn.Module:
    """:func:`nvib_model_in`, or a ValueError."""
    found = nvib_model_in(model)
    if found is not None:
        return found
    raise ValueError(f"{type(model).__name__} contains no NvibForConditionalGeneration. Wrap a base model first.")


def check_restored(callback: str, name: str, value: object, sample: object) -> None:
    """Raise ValueError if a value of a checkpoint is not of the sample's type, or is not a finite number."""
    if isinstance(sample, bool):
        right = isinstance(value, bool)
    elif isinstance(sample, list):
        right = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    elif isinstance(sample, dict):
        right = isinstance(value, dict) and all(isinstance(x, float) and math.isfinite(x) for x in value.values())
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        right = is_number or (sample is None and value is None)
    if not right:
        raise ValueError(
            f"trainer_state.json has {name}={value!r} for {callback}, but {callback} never saves that. Resume from an "
            f"earlier checkpoint, or remove the entry {callback!r} from the stateful_callbacks there."
        )


class Recorder:
    """Means of the loss, its terms and the vectors kept, since the last :meth:`read`.

    ``cross_entropy``, ``kl_gaussian``, ``kl_dirichlet`` (nats) and a ``loss`` that you add are means over target
    tokens. ``num_vectors``, ``prop_vectors`` and ``effective_vectors`` are means over examples. Each NVIB layer in
    ``layers`` adds its own, such as ``kl_gaussian_encoder.0``.
    """

    def __init__(self, layers: Iterable[str] = ()) -> None:
        self._sums: dict[str, Tensor] = {}
        self.saw_no_target = False  # the last read had losses, but no target
        self._layers = tuple(layers)
        self._counted = dict(COUNTED)
        for name, count in OF_LAYERS.items():
            self._counted[count] += tuple(f"{name}_{layer}" for layer in self._layers)

    def hook(self, model, args: tuple, inputs: dict, outputs) -> None:
        """Add a forward pass: a forward hook (``with_kwargs=True``)."""
        labels = inputs.get("labels")
        if labels is None or not hasattr(outputs, "get") or outputs.get("num_vectors") is None:
            return  # nothing to record; an encoder alone has no latents
        tokens = (labels != IGNORED).sum(-1)  # (B,)
        for name, count in OF_LAYERS.items():
            for layer in self._layers:
                values = outputs[f"layer_{name}"][layer]
                self._add(**{f"{name}_{layer}": ((tokens if count == "tokens" else 1) * values).sum()})
        self._add(
            cross_entropy=outputs.cross_entropy.mean() * tokens.sum(),  # one value, or one per device
            kl_gaussian=(tokens * outputs.kl_gaussian).sum(),
            kl_dirichlet=(tokens * outputs.kl_dirichlet).sum(),
            num_vectors=outputs.num_vectors.sum(),
            prop_vectors=outputs.prop_vectors.sum(),
            effective_vectors=outputs.effective_vectors.sum(),
            tokens=tokens.sum(),
            examples=torch.ones_like(tokens).sum(),
        )

    def add_loss(self, loss: Tensor, labels: Tensor) -> None:
        """Add only the loss of a batch, a mean over its target tokens. Works for any model."""
        tokens = (labels != IGNORED).sum()
        self._add(loss=loss * tokens, tokens_of_loss=tokens, losses=torch.ones_like(tokens))

    @property
    def names(self) -> set[str]:
        """The names of all means."""
        return {name for means in self._counted.values() for name in means}

    def _add(self, **terms: Tensor) -> None:
        for name, value in terms.items():
            value, before = value.detach().float(), self._sums.get(name)
            self._sums[name] = value if before is None else before.to(value.device) + value

    @property
    def sums(self) -> dict[str, float]:
        """What was added since the last read, by name. It waits for the device."""
        return {name: float(value) for name, value in self._sums.items()}

    @sums.setter
    def sums(self, values: dict[str, float]) -> None:
        self._sums = {name: torch.tensor(value) for name, value in values.items()}

    def clear(self) -> None:
        self._sums = {}

    def read(self, device: torch.device | str) -> dict[str, float]:
        """Means over all processes since the last call, which it then resets. Call it on every process.

        Args:
            device: the device for the sums of a process that recorded nothing.

        Returns:
            The means by name. Means that nothing was recorded for are left out.
        """
        from accelerate.utils import reduce

        names = [*(name for count, means in self._counted.items() for name in (*means, count)), "losses"]
        nothing = torch.zeros((), device=device)
        sums = reduce(torch.stack([self._sums.get(name, nothing).to(device) for name in names]), "sum").tolist()
        self.clear()
        of = dict(zip(names, sums, strict=True))
        self.saw_no_target = of["losses"] > 0 and not of["tokens_of_loss"]
        return {name: of[name] / of[count] for count, means in self._counted.items() for name in means if of[count]}


class MeasuringCallback(TrainerCallback, ExportableState):
    """Records what the model returns in training, with any Trainer, and saves its own state in checkpoints.

    Subclasses name the attributes to save in ``kept_in_checkpoints``, and put their arguments into ``arguments``.
    """

    kept_in_checkpoints: tuple[str, ...] = ("recorded",)
    _model: Any  # the NVIB model, from the start of the training on
    _hook: Any
    _at_start: dict[str, Any]

    def __init__(self, arguments: dict) -> None:
        self.arguments = arguments
        self._recorder, self._hook, self._model, self._is_over = Recorder(), None, None, False

    @property
    def recorded(self) -> dict[str, float]:
        """Sums since the last measurement: a checkpoint may be saved between two."""
        return self._recorder.sums

    @recorded.setter
    def recorded(self, sums: dict[str, float]) -> None:
        self._recorder.sums = sums

    def __setattr__(self, name: str, value: object) -> None:
        if callable(getattr(type(self), name, None)) and not callable(value):  # the Trainer does this when it restores
            raise ValueError(
                f"{type(self).__name__}.{name} is a method, but trainer_state.json has {value!r} for it. Remove the "
                "entry from the stateful_callbacks there."
            )
        super().__setattr__(name, value)

    def state(self) -> dict:
        """What the Trainer writes to ``trainer_state.json``."""
        return {"args": self.arguments, "attributes": {name: getattr(self, name) for name in self.kept_in_checkpoints}}

    def restore(self, attributes: dict) -> None:
        """Go on from a saved state. Unknown attributes are ignored.

        Raises:
            ValueError: :meth:`state` cannot have saved this value.
        """
        for name in self.kept_in_checkpoints:
            if name in attributes:
                check_restored(type(self).__name__, name, attributes[name], self._at_start[name])
                setattr(self, name, attributes[name])

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        model, name = find_nvib_model(model), type(self).__name__
        if not hasattr(model, "nvib"):
            raise ValueError(
                f"{name} is for encoder-decoders, but this is a {type(model).__name__}, which has no latents. Leave "
                "it out; KLAnnealingCallback steers encoders alone."
            )
        self._recorder.clear()
        if self._model is None:
            now = self.state()["attributes"]
            self._at_start = type(self)(**self.arguments).state()["attributes"]
            self.restore(now)  # checks what the Trainer itself has restored
            self._at_start = now
        elif self._model is not model and state.global_step == 0:  # model_init of a Trainer made a new model
            state.stateful_callbacks.pop(name, None)  # they belong to the model before
            self.__dict__.update(self._at_start)
        # The Trainer saves this entry. A checkpoint of a training without this callback lacks it.
        saved = state.stateful_callbacks.setdefault(name, self.state())
        entries = saved if isinstance(saved, list) else [saved]
        for entry in entries:
            if self._is_of_the_same(entry):  # continue a resumed training
                self.restore(entry.get("attributes", {}))
        if not any(map(self._is_of_the_same, entries)):
            others = {name: value for name, value in entries[0]["args"].items() if self.arguments.get(name) != value}
            warnings.warn(
                f"The checkpoint has the state of another {name}, made with {others}: this one starts anew. To go on "
                "from the checkpoint, give it the same arguments.",
                stacklevel=2,
            )
        self.on_train_end(args, state, control)  # if the last training was interrupted
        self._model, self._is_over = model, False
        self._hook = self._model.register_forward_hook(self._see, with_kwargs=True)

    def _is_of_the_same(self, entry: dict) -> bool:
        """Whether a callback with these arguments saved the state. Arguments that it lacks are ignored."""
        saved = entry.get("args", {})
        return all(saved.get(name, value) == value for name, value in self.arguments.items())

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._is_over = True
        if self._hook is not None:
            self._hook.remove()

    # Not compiled: otherwise each hook would compile the forward pass anew.
    @torch.compiler.disable
    def _see(self, model: nn.Module, args: tuple, inputs: dict, outputs) -> None:
        if model.training:  # not the evaluations on the way
            self.record(model, inputs, outputs)

    def record(self, model: nn.Module, inputs: dict, outputs) -> None:
        """Take note of a forward pass of training."""
        self._recorder.hook(model, (), inputs, outputs)

    def measured(self, device: torch.device) -> dict[str, float]:
        """Means over all processes since the last call."""
        return self._recorder.read(device)

    def trace(self) -> dict[str, float]:
        """What to log."""
        return {}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is not None and "loss" in logs:
            trace = self.trace()
            logs.update(trace)
            state.log_history[-1].update(trace)
