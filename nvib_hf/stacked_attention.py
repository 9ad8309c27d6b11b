"""Encoder layers on top of each other that hand on which vectors are left, and their pseudo-counts.

What a layer drops is hidden from the layers above it and from the decoder. For generation it is taken out of their
sequence altogether.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .denoising_attention import AttendedLatent
from .dropping import kept_first
from .posterior import Posterior
from .self_attention import DenoisingSelfAttention, visible_keys

OF_A_PASS = ("nvib_gone", "nvib_places", "nvib_order", "nvib_log_alpha", "nvib_length")
NOT_SEEN = (
    "An encoder layer cannot see what the one below it dropped or weighed: its forward pass runs again without it, as "
    "in gradient checkpointing, or in a replica of nn.DataParallel. Train without them, or with NVIB in the encoder's "
    "last layer alone."
)


class StackedSelfAttention(DenoisingSelfAttention):
    """The self-attention of an encoder layer in a stack, which :func:`stack` makes.

    ``nvib_below`` is the module below it in the stack, in a tuple, so that it is no part of this one;
    ``nvib_shortens`` whether what is dropped leaves the sequence. The others are of a forward pass, until
    :func:`left_of` clears them.
    """

    nvib_below: tuple[StackedSelfAttention, ...]
    nvib_shortens: bool
    nvib_gone: Tensor | None  # (B, N'), True where nothing is left, of what this layer hands on
    nvib_places: Tensor | None  # (B, N'), where that stood in the encoder's input; None while it is all of it
    nvib_order: Tensor | None  # (B, N'), where it stood in this layer's own
    nvib_log_alpha: Tensor | None  # (B, N')
    nvib_length: int | None  # of the encoder's input

    def _below(self, name: str) -> Tensor | int | None:
        """What the layer below handed on; ``None`` if there is none."""
        if not self.nvib_below:
            return None
        below = self.nvib_below[0]
        if below.nvib_gone is None:
            raise RuntimeError(NOT_SEEN)
        return getattr(below, name)

    def _latent(
        self, hidden_states: Tensor, log_alpha_below: Tensor | None = None
    ) -> tuple[AttendedLatent, Posterior]:
        return super()._latent(
            hidden_states, self._below("nvib_log_alpha") if self.nvib_config.accumulate_alpha else None
        )

    def _see(self, posterior: Posterior, mask: Tensor | None, hidden_states: Tensor) -> None:
        """Leave what the layer above has to know, too."""
        gone = self._below("nvib_gone")
        if gone is None:
            visible = visible_keys(mask, hidden_states)
            gone = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.bool) if visible is None else ~visible
            self.nvib_length, self.nvib_sources = hidden_states.shape[1], (~gone).sum(-1)
        else:
            self.nvib_length, self.nvib_sources = self._below("nvib_length"), self.nvib_below[0].nvib_sources
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


def stack(encoder: nn.Module, modules: dict[str, StackedSelfAttention]) -> None:
    """Put converted modules of an encoder, by their names in it, on top of each other, the lowest first."""
    below = ()
    for name, module in modules.items():
        module.nvib_below, module.nvib_shortens = below, False
        below = (module,)
        clear(module)
        layer = encoder_layer(encoder, name)
        encoder.get_submodule(layer).register_forward_hook(Shortening(name.removeprefix(f"{layer}.")))


def unstack(model: nn.Module) -> None:
    """Remove the hooks of :func:`stack` from the whole model."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Shortening):
                del module._forward_hooks[key]


def encoder_layer(encoder: nn.Module, name: str) -> str:
    """The name of the layer that a module of an encoder belongs to: the outermost element of a list of modules."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(encoder.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    raise ValueError(f"{type(encoder).__name__} keeps {name} in no list of layers, so nothing can be dropped in it.")


def left_of(modules: list[StackedSelfAttention]) -> tuple[Tensor, Tensor]:
    """What a stack, which has run, left of the encoder's input: where nothing is, ``(B, N')``, and the share ``(B,)``.

    Clears what is of that pass.
    """
    top = modules[-1]
    gone, sources = top.nvib_gone, top.nvib_sources
    for module in modules:
        clear(module)
    return gone, (~gone).sum(-1) / sources.clamp(min=1)


def clear(module: StackedSelfAttention) -> None:
    """Forget a forward pass."""
    for name in OF_A_PASS:
        setattr(module, name, None)
