"""From a base model to an NVIB model."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .architectures import attention_scale, check_names, find_cross_attention, input_width, memory_width, row_of
from .attended_layer import AttendedNvibLayer
from .base_model import check_decoder_call
from .checks import check_one_scale
from .configuration_nvib import NvibConfig, refuse_misspelt_settings, setting_names
from .nvib_layer import NvibLayer
from .self_architectures import find_self_attention, self_attention_row
from .self_attention import DenoisingSelfAttention, convert_self_attention
from .stacked_attention import StackedSelfAttention, stack


class CrossAttentionOf(NamedTuple):
    """What NVIB needs to know of a base's cross-attention.

    Its modules; the width ``P`` of the vectors they read; their scale ``s``; and their places in the cache.
    """

    modules: list[nn.Module]
    width: int
    scale: float
    cached_layers: tuple[int, ...]


def cross_attention_of(base: PreTrainedModel) -> CrossAttentionOf:
    """Cross-attention of a base that has not been converted.

    Raises:
        ValueError: it is not what the table of architectures says; layers of different scales.
    """
    modules = find_cross_attention(base)
    for module in modules:
        check_names(module)
    cached_layers = tuple(module.layer_idx for module in modules if row_of(module).cache)
    check_decoder_call(base, cached=bool(cached_layers))
    check_one_scale(type(base).__name__, modules)
    return CrossAttentionOf(modules, memory_width(modules[0]), attention_scale(modules[0]), cached_layers)


def make_layer(config: NvibConfig, width: int, scale: float) -> NvibLayer:
    """The NVIB layer between encoder and decoder; its prior is set when its weights are initialised."""
    return NvibLayer(
        width, width, kappa=config.kappa, scale=scale, **dropping_settings(config), **layer_settings(config)
    )


def layer_settings(config: NvibConfig) -> dict:
    """What a configuration says of all NVIB layers."""
    return {"delta": config.delta, "alpha_activation": config.alpha_activation, "kl_weights": config.kl_weights}


def dropping_settings(config: NvibConfig) -> dict:
    """What a configuration says of the layers that can drop vectors."""
    return {
        "dropping": config.dropping,
        "alpha_threshold": config.alpha_threshold,
        "threshold_share": config.threshold_share,
    }


def put_into_self_attention(base: PreTrainedModel, halves: dict[str, nn.Module], config: NvibConfig) -> dict[str, str]:
    """Turn the self-attentions that ``config.attentions`` names into denoising attention, in place.

    Args:
        halves: the base's ``"encoder"``, and its ``"decoder"`` if it has one.

    Returns:
        The modules' names in the base by those of their layers, ``{"encoder.0": ...}``, from below to above.

    Raises:
        ValueError: an attention that the table does not know, or the number of a layer that there is not. Nothing has
            been changed then.
    """
    found = {}
    for kind, half in halves.items():
        if kind in config.attentions:
            found |= chosen(half, kind, config)
    names = {id(module): name for name, module in base.named_modules()}
    stacked = is_stacked(config)
    for layer, module in found.items():
        row, in_encoder = self_attention_row(module), layer.startswith("encoder")
        scale, width = getattr(module, row.scale), input_width(getattr(module, row.key or row.query_key_value))
        dropping = dropping_settings(config) if in_encoder else {}
        made = AttendedNvibLayer(width, width, scale=scale, **dropping, **layer_settings(config))
        mixin = StackedSelfAttention if stacked and in_encoder else DenoisingSelfAttention
        convert_self_attention(module, made, config, mixin)
    names = {layer: names[id(module)] for layer, module in found.items()}
    if stacked:
        stack(halves["encoder"], [module for layer, module in found.items() if layer.startswith("encoder")])
    return names


def is_stacked(config: NvibConfig) -> bool:
    """Whether the encoder's layers hand on to each other what they dropped, or their pseudo-counts."""
    return "encoder" in config.attentions and (config.drops or config.accumulate_alpha)


def chosen(half: nn.Module, kind: str, config: NvibConfig) -> dict[str, nn.Module]:
    """The self-attentions of an encoder or decoder that ``config.attentions`` names, by the names of their layers.

    Raises:
        ValueError: an attention that the table does not know; the number of a layer that there is not; where vectors
            are dropped, layers that do not go on to the last.
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
            f"attentions['encoder'] is {layers}, but what a layer drops is gone from all layers above it, and "
            f"accumulated pseudo-counts go from each layer to the next: name all of them from one on, for instance "
            f"{list(range(layers[0], len(modules)))}."
        )
    if kind == "encoder" and config.drops and config.dropping == "relaxed":
        raise ValueError(
            "dropping='relaxed' keeps every vector in training, at a smaller weight that layers above do not see. "
            "Set dropping='hard' or an alpha_threshold, or leave the encoder out of attentions."
        )
    return {f"{kind}.{number}": modules[number][1] for number in layers}


def wrap(model_class: type[PreTrainedModel], base: PreTrainedModel, settings: dict) -> PreTrainedModel:
    """A model of ``model_class`` around a base, which is changed in place, on its device and in its mode."""
    config = NvibConfig(base_config=base.config, base_architecture=type(base).__name__, **settings)
    model = model_class(config, base=base)
    # Not the base's name: whoever loads by it (an adapter does) would get the bare base.
    model.name_or_path = config.name_or_path = ""
    for layer in model.nvib_layers().values():
        layer.to(base.device, base.dtype)
    model.kl_beta = model.kl_beta.to(base.device)
    carry_quantisation(base, model)
    return model.train(base.training)


def carry_quantisation(base: PreTrainedModel, model: PreTrainedModel) -> None:
    """A base that was loaded quantised makes a quantised model, all but its NVIB layer, that can be saved."""
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None:
        return
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        if hasattr(base, name):
            setattr(model, name, getattr(base, name))
    settings = copy.deepcopy(quantizer.quantization_config)
    name = "llm_int8_skip_modules" if hasattr(settings, "llm_int8_skip_modules") else "modules_to_not_convert"
    setattr(settings, name, [*quantizer.modules_to_not_convert, "nvib"])
    model.config.quantization_config = settings


def split_settings(kwargs: dict) -> tuple[dict, dict]:
    """Keyword arguments that are settings of :class:`NvibConfig`, and the others."""
    names = setting_names()
    settings = {name: value for name, value in kwargs.items() if name in names}
    others = {name: value for name, value in kwargs.items() if name not in names}
    refuse_misspelt_settings(others)
    return settings, others
