"""A stack of encoder layers that pass on which vectors are left, how many each stands for, and their pseudo-counts.

The layers above and the decoder do not see what a layer drops. In generation, dropped vectors leave their sequence.
Merged vectors go on with the mass of all that they replace (:mod:`nvib_hf.layers.merging`): the layers above and the
decoder's latent add it to their pseudo-counts. Before a decoder, merging shortens the sequence, in training too.
The :class:`~nvib_hf.wrapping.self_attention.ForwardPass` holds what layers pass on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..latents.merging import UNTRACEABLE
from ..layers.distributions import Posterior
from ..layers.dropping import kept_first
from ..layers.exporting import check_not_exporting
from ..layers.merging import merge_in_place
from .self_attention import DenoisingSelfAttention, ForwardPass, HandedOn, LayerRecord, current_pass

NOT_SEEN = (
    "An encoder layer cannot see what the layer below it dropped, merged or weighed: its forward pass runs again "
    "without that layer, as in gradient checkpointing. Train without checkpointing, or with NVIB in the encoder's "
    "last layer only."
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
        places, log_mass = (None, None) if below is None else (below.places, below.log_mass)
        handed_on = HandedOn(self, keep, places, None, log_alpha, log_mass, length, sources)
        shortens = this_pass.shortens and self.nvib_spec.shortens
        if shortens and (order := kept_first(at_least_one(keep))) is not None:
            handed_on = handed_on.only(order)._replace(order=order)
        this_pass.handed_on = handed_on

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
    scores = scores.expand(places.shape[0], -1, -1, -1)
    if scores.shape[2] > 1:
        scores = scores.take_along_dim(places[:, None, :, None], dim=2)
    return scores.take_along_dim(places[:, None, None, :], dim=3)


@torch.compiler.disable(reason=UNTRACEABLE)
def merged_states(states: Tensor, handed_on: HandedOn, share: float, shorten: bool) -> tuple[Tensor, HandedOn]:
    """The output ``(B, N', H)`` of an encoder layer merged to a share of its vectors, and what it hands on then.

    Args:
        shorten: take merged vectors out of the sequence. Otherwise each stands in the place of all that it is of, and
            attention reads the first.
    """
    check_not_exporting("encoder_merge_share", "Export a model without it.")
    log_mass = torch.zeros_like(states[..., 0]) if handed_on.log_mass is None else handed_on.log_mass
    made = merge_in_place(states, log_mass.masked_fill(~handed_on.keep, -torch.inf), share)
    log_alpha = handed_on.log_alpha
    if handed_on.by.nvib_config.accumulate_alpha:
        log_alpha = made.total(log_alpha.masked_fill(~handed_on.keep, -torch.inf)).masked_fill(~made.keep, 0)
    log_mass = made.log_mass.masked_fill(~made.keep, 0)
    handed_on = handed_on._replace(keep=made.keep, order=None, log_alpha=log_alpha, log_mass=log_mass)
    if shorten and (order := kept_first(at_least_one(made.keep))) is not None:
        return made.z.take_along_dim(order[..., None], dim=1), handed_on.only(order)
    return made.z, handed_on


class Shortening:
    """A forward hook of an encoder layer: it removes what the layer's attention dropped, and merges what is left.

    It finds the attention by name, so that the hook of a copied model uses the copy.

    Args:
        attention: its name in the layer.
        share: the share of the vectors that merging leaves; 1 merges nothing.
    """

    def __init__(self, attention: str, share: float = 1.0) -> None:
        self.attention, self.share = attention, share

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        this_pass, attention = current_pass(), layer.get_submodule(self.attention)
        if this_pass is None or (handed_on := this_pass.handed_on) is None or handed_on.by is not attention:
            return output
        states = output if isinstance(output, Tensor) else output[0]
        if handed_on.order is not None:
            states = states.take_along_dim(handed_on.order[..., None], dim=1)
        if self.share < 1:
            shorten = handed_on.by.nvib_config.is_encoder_decoder and handed_on.by.nvib_spec.shortens
            states, this_pass.handed_on = merged_states(states, handed_on, self.share, shorten)
        return states if isinstance(output, Tensor) else (states, *output[1:])


def begin_encoder(encoder: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a stacked encoder: begins a pass of its own for its layers, inside the model's pass."""
    outer = current_pass() or ForwardPass()
    ForwardPass(outer.generator, outer.shortens, outer.records, encoder).__enter__()


def end_encoder(encoder: nn.Module, args: tuple, output: object) -> None:
    """Forward hook, called after an exception too: gives the model's pass what the encoder's last layer passed on."""
    this_pass = current_pass()
    if this_pass is None or this_pass.encoder is not encoder:
        return
    this_pass.__exit__()
    outer = current_pass()
    if outer is not None:
        outer.left = this_pass.handed_on


def stack(encoder: nn.Module, modules: dict[int, StackedSelfAttention], shares: dict[int, float]) -> None:
    """Connect converted modules of an encoder.

    Args:
        modules: by the number of their layer, the lowest first.
        shares: to which share of its vectors a layer's output is merged, by the number of the layer.
    """
    names = {id(module): name for name, module in encoder.named_modules()}
    for number, module in modules.items():
        module.nvib_lowest = number == min(modules)
        name = names[id(module)]
        layer = encoder_layer(encoder, name)
        shortening = Shortening(name.removeprefix(f"{layer}."), shares.get(number, 1.0))
        encoder.get_submodule(layer).register_forward_hook(shortening)
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


def check_merges_as_made(now: dict[int, float] | None, made_with: dict[int, float]) -> None:
    """Raise ValueError if ``encoder_merge_share`` was set since a model was made, which its layers do not see."""
    if (now or {}) != made_with:
        raise ValueError(
            f"encoder_merge_share was set to {now}, but the encoder's layers were made with {made_with or None}, and "
            "do not see it. Save the model and load it again, or set it when you wrap a base."
        )


def check_states_are_whole(has_stacked_encoder: bool) -> None:
    """Raise ValueError for an encoder's output in place of its inputs, if its layers pass on what they dropped."""
    if has_stacked_encoder:
        raise ValueError(
            "encoder_last_hidden_state does not tell what this encoder's layers dropped. Pass the inputs, or latents "
            "as encoder_outputs."
        )


def left_by_layers(states: Tensor) -> HandedOn | None:
    """What the layers of the encoder that just ran left of its output ``(B, N', H)``; ``None`` outside of a pass.

    Raises:
        ValueError: the encoder changes the length after the layers that drop vectors.
    """
    this_pass = current_pass()
    left = None if this_pass is None else this_pass.left
    if left is not None and left.keep.shape[1] != states.shape[1]:
        raise ValueError(
            f"The encoder's layers leave {left.keep.shape[1]} vectors, but it turns them into {states.shape[1]}, so "
            "NVIB cannot tell which are dropped. Leave 'encoder' out of attentions."
        )
    return left
