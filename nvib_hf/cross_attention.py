"""Cross-attention of every supported architecture, turned into denoising attention in place.

A row of the table (``architectures.py``) says where a module's projections, widths and scale are; one forward serves
all rows. A module keeps its parameters, names and hooks: only its class changes, to a subclass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from .architectures import CrossAttention, attention_scale, row_of
from .attention_module import ConvertedAttention, converted_class, own_class, projection_matrix, set_class
from .denoising_attention import append_bias, denoising_attention, is_half
from .packing import unpack
from .versions import CACHE, installed_and_tested


class DenoisingCrossAttention(ConvertedAttention):
    """Mixed in before a cross-attention's own class by :func:`convert_cross_attention`."""

    nvib_row: CrossAttention
    nvib_width: int
    nvib_exact: bool
    nvib_hard: bool

    def forward(self, *args, **kwargs):
        row, inputs = self.nvib_row, self._given(args, kwargs)
        hidden_states, packed = inputs[row.hidden_states], inputs.get(row.memory)
        if packed is None:
            raise ValueError(f"{type(self).__name__} got no {row.memory}: the latent is missing.")
        if row.time_major:
            hidden_states, packed = hidden_states.transpose(0, 1), packed.transpose(0, 1)
        query = self._by_head(getattr(self, row.query)(hidden_states))
        rows, sources = hidden_states.shape[0], packed.shape[0]
        if rows != sources:
            query = fold_rows(query, sources)
        output, weights = denoising_attention(
            query,
            **self._projected(packed, hidden_states.dtype, inputs.get(row.cache)),
            scale=attention_scale(self),
            exact=self.nvib_exact,
            softcap=getattr(self, row.softcap) if row.softcap else None,
            dropout_p=self._probability(row.dropout),
            need_weights=self._needs_weights(inputs),
        )
        if rows != sources:
            output = unfold_rows(output, rows)
            weights = None if weights is None else unfold_rows(weights, rows)
        output = self._joined(output)
        inputs["output"] = output.transpose(0, 1) if row.time_major else output
        inputs["weights"] = weights
        return tuple(inputs.get(name) for name in row.returns)

    def _projected(self, packed: Tensor, dtype: torch.dtype, cache) -> dict[str, Tensor]:
        """What attention reads of a latent in this layer, once per source: later steps find it in the cache.

        ``key``, ``value`` ``(B, H, Nl, E)`` and ``bias``; of a mixture also ``shrinkage`` and the matrices.
        """
        has_cache = isinstance(cache, EncoderDecoderCache)
        if has_cache and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return {"key": layer.keys, "value": layer.values, **layer.nvib_beside}
        row, latent = self.nvib_row, unpack(packed, self.nvib_width, self.nvib_hard)
        vectors = latent.vectors.to(dtype)
        if not torch.is_grad_enabled():  # which would keep the copy: each projection of a slice takes 7 % longer
            vectors = vectors.contiguous()
        if row.key_value is not None:
            key, value = getattr(self, row.key_value)(vectors).chunk(2, dim=-1)
        else:
            key, value = getattr(self, row.key)(vectors), getattr(self, row.value)(vectors)
        key, value = self._by_head(key), self._by_head(value)
        beside = {"bias": latent.bias}
        if latent.dropped is not None and self.training:
            beside["dropped"] = latent.dropped
        elif latent.dropped is not None:
            beside["bias"] = latent.bias.masked_fill(latent.dropped > 0.5, float("-inf"))
        if latent.shrinkage is not None:
            key_weight, value_weight = self._matrices(vectors)
            beside |= {
                "shrinkage": latent.shrinkage.to(dtype),
                "key_weight": key_weight,
                "value_weight": value_weight,
            }
        if has_cache:
            plain = latent.shrinkage is None and "dropped" not in beside and row.softcap is None
            if plain and is_half(dtype):  # once, not at every step, for which fp32 has a mask
                key, value = append_bias(key, value, beside["bias"], attention_scale(self))
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
            cache.cross_attention_cache.layers[self.layer_idx].nvib_beside = beside
        return {"key": key, "value": value, **beside}

    def _matrices(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """``W_k`` and ``W_v`` ``(H, E, P)``."""
        row = self.nvib_row
        if row.key_value is not None:
            weights = projection_matrix(getattr(self, row.key_value), vectors).chunk(2)
        else:
            weights = [projection_matrix(getattr(self, name), vectors) for name in (row.key, row.value)]
        head_dim = getattr(self, row.head_dim)
        return tuple(weight.unflatten(0, (-1, head_dim)) for weight in weights)


def fold_rows(x: Tensor, sources: int) -> Tensor:
    """A source's rows (its beams, side by side) as further queries: ``(S * K, H, Nt, E)`` to ``(S, H, K * Nt, E)``.

    So its keys and values are stored once, however many beams there are.
    """
    if len(x) % sources:
        raise ValueError(f"There are {sources} latents but {len(x)} decoder inputs. Pass one latent for each row.")
    return x.unflatten(0, (sources, -1)).transpose(1, 2).flatten(2, 3)


def unfold_rows(x: Tensor, rows: int) -> Tensor:
    """The inverse of :func:`fold_rows`."""
    return x.unflatten(2, (rows // len(x), -1)).transpose(1, 2).flatten(0, 1)


def convert_cross_attention(modules: list[nn.Module], width: int, exact: bool = False, hard: bool = False) -> None:
    """Turn cross-attention modules into denoising attention for latents ``width`` wide, in place.

    ``hard`` is whether training drops vectors by hard draws (:func:`~nvib_hf.dropping.hard_draw`).
    """
    for module in modules:
        set_class(module, converted_class(DenoisingCrossAttention, type(module), row_of(module)))
        module.nvib_width, module.nvib_exact, module.nvib_hard = width, exact, hard


def restore_cross_attention(model: nn.Module) -> None:
    """Undo :func:`convert_cross_attention` in the whole model."""
    for module in model.modules():
        if isinstance(module, DenoisingCrossAttention):
            set_class(module, own_class(module))
            del module.nvib_width, module.nvib_exact, module.nvib_hard


def check_cache_was_found(cache: object, layers: tuple[int, ...]) -> None:
    """Raise RuntimeError if a decoder was given a cache that its cross-attention in ``layers`` did not see.

    It would decode on, from keys and values of every step anew.
    """
    if isinstance(cache, EncoderDecoderCache) and not all(cache.is_updated.get(layer) for layer in layers):
        missed = [layer for layer in layers if not cache.is_updated.get(layer)]
        raise RuntimeError(
            f"The cache did not reach the cross-attention of layers {missed}: the decoder hands it on under a name "
            f"that is not {CACHE!r}. {installed_and_tested()}. Install a tested version, or pass use_cache=False."
        )
