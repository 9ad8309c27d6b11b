"""Encoder layers on top of each other that hand on which vectors are left, and their pseudo-counts.

What a layer drops is hidden from the layers above it and from the decoder. For generation it is taken out of their
sequence altogether. What is handed on is part of the :class:`~nvib_hf.wrapping.self_attention.ForwardPass`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.distributions import Posterior
from ..layers.dropping import kept_first
from .self_attention import DenoisingSelfAttention, ForwardPass, HandedOn, LayerRecord, current_pass

NOT_SEEN = (
    "An encoder layer cannot see what the one below it dropped or weighed: its forward pass runs again without it, as "
    "in gradient checkpointing. Train without it, or with NVIB in the encoder's last layer alone."
)


class StackedSelfAttention(DenoisingSelfAttention):
    """The self-attention of an encoder layer in a stack, which :func:`stack` makes; ``nvib_lowest`` is the first."""

    nvib_lowest: bool

    def handed_on_below(self) -> HandedOn | None:
        """What the nearest layer below that ran (layer drop skips some) handed on; ``None`` if there is none."""
        this_pass = current_pass()
        if this_pass is not None and this_pass.encoder is not None:
            return this_pass.handed_on
        if not self.nvib_lowest:
            raise RuntimeError(NOT_SEEN)
        return None

    def visible(self, mask: Tensor | None, hidden_states: Tensor, below: HandedOn | None) -> Tensor | None:
        """Without what the layers below dropped, too."""
        return super().visible(mask, hidden_states, below) if below is None else ~below.gone

    def _leave(
        self, this_pass: ForwardPass | None, posterior: Posterior, visible: Tensor | None, below: HandedOn | None
    ) -> None:
        """Hand on to the layer above what it has to know, too."""
        if this_pass is None:
            return
        if visible is None:
            visible = posterior.mask[:, 1:]
        if below is None:
            length, sources = visible.shape[1], visible.sum(-1)
        else:
            length, sources = below.length, below.sources
        if this_pass.records is not None:
            this_pass.records[self] = LayerRecord(posterior, visible, sources)
        left, log_alpha = visible & posterior.keep[:, 1:], posterior.log_alpha[:, 1:]
        places = None if below is None else below.places
        shortens = this_pass.shortens and self.nvib_spec.shortens
        order = kept_first(at_least_one(left)) if shortens else None
        if order is not None:
            left, log_alpha = (x.take_along_dim(order, dim=1) for x in (left, log_alpha))
            places = order if places is None else places.take_along_dim(order, dim=1)
        this_pass.handed_on = HandedOn(self, ~left, places, order, log_alpha, length, sources)

    def _lengths(self, query: Tensor, num_keys: int, below: HandedOn | None) -> tuple[int, int]:
        """Of the encoder's whole input, as the layers above may need other parts of the position bias."""
        return super()._lengths(query, num_keys, below) if below is None else (below.length, below.length)

    def _of_what_is_left(
        self, mask: Tensor | None, position_bias: Tensor | None, below: HandedOn | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if below is None:
            return mask, position_bias
        if below.places is not None:
            mask, position_bias = (None if x is None else of_places(x, below.places) for x in (mask, position_bias))
        hidden = below.gone[:, None, None]  # (B, 1, 1, N)
        if mask is None:
            mask = ~hidden
        elif mask.dtype == torch.bool:
            mask = mask & ~hidden
        else:
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return mask, position_bias


def at_least_one(keep: Tensor) -> Tensor:
    """``keep`` ``(B, N)`` itself or, if it is nothing in the whole batch, the first position: no sequence is empty."""
    nothing = ~keep.any()
    return torch.cat([keep[:, :1] | nothing, keep[:, 1:]], dim=1)


def of_places(scores: Tensor, places: Tensor) -> Tensor:
    """Rows and columns ``(B, N')`` of what is added to scores, ``(B or 1, H or 1, N or 1, N)``."""
    scores = scores.expand(places.shape[0], -1, -1, -1)
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
        this_pass = current_pass()
        handed_on = None if this_pass is None else this_pass.handed_on
        if handed_on is None or handed_on.order is None or handed_on.by is not layer.get_submodule(self.attention):
            return output
        order = handed_on.order[..., None]
        if isinstance(output, Tensor):
            return output.take_along_dim(order, dim=1)
        return (output[0].take_along_dim(order, dim=1), *output[1:])


def begin_encoder(encoder: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a stacked encoder, whose layers hand on within a pass of its own, inside the model's."""
    outer = current_pass() or ForwardPass()
    ForwardPass(outer.generator, outer.shortens, outer.records, encoder).__enter__()


def end_encoder(encoder: nn.Module, args: tuple, output: object) -> None:
    """Forward hook, called after an exception too: the model's pass gets what the encoder left of its input.

    Where nothing is left, ``(B, N')``, and the share of the input that is, ``(B,)``.
    """
    this_pass = current_pass()
    if this_pass is None or this_pass.encoder is not encoder:
        return
    this_pass.__exit__()
    outer, top = current_pass(), this_pass.handed_on
    if outer is not None and top is not None:
        outer.left = top.gone, (~top.gone).sum(-1) / top.sources.clamp(min=1)


def stack(encoder: nn.Module, modules: list[StackedSelfAttention]) -> None:
    """Put converted modules of an encoder on top of each other, the lowest first."""
    names = {id(module): name for name, module in encoder.named_modules()}
    for module in modules:
        module.nvib_lowest = module is modules[0]
        name = names[id(module)]
        layer = encoder_layer(encoder, name)
        encoder.get_submodule(layer).register_forward_hook(Shortening(name.removeprefix(f"{layer}.")))
    encoder.register_forward_pre_hook(begin_encoder)
    encoder.register_forward_hook(end_encoder, always_call=True)


def unstack(model: nn.Module) -> None:
    """Remove the hooks of :func:`stack` from the whole model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, Shortening) or hook in (begin_encoder, end_encoder):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


def encoder_layer(encoder: nn.Module, name: str) -> str:
    """The name of the layer that a module of an encoder belongs to: the outermost element of a list of modules."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(encoder.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    raise ValueError(f"{type(encoder).__name__} keeps {name} in no list of layers, so nothing can be dropped in it.")


def check_states_are_whole(has_stacked_encoder: bool) -> None:
    """Raise ValueError for an encoder's output in place of its inputs where its layers hand on what they dropped."""
    if has_stacked_encoder:
        raise ValueError(
            "encoder_last_hidden_state does not say what this encoder's layers dropped. Pass the inputs, or latents "
            "as encoder_outputs."
        )


def check_length_is_left(gone: Tensor, states: Tensor) -> None:
    """Raise ValueError where an encoder changes the length after the layers that drop vectors."""
    if gone.shape[1] != states.shape[1]:
        raise ValueError(
            f"The encoder's layers leave {gone.shape[1]} vectors, of which it makes {states.shape[1]}, so that nobody "
            "knows which are dropped. Leave 'encoder' out of attentions."
        )
