"""How a model comes to be, from a base or from files, and what it overrides of ``PreTrainedModel`` for that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .base_loading import damage_explained, join_encoder_decoder, load_base
from .base_model import JOINED, joined_vocabularies
from .checks import check_known, check_name_to_load, check_nothing_is_missing
from .cross_attention import restore_cross_attention
from .nvib_layer import NvibLayer
from .prior import prior_buffers
from .self_attention import restore_self_attention
from .stacked_attention import unstack
from .wrapping import split_settings, wrap


class NvibPretrainedMixin:
    """Before ``PreTrainedModel``: wraps a base; what the base has is initialised, loaded and resized as it does it.

    ``_load_base`` loads one by its name or path.
    """

    _load_base: Callable[..., PreTrainedModel]

    @classmethod
    def from_base_pretrained(cls, base: str | PreTrainedModel, **kwargs) -> Self:
        """Wrap a pretrained model.

        In ``eval()`` a fresh wrap computes what the base computes (for the default ``tau_*``).

        Args:
            base: name or path of a checkpoint, or a loaded model, which is changed in place.
            kwargs: settings of :class:`NvibConfig`; the others go to the base's ``from_pretrained``
                (``dtype``, ``attn_implementation``, ``revision``, ...).

        Raises:
            ValueError: the base has no attention that is known; a setting outside its range.
            TypeError: an argument that neither takes.
        """
        settings, others = split_settings(kwargs)
        if isinstance(base, PreTrainedModel):
            check_known(others, "A loaded model")
        else:
            base = cls._load_base(base, **others)
        return wrap(cls, base, settings)

    def unwrap(self) -> PreTrainedModel:
        """The base model with its trained weights and its own cross-attention. This model is spent afterwards."""
        restore_cross_attention(self.base)
        unstack(self.base)
        restore_self_attention(self.base)
        return self.base

    def freeze_base(self) -> Self:
        """Train the NVIB layers alone."""
        self.base.requires_grad_(False)
        for layer in self.nvib_layers().values():
            layer.requires_grad_(True)
        return self

    def initialize_weights(self) -> None:
        """What was not loaded: the base's by its own rules, which would pass it over in a model from elsewhere."""
        for name, layer in self.nvib_layers().items():  # first: the base has rules for linear maps of any kind
            if not getattr(layer, "_is_hf_initialized", False):
                self._initialize_nvib(layer, self.config.taus(name.partition(".")[0]))
        self.base.initialize_weights()
        super().initialize_weights()

    @torch.no_grad()
    def _initialize_nvib(self, layer: NvibLayer, taus: dict[str, float]) -> None:
        """Prior and identity of an NVIB layer, tensor by tensor, but for those that were loaded."""
        config = self.config
        buffers = prior_buffers(config.prior_mu, config.prior_var, math.log(config.prior_alpha))
        for name, value in (buffers | {"threshold_share": config.threshold_share}).items():
            init.copy_(layer.get_buffer(name), torch.as_tensor(value))
        parameters = layer.identity_parameters(**taus)
        for name, value in parameters.items():
            init.copy_(layer.get_parameter(name), value)
        for module in layer.modules():
            module._is_hf_initialized = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.ones_(self.kl_beta)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in ``PreTrainedModel``, of a saved NVIB model: one whose files are damaged or incomplete is refused.

        Raises:
            OSError: files that are missing or cut short, or weights that are missing, unless they are given
                (``state_dict``), looked at (``output_loading_info``) or not expected (``ignore_mismatched_sizes``).
            ValueError: another kind of model, or one saved by a newer version; no name at all.
        """
        state_dict = kwargs.get("state_dict")
        check_name_to_load(pretrained_model_name_or_path, state_dict)
        with damage_explained(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        if output_loading_info:
            return model, info
        if state_dict is None and not kwargs.get("ignore_mismatched_sizes"):
            check_nothing_is_missing(pretrained_model_name_or_path, info["missing_keys"])
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)


class NvibSeq2SeqPretrainedMixin(NvibPretrainedMixin):
    """Of encoder-decoders."""

    _load_base = staticmethod(load_base)

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
        settings, others = split_settings(kwargs)
        return wrap(cls, join_encoder_decoder(encoder, decoder, **others), settings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.base.get_encoder() if modality is None else self.base.get_encoder(modality=modality)

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As of the base. Where an encoder and a decoder were joined: of both, if their vocabularies are as large.

        Raises:
            ValueError: the two have vocabularies of their own.
        """
        if isinstance(self.base, JOINED) and new_num_tokens is not None:
            halves = joined_vocabularies(self.base)
        else:
            halves = [self.base]
        for half in halves:
            embeddings = half.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.vocab_size = embeddings.num_embeddings
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        return embeddings
