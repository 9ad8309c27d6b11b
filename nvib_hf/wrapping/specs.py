"""The table of architectures: where a model's attention is, and the names of its parts.

Each kind of attention module, cross- or self-attention, has a spec. Wrapping checks every name of a spec against the
installed Transformers: a renamed argument would raise no error, but the model would decode differently.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..versions import CACHE, installed_and_tested


@dataclass(frozen=True)
class AttentionSpec:
    """How to read one kind of attention module. Fields are names of its attributes and arguments.

    Args:
        place: end of the module's name in the model. It distinguishes cross- and self-attention of the same class.
        query, key, value, output: the projections; ``output`` is ``None`` if another module applies it.
        key_value: a joint projection to keys and values, instead of ``key`` and ``value``.
        query_key_value: a joint projection to all three, instead of them.
        head_dim: attribute with the head's width ``E``.
        scale: attribute with the scale ``s``; ``None`` for ``E ** -0.5``.
        dropout: attribute with the dropout of the weights, a number or an ``nn.Dropout``.
        output_dropout: attribute with a dropout after the output projection.
        softcap: attribute with the soft cap of the scores.
        hidden_states, cache: arguments of ``forward`` for the attention's own states and the cache (``None`` if it
            takes no cache; such a model decodes with ``use_cache=False``).
        memory: argument of ``forward`` for the encoder's states; ``None`` for self-attention.
        mask: argument of ``forward`` for the mask of the scores; used in self-attention.
        has_position_bias: whether the module adds a bias from its ``compute_bias`` to the scores.
        returns: what ``forward`` returns, in order: ``output``, ``weights``, or the name of an argument to return.
        time_major: whether states are ``(N, B, C)``.
        shortens: whether vectors that an encoder's self-attention drops can leave the sequence. They can if nothing
            else in the layer reads a mask of the whole sequence.
    """

    place: str
    query: str | None = "q_proj"
    key: str | None = "k_proj"
    value: str | None = "v_proj"
    key_value: str | None = None
    query_key_value: str | None = None
    output: str | None = "out_proj"
    head_dim: str = "head_dim"
    scale: str | None = "scaling"
    dropout: str = "dropout"
    output_dropout: str | None = None
    softcap: str | None = None
    hidden_states: str = "hidden_states"
    memory: str | None = "key_value_states"
    mask: str = "attention_mask"
    cache: str | None = CACHE
    has_position_bias: bool = False
    returns: tuple[str, ...] = ("output", "weights")
    time_major: bool = False
    shortens: bool = True

    @property
    def kind(self) -> str:
        """``"cross"`` or ``"self"``."""
        return "self" if self.memory is None else "cross"


def CrossAttention(place: str, **names) -> AttentionSpec:
    """The :class:`AttentionSpec` of a cross-attention."""
    return AttentionSpec(place, **names)


def SelfAttention(place: str, **names) -> AttentionSpec:
    """The :class:`AttentionSpec` of a self-attention."""
    return AttentionSpec(place, memory=None, **names)


# The fields of a spec that name attributes of the module.
ATTRIBUTES = (
    "query",
    "key",
    "value",
    "key_value",
    "query_key_value",
    "output",
    "head_dim",
    "scale",
    "dropout",
    "output_dropout",
    "softcap",
)

BART = AttentionSpec(place="encoder_attn")
T5 = AttentionSpec(
    place="EncDecAttention",
    query="q",
    key="k",
    value="v",
    output="o",
    head_dim="key_value_proj_dim",
    returns=("output", "position_bias", "weights"),
)
BERT = AttentionSpec(
    place="crossattention.self",
    query="query",
    key="key",
    value="value",
    output=None,
    head_dim="attention_head_size",
    memory="encoder_hidden_states",
)
GPT2 = AttentionSpec(
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
T5GEMMA = AttentionSpec(
    place="cross_attn",
    output="o_proj",
    dropout="attention_dropout",
    softcap="attn_logit_softcapping",
    memory="encoder_hidden_states",
)
PROPHETNET = AttentionSpec(
    place="cross_attn",
    query="query_proj",
    key="key_proj",
    value="value_proj",
    scale=None,
    dropout="attention_dropout",
    output_dropout="dropout",
)
FSMT = AttentionSpec(place="encoder_attn", hidden_states="query", memory="key", cache="layer_state", time_major=True)

BART_SELF = SelfAttention(place="self_attn")
T5_SELF = replace(T5, place="SelfAttention", memory=None, mask="mask", has_position_bias=True)
BERT_SELF = replace(BERT, place="attention.self", memory=None)
GPT2_SELF = replace(GPT2, place="attn", memory=None, query=None, key_value=None, query_key_value="c_attn")
DISTILBERT_SELF = SelfAttention(
    place="attention",
    query="q_lin",
    key="k_lin",
    value="v_lin",
    output="out_lin",
    head_dim="attention_head_size",
    cache=None,
)
VIT_SELF = SelfAttention(place="attention", output="o_proj", dropout="attention_dropout", cache=None)

_REGISTRY: dict[tuple[str, str], AttentionSpec] = {}  # by kind and the name of the module's class


def register_attention(spec: AttentionSpec, *class_names: str) -> None:
    """Teach NVIB the cross- or self-attention of another architecture.

    Args:
        spec: how to read the module.
        class_names: names of the module's classes. If a name is too general, put the last part of the Python module's
            name in front (``"modeling_fsmt.Attention"``).

    Example:
        >>> register_attention(AttentionSpec(place="cross_attn", output="o_proj"), "MyAttention")
    """
    for name in class_names:
        _REGISTRY[spec.kind, name] = spec


register_cross_attention = register_self_attention = register_attention  # the names that users know

register_attention(
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
register_attention(replace(BART, returns=("output", "weights", CACHE)), "LEDDecoderAttention")
register_attention(replace(BART, place="cross_attention"), "NllbMoeAttention")
register_attention(replace(BART, output="o_proj", dropout="attention_dropout"), "MoonshineAttention")
register_attention(
    T5,
    "LongT5Attention",
    "MT5Attention",
    "Pop2PianoAttention",
    "SwitchTransformersAttention",
    "T5Attention",
)
register_attention(replace(T5, memory="encoder_hidden_states", returns=("output", "weights")), "UMT5Attention")
register_attention(
    BERT,
    "BertCrossAttention",
    "BertGenerationCrossAttention",
    "CamembertCrossAttention",
    "ElectraCrossAttention",
    "RobertaCrossAttention",
    "XLMRobertaCrossAttention",
)
register_attention(GPT2, "GPT2Attention")
register_attention(T5GEMMA, "T5GemmaCrossAttention")
register_attention(PROPHETNET, "ProphetNetAttention")
register_attention(FSMT, "modeling_fsmt.Attention")

register_attention(
    BART_SELF,
    "BartAttention",
    "BigBirdPegasusDecoderAttention",
    "BlenderbotAttention",
    "BlenderbotSmallAttention",
    "M2M100Attention",
    "MarianAttention",
    "MBartAttention",
    "PegasusAttention",
    "PegasusXAttention",
    "PLBartAttention",
    "Speech2TextAttention",
    "WhisperAttention",
)
register_attention(replace(BART_SELF, shortens=False), "NllbMoeAttention")  # its router reads the mask too
register_attention(
    T5_SELF,
    "LongT5Attention",
    "MT5Attention",
    "Pop2PianoAttention",
    "SwitchTransformersAttention",
    "T5Attention",
)
register_attention(replace(T5_SELF, mask="attention_mask", returns=("output", "weights")), "UMT5Attention")
register_attention(
    BERT_SELF,
    "BertGenerationSelfAttention",
    "BertSelfAttention",
    "CamembertSelfAttention",
    "ElectraSelfAttention",
    "RobertaSelfAttention",
    "XLMRobertaSelfAttention",
)
register_attention(GPT2_SELF, "GPT2Attention")
register_attention(DISTILBERT_SELF, "DistilBertSelfAttention")
register_attention(VIT_SELF, "ViTAttention")
register_attention(replace(BART_SELF, place="attention", cache=None), "Wav2Vec2Attention")

# Attention that no spec can describe, by class and place.
_IMPOSSIBLE = {
    ("T5Gemma2MergedAttention", "self_attn"): "it attends to the source and to the decoder's own tokens in one "
    "softmax, where a latent's weights mean nothing by themselves. Take T5Gemma",
    ("GPTBigCodeAttention", "crossattention"): "in Transformers itself it raises an error. Take a GPT-2 decoder",
}
# Parts of names that cross-attention has in models outside the table.
_HINTS = ("cross", "encoder_attn", "encdec", "encoder_decoder", "enc_dec", "multihead_attn")


def spec_of(module: nn.Module, kind: str) -> AttentionSpec | None:
    """The spec of an attention module, by its class's qualified name or its name; ``None`` if there is none."""
    name = type(module).__name__
    qualified = f"{type(module).__module__.rsplit('.', 1)[-1]}.{name}"
    return _REGISTRY.get((kind, qualified), _REGISTRY.get((kind, name)))


