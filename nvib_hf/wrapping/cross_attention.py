"""Turns a base's attention module into denoising attention, in place: code for all kinds, and for cross-attention.

A spec (``specs.py``) says where a module's projections, widths and scale are, so one forward serves all architectures.
A module keeps its parameters, names and hooks. Only its class changes, to a subclass of its own class.
"""

from __future__ import annotations

import copyreg
import functools
import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache

from ..layers.denoising_attention import BIAS_WIDTH, HALF_PRECISION, append_bias, denoising_attention, unpack
from ..versions import CACHE, installed_and_tested
from .cached_keys import ALIGNED, carried, separated
from .specs import AttentionSpec


class ConvertedAttention(nn.Module):
    """Mixin before an attention's own class. ``nvib_spec`` has the names of its parts."""

    nvib_spec: AttentionSpec
    nvib_arguments: tuple[str, ...]

    def _key_value(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, N, E)`` of vectors ``(B, N, P)``."""
        spec = self.nvib_spec
        if joint := spec.key_value or spec.query_key_value:
            key, value = getattr(self, joint)(vectors).chunk(3 if spec.query_key_value else 2, dim=-1)[-2:]
        else:
            key, value = getattr(self, spec.key)(vectors), getattr(self, spec.value)(vectors)
        return self._by_head(key), self._by_head(value)

    def _matrices(self, vectors: Tensor) -> dict[str, Tensor]:
        """``W_k`` and ``W_v`` ``(H, E, P)``."""
        spec = self.nvib_spec
        if joint := spec.key_value or spec.query_key_value:
            weights = projection_matrix(getattr(self, joint), vectors).chunk(3 if spec.query_key_value else 2)[-2:]
        else:
            weights = [projection_matrix(getattr(self, name), vectors) for name in (spec.key, spec.value)]
        key, value = (weight.unflatten(0, (-1, getattr(self, spec.head_dim))) for weight in weights)
        return {"key_weight": key, "value_weight": value}

    def _by_head(self, x: Tensor) -> Tensor:
        """``(B, N, H * E)`` to ``(B, H, N, E)``."""
        return x.view(*x.shape[:-1], -1, getattr(self, self.nvib_spec.head_dim)).transpose(1, 2)

    def _joined(self, output: Tensor) -> Tensor:
        """``(B, H, N, E)`` to the module's output ``(B, N, C)``."""
        spec, output = self.nvib_spec, output.transpose(1, 2).flatten(2)
        if spec.output is not None:
            output = getattr(self, spec.output)(output)
        if spec.output_dropout is not None:
            dropout = getattr(self, spec.output_dropout)
            output = dropout(output) if isinstance(dropout, nn.Module) else F.dropout(output, dropout, self.training)
        return output

    def _weights_arguments(self, inputs: dict) -> dict:
        """Arguments of :func:`denoising_attention`: the dropout of the weights, and whether they are returned."""
        config, dropout = getattr(self, "config", None), getattr(self, self.nvib_spec.dropout)
        dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        return {
            "dropout_p": dropout if self.training else 0.0,
            "need_weights": inputs.get("output_attentions") or getattr(config, "_attn_implementation", "") == "eager",
        }


def projection_matrix(projection: nn.Module, like: Tensor) -> Tensor:
    """The matrix ``(out, P)`` of a linear map.

    A plain ``nn.Linear`` gives its weight. Anything else (LoRA, quantised weights, Conv1D, offloaded weights) is
    applied to the identity, so that everything it does counts.
    """
    plain = type(projection) is nn.Linear and type(projection.weight) is nn.Parameter
    hooked = hasattr(projection, "_hf_hook") or projection._forward_hooks or projection._forward_pre_hooks
    if plain and not hooked and projection.weight.dtype == like.dtype:
        return projection.weight
    eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None]
    return (projection(eye) - projection(torch.zeros_like(eye[:, :1]))).squeeze(0).transpose(0, 1)


class MadeAtRunTime(type):
    """The type of a class that is in no module. Pickle stores the parts that it is made of, and makes it again."""


@functools.cache
def converted_class(mixin: type[ConvertedAttention], base: type[nn.Module], spec: AttentionSpec) -> type[nn.Module]:
    """A subclass of ``base`` that computes ``mixin``'s attention. Equal arguments give the same class."""
    names = tuple(inspect.signature(base.forward).parameters)[1:]
    fields = {"nvib_spec": spec, "nvib_arguments": names, "__module__": base.__module__}
    return MadeAtRunTime(f"Denoising{base.__name__}", (mixin, base), fields)


