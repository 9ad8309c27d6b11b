"""From a base model to an NVIB model."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .architectures import check_names, cross_attention_scale, find_cross_attention, memory_width, row_of
from .base_model import check_decoder_call
from .checks import check_one_scale
from .configuration_nvib import NvibConfig, refuse_misspelt_settings, setting_names
from .nvib_layer import NvibLayer


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
    return CrossAttentionOf(modules, memory_width(modules[0]), cross_attention_scale(modules[0]), cached_layers)


def make_layer(config: NvibConfig, width: int, scale: float) -> NvibLayer:
    """The NVIB layer of a model; its prior is set when its weights are initialised."""
    return NvibLayer(
        width,
        width,
        delta=config.delta,
        kappa=config.kappa,
        alpha_activation=config.alpha_activation,
        dropping=config.dropping,
        alpha_threshold=config.alpha_threshold,
        threshold_share=config.threshold_share,
        kl_weights=config.kl_weights,
        scale=scale,
    )


def wrap(model_class: type[PreTrainedModel], base: PreTrainedModel, settings: dict) -> PreTrainedModel:
    """A model of ``model_class`` around a base, which is changed in place, on its device and in its mode."""
    config = NvibConfig(base_config=base.config, base_architecture=type(base).__name__, **settings)
    model = model_class(config, base=base)
    # Not the base's name: whoever loads by it (an adapter does) would get the bare base.
    model.name_or_path = config.name_or_path = ""
    model.nvib.to(base.device, base.dtype)
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