def attention_scale(module: nn.Module, spec: AttentionSpec) -> float:
    """The scale ``s`` of an attention module."""
    return getattr(module, spec.head_dim) ** -0.5 if spec.scale is None else getattr(module, spec.scale)


def attended_width(module: nn.Module, spec: AttentionSpec) -> int:
    """Width ``P`` of the vectors that an attention turns into keys and values."""
    name = spec.key or spec.key_value or spec.query_key_value
    assert name is not None, f"{spec} names no projection to keys"
    projection = getattr(module, name)
    return projection.nx if isinstance(projection, Conv1D) else projection.in_features


def find_cross_attention(model: nn.Module) -> list[tuple[nn.Module, AttentionSpec]]:
    """The model's cross-attention modules that are in the table, each with its spec.

    Raises:
        ValueError: there are none, or they cannot be converted. The message says what was found instead.
    """
    found, unknown = [], set()
    for name, module in model.named_modules():
        spec, class_name, place = spec_of(module, "cross"), type(module).__name__, name.rsplit(".", 1)[-1]
        if (reason := _IMPOSSIBLE.get((class_name, place))) is not None:
            raise ValueError(f"{class_name} cannot become denoising attention: {reason}.")
        if spec is not None and f".{name}".endswith(f".{spec.place}"):
            found.append((module, spec))
        elif "Attention" in class_name and any(hint in name.lower() for hint in _HINTS):
            unknown.add(f"{class_name} ({name})")
    if found:
        if getattr(model.config, "use_prompt", False):
            raise ValueError(
                f"{type(model).__name__} with use_prompt=True also attends to trained keys, which are not part of a "
                "latent. Load it with use_prompt=False."
            )
        return found
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has cross-attention of a kind that is not in the table: "
            f"{', '.join(sorted(unknown))}. Describe it with a spec that names its projections: "
            "nvib_hf.register_cross_attention(CrossAttention(place=..., query=..., key=..., value=..., output=..., "
            "...), class_name)."
        )
    raise ValueError(
        f"{type(model).__name__} has no cross-attention that NVIB could turn into denoising attention. Pass an "
        "encoder-decoder model (BART, T5, ...), or join an encoder and a decoder with "
        "NvibForConditionalGeneration.from_encoder_decoder_pretrained. If it has cross-attention under an unknown "
        "name, describe it: nvib_hf.register_cross_attention(CrossAttention(place=..., ...), class_name)."
    )


