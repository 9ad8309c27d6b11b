"""Encoder layers on top of each other that hand on which vectors are left, and their pseudo-counts.

What a layer drops is hidden from the layers above it and from the decoder. For generation it is taken out of their
sequence altogether.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .denoising_attention import AttendedLatent
from .dropping import kept_first
from .posterior import Posterior
from .self_attention import DenoisingSelfAttention

OF_A_PASS = ("nvib_gone", "nvib_places", "nvib_order", "nvib_log_alpha", "nvib_length", "nvib_left")
NOT_SEEN = (
    "An encoder layer cannot see what the one below it dropped or weighed: its forward pass runs again without it, as "
    "in gradient checkpointing, or in a replica of nn.DataParallel. Train without them, or with NVIB in the encoder's "
    "last layer alone."
)


class StackedSelfAttention(DenoisingSelfAttention):
    """The self-attention of an encoder layer in a stack, which :func:`stack` makes.

    ``nvib_below`` is the module below it in the stack, in a tuple, so that it is no part of this one;
    ``nvib_shortens`` whether what is dropped leaves the sequence; ``nvib_running`` whether the encoder runs. The
    others are of that pass: when it ends, the top module keeps ``nvib_left`` for :func:`left_of`.
    """

    nvib_below: tuple[StackedSelfAttention, ...]
    nvib_shortens: bool
    nvib_running: bool
    nvib_gone: Tensor | None  # (B, N'), True where nothing is left, of what this layer hands on
    nvib_places: Tensor | None  # (B, N'), where that stood in the encoder's input; None while it is all of it
    nvib_order: Tensor | None  # (B, N'), where it stood in this layer's own
    nvib_log_alpha: Tensor | None  # (B, N')
    nvib_length: int | None  # of the encoder's input
    nvib_left: tuple[Tensor, Tensor] | None

    def _below(self, name: str) -> Tensor | int | None:
        """What the nearest layer below that ran (layer drop skips some) handed on; ``None`` if there is none."""
        below = self.nvib_below
        while below:
            if not (self.nvib_running and below[0].nvib_running):
                raise RuntimeError(NOT_SEEN)
            if below[0].nvib_gone is not None:
                return getattr(below[0], name)
            below = below[0].nvib_below
        return None

    def _latent(
        self, hidden_states: Tensor, log_alpha_below: Tensor | None = None
    ) -> tuple[AttendedLatent, Posterior]:
        return super()._latent(
            hidden_states, self._below("nvib_log_alpha") if self.nvib_config.accumulate_alpha else None
        )

    def unseen(self, mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """What the layers below left nothing of, too."""
        gone = self._below("nvib_gone")
        return super().unseen(mask, hidden_states) if gone is None else gone

    def _see(self, posterior: Posterior, mask: Tensor | None, hidden_states: Tensor) -> None:
        """Leave what the layer above has to know, too."""
        gone, self.nvib_length = self.unseen(mask, hidden_states), self._below("nvib_length")
        if gone is None:
            gone = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.bool)
        if self.nvib_length is None:
            self.nvib_length, self.nvib_sources = hidden_states.shape[1], (~gone).sum(-1)
        else:
            self.nvib_sources = self._below("nvib_sources")
        if self.nvib_recording:
            self.nvib_posterior, self.nvib_visible = posterior, ~gone
        gone, log_alpha, places = gone | ~posterior.keep[:, 1:], posterior.log_alpha[:, 1:], self._below("nvib_places")
        order = kept_first(at_least_one(~gone)) if self.nvib_shortens else None
        if order is not None:
            gone, log_alpha = (x.take_along_dim(order, dim=1) for x in (gone, log_alpha))
            places = order if places is None else places.take_along_dim(order, dim=1)
        self.nvib_gone, self.nvib_places, self.nvib_order, self.nvib_log_alpha = gone, places, order, log_alpha

    def _position_bias(self, inputs: dict, queries: int, keys: int, past: int | Tensor) -> Tensor | None:
        """Of the encoder's whole input, as the layers above may need other parts of it."""
        return super()._position_bias(inputs, self.nvib_length, self.nvib_length, past)

    def _scores_mask(
        self, mask: Tensor | None, is_causal: bool | None, position_bias: Tensor | None, query: Tensor, keys: int
    ) -> Tensor | None:
        gone, places = self._below("nvib_gone"), self._below("nvib_places")
        if places is not None:
            mask, position_bias = (None if x is None else of_places(x, places) for x in (mask, position_bias))
        if gone is not None:
            hidden = gone[:, None, None]  # (B, 1, 1, N)
            if mask is None:
                mask = ~hidden
            elif mask.dtype == torch.bool:
                mask = mask & ~hidden
            else:
                mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return super()._scores_mask(mask, is_causal, position_bias, query, keys)


