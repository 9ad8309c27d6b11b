"""Cross-attention of every supported architecture, turned into denoising attention in place.

One row a kind of module says where its projections, widths and scale are; one forward serves all rows. A module
keeps its parameters, names and hooks: only its class changes, to a subclass of its own.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncoderDecoderCache
from transformers.pytorch_utils import Conv1D

from .denoising_attention import denoising_attention
from .latent import unpack


@dataclass(frozen=True)
class CrossAttention:
    """How to read one kind of cross-attention module. Fields are names of its attributes and arguments.

    Args:
        place: end of the module's name in the model: it tells cross- from self-attention of the same class.
        query, key, value, output: the projections; ``output`` is ``None`` where another module applies it.
        key_value: one projection to keys and values side by side, instead of ``key`` and ``value``.
        head_dim: attribute with the head's width ``E``.
        scale: attribute with the scale ``s``; ``None`` for ``E ** -0.5``.
        dropout: attribute with the dropout of the weights, a number or an ``nn.Dropout``.
        output_dropout: attribute with a dropout after the output projection.
        softcap: attribute with the soft cap of the scores.
        hidden_states, memory, cache: arguments of ``forward``: the decoder's states, the encoder's, the cache.
        returns: what ``forward`` returns, in order: ``output``, ``weights``, or the name of an argument handed on.
        time_major: states are ``(N, B, C)``.
    """

    place: str
    query: str = "q_proj"
    key: str | None = "k_proj"
    value: str | None = "v_proj"
    key_value: str | None = None
    output: str | None = "out_proj"
    head_dim: str = "head_dim"
    scale: str | None = "scaling"
    dropout: str = "dropout"
    output_dropout: str | None = None
    softcap: str | None = None
    hidden_states: str = "hidden_states"
    memory: str = "key_value_states"
    cache: str = "past_key_values"
    returns: tuple[str, ...] = ("output", "weights")
    time_major: bool = False


BART = CrossAttention(place="encoder_attn")
T5 = CrossAttention(
    place="EncDecAttention",
    query="q",
    key="k",
    value="v",
    output="o",
    head_dim="key_value_proj_dim",
    returns=("output", "position_bias", "weights"),
)
BERT = CrossAttention(
    place="crossattention.self",
    query="query",
    key="key",
    value="value",
    output=None,
    head_dim="attention_head_size",
    memory="encoder_hidden_states",
)
GPT2 = CrossAttention(
    place="crossattention",
    query="q_attn",
    key=None,
    value=None,
    key_value="c_attn",
    output="c_proj",
    dropout="attn_dropout",
    output_dropout="resid_dropout",
    memory="encoder_hidden_states",
)

T5GEMMA = CrossAttention(
    place="cross_attn",
    output="o_proj",
    dropout="attention_dropout",
    softcap="attn_logit_softcapping",
    memory="encoder_hidden_states",
)
PROPHETNET = CrossAttention(
    place="cross_attn",
    query="query_proj",
    key="key_proj",
    value="value_proj",
    scale=None,
    dropout="attention_dropout",
    output_dropout="dropout",
)
FSMT = CrossAttention(place="encoder_attn", hidden_states="query", memory="key", cache="layer_state", time_major=True)

_REGISTRY: dict[str, CrossAttention] = {}


def register_cross_attention(row: CrossAttention, *class_names: str) -> None:
    """Teach NVIB the cross-attention of another architecture.

    Args:
        row: how to read the module.
        class_names: names of the module's classes; with the last part of the Python module's name in front
            (``"modeling_fsmt.Attention"``) where the name alone could be anybody's.

    Example:
        >>> register_cross_attention(CrossAttention(place="cross_attn", output="o_proj"), "MyAttention")
    """
    for name in class_names:
        _REGISTRY[name] = row


register_cross_attention(
    BART,
    "BartAttention",
    "BigBirdPegasusDecoderAttention",
    "BlenderbotAttention",
    "BlenderbotSmallAttention",
    "M2M100Attention",
    "MarianAttention",
    "MBartAttention",
    "MvpAttention",
    "PegasusAttention",
    "PegasusXAttention",
    "PLBartAttention",
    "Speech2TextAttention",
    "TrOCRAttention",
    "WhisperAttention",
    "XGLMAttention",
)
register_cross_attention(replace(BART, returns=("output", "weights", "past_key_values")), "LEDDecoderAttention")
register_cross_attention(replace(BART, place="cross_attention"), "NllbMoeAttention")
register_cross_attention(replace(BART, output="o_proj", dropout="attention_dropout"), "MoonshineAttention")
register_cross_attention(
    T5,
    "LongT5Attention",
    "MT5Attention",
    "Pop2PianoAttention",
    "SwitchTransformersAttention",
    "T5Attention",
)
register_cross_attention(
    replace(T5, memory="encoder_hidden_states", returns=("output", "weights")),
    "UMT5Attention",
)
register_cross_attention(T5GEMMA, "T5GemmaCrossAttention")
register_cross_attention(
    BERT,
    "BertCrossAttention",
    "BertGenerationCrossAttention",
    "CamembertCrossAttention",
    "ElectraCrossAttention",
    "RobertaCrossAttention",
    "XLMRobertaCrossAttention",
)
register_cross_attention(GPT2, "GPT2Attention")
register_cross_attention(PROPHETNET, "ProphetNetAttention")
register_cross_attention(FSMT, "modeling_fsmt.Attention")

# Attention that no row can describe, by class and place.
_IMPOSSIBLE = {
    ("T5Gemma2MergedAttention", "self_attn"): "it attends to the source and to the decoder's own tokens in one "
    "softmax, where a latent's weights mean nothing by themselves. Take T5Gemma",
    ("GPTBigCodeAttention", "crossattention"): "in Transformers itself it raises an error. Take a GPT-2 decoder",
}
# Parts of the names that cross-attention has in models that are not in the table.
_HINTS = ("cross", "encoder_attn", "encdec", "encoder_decoder", "enc_dec", "multihead_attn")


def _row(module_class: type) -> CrossAttention | None:
    name = module_class.__name__
    qualified = f"{module_class.__module__.rsplit('.', 1)[-1]}.{name}"
    return _REGISTRY.get(qualified, _REGISTRY.get(name))


class DenoisingCrossAttention(nn.Module):
    """Mixed in before a cross-attention's own class by :func:`convert_cross_attention`."""

    nvib_row: CrossAttention
    nvib_arguments: tuple[str, ...]
    nvib_width: int
    nvib_exact: bool

    def forward(self, *args, **kwargs):
        row = self.nvib_row
        inputs = dict(zip(self.nvib_arguments, args, strict=False)) | kwargs
        hidden_states, packed = inputs[row.hidden_states], inputs.get(row.memory)
        if packed is None:
            raise ValueError(f"{type(self).__name__} got no {row.memory}: the latent is missing.")
        if row.time_major:
            hidden_states, packed = hidden_states.transpose(0, 1), packed.transpose(0, 1)
        memory = unpack(packed, self.nvib_width)
        query = self._by_head(getattr(self, row.query)(hidden_states))
        rows, sources = len(hidden_states), len(packed)
        if rows != sources:
            query = fold_rows(query, sources)
        vectors = memory.vectors.to(hidden_states.dtype)
        key, value, matrices = self._keys_and_values(
            vectors, inputs.get(row.cache), need_matrices=memory.shrinkage is not None
        )
        key_weight, value_weight = matrices
        config = getattr(self, "config", None)
        output, weights = denoising_attention(
            query,
            key,
            value,
            memory.bias,
            cross_attention_scale(self),
            shrinkage=None if memory.shrinkage is None else memory.shrinkage.to(query.dtype),
            key_weight=key_weight,
            value_weight=value_weight,
            exact=self.nvib_exact,
            softcap=getattr(self, row.softcap) if row.softcap else None,
            dropout_p=self._probability(row.dropout),
            need_weights=inputs.get("output_attentions") or getattr(config, "_attn_implementation", "") == "eager",
        )
        if rows != sources:
            output = unfold_rows(output, rows)
            weights = None if weights is None else unfold_rows(weights, rows)
        output = output.transpose(1, 2).flatten(2)
        if row.output is not None:
            output = getattr(self, row.output)(output)
        if row.output_dropout is not None:
            output = F.dropout(output, self._probability(row.output_dropout))
        inputs["output"] = output.transpose(0, 1) if row.time_major else output
        inputs["weights"] = weights
        return tuple(inputs.get(name) for name in row.returns)

    def _by_head(self, x: Tensor) -> Tensor:
        """``(B, N, H * E)`` to ``(B, H, N, E)``."""
        return x.unflatten(-1, (-1, getattr(self, self.nvib_row.head_dim))).transpose(1, 2)

    def _keys_and_values(self, vectors: Tensor, cache, need_matrices: bool):
        """Keys, values ``(B, H, Nl, E)`` and the matrices of their projections: once a source, then cached."""
        if isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values, self._matrices(vectors, layer) if need_matrices else (None, None)
        row, layer = self.nvib_row, None
        if row.key_value is not None:
            key, value = getattr(self, row.key_value)(vectors).chunk(2, dim=-1)
        else:
            key, value = getattr(self, row.key)(vectors), getattr(self, row.value)(vectors)
        key, value = self._by_head(key), self._by_head(value)
        if isinstance(cache, EncoderDecoderCache):
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            layer.nvib_matrices = None  # a static cache is used again, after the weights may have changed
        return key, value, self._matrices(vectors, layer) if need_matrices else (None, None)

    def _matrices(self, vectors: Tensor, cache_layer) -> tuple[Tensor, Tensor]:
        """``W_k`` and ``W_v`` ``(H, E, P)``; where they are computed, they are kept on the cache's layer."""
        kept = getattr(cache_layer, "nvib_matrices", None)
        if kept is not None:
            return kept
        row = self.nvib_row
        if row.key_value is not None:
            weights, computed = projection_matrix(getattr(self, row.key_value), vectors)
            weights = weights.chunk(2)
        else:
            (key_weight, first), (value_weight, second) = (
                projection_matrix(getattr(self, name), vectors) for name in (row.key, row.value)
            )
            weights, computed = (key_weight, value_weight), first or second
        head_dim = getattr(self, row.head_dim)
        matrices = tuple(weight.unflatten(0, (-1, head_dim)) for weight in weights)
        if computed and cache_layer is not None:
            cache_layer.nvib_matrices = matrices
        return matrices

    def _probability(self, name: str) -> float:
        if not self.training:
            return 0.0
        dropout = getattr(self, name)
        return dropout.p if isinstance(dropout, nn.Dropout) else dropout


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


