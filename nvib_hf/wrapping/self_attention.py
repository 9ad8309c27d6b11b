"""Turns the self-attention of every architecture in the table into denoising attention, in place.

A converted module has its own NVIB layer, ``nvib``, between its input and its keys and values. The base's masks,
position biases and caches do not change. The prior's component comes before all keys, and every query sees it. What
else attention needs for a position is stored in the cache, as further channels of the key.

A :class:`ForwardPass` holds what belongs to one pass through the model (its random generator, the posteriors of its
layers). Modules never hold it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncoderDecoderCache

from ..configuration_nvib import NvibConfig
from ..layers.denoising_attention import AttendedLatent, additive_mask, denoising_attention
from ..layers.distributions import Posterior
from ..layers.nvib import SelfAttentionNvibLayer
from .cached_keys import carried, separated
from .cross_attention import ConvertedAttention, converted_class, own_class, set_class
from .specs import AttentionSpec


# -------------------------------------------------------------------------------------------- one forward pass
class LayerRecord(NamedTuple):
    """What a self-attention records in one pass, so that the loss can charge for it.

    ``source_mask`` ``(B, N)`` is True where a position is no padding; ``None`` means True everywhere. ``sources``
    ``(B,)`` is the number of vectors that the share kept divides by; ``None`` means the number in the mask.
    """

    posterior: Posterior
    source_mask: Tensor | None
    sources: Tensor | None = None


class HandedOn(NamedTuple):
    """What an encoder layer that drops or merges vectors, or accumulates pseudo-counts, passes to the layers above it.

    ``by`` is the attention that made it. ``keep`` ``(B, N')`` is True where a vector is left. ``places`` ``(B, N')``
    are positions in the encoder's input, ``None`` while all of them are left; ``order`` ``(B, N')`` are positions in
    this layer's own input. ``log_alpha`` ``(B, N')`` are the accumulated pseudo-counts. ``log_mass`` ``(B, N')`` says
    how many vectors each one stands for, ``None`` while each stands for itself. ``length`` is the length of the
    encoder's input, ``sources`` ``(B,)`` counts its vectors.
    """

    by: DenoisingSelfAttention
    keep: Tensor
    places: Tensor | None
    order: Tensor | None
    log_alpha: Tensor
    log_mass: Tensor | None
    length: int
    sources: Tensor

    def only(self, order: Tensor) -> HandedOn:
        """What is passed on for the vectors at the positions ``order`` ``(B, N')`` only."""
        taken = {
            name: value.take_along_dim(order, dim=1)
            for name in ("keep", "places", "log_alpha", "log_mass")
            if (value := getattr(self, name)) is not None
        }
        return self._replace(**{"places": order, **taken})


class ForwardPass:
    """One pass through a model or its encoder: everything that its self-attentions share, except tensors.

    It is a context manager. Inside, it is the current pass of this thread only. A call inside a call has its own pass.
    An exception ends a pass like a return.

    Args:
        generator: for the draws of training.
        shortens: whether dropped vectors leave the encoder's sequence, if the architecture allows it.
        records: ``{}`` makes every self-attention leave a :class:`LayerRecord`; ``None`` records nothing.
        encoder: the encoder's module, if the pass is through the encoder only.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        shortens: bool = False,
        records: dict[nn.Module, LayerRecord] | None = None,
        encoder: nn.Module | None = None,
    ) -> None:
        self.generator, self.shortens, self.records, self.encoder = generator, shortens, records, encoder
        self.handed_on: HandedOn | None = None  # by the layer that ran last
        self.left: HandedOn | None = None  # by the encoder's last layer
        self._outer: ForwardPass | None = None

    def __enter__(self) -> Self:
        self._outer = current_pass()
        _set_current(self)
        return self

    def __exit__(self, *error) -> None:
        _set_current(self._outer)


class _Traced:
    """The current pass while ``torch.compile`` traces, one pass at a time. Tracing cannot set a ContextVar."""

    current: ForwardPass | None = None


_CURRENT: ContextVar[ForwardPass | None] = ContextVar("nvib_forward_pass", default=None)
_TRACED = _Traced()


def current_pass() -> ForwardPass | None:
    """This thread's current pass. ``None`` outside of a pass, for instance when checkpointing runs a layer again."""
    return _TRACED.current if torch.compiler.is_compiling() else _CURRENT.get()


def _set_current(this_pass: ForwardPass | None) -> None:
    if torch.compiler.is_compiling():
        _TRACED.current = this_pass
    else:
        _CURRENT.set(this_pass)


# ------------------------------------------------------------------------------------------------ the attention
class DenoisingSelfAttention(ConvertedAttention):
    """Mixin that :func:`convert_self_attention` puts before a self-attention's own class."""

    nvib: SelfAttentionNvibLayer
    nvib_config: NvibConfig

    def forward(self, *args, **kwargs):
        spec, inputs = self.nvib_spec, dict(zip(self.nvib_arguments, args, strict=False)) | kwargs
        hidden_states, mask = self.states_and_mask(args, kwargs)
        check_mask(mask, type(self).__name__)
        cache = inputs.get(spec.cache) if spec.cache else None
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        if isinstance(past, Tensor):
            past = past.clone()  # a static cache's own counter
        this_pass, below, from_below = current_pass(), self.handed_on_below(), None
        if below is not None:  # accumulated pseudo-counts have the mass in them
            from_below = below.log_alpha if self.nvib_config.accumulate_alpha else below.log_mass
        latent, posterior = self.nvib(
            hidden_states,
            self.nvib_config.evaluation,
            None if this_pass is None else this_pass.generator,
            from_below,
        )
        self._leave(this_pass, posterior, self.source_mask(mask, hidden_states, below), below)
        query = self._query(hidden_states)
        read = self._projected(latent, hidden_states.dtype, cache, past)
        num_keys = read["key"].shape[2] - 1  # without the prior's
        position_bias = self._position_bias(inputs, *self._lengths(query, num_keys, below), past)
        mask, bias = self._of_what_is_left(mask, position_bias, below)
        output, weights = denoising_attention(
            query,
            **read,
            scale=self.nvib.scale,
            exact=self.nvib_config.exact_attention,
            attention_mask=self._scores_mask(mask, inputs.get("is_causal"), bias, query, num_keys),
            **self._weights_arguments(inputs),
        )
        inputs |= {"output": self._joined(output), "weights": weights, "position_bias": position_bias}
        return tuple(inputs.get(name) for name in spec.returns)

    def handed_on_below(self) -> HandedOn | None:
        """What the layers below passed on; ``None`` if they drop nothing."""
        return None

    def source_mask(self, mask: Tensor | None, hidden_states: Tensor, below: HandedOn | None) -> Tensor | None:
        """Positions ``(B, N)`` that at least one query sees; ``None`` if all are seen."""
        return positions_seen_by_any(mask, hidden_states)

    def _leave(
        self, this_pass: ForwardPass | None, posterior: Posterior, source_mask: Tensor | None, below: HandedOn | None
    ) -> None:
        """Record in the pass what the loss charges this layer for."""
        if this_pass is not None and this_pass.records is not None:
            this_pass.records[self] = LayerRecord(posterior, source_mask)

    def _lengths(self, query: Tensor, num_keys: int, below: HandedOn | None) -> tuple[int, int]:
        """The numbers of queries and keys that a position bias is made for."""
        return query.shape[2], num_keys

    def _of_what_is_left(
        self, mask: Tensor | None, position_bias: Tensor | None, below: HandedOn | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mask and position bias for the vectors that the layers below left."""
        return mask, position_bias

    def states_and_mask(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        """The hidden states and the mask in a call's arguments."""
        inputs = dict(zip(self.nvib_arguments, args, strict=False)) | kwargs
        return inputs[self.nvib_spec.hidden_states], inputs.get(self.nvib_spec.mask)

    def _query(self, hidden_states: Tensor) -> Tensor:
        spec = self.nvib_spec
        if spec.query_key_value is None:
            return self._by_head(getattr(self, spec.query)(hidden_states))
        return self._by_head(getattr(self, spec.query_key_value)(hidden_states).chunk(3, dim=-1)[0])

    def _projected(self, latent: AttendedLatent, dtype: torch.dtype, cache, past: int | Tensor) -> dict[str, Tensor]:
        """What attention reads: ``key``, ``value`` ``(B, H, 1 + Nk, E)`` and ``bias``, the prior's first.

        For a mixture there are also ``shrinkage`` and the matrices.
        """
        vectors, bias, shrinkage = latent.vectors.to(dtype), latent.bias, latent.shrinkage
        matrices = {}
        if shrinkage is not None:
            shrinkage = shrinkage.to(dtype)
            matrices = self._matrices(vectors)
        if cache is None:
            key, value = self._key_value(vectors)
        else:
            # The prior's component is projected the first time, again if the cache has been taken apart since, and
            # always if the counter is on the device.
            first = isinstance(past, Tensor) or past == 0 or not hasattr(cache.layers[self.layer_idx], "nvib_prior")
            key, value = self._key_value(vectors if first else vectors[:, 1:])
            wide = carried(
                key, bias if first else bias[:, 1:], shrinkage if first or shrinkage is None else shrinkage[:, 1:]
            )
            prior = None
            if first:
                prior, wide, value = (wide[:1, :, :1], value[:1, :, :1]), wide[:, :, 1:], value[:, :, 1:]
            wide, value = cache.update(wide, value, self.layer_idx)
            layer = cache.layers[self.layer_idx]
            if prior is not None:
                layer.nvib_prior = prior
            prior_wide, prior_value = (x.expand(wide.shape[0], -1, -1, -1) for x in layer.nvib_prior)
            wide, value = torch.cat([prior_wide, wide], dim=2), torch.cat([prior_value, value], dim=2)
            width = getattr(self, self.nvib_spec.head_dim)
            key, bias, shrinkage = separated(wide, width, None if shrinkage is None else self.nvib.size_out)
        beside = {} if shrinkage is None else {"shrinkage": shrinkage, **matrices}
        return {"key": key, "value": value, "bias": bias, **beside}

    def _position_bias(self, inputs: dict, queries: int, keys: int, past: int | Tensor) -> Tensor | None:
        """The base's position bias ``(1, H, Nt, Nk)``: this layer's own, or the one from a layer below."""
        if not self.nvib_spec.has_position_bias:
            return None
        given = inputs.get("position_bias")
        if given is not None or not self.has_relative_attention_bias:
            return given
        return self.compute_bias(
            queries, keys, device=inputs[self.nvib_spec.hidden_states].device, past_seen_tokens=past
        )

    def _scores_mask(
        self, mask: Tensor | None, is_causal: bool | None, position_bias: Tensor | None, query: Tensor, keys: int
    ) -> Tensor | None:
        """The base's mask and position bias for the scores, with a column for the prior's component."""
        queries = query.shape[2]
        is_causal = self.is_causal if is_causal is None else is_causal
        if mask is None and is_causal and queries > 1:  # as in the base, where a flag tells the kernels
            positions = torch.arange(keys, device=query.device)
            mask = (positions <= positions[-queries:, None])[None, None]
        if mask is not None:
            mask = F.pad(mask[..., :keys], (1, 0), value=True if mask.dtype == torch.bool else 0.0)
        if position_bias is None:
            return mask
        position_bias = F.pad(position_bias, (1, 0))
        return position_bias if mask is None else position_bias + additive_mask(mask, position_bias.dtype)


def check_mask(mask: object, name: str) -> None:
    """Raise ValueError unless a mask is one of scores. Some implementations of attention have other masks."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        raise ValueError(
            f"{name} adds a bias to its scores, but this model's attention implementation cannot do that. Call "
            "model.set_attn_implementation('sdpa'), or 'eager'."
        )


def positions_seen_by_any(mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """Positions that at least one query sees, ``(B, N)``, so no padding. ``None`` without a mask."""
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(dim=1).any(dim=1).expand(hidden_states.shape[0], -1)


def convert_self_attention(
    module: nn.Module,
    spec: AttentionSpec,
    layer: SelfAttentionNvibLayer,
    config: NvibConfig,
    mixin: type[DenoisingSelfAttention] = DenoisingSelfAttention,
) -> None:
    """Turn a self-attention module into denoising attention, in place, with ``layer`` as its NVIB layer."""
    set_class(module, converted_class(mixin, type(module), spec))
    module.nvib, module.nvib_config = layer, config


def restore_self_attention(model: nn.Module) -> None:
    """Undo :func:`convert_self_attention` in the whole model."""
    for module in list(model.modules()):
        if isinstance(module, DenoisingSelfAttention):
            set_class(module, own_class(module))
            del module.nvib
            for name in [name for name in vars(module) if name.startswith("nvib_")]:
                delattr(module, name)