def at_least_one(keep: Tensor) -> Tensor:
    """``keep`` ``(B, N)`` itself or, if it is nothing in the whole batch, the first position: no sequence is empty."""
    nothing = ~keep.any()
    return torch.cat([keep[:, :1] | nothing, keep[:, 1:]], dim=1)


def of_places(scores: Tensor, places: Tensor) -> Tensor:
    """Rows and columns ``(B, N')`` of what is added to scores, ``(B or 1, H or 1, N or 1, N)``."""
    scores = scores.expand(len(places), -1, -1, -1)
    if scores.shape[2] > 1:
        scores = scores.take_along_dim(places[:, None, :, None], dim=2)
    return scores.take_along_dim(places[:, None, None, :], dim=3)


class Shortening:
    """Takes what an attention dropped out of the output of its encoder layer: a forward hook of that.

    By name, so that the hook of a copied model is one of the copy.
    """

    def __init__(self, attention: str) -> None:
        self.attention = attention

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        order = layer.get_submodule(self.attention).nvib_order
        if order is None:
            return output
        if isinstance(output, Tensor):
            return output.take_along_dim(order[..., None], dim=1)
        return (output[0].take_along_dim(order[..., None], dim=1), *output[1:])


class Pass:
    """Hooks of an encoder, before and after it runs: what the layers hand on to each other is of one pass.

    By names, as :class:`Shortening`.
    """

    def __init__(self, attentions: list[str]) -> None:
        self.attentions = attentions

    def begin(self, encoder: nn.Module, args: tuple) -> None:
        for name in self.attentions:
            module = encoder.get_submodule(name)
            clear(module)
            module.nvib_running = True

    def end(self, encoder: nn.Module, args: tuple, output: object) -> None:
        modules = [encoder.get_submodule(name) for name in self.attentions]
        top = next((module for module in reversed(modules) if module.nvib_gone is not None), None)
        left = None if top is None else (top.nvib_gone, (~top.nvib_gone).sum(-1) / top.nvib_sources.clamp(min=1))
        for module in modules:
            clear(module)
        modules[-1].nvib_left = left


def stack(encoder: nn.Module, modules: list[StackedSelfAttention]) -> None:
    """Put converted modules of an encoder on top of each other, the lowest first."""
    names = {id(module): name for name, module in encoder.named_modules()}
    below = ()
    for module in modules:
        module.nvib_below, module.nvib_shortens = below, False
        below = (module,)
        clear(module)
        name = names[id(module)]
        layer = encoder_layer(encoder, name)
        encoder.get_submodule(layer).register_forward_hook(Shortening(name.removeprefix(f"{layer}.")))
    run = Pass([names[id(module)] for module in modules])
    encoder.register_forward_pre_hook(run.begin)
    encoder.register_forward_hook(run.end, always_call=True)


def unstack(model: nn.Module) -> None:
    """Remove the hooks of :func:`stack` from the whole model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, Shortening) or isinstance(getattr(hook, "__self__", None), Pass):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


@contextmanager
def shortening(modules: list[StackedSelfAttention], shortens: bool) -> Iterator[None]:
    """Whether what they drop leaves the sequence, where their layers allow it."""
    for module in modules:
        module.nvib_shortens = shortens and module.nvib_row.shortens
    try:
        yield
    finally:
        for module in modules:
            module.nvib_shortens = False


def encoder_layer(encoder: nn.Module, name: str) -> str:
    """The name of the layer that a module of an encoder belongs to: the outermost element of a list of modules."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(encoder.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    raise ValueError(f"{type(encoder).__name__} keeps {name} in no list of layers, so nothing can be dropped in it.")


def left_of(modules: list[StackedSelfAttention]) -> tuple[Tensor, Tensor] | None:
    """What a stack, which has run, left of the encoder's input: where nothing is, ``(B, N')``, and the share ``(B,)``.

    Once: it is forgotten then. ``None`` if there is no stack, or layer drop skipped all of it.
    """
    if not modules:
        return None
    left, modules[-1].nvib_left = modules[-1].nvib_left, None
    return left


def clear(module: StackedSelfAttention) -> None:
    """Forget a forward pass."""
    module.nvib_running = False
    for name in OF_A_PASS:
        setattr(module, name, None)