def projection_matrix(projection: nn.Module, like: Tensor) -> tuple[Tensor, bool]:
    """The matrix ``(out, P)`` of a linear map, and whether it had to be computed.

    A plain ``nn.Linear`` is read. Anything else (LoRA, quantised weights, Conv1D, offloaded weights) is applied to
    the identity, so that whatever it does counts.
    """
    plain = type(projection) is nn.Linear and type(projection.weight) is nn.Parameter
    hooked = hasattr(projection, "_hf_hook") or projection._forward_hooks or projection._forward_pre_hooks
    if plain and not hooked and projection.weight.dtype == like.dtype:
        return projection.weight, False
    eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None]
    return (projection(eye) - projection(torch.zeros_like(eye[:, :1]))).squeeze(0).transpose(0, 1), True


def _row_of(module: nn.Module) -> CrossAttention:
    """The row of a cross-attention module, converted or not."""
    return module.nvib_row if isinstance(module, DenoisingCrossAttention) else _row(type(module))


def cross_attention_scale(module: nn.Module) -> float:
    """The scale ``s`` of a cross-attention module."""
    row = _row_of(module)
    return getattr(module, row.head_dim) ** -0.5 if row.scale is None else getattr(module, row.scale)


def memory_width(module: nn.Module) -> int:
    """Width ``P`` of the vectors that a cross-attention module reads, before its projections."""
    row = _row_of(module)
    projection = getattr(module, row.key or row.key_value)
    return projection.nx if isinstance(projection, Conv1D) else projection.in_features