def find_self_attention(half: nn.Module, kind: str) -> list[tuple[nn.Module, AttentionSpec]]:
    """The self-attention modules of an encoder or decoder, in the order of the layers, each with its spec.

    Args:
        kind: the name of ``half`` in messages, ``"encoder"`` or ``"decoder"``.

    Raises:
        ValueError: none is in the table, or one differs from it. The message says what was found instead.
    """
    found, unknown = [], set()
    for name, module in half.named_modules():
        spec = spec_of(module, "self")
        if spec is not None and f".{name}".endswith(f".{spec.place}"):
            check_names(module, spec)
            found.append((module, spec))
        elif "Attention" in type(module).__name__:
            unknown.add(type(module).__name__)
    if not found:
        raise ValueError(
            f"The {kind} {type(half).__name__} has no self-attention that is in the table, only "
            f"{', '.join(sorted(unknown)) or 'other modules'}. Leave {kind!r} out of attentions. Or, if it computes a "
            "plain softmax of scores, masks and position biases, describe it: nvib_hf.register_self_attention("
            "SelfAttention(place=..., query=..., key=..., value=..., output=..., ...), class_name)."
        )
    return found


def check_names(module: nn.Module, spec: AttentionSpec) -> None:
    """Raise ValueError unless an attention module has every argument and attribute that its spec names."""
    arguments = inspect.signature(type(module).forward).parameters
    taken = [("hidden_states", spec.hidden_states), ("cache", spec.cache), ("memory", spec.memory)]
    attributes = [(field, getattr(spec, field)) for field in ATTRIBUTES]
    attributes += [("cache", "layer_idx")] if spec.cache else []
    if spec.kind == "self":
        taken += [("mask", spec.mask)]
        attributes += [("has_position_bias", "compute_bias")] if spec.has_position_bias else []
        attributes += [("place", "is_causal")]
    else:
        taken += [("returns", name) for name in spec.returns if name not in ("output", "weights")]
    missing = [
        (field, f"forward takes no argument {name!r}") for field, name in taken if name and name not in arguments
    ]
    missing += [
        (field, f"it has no attribute {name!r}") for field, name in attributes if name and not hasattr(module, name)
    ]
    if missing:
        (field, what), name = missing[0], type(module).__name__
        raise ValueError(
            f"{name} differs from the table of {spec.kind}-attention: {what} (field {field!r} of its spec), so it "
            f"would compute something else. {installed_and_tested()}. Install a tested version, or describe the "
            f"module anew: nvib_hf.register_{spec.kind}_attention({spec.kind.title()}Attention(..., {field}=...), "
            f"{name!r})."
        )
