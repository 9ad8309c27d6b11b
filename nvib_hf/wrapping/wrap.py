"""From a base model to an NVIB model."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..configuration_nvib import NvibConfig, refuse_misspelt_settings, setting_names
from ..layers.nvib import NvibLayer, SelfAttentionNvibLayer
from ..layers.settings import check_mass_is_read
from .architecture import architecture_name
from .base import check_decoder_call
from .cross_attention import ConvertedAttention
from .self_attention import DenoisingSelfAttention, convert_self_attention
from .specs import (
    AttentionSpec,
    attended_width,
    attention_scale,
    check_names,
    find_cross_attention,
    find_self_attention,
)
from .stacked_encoder import StackedSelfAttention, stack


class CrossAttentionOf(NamedTuple):
    """What NVIB needs to know about a base's cross-attention.

    The modules with their specs; the width ``P`` of the vectors that they read; their scale ``s``; their layers in
    the cache.
    """

    modules: list[tuple[nn.Module, AttentionSpec]]
    width: int
    scale: float
    cached_layers: tuple[int, ...]


def cross_attention_of(base: PreTrainedModel) -> CrossAttentionOf:
    """The cross-attention of a base that has not been converted.

    Raises:
        ValueError: it differs from the table of architectures; layers have different scales.
    """
    found = find_cross_attention(base)
    for module, spec in found:
        check_names(module, spec)
    cached_layers = tuple(module.layer_idx for module, spec in found if spec.cache)
    check_decoder_call(base, cached=bool(cached_layers))
    check_one_scale(type(base).__name__, {attention_scale(*module_and_spec) for module_and_spec in found})
    return CrossAttentionOf(found, attended_width(*found[0]), attention_scale(*found[0]), cached_layers)


def make_layer(config: NvibConfig, width: int, scale: float) -> NvibLayer:
    """The NVIB layer between encoder and decoder; its prior is set when its weights are initialised."""
    return NvibLayer(
        width, width, kappa=config.kappa, scale=scale, **dropping_settings(config), **layer_settings(config)
    )


def layer_settings(config: NvibConfig) -> dict:
    """The settings in a configuration for all NVIB layers."""
    return {"delta": config.delta, "alpha_activation": config.alpha_activation, "kl_weights": config.kl_weights}


def dropping_settings(config: NvibConfig) -> dict:
    """The settings in a configuration for layers that can drop vectors."""
    return {
        "dropping": config.dropping,
        "alpha_threshold": config.alpha_threshold,
        "dropping_share": config.dropping_share,
    }


def put_into_self_attention(base: PreTrainedModel, halves: dict[str, nn.Module], config: NvibConfig) -> dict[str, str]:
    """Turn the self-attentions that ``config.attentions`` names into denoising attention, in place.

    Args:
        halves: the base's ``"encoder"``, and its ``"decoder"`` if it has one.

    Returns:
        The modules' names in the base by the names of their layers, ``{"encoder.0": ...}``, from below to above.

    Raises:
        ValueError: the table does not know an attention, or a layer does not exist. Then nothing has changed.
    """
    found: dict[str, tuple[nn.Module, AttentionSpec]] = {}
    for kind, half in halves.items():
        if kind in config.attentions:
            found |= chosen(half, kind, config)
    names = {id(module): name for name, module in base.named_modules()}
    stacked = is_stacked(config)
    for layer, (module, spec) in found.items():
        in_encoder, width = layer.startswith("encoder"), attended_width(module, spec)
        dropping = dropping_settings(config) if in_encoder else {}
        scale = attention_scale(module, spec)
        made = SelfAttentionNvibLayer(width, width, scale=scale, **dropping, **layer_settings(config))
        mixin = StackedSelfAttention if stacked and in_encoder else DenoisingSelfAttention
        convert_self_attention(module, spec, made, config, mixin)
    if stacked:
        in_encoder = {name: module for name, (module, _) in found.items() if name.startswith("encoder")}
        modules = {int(name.partition(".")[2]): module for name, module in in_encoder.items()}
        stack(halves["encoder"], modules, config.encoder_merge_share or {})
    return {layer: names[id(module)] for layer, (module, _) in found.items()}


def is_stacked(config: NvibConfig) -> bool:
    """Whether the encoder's layers pass on what they dropped or merged, or their pseudo-counts."""
    passes_on = config.drops or config.accumulate_alpha or bool(config.encoder_merge_share)
    return "encoder" in config.attentions and passes_on


