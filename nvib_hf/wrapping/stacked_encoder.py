"""A stack of encoder layers that pass on which vectors are left, and their pseudo-counts.

The layers above and the decoder do not see what a layer drops. In generation, dropped vectors leave their sequence.
The :class:`~nvib_hf.wrapping.self_attention.ForwardPass` holds what layers pass on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.distributions import Posterior
from ..layers.dropping import kept_first
from .self_attention import DenoisingSelfAttention, ForwardPass, HandedOn, LayerRecord, current_pass

NOT_SEEN = (
    "An encoder layer cannot see what the layer below it dropped or weighed: its forward pass runs again without that "
    "layer, as in gradient checkpointing. Train without checkpointing, or with NVIB in the encoder's last layer only."
)


class StackedSelfAttention(DenoisingSelfAttention):
    """The self-attention of an encoder layer in a stack (:func:`stack`). ``nvib_lowest`` marks the lowest layer."""

    nvib_lowest: bool

    def handed_on_below(self) -> HandedOn | None:
        """What the nearest layer below passed on (layer drop skips some layers); ``None`` if there is none."""
        this_pass = current_pass()
        if this_pass is not None and this_pass.encoder is not None:
            return this_pass.handed_on
        if not self.nvib_lowest:
            raise RuntimeError(NOT_SEEN)
        return None

    def source_mask(self, mask: Tensor | None, hidden_states: Tensor, below: HandedOn | None) -> Tensor | None:
        """As in the base class, without the vectors that layers below dropped."""
        return super().source_mask(mask, hidden_states, below) if below is None else below.keep

    def _leave(
        self, this_pass: ForwardPass | None, posterior: Posterior, source_mask: Tensor | None, below: HandedOn | None
    ) -> None:
        """As in the base class, and pass on what the layer above has to know."""
        if this_pass is None:
            return
        if source_mask is None:
            source_mask = posterior.mask[:, 1:]
        if below is None:
            length, sources = source_mask.shape[1], source_mask.sum(-1)
        else:
            length, sources = below.length, below.sources
        if this_pass.records is not None:
            this_pass.records[self] = LayerRecord(posterior, source_mask, sources)
        keep, log_alpha = source_mask & posterior.keep[:, 1:], posterior.log_alpha[:, 1:]
        places = None if below is None else below.places
        shortens = this_pass.shortens and self.nvib_spec.shortens
        order = kept_first(at_least_one(keep)) if shortens else None
        if order is not None:
            keep, log_alpha = (x.take_along_dim(order, dim=1) for x in (keep, log_alpha))
            places = order if places is None else places.take_along_dim(order, dim=1)
        this_pass.handed_on = HandedOn(self, keep, places, order, log_alpha, length, sources)

    def _lengths(self, query: Tensor, num_keys: int, below: HandedOn | None) -> tuple[int, int]:
        """The lengths of the encoder's whole input, because layers above may need other parts of the position bias."""
        return super()._lengths(query, num_keys, below) if below is None else (below.length, below.length)

    def _of_what_is_left(
        self, mask: Tensor | None, position_bias: Tensor | None, below: HandedOn | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if below is None:
            return mask, position_bias
        if below.places is not None:
            mask, position_bias = (None if x is None else of_places(x, below.places) for x in (mask, position_bias))
        keep = below.keep[:, None, None]  # (B, 1, 1, N)
        if mask is None:
            mask = keep
        elif mask.dtype == torch.bool:
            mask = mask & keep
        else:
            mask = mask.masked_fill(~keep, torch.finfo(mask.dtype).min)
        return mask, position_bias


def at_least_one(keep: Tensor) -> Tensor:
    """``keep`` ``(B, N)``, or the first position if the whole batch keeps nothing: no sequence may be empty."""
    nothing = ~keep.any()
    return torch.cat([keep[:, :1] | nothing, keep[:, 1:]], dim=1)


def of_places(scores: Tensor, places: Tensor) -> Tensor:
    """Select rows and columns ``(B, N')`` of a mask or bias of scores, ``(B or 1, H or 1, N or 1, N)``."""
    scores = scores.expand(len(places), -1, -1, -1)
    if scores.shape[2] > 1:
        scores = scores.take_along_dim(places[:, None, :, None], dim=2)
    return scores.take_along_dim(places[:, None, None, :], dim=3)


class Shortening:
    """A forward hook of an encoder layer: it removes what the layer's attention dropped from the layer's output.

    It finds the attention by name, so that the hook of a copied model uses the copy.
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
    """Forward pre-hook of a stacked encoder: begins a pass of its own for its layers, inside the model's pass."""
    outer = current_pass() or ForwardPass()
    ForwardPass(outer.generator, outer.shortens, outer.records, encoder).__enter__()


def end_encoder(encoder: nn.Module, args: tuple, output: object) -> None:
    """Forward hook, called after an exception too: tells the model's pass what the encoder kept of its input.

    It sets where a vector is kept, ``(B, N')``, and the share of the input that is kept, ``(B,)``.
    """
    this_pass = current_pass()
    if this_pass is None or this_pass.encoder is not encoder:
        return
    this_pass.__exit__()
    outer, top = current_pass(), this_pass.handed_on
    if outer is not None and top is not None:
        outer.left = top.keep, top.keep.sum(-1) / top.sources.clamp(min=1)


def stack(encoder: nn.Module, modules: list[StackedSelfAttention]) -> None:
    """Connect converted modules of an encoder, the lowest first."""
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
    """The name of the encoder layer that a module belongs to: the outermost element of a list of modules."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(encoder.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    raise ValueError(f"{type(encoder).__name__} keeps {name} in no list of layers, so nothing can be dropped in it.")


def check_states_are_whole(has_stacked_encoder: bool) -> None:
    """Raise ValueError for an encoder's output in place of its inputs, if its layers pass on what they dropped."""
    if has_stacked_encoder:
        raise ValueError(
            "encoder_last_hidden_state does not tell what this encoder's layers dropped. Pass the inputs, or latents "
            "as encoder_outputs."
        )


def check_length_is_left(keep: Tensor, states: Tensor) -> None:
    """Raise ValueError if an encoder changes the length after the layers that drop vectors."""
    if keep.shape[1] != states.shape[1]:
        raise ValueError(
            f"The encoder's layers leave {keep.shape[1]} vectors, but it turns them into {states.shape[1]}, so NVIB "
            "cannot tell which are dropped. Leave 'encoder' out of attentions."
        )