def _what_made_it(made: type[ConvertedAttention]) -> tuple:
    mixin, base = made.__bases__
    return converted_class, (mixin, base, made.nvib_spec)


copyreg.pickle(MadeAtRunTime, _what_made_it)


def own_class(module: ConvertedAttention) -> type[nn.Module]:
    """The class that a module had before it was converted."""
    return type(module).__bases__[1]


def set_class(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Change the class, also under a hook of accelerate, which stores the instance's original ``forward``."""
    module.__class__ = module_class
    if "_old_forward" in vars(module):
        module._old_forward = module_class.forward.__get__(module)


class DenoisingCrossAttention(ConvertedAttention):
    """Mixin that :func:`convert_cross_attention` puts before a cross-attention's own class."""

    nvib_width: int  # of latent vectors
    nvib_scale: float
    nvib_exact: bool

    def forward(self, *args, **kwargs):
        spec, inputs = self.nvib_spec, dict(zip(self.nvib_arguments, args, strict=False)) | kwargs
        hidden_states, packed = inputs[spec.hidden_states], inputs.get(spec.memory)
        if packed is None:
            raise ValueError(f"{type(self).__name__} got no {spec.memory}: the latent is missing.")
        if spec.time_major:
            hidden_states, packed = hidden_states.transpose(0, 1), packed.transpose(0, 1)
        query = self._by_head(getattr(self, spec.query)(hidden_states))
        read = self._projected(packed, hidden_states.dtype, inputs.get(spec.cache))
        rows, sources = query.shape[0], read["key"].shape[0]  # keys of a cache may have been reordered or repeated
        if rows != sources:
            query = fold_rows(query, sources)
        output, weights = denoising_attention(
            query,
            **read,
            scale=self.nvib_scale,
            exact=self.nvib_exact,
            softcap=getattr(self, spec.softcap) if spec.softcap else None,
            **self._weights_arguments(inputs),
        )
        if rows != sources:
            output = unfold_rows(output, rows)
            weights = None if weights is None else unfold_rows(weights, rows)
        output = self._joined(output)
        inputs["output"] = output.transpose(0, 1) if spec.time_major else output
        inputs["weights"] = weights
        return tuple(inputs.get(name) for name in spec.returns)

    def _projected(self, packed: Tensor, dtype: torch.dtype, cache) -> dict[str, Tensor | None]:
        """What attention reads of a latent in this layer. It is computed once; later steps find it in the cache.

        There are ``key``, ``value`` ``(B, H, Nl, E)`` and ``bias``; for a mixture also ``shrinkage`` and the matrices.
        """
        if not isinstance(cache, EncoderDecoderCache):
            return self._of_latent(packed, dtype)
        cached, index = cache.cross_attention_cache, self.layer_idx
        if cache.is_updated.get(index):
            layer = cached.layers[index]
            key, value = layer.keys, layer.values
            if (seen := getattr(layer, "nvib_read", None)) is not None and seen[0] is key and seen[1] is value:
                return seen[2]
        else:
            read = self._of_latent(packed, dtype)
            make_room(cached, index, packed.shape[1])
            key, value = cached.update(*self._to_be_cached(read), index)
            cache.is_updated[index], layer = True, cached.layers[index]
            # They belong to no example, so a cache that is taken apart may lose them. Then they are made again.
            layer.nvib_matrices = {name: read[name] for name in ("key_weight", "value_weight") if name in read}
        read = self._from_cache(key, value, layer, packed, dtype)
        if key is layer.keys and not torch.compiler.is_compiling():
            layer.nvib_read = (key, value, read)  # for the next step, unless the cache has other tensors by then
        return read

    def _from_cache(self, key: Tensor, value: Tensor, layer, packed: Tensor, dtype: torch.dtype) -> dict:
        """What attention reads of the keys and values in a cache, which may be on another device."""
        key, value = (x.to(packed.device) for x in (key, value))
        if hasattr(layer, "max_cache_len"):
            key, value = (x[:, :, : packed.shape[1]] for x in (key, value))
        if not self._is_mixture(packed) and self._appends_bias(key.dtype):
            return {"key": key, "value": value, "bias": None}
        size = self.nvib_width if self._is_mixture(packed) else None
        key, bias, shrinkage = separated(key, getattr(self, self.nvib_spec.head_dim), size)
        read = {"key": key, "value": value, "bias": bias}
        if shrinkage is not None:
            vectors = packed[..., : self.nvib_width].to(dtype)
            read |= {"shrinkage": shrinkage, **(getattr(layer, "nvib_matrices", None) or self._matrices(vectors))}
        return read

    def _of_latent(self, packed: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        latent = unpack(packed, self.nvib_width)
        vectors = latent.vectors.to(dtype)
        if not torch.is_grad_enabled():  # projections of a slice take 7 % longer, but autograd would keep the copy
            vectors = vectors.contiguous()
        key, value = self._key_value(vectors)
        read = {"key": key, "value": value, "bias": latent.bias}
        if latent.shrinkage is not None:
            read |= {"shrinkage": latent.shrinkage.to(dtype), **self._matrices(vectors)}
        return read

    def _to_be_cached(self, read: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values that hold everything that belongs to a vector."""
        key, value, bias, shrinkage = read["key"], read["value"], read["bias"], read.get("shrinkage")
        if shrinkage is None and self._appends_bias(key.dtype):
            return append_bias(key, value, bias, self.nvib_scale)
        return carried(key, bias, shrinkage, multiple_of=ALIGNED), value

    def _appends_bias(self, dtype: torch.dtype) -> bool:
        """Whether the cache has points in the form that kernels read, made once. For fp32 there is a mask instead."""
        return dtype in HALF_PRECISION and self.nvib_spec.softcap is None

    def _is_mixture(self, packed: Tensor) -> bool:
        return packed.shape[-1] > self.nvib_width + BIAS_WIDTH


def make_room(cache: Cache, index: int, length: int) -> None:
    """Let an empty static cache hold ``length`` vectors in a layer. A cache made for a source lacks the prior's.

    Raises:
        ValueError: the cache is too short, and not empty.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is None or getattr(layer, "max_cache_len", length) >= length:
        return
    if layer.is_initialized:
        raise ValueError(
            f"The cache of cross-attention holds {layer.max_cache_len} vectors, but the latents have {length}, "
            f"including the prior's. Make it with max_cache_len={length}, or leave the cache to generate()."
        )
    layer.max_cache_len = length


def fold_rows(x: Tensor, sources: int) -> Tensor:
    """A source's beams, next to each other, as further queries: ``(S * K, H, Nt, E)`` to ``(S, H, K * Nt, E)``.

    So a source's keys and values are stored once, however many beams there are.
    """
    if x.shape[0] % sources:
        raise ValueError(
            f"There are {sources} latents but {x.shape[0]} decoder inputs. Pass one latent for each example."
        )
    return x.unflatten(0, (sources, -1)).transpose(1, 2).flatten(2, 3)


def unfold_rows(x: Tensor, rows: int) -> Tensor:
    """The inverse of :func:`fold_rows`."""
    return x.unflatten(2, (rows // x.shape[0], -1)).transpose(1, 2).flatten(0, 1)


def convert_cross_attention(
    modules: list[tuple[nn.Module, AttentionSpec]], width: int, scale: float, exact: bool = False
) -> None:
    """Turn cross-attention modules into denoising attention for latents ``width`` wide, in place."""
    for module, spec in modules:
        set_class(module, converted_class(DenoisingCrossAttention, type(module), spec))
        module.nvib_width, module.nvib_scale, module.nvib_exact = width, scale, exact


def restore_cross_attention(model: nn.Module) -> None:
    """Undo :func:`convert_cross_attention` in the whole model."""
    for module in model.modules():
        if isinstance(module, DenoisingCrossAttention):
            set_class(module, own_class(module))
            del module.nvib_width, module.nvib_scale, module.nvib_exact


def check_cache_was_found(cache: object, layers: tuple[int, ...]) -> None:
    """Raise RuntimeError if a decoder got a cache, but its cross-attention in ``layers`` did not see it.

    Decoding would still work, but compute keys and values anew at every step.
    """
    if isinstance(cache, EncoderDecoderCache) and not all(cache.is_updated.get(layer) for layer in layers):
        missed = [layer for layer in layers if not cache.is_updated.get(layer)]
        raise RuntimeError(
            f"The cache did not reach the cross-attention of layers {missed}: the decoder passes it under another "
            f"name than {CACHE!r}. {installed_and_tested()}. Install a tested version, or pass use_cache=False."
        )
