"""From a base model to an NVIB model and back."""

from __future__ import annotations

import copy
from typing import Self

from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import find_cross_attention
from .base_model import join_encoder_decoder, load_base
from .configuration_nvib import NvibConfig, refuse_misspelt_settings, setting_names
from .cross_attention import DenoisingCrossAttention, restore_cross_attention
from .encoding import refuse_unknown


class NvibWrappingMixin:
    """The half of :class:`~nvib_hf.NvibForConditionalGeneration` that wraps a base model and unwraps it."""

    @classmethod
    def from_base_pretrained(cls, base: str | PreTrainedModel, **kwargs) -> Self:
        """Wrap a pretrained encoder-decoder model.

        In ``eval()`` a fresh wrap computes what the base computes (for the default ``tau_*``).

        Args:
            base: name or path of a checkpoint, or a loaded model, which is changed in place.
            kwargs: settings of :class:`NvibConfig`; the others go to the base's ``from_pretrained``
                (``dtype``, ``attn_implementation``, ``revision``, ...).

        Raises:
            ValueError: the base has no cross-attention that is known; a setting outside its range.
            TypeError: an argument that neither takes.
        """
        settings, others = _split_settings(kwargs)
        if isinstance(base, PreTrainedModel):
            refuse_unknown(others, "A loaded model")
        else:
            base = load_base(base, **others)
        return cls._wrap(base, settings)

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str | PreTrainedModel,
        decoder: str | PreTrainedModel | PreTrainedConfig,
        **kwargs,
    ) -> Self:
        """Join a pretrained encoder with a decoder that can cross-attend, and wrap the two.

        Args:
            encoder: name, path or model.
            decoder: name, path, model, or a configuration for fresh weights.
            kwargs: settings of :class:`NvibConfig`; the others go to both ``from_pretrained``.
        """
        settings, others = _split_settings(kwargs)
        return cls._wrap(join_encoder_decoder(encoder, decoder, **others), settings)

    @classmethod
    def _wrap(cls, base: PreTrainedModel, settings: dict) -> Self:
        config = NvibConfig(base_config=base.config, base_architecture=type(base).__name__, **settings)
        model = cls(config, base=base)
        # Not the base's name: whoever loads by it (an adapter does) would get the bare base.
        model.name_or_path = config.name_or_path = ""
        model.nvib.to(base.device, base.dtype)
        model.kl_beta = model.kl_beta.to(base.device)
        carry_quantisation(base, model)
        return model.train(base.training)

    def unwrap(self) -> PreTrainedModel:
        """The base model with its trained weights and its own cross-attention. This model is spent afterwards."""
        restore_cross_attention(self.base)
        return self.base

    def freeze_base(self) -> Self:
        """Train the bottleneck alone."""
        self.base.requires_grad_(False)
        return self


def check_base(base: PreTrainedModel) -> None:
    """Raise ValueError unless a model can be wrapped: nothing has been changed by then."""
    name = type(base).__name__
    if any(isinstance(module, DenoisingCrossAttention) for module in base.modules()):
        raise ValueError(
            f"{name} is part of an NVIB model already, or one itself. Wrap another base, or call unwrap() on that "
            "model first."
        )
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            f"{name} is spread over several devices by its device_map. Load it on one, wrap it, save it with "
            "save_pretrained, and load that with NvibForConditionalGeneration.from_pretrained(..., device_map=...)."
        )
    find_cross_attention(base)
    if not base.config.is_encoder_decoder or not base.can_generate():
        raise ValueError(
            f"{name} is no encoder-decoder model that generates, so there is nothing to put NVIB between. Pass a "
            "...ForConditionalGeneration, or join an encoder and a decoder with "
            "NvibForConditionalGeneration.from_encoder_decoder_pretrained(encoder, decoder)."
        )


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


def _split_settings(kwargs: dict) -> tuple[dict, dict]:
    """Keyword arguments that are settings of :class:`NvibConfig`, and the others."""
    names = setting_names()
    settings = {name: value for name, value in kwargs.items() if name in names}
    others = {name: value for name, value in kwargs.items() if name not in names}
    refuse_misspelt_settings(others)
    return settings, others