def find_cross_attention(model: nn.Module) -> list[nn.Module]:
    """The model's cross-attention modules that the table knows.

    Raises:
        ValueError: there are none, or none that can be converted; the message says what was found instead.
    """
    found, unknown = [], set()
    for name, module in model.named_modules():
        row, class_name, place = _row(type(module)), type(module).__name__, name.rsplit(".", 1)[-1]
        if (reason := _IMPOSSIBLE.get((class_name, place))) is not None:
            raise ValueError(f"{class_name} cannot become denoising attention: {reason}.")
        if row is not None and f".{name}".endswith(f".{row.place}"):
            found.append(module)
        elif "Attention" in class_name and any(hint in name.lower() for hint in _HINTS):
            unknown.add(f"{class_name} ({name})")
    if found:
        if getattr(model.config, "use_prompt", False):
            raise ValueError(
                f"{type(model).__name__} with use_prompt=True attends to trained keys beside those of the source, "
                "which are no part of a latent. Load it with use_prompt=False."
            )
        return found
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has cross-attention of a kind that is not in the table: "
            f"{', '.join(sorted(unknown))}. Add a row that names its projections: nvib_hf.register_cross_attention("
            "CrossAttention(place=..., query=..., key=..., value=..., output=..., ...), class_name)."
        )
    raise ValueError(
        f"{type(model).__name__} has no cross-attention, which NVIB turns into denoising attention. Pass an "
        "encoder-decoder model (BART, T5, ...), or join an encoder and a decoder with "
        "NvibForConditionalGeneration.from_encoder_decoder_pretrained. If it has one under a name that was not "
        "recognised, add a row with nvib_hf.register_cross_attention(CrossAttention(place=..., ...), class_name)."
    )


@functools.cache
def _denoising_class(base: type[nn.Module], row: CrossAttention) -> type[nn.Module]:
    names = tuple(inspect.signature(base.forward).parameters)[1:]
    fields = {"nvib_row": row, "nvib_arguments": names, "__module__": base.__module__}
    return type(f"Denoising{base.__name__}", (DenoisingCrossAttention, base), fields)


def _set_class(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Change the class, also beneath a hook of accelerate, which keeps the ``forward`` it calls on the instance."""
    module.__class__ = module_class
    if "_old_forward" in vars(module):
        module._old_forward = module_class.forward.__get__(module)


def convert_cross_attention(modules: list[nn.Module], width: int, exact: bool = False) -> None:
    """Turn cross-attention modules into denoising attention for latents ``width`` wide, in place."""
    for module in modules:
        _set_class(module, _denoising_class(type(module), _row(type(module))))
        module.nvib_width, module.nvib_exact = width, exact


def restore_cross_attention(model: nn.Module) -> None:
    """Undo :func:`convert_cross_attention` in the whole model."""
    for module in model.modules():
        if isinstance(module, DenoisingCrossAttention):
            _set_class(module, type(module).__mro__[2])
            del module.nvib_width, module.nvib_exact
