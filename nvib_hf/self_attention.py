"""Self-attention of every architecture of the table, turned into denoising attention in place.

A converted module has an NVIB layer of its own, ``nvib``, between its input and its keys and values. The base's masks,
position biases and caches stay what they are: the prior's component stands in front of all keys, visible to every
query, and what attention needs to know of a position beside its key travels in the cache as further channels of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncoderDecoderCache

from .attended_layer import AttendedNvibLayer
from .attention_module import ConvertedAttention, converted_class, own_class, projection_matrix, set_class
from .configuration_nvib import NvibConfig
from .denoising_attention import AttendedLatent, additive_mask, denoising_attention, is_half, three_summands
from .posterior import Posterior
from .self_architectures import SelfAttention, self_attention_row


class DenoisingSelfAttention(ConvertedAttention):
    """Mixed in before a self-attention's own class by :func:`convert_self_attention`."""

    nvib_row: SelfAttention
    nvib: AttendedNvibLayer
    nvib_config: NvibConfig
    nvib_recording: bool  # whether a forward pass leaves what :func:`recorded` reads
    nvib_generator: torch.Generator | None
    nvib_posterior: Posterior | None
    nvib_visible: Tensor | None  # (B, N), what is no padding; None if nothing is
    nvib_sources: Tensor | None = (
        None  # (B,), of how many vectors the kept ones are a share; None: of the visible ones
    )

    def forward(self, *args, **kwargs):
        row, inputs = self.nvib_row, self._given(args, kwargs)
        hidden_states, mask = self.states_and_mask(args, kwargs)
        check_mask(mask, type(self).__name__)
        cache = inputs.get(row.cache) if row.cache else None
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        if isinstance(past, Tensor):
            past = past.clone()  # a static cache's own counter
        latent, posterior = self._latent(hidden_states)
        self._see(posterior, mask, hidden_states)
        query = self._query(hidden_states)
        read = self._projected(latent, hidden_states.dtype, cache, past)
        num_keys = read["key"].shape[2] - 1  # without the prior's
        position_bias = self._position_bias(inputs, query.shape[2], num_keys, past)
        output, weights = denoising_attention(
            query,
            **read,
            scale=self.nvib.scale,
            exact=self.nvib_config.exact_attention,
            attention_mask=self._scores_mask(mask, inputs.get("is_causal"), position_bias, query, num_keys),
            dropout_p=self._probability(row.dropout),
            need_weights=self._needs_weights(inputs),
        )
        inputs |= {"output": self._joined(output), "weights": weights, "position_bias": position_bias}
        return tuple(inputs.get(name) for name in row.returns)

    def _latent(
        self, hidden_states: Tensor, log_alpha_below: Tensor | None = None
    ) -> tuple[AttendedLatent, Posterior]:
        return self.nvib(hidden_states, self.nvib_config.evaluation, self.nvib_generator, log_alpha_below)

    def _see(self, posterior: Posterior, mask: Tensor | None, hidden_states: Tensor) -> None:
        """Leave what is recorded."""
        if self.nvib_recording:
            self.nvib_posterior, self.nvib_visible = posterior, visible_keys(mask, hidden_states)

    def __getstate__(self) -> dict:
        """Without what a pass that failed left: a graph, which nothing can copy."""
        return vars(self) | {"nvib_posterior": None, "nvib_visible": None, "nvib_sources": None}

    def unseen(self, mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """Positions that no query sees, ``(B, N)``; ``None`` if there are none."""
        visible = visible_keys(mask, hidden_states)
        return None if visible is None else ~visible

    def states_and_mask(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        """Of a call's arguments."""
        inputs = self._given(args, kwargs)
        return inputs[self.nvib_row.hidden_states], inputs.get(self.nvib_row.mask)

    def _query(self, hidden_states: Tensor) -> Tensor:
        row = self.nvib_row
        if row.query_key_value is None:
            return self._by_head(getattr(self, row.query)(hidden_states))
        return self._by_head(getattr(self, row.query_key_value)(hidden_states).chunk(3, dim=-1)[0])

    def _key_value(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        row = self.nvib_row
        if row.query_key_value is None:
            return self._by_head(getattr(self, row.key)(vectors)), self._by_head(getattr(self, row.value)(vectors))
        _, key, value = getattr(self, row.query_key_value)(vectors).chunk(3, dim=-1)
        return self._by_head(key), self._by_head(value)

    def _projected(self, latent: AttendedLatent, dtype: torch.dtype, cache, past: int | Tensor) -> dict[str, Tensor]:
        """What attention reads: ``key``, ``value`` ``(B, H, 1 + Nk, E)`` and ``bias``, the prior's first.

        Of a mixture also ``shrinkage`` and the matrices; of hard draws also ``dropped``.
        """
        vectors, bias, shrinkage = latent.vectors.to(dtype), latent.bias, latent.shrinkage
        matrices = {}
        if shrinkage is not None:
            shrinkage = shrinkage.to(dtype)
            matrices = self._matrices(vectors)
        if cache is None:
            key, value = self._key_value(vectors)
            dropped = {} if latent.dropped is None else {"dropped": latent.dropped}
        else:
            dropped = {}
            # The prior's component is projected once: the first time, or always beside a counter on the device.
            first = isinstance(past, Tensor) or past == 0
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
            prior_wide, prior_value = (x.expand(len(wide), -1, -1, -1) for x in layer.nvib_prior)
            wide, value = torch.cat([prior_wide, wide], dim=2), torch.cat([prior_value, value], dim=2)
            width = getattr(self, self.nvib_row.head_dim)
            key, bias, shrinkage = separated(wide, width, None if shrinkage is None else self.nvib.size_out)
        beside = {} if shrinkage is None else {"shrinkage": shrinkage, **matrices}
        return {"key": key, "value": value, "bias": bias, **dropped, **beside}

    def _matrices(self, vectors: Tensor) -> dict[str, Tensor]:
        """``W_k`` and ``W_v`` ``(H, E, P)``."""
        row = self.nvib_row
        if row.query_key_value is not None:
            weights = projection_matrix(getattr(self, row.query_key_value), vectors).chunk(3)[1:]
        else:
            weights = [projection_matrix(getattr(self, name), vectors) for name in (row.key, row.value)]
        key, value = (weight.unflatten(0, (-1, getattr(self, row.head_dim))) for weight in weights)
        return {"key_weight": key, "value_weight": value}

    def _position_bias(self, inputs: dict, queries: int, keys: int, past: int | Tensor) -> Tensor | None:
        """What the base adds to the scores, ``(1, H, Nt, Nk)``: its own, or that of a layer below."""
        if not self.nvib_row.has_position_bias:
            return None
        given = inputs.get("position_bias")
        if given is not None or not self.has_relative_attention_bias:
            return given
        return self.compute_bias(
            queries, keys, device=inputs[self.nvib_row.hidden_states].device, past_seen_tokens=past
        )

    def _scores_mask(
        self, mask: Tensor | None, is_causal: bool | None, position_bias: Tensor | None, query: Tensor, keys: int
    ) -> Tensor | None:
        """The base's mask and position bias, to be added to the scores, with a column for the prior's component."""
        queries = query.shape[2]
        is_causal = self.is_causal if is_causal is None else is_causal
        if mask is None and is_causal and queries > 1:  # as in the base, whose kernels take a flag for it
            positions = torch.arange(keys, device=query.device)
            mask = (positions <= positions[-queries:, None])[None, None]
        if mask is not None:
            mask = F.pad(mask[..., :keys], (1, 0), value=True if mask.dtype == torch.bool else 0.0)
        if position_bias is None:
            return mask
        position_bias = F.pad(position_bias, (1, 0))
        return position_bias if mask is None else position_bias + additive_mask(mask, position_bias.dtype)


def check_mask(mask: object, name: str) -> None:
    """Raise ValueError for a mask that is none of scores: other implementations of attention have their own kinds."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        raise ValueError(
            f"{name} adds a bias to its scores, which the attention implementation of this model cannot. Call "
            "model.set_attn_implementation('sdpa'), or 'eager'."
        )


def visible_keys(mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """Positions that any query sees, ``(B, N)``: what is no padding. ``None`` without a mask."""
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(dim=1).any(dim=1).expand(len(hidden_states), -1)


def carried(key: Tensor, bias: Tensor, shrinkage: Tensor | None) -> Tensor:
    """Keys ``(B, H, N, E)`` with what belongs to them in further channels, for a base's cache.

    First the bias ``(B, N)``, in half precision as three summands that it does not round; then of the shrinkage
    ``(B, N, P)`` a slice for each head.
    """
    heads = key.shape[1]
    channels = three_summands(bias) if is_half(key.dtype) else bias[..., None]
    channels = channels.clamp(min=torch.finfo(key.dtype).min).to(key.dtype)
    parts = [key, channels[:, None].expand(-1, heads, -1, -1)]
    if shrinkage is not None:
        missing = -shrinkage.shape[-1] % heads
        shrinkage = F.pad(shrinkage, (0, missing)).unflatten(-1, (heads, -1)).transpose(1, 2)
        parts.append(shrinkage.to(key.dtype))  # under autocast its own may be wider, and would be that of all channels
    return torch.cat(parts, dim=-1)


def separated(wide: Tensor, width: int, size: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys of ``width``, bias and shrinkage (of ``size`` ``P``, ``None`` for none) of what :func:`carried` made."""
    beyond = width + (3 if is_half(wide.dtype) else 1)
    bias = wide[:, 0, :, width:beyond]
    bias = (bias.float() if is_half(bias.dtype) else bias).sum(-1)
    shrinkage = None if size is None else wide[..., beyond:].transpose(1, 2).flatten(2)[..., :size]
    return wide[..., :width], bias, shrinkage


def convert_self_attention(
    module: nn.Module,
    layer: AttendedNvibLayer,
    config: NvibConfig,
    mixin: type[DenoisingSelfAttention] = DenoisingSelfAttention,
) -> None:
    """Turn a self-attention module into denoising attention, in place, with an NVIB layer of its own."""
    set_class(module, converted_class(mixin, type(module), self_attention_row(module)))
    module.nvib, module.nvib_config = layer, config
    module.nvib_recording, module.nvib_generator = False, None
    module.nvib_posterior = module.nvib_visible = None


def restore_self_attention(model: nn.Module) -> None:
    """Undo :func:`convert_self_attention` in the whole model."""
    for module in list(model.modules()):
        if isinstance(module, DenoisingSelfAttention):
            set_class(module, own_class(module))
            del module.nvib
            for name in [name for name in vars(module) if name.startswith("nvib_")]:
                delattr(module, name)