def chosen(half: nn.Module, kind: str, config: NvibConfig) -> dict[str, tuple[nn.Module, AttentionSpec]]:
    """The self-attentions of an encoder or decoder that ``config.attentions`` names, by the names of their layers.

    Raises:
        ValueError: the table does not know an attention; a layer does not exist; vectors are dropped, but a later
            layer is not chosen.
    """
    layers, modules = config.attentions[kind], find_self_attention(half, kind)
    if layers == "all":
        layers = list(range(len(modules)))
    if layers[-1] >= len(modules):
        raise ValueError(
            f"attentions[{kind!r}] names layer {layers[-1]}, but {type(half).__name__} has {len(modules)}, "
            "counted from 0."
        )
    if kind == "encoder" and is_stacked(config) and layers != list(range(layers[0], len(modules))):
        raise ValueError(
            f"attentions['encoder'] is {layers}, but each layer passes what it drops, merges or accumulates on to all "
            "layers above it. Name every layer from the first one on, for instance "
            f"{list(range(layers[0], len(modules)))}."
        )
    if kind == "encoder" and (others := sorted((config.encoder_merge_share or {}).keys() - set(layers))):
        raise ValueError(
            f"encoder_merge_share merges after layer {others[0]}, but attentions['encoder'] puts NVIB into the layers "
            f"{layers}. Name one of these, or put NVIB into layer {others[0]} too."
        )
    if kind == "encoder" and config.drops and config.dropping == "relaxed":
        raise ValueError(
            "dropping='relaxed' keeps every vector in training, with a smaller weight that layers above do not see. "
            "Set dropping='threshold' and an alpha_threshold, or leave the encoder out of attentions."
        )
    if kind == "encoder" and is_stacked(config) and config.is_encoder_decoder and shortens_after_its_layers(half):
        raise ValueError(
            f"{type(half).__name__} has an adapter that shortens its layers' output, so NVIB cannot tell which "
            "vectors are dropped or merged. Leave 'encoder' out of attentions, or load the encoder with "
            "add_adapter=False."
        )
    return {f"{kind}.{number}": modules[number] for number in layers}


def shortens_after_its_layers(encoder: nn.Module) -> bool:
    """Whether an encoder of sound has an adapter on top that changes the length."""
    if getattr(encoder, "adapter", None) is None:
        return False
    with_and_without = {int(encoder._get_feat_extract_output_lengths(10_000, add_adapter=x)) for x in (True, False)}
    return len(with_and_without) > 1


def wrap(model_class: type[PreTrainedModel], base: PreTrainedModel, settings: dict) -> PreTrainedModel:
    """A ``model_class`` around a base, on the base's device and in its mode. The base is changed in place."""
    config = NvibConfig(base_config=base.config, base_architecture=architecture_name(type(base)), **settings)
    model = model_class(config, base=base)
    # Not the base's name: an adapter loads its model by this name, and would get the bare base.
    model.name_or_path = config.name_or_path = ""
    for layer in model.nvib_layers().values():
        layer.to(base.device, base.dtype)
    model.kl_beta = model.kl_beta.to(base.device)
    if config.encode_sound_only:
        model.store_silence()
    carry_quantisation(base, model)
    return model.train(base.training)


QUANTISED = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit")


