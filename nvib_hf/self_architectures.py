"""The table of self-attention: what its parts are called in each architecture that can have NVIB in it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from torch import nn

from .architectures import registered
from .versions import CACHE, installed_and_tested


@dataclass(frozen=True)
class SelfAttention:
    """How to read one kind of self-attention module. Fields are names of its attributes and arguments.

    Args:
        place: end of the module's name in the model: it tells self- from cross-attention of the same class.
        query, key, value, output: the projections; ``output`` is ``None`` where another module applies it.
        query_key_value: one projection to all three side by side, instead of them.
        head_dim: attribute with the head's width ``E``.
        scale: attribute with the scale ``s``.
        dropout: attribute with the dropout of the weights, a number or an ``nn.Dropout``.
        output_dropout: attribute with a dropout after the output projection.
        hidden_states, mask, cache: arguments of ``forward``: the states, the mask of the scores, the cache (``None``
            if it takes none).
        has_position_bias: the module adds what its ``compute_bias`` makes of positions to the scores.
        returns: what ``forward`` returns, in order: ``output``, ``weights``, or the name of an argument.
        shortens: what it drops can leave the sequence: nothing else in its layer reads a mask of the whole.
    """

    place: str
    query: str | None = "q_proj"
    key: str | None = "k_proj"
    value: str | None = "v_proj"
    query_key_value: str | None = None
    output: str | None = "out_proj"
    head_dim: str = "head_dim"
    scale: str = "scaling"
    dropout: str = "dropout"
    output_dropout: str | None = None
    hidden_states: str = "hidden_states"
    mask: str = "attention_mask"
    cache: str | None = CACHE
    has_position_bias: bool = False
    returns: tuple[str, ...] = ("output", "weights")
    shortens: bool = True


ATTRIBUTES = (
    "query",
    "key",
    "value",
    "query_key_value",
    "output",
    "head_dim",
    "scale",
    "dropout",
    "output_dropout",
)

BART = SelfAttention(place="self_attn")
T5 = SelfAttention(
    place="SelfAttention",
    query="q",
    key="k",
    value="v",
    output="o",
    head_dim="key_value_proj_dim",
    mask="mask",
    has_position_bias=True,
    returns=("output", "position_bias", "weights"),
)
BERT = SelfAttention(
    place="attention.self",
    query="query",
    key="key",
    value="value",
    output=None,
    head_dim="attention_head_size",
)
GPT2 = SelfAttention(
    place="attn",
    query=None,
    key=None,
    value=None,
    query_key_value="c_attn",
    output="c_proj",
    dropout="attn_dropout",
    output_dropout="resid_dropout",
)
DISTILBERT = SelfAttention(
    place="attention",
    query="q_lin",
    key="k_lin",
    value="v_lin",
    output="out_lin",
    head_dim="attention_head_size",
    cache=None,
)
VIT = SelfAttention(place="attention", output="o_proj", dropout="attention_dropout", cache=None)

_REGISTRY: dict[str, SelfAttention] = {}


def register_self_attention(row: SelfAttention, *class_names: str) -> None:
    """Teach NVIB the self-attention of another architecture.

    Args:
        row: how to read the module.
        class_names: names of the module's classes; with the last part of the Python module's name in front
            (``"modeling_fsmt.Attention"``) where the name alone could be anybody's.

    Example:
        >>> register_self_attention(SelfAttention(place="self_attn", output="o_proj"), "MyAttention")
    """
    for name in class_names:
        _REGISTRY[name] = row


register_self_attention(
    BART,
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
register_self_attention(replace(BART, shortens=False), "NllbMoeAttention")  # its router reads the mask, too
register_self_attention(
    T5,
    "LongT5Attention",
    "MT5Attention",
    "Pop2PianoAttention",
    "SwitchTransformersAttention",
    "T5Attention",
)
register_self_attention(replace(T5, mask="attention_mask", returns=("output", "weights")), "UMT5Attention")
register_self_attention(
    BERT,
    "BertGenerationSelfAttention",
    "BertSelfAttention",
    "CamembertSelfAttention",
    "ElectraSelfAttention",
    "RobertaSelfAttention",
    "XLMRobertaSelfAttention",
)
register_self_attention(GPT2, "GPT2Attention")
register_self_attention(DISTILBERT, "DistilBertSelfAttention")
register_self_attention(VIT, "ViTAttention")
register_self_attention(replace(BART, place="attention", cache=None), "Wav2Vec2Attention")


def self_attention_row(module: nn.Module) -> SelfAttention | None:
    """The row of a self-attention module that has not been converted; ``None`` if there is none for its class."""
    return registered(module, _REGISTRY)


def find_self_attention(half: nn.Module, kind: str) -> list[tuple[str, nn.Module]]:
    """The self-attention modules of an encoder or decoder, by name, in the order of the layers.

    Args:
        kind: what ``half`` is called in a message, ``"encoder"`` or ``"decoder"``.

    Raises:
        ValueError: the table knows none of them, or not as they are; the message says what was found instead.
    """
    found, unknown = [], set()
    for name, module in half.named_modules():
        row = self_attention_row(module)
        if row is not None and f".{name}".endswith(f".{row.place}"):
            check_names(module, row)
            found.append((name, module))
        elif "Attention" in type(module).__name__:
            unknown.add(type(module).__name__)
    if not found:
        raise ValueError(
            f"The {kind} {type(half).__name__} has no self-attention that is in the table, but "
            f"{', '.join(sorted(unknown)) or 'none at all'}. Leave {kind!r} out of attentions, or, if it computes a "
            "plain softmax of scores, masks and position biases, add a row: nvib_hf.register_self_attention("
            "SelfAttention(place=..., query=..., key=..., value=..., output=..., ...), class_name)."
        )
    return found


def check_names(module: nn.Module, row: SelfAttention) -> None:
    """Raise ValueError unless a self-attention module has every argument and attribute that its row names."""
    arguments = inspect.signature(type(module).forward).parameters
    taken = [("hidden_states", row.hidden_states), ("mask", row.mask), ("cache", row.cache)]
    missing = [
        f"forward takes no argument {name!r} (field {field!r})"
        for field, name in taken
        if name and name not in arguments
    ]
    attributes = [(field, getattr(row, field)) for field in ATTRIBUTES]
    attributes += [("cache", "layer_idx")] if row.cache else []
    attributes += [("has_position_bias", "compute_bias")] if row.has_position_bias else []
    attributes += [("place", "is_causal")]
    missing += [
        f"it has no attribute {name!r} (field {field!r})"
        for field, name in attributes
        if name and not hasattr(module, name)
    ]
    if missing:
        name = type(module).__name__
        raise ValueError(
            f"{name} is not what the table of self-attention says: {missing[0]}, so it would compute something else. "
            f"{installed_and_tested()}. Install a tested version, or describe the module anew: "
            f"nvib_hf.register_self_attention(SelfAttention(...), {name!r})."
        )
