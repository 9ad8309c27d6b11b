"""Sums of what a model says of its latents while it trains: nothing is read from the device before it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..layers.cross_entropy import IGNORED

# Means, by what they are counted over.
COUNTED = {
    "tokens": ("cross_entropy", "kl_gaussian", "kl_dirichlet"),
    "examples": ("num_vectors", "prop_vectors", "effective_vectors"),
    "tokens_of_loss": ("loss",),
}

# Of each layer, where self-attentions have NVIB.
OF_LAYERS = {"kl_gaussian": "tokens", "kl_dirichlet": "tokens", "prop_vectors": "examples"}


def nvib_model_in(model: nn.Module) -> nn.Module | None:
    """The NVIB model inside whatever wraps it (PEFT, DDP, ``torch.compile``), its code from here or from a hub."""
    # By the type's name: the class itself is another one in code from a hub.
    configs = ((module, getattr(type(module), "config_class", None)) for module in model.modules())
    return next((module for module, config in configs if getattr(config, "model_type", None) == "nvib"), None)


def find_nvib_model(model: nn.Module) -> nn.Module:
    """:func:`nvib_model_in`, or a ValueError."""
    found = nvib_model_in(model)
    if found is not None:
        return found
    raise ValueError(f"{type(model).__name__} contains no NvibForConditionalGeneration. Wrap a base model first.")


def check_restored(callback: str, name: str, value: object, sample: object) -> None:
    """Raise ValueError for a value of a checkpoint that is not of the kind of this sample, or no finite number."""
    if isinstance(sample, bool):
        right = isinstance(value, bool)
    elif isinstance(sample, list):
        right = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        right = is_number or (sample is None and value is None)
    if not right:
        raise ValueError(
            f"trainer_state.json has {name}={value!r} for {callback}, which it cannot have saved. Resume from an "
            f"earlier checkpoint, or remove the entry {callback!r} from the stateful_callbacks there."
        )


class Recorder:
    """Means of the loss, of its terms and of the vectors kept, since they were last read.

    ``cross_entropy``, ``kl_gaussian``, ``kl_dirichlet`` in nats, and the ``loss`` where it is added, are means over
    target tokens; ``num_vectors``, ``prop_vectors`` and ``effective_vectors`` over examples. Of the NVIB ``layers``
    that it is made with also ``kl_gaussian_encoder.0`` and the like.
    """

    def __init__(self, layers: Iterable[str] = ()) -> None:
        self._sums: dict[str, Tensor] = {}
        self.saw_no_target = False  # when it was last read: losses, but not one target
        self._layers = tuple(layers)
        self._counted = dict(COUNTED)
        for name, count in OF_LAYERS.items():
            self._counted[count] += tuple(f"{name}_{layer}" for layer in self._layers)

    def hook(self, model, args: tuple, inputs: dict, outputs) -> None:
        """Add a forward pass: a forward hook (``with_kwargs=True``)."""
        labels = inputs.get("labels")
        if labels is None or not hasattr(outputs, "get") or outputs.get("kl_gaussian") is None:
            return
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
        """Add the loss of a batch, a mean over its target tokens, by itself: of any model."""
        tokens = (labels != IGNORED).sum()
        self._add(loss=loss * tokens, tokens_of_loss=tokens, losses=torch.ones_like(tokens))

    @property
    def names(self) -> set[str]:
        """Of all that it can read."""
        return {name for means in self._counted.values() for name in means}

    def _add(self, **terms: Tensor) -> None:
        for name, value in terms.items():
            value, before = value.detach().float(), self._sums.get(name)
            self._sums[name] = value if before is None else before + value.to(before.device)

    def clear(self) -> None:
        self._sums = {}

    def read(self, device: torch.device | str) -> dict[str, float]:
        """Means over all processes since the last call: call it on every one of them. It starts them anew.

        Args:
            device: where the sums of a process that recorded nothing lie.

        Returns:
            Nothing where nothing was recorded.
        """
        from accelerate.utils import reduce

        names = [*(name for count, means in self._counted.items() for name in (*means, count)), "losses"]
        nothing = torch.zeros((), device=device)
        sums = reduce(torch.stack([self._sums.get(name, nothing) for name in names]), "sum").tolist()
        self.clear()
        of = dict(zip(names, sums, strict=True))
        self.saw_no_target = of["losses"] > 0 and not of["tokens_of_loss"]
        return {name: of[name] / of[count] for count, means in self._counted.items() for name in means if of[count]}


class MeasuringCallback(TrainerCallback, ExportableState):
    """Sees what the model says in training, with any Trainer, and keeps its own state in the checkpoints.

    Subclasses name what to keep in ``kept_in_checkpoints``, and the arguments they were made with in ``arguments``.
    """

    kept_in_checkpoints: tuple[str, ...] = ()
    _model: Any  # the NVIB model, from the start of the training on
    _hook: Any
    _at_start: dict[str, Any]

    def __init__(self, arguments: dict) -> None:
        self.arguments = arguments
        self._recorder, self._hook, self._model, self._is_over = Recorder(), None, None, False

    def __setattr__(self, name: str, value: object) -> None:
        if callable(getattr(type(self), name, None)) and not callable(value):  # as the Trainer, of what it restores
            raise ValueError(
                f"{type(self).__name__}.{name} is a method, but trainer_state.json has {value!r} for it. Remove the "
                "entry from the stateful_callbacks there."
            )
        super().__setattr__(name, value)

    def state(self) -> dict:
        """What the Trainer writes to ``trainer_state.json``."""
        return {"args": self.arguments, "attributes": {name: getattr(self, name) for name in self.kept_in_checkpoints}}

    def restore(self, attributes: dict) -> None:
        """Go on from a state, as far as it is known here.

        Raises:
            ValueError: a value that cannot have been saved by :meth:`state`.
        """
        for name in self.kept_in_checkpoints:
            if name in attributes:
                check_restored(type(self).__name__, name, attributes[name], self._at_start[name])
                setattr(self, name, attributes[name])

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        model, name = find_nvib_model(model), type(self).__name__
        if self._model is None:
            now = self.state()["attributes"]
            self._at_start = type(self)(**self.arguments).state()["attributes"]
            self.restore(now)  # checks what the Trainer itself has restored
            self._at_start = now
        elif self._model is not model and state.global_step == 0:  # as of a Trainer's model_init
            state.stateful_callbacks.pop(name, None)  # which are those of the model before
            self.__dict__.update(self._at_start)
        # What a Trainer saves has to stand there, and does not in a checkpoint of a training without this callback.
        saved = state.stateful_callbacks.setdefault(name, self.state())
        for entry in saved if isinstance(saved, list) else [saved]:
            if self._is_of_the_same(entry):  # a resumed training goes on where it stood
                self.restore(entry.get("attributes", {}))
        self.on_train_end(args, state, control)  # of a training that was broken off
        self._model, self._is_over = model, False
        self._recorder.clear()
        self._hook = self._model.register_forward_hook(self._see, with_kwargs=True)

    def _is_of_the_same(self, entry: dict) -> bool:
        """Whether a saved state is of a callback with these arguments, as far as it knew them."""
        saved = entry.get("args", {})
        return all(saved.get(name, value) == value for name, value in self.arguments.items())

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._is_over = True
        if self._hook is not None:
            self._hook.remove()

    # Out of a compiled forward pass, which would be compiled anew for each hook.
    @torch.compiler.disable
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
