"""The table of architectures: where cross-attention sits in a model and what its parts are called.

One row per kind of module. A wrap checks every name of its row against the installed Transformers, since a renamed
argument would not raise an error but decode differently.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from .versions import CACHE, installed_and_tested


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
        hidden_states, memory, cache: arguments of ``forward``: the decoder's states, the encoder's, the cache
            (``None`` if it takes none; such a model decodes with ``use_cache=False``).
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
    cache: str | None = CACHE
    returns: tuple[str, ...] = ("output", "weights")
    time_major: bool = False


# The fields of a row that name attributes of the module.
ATTRIBUTES = (
    "query",
    "key",
    "value",
    "key_value",
    "output",
    "head_dim",
    "scale",
    "dropout",
    "output_dropout",
    "softcap",
)

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
register_cross_attention(replace(BART, returns=("output", "weights", CACHE)), "LEDDecoderAttention")
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


def row_of(module: nn.Module) -> CrossAttention | None:
    """The row of a cross-attention module, converted or not; ``None`` if there is none for its class."""
    if hasattr(module, "nvib_row"):
        return module.nvib_row
    return registered(module, _REGISTRY)


def registered(module: nn.Module, registry: dict):
    """What a registry has for a module's class: by its qualified name, or by its name alone."""
    name = type(module).__name__
    qualified = f"{type(module).__module__.rsplit('.', 1)[-1]}.{name}"
    return registry.get(qualified, registry.get(name))


def attention_scale(module: nn.Module) -> float:
    """The scale ``s`` of an attention module of the table."""
    row = row_of(module)
    return getattr(module, row.head_dim) ** -0.5 if row.scale is None else getattr(module, row.scale)


def memory_width(module: nn.Module) -> int:
    """Width ``P`` of the vectors that a cross-attention module reads, before its projections."""
    row = row_of(module)
    return input_width(getattr(module, row.key or row.key_value))


def input_width(projection: nn.Module) -> int:
    """Width of the vectors that a linear map takes."""
    return projection.nx if isinstance(projection, Conv1D) else projection.in_features


def find_cross_attention(model: nn.Module) -> list[nn.Module]:
    """The model's cross-attention modules that the table knows.

    Raises:
        ValueError: there are none, or none that can be converted; the message says what was found instead.
    """
    found, unknown = [], set()
    for name, module in model.named_modules():
        row, class_name, place = row_of(module), type(module).__name__, name.rsplit(".", 1)[-1]
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


def check_names(module: nn.Module) -> None:
    """Raise ValueError unless a cross-attention module has every argument and attribute that its row names."""
    row, module_class = row_of(module), type(module)
    arguments = inspect.signature(module_class.forward).parameters
    taken = [("hidden_states", row.hidden_states), ("memory", row.memory), ("cache", row.cache)]
    taken += [("returns", name) for name in row.returns if name not in ("output", "weights")]
    for field, name in taken:
        if name is not None and name not in arguments:
            raise ValueError(_moved(module_class, f"forward takes no argument {name!r}", field))
    attributes = [(field, getattr(row, field)) for field in ATTRIBUTES]
    attributes += [("cache", "layer_idx")] if row.cache is not None else []
    for field, name in attributes:
        if name is not None and not hasattr(module, name):
            raise ValueError(_moved(module_class, f"it has no attribute {name!r}", field))


def _moved(module_class: type, what: str, field: str) -> str:
    return (
        f"{module_class.__name__} is not what the table of cross-attention says: {what} (field {field!r} of its row), "
        f"so it would compute something else. {installed_and_tested()}. Install a tested version, or describe the "
        f"module anew: nvib_hf.register_cross_attention(CrossAttention(..., {field}=...), {module_class.__name__!r})."
    )