def carry_quantisation(base: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let a model with a quantised base be saved as quantised, except for its NVIB layer."""
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None:
        return
    for name in QUANTISED:
        if hasattr(base, name):
            setattr(model, name, getattr(base, name))
    settings = copy.deepcopy(quantizer.quantization_config)
    name = "llm_int8_skip_modules" if hasattr(settings, "llm_int8_skip_modules") else "modules_to_not_convert"
    setattr(settings, name, [*quantizer.modules_to_not_convert, "nvib"])
    model.config.quantization_config = settings


def hand_back(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Give a base what only the model around it has. If the model was loaded from a file, the base lacks all of it."""
    if base.can_generate() and model.can_generate():
        base.generation_config = model.generation_config
    if tags := [tag for tag in model.model_tags or () if tag != "nvib"]:
        base.model_tags = tags
    for name in (*QUANTISED, "hf_device_map"):
        if hasattr(model, name) and not hasattr(base, name):
            value = getattr(model, name)
            if name == "hf_device_map":
                value = {part.removeprefix("base").removeprefix("."): place for part, place in value.items()}
            setattr(base, name, value)
    if getattr(model, "hf_quantizer", None) is not None and not hasattr(base.config, "quantization_config"):
        base.config.quantization_config = model.config.quantization_config


def split_settings(kwargs: dict) -> tuple[dict, dict]:
    """Split keyword arguments into settings of :class:`NvibConfig` and others."""
    names = setting_names()
    settings = {name: value for name, value in kwargs.items() if name in names}
    others = {name: value for name, value in kwargs.items() if name not in names}
    refuse_misspelt_settings(others)
    return settings, others


# Wrapping and loading


def check_base(base: PreTrainedModel) -> None:
    """Raise ValueError unless a model can be wrapped. This changes nothing."""
    check_unwrapped(base)
    find_cross_attention(base)
    if not base.config.is_encoder_decoder or not base.can_generate():
        raise ValueError(
            f"{type(base).__name__} is not an encoder-decoder model that generates, so NVIB has no place in it. "
            "Pass a ...ForConditionalGeneration, or join an encoder and a decoder with "
            "NvibForConditionalGeneration.from_encoder_decoder_pretrained(encoder, decoder)."
        )


def check_unwrapped(base: PreTrainedModel) -> None:
    """Raise ValueError if a model has NVIB already, or is spread over several devices."""
    name = type(base).__name__
    if any(isinstance(module, ConvertedAttention) for module in base.modules()):
        raise ValueError(
            f"{name} is an NVIB model already, or part of one. Wrap another base, or call unwrap() on that "
            "model first."
        )
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            f"{name} is spread over several devices by its device_map. Load it on one, wrap it, save it with "
            "save_pretrained, and load that with from_pretrained(..., device_map=...) of the NVIB model."
        )


def check_attentions(config: NvibConfig) -> dict:
    """The attentions of an encoder-decoder, by default the cross-attention; ValueError if they lack that."""
    if not config.is_encoder_decoder:
        raise ValueError(
            "is_encoder_decoder is False, as for an encoder with a head, but this model has a decoder. Leave the "
            "setting out, or load an encoder with NvibForSequenceClassification or NvibForTokenClassification."
        )
    if config.attentions is not None and "cross" not in config.attentions:
        raise ValueError(
            f"attentions are {list(config.attentions)}, but the cross-attention of an encoder-decoder reads the "
            "latents. Name 'cross' too. As it is initialised, it computes what the base computes."
        )
    attentions = {"cross": "all"} if config.attentions is None else config.attentions
    check_mass_is_read(config.encoder_merge_share, attentions)
    return attentions


def check_one_scale(name: str, scales: set[float]) -> None:
    """Raise ValueError unless all layers of the model ``name`` have the same scale."""
    if len(scales) > 1:
        raise ValueError(
            f"The cross-attention layers of {name} have different scales ({sorted(scales)}), but one latent with one "
            "norm term serves them all. For GPT-2 set scale_attn_by_inverse_layer_idx=False."
        )
