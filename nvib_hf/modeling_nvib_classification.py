"""Encoders with a head for classification, with NVIB in their self-attentions."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import can_return_tuple, logging

from .configuration_nvib import NvibConfig
from .layers.cross_entropy import IGNORED
from .layers.exporting import is_exporting
from .loss import layer_terms, regulariser
from .outputs import NvibClassifierOutput
from .versions import warn_if_untested
from .wrapping.architecture import architecture_class, architecture_name
from .wrapping.base import argument_names, check_known, load_base
from .wrapping.pretrained import NvibPreTrainedModel
from .wrapping.self_attention import ForwardPass
from .wrapping.stacked_encoder import check_merges_as_made
from .wrapping.wrap import check_unwrapped


def classifier_class(
    config: PreTrainedConfig, autos: Iterable[type], architecture: str | None
) -> type[PreTrainedModel]:
    """The class of the classifier that a configuration belongs to.

    Args:
        autos: the Auto classes to search, in order. A class that the configuration names comes first.
        architecture: the name of the class, if it is known.

    Raises:
        ValueError: no such class exists.
    """
    if architecture is not None:
        return architecture_class(architecture)
    found = [auto._model_mapping[type(config)] for auto in autos if type(config) in auto._model_mapping]
    named = config.architectures or ()
    for model_class in found:
        if model_class.__name__ in named:
            return model_class
    if not found:
        raise ValueError(
            f"A model of type {config.model_type!r} has no head of this kind in Transformers. Pass an encoder that "
            "has one, for instance BERT."
        )
    return found[0]


def auto_class(base: PreTrainedModel, autos: tuple[type, ...]) -> str:
    """The name of the Auto class in ``autos`` that loads such a base. If none does, the name of the first."""
    fitting = (auto for auto in autos if auto._model_mapping.get(type(base.config), None) is type(base))
    return next(fitting, autos[0]).__name__


RECORDED = {"output_attentions", "output_hidden_states", "return_dict"}  # Transformers takes them in kwargs


def argument_names_of(base: PreTrainedModel) -> frozenset[str] | None:
    """The names of what a classifier reads: its own arguments, and those that it may hand on to its encoder.

    The kwargs of Transformers' models may hold others, for packed sequences, but attention with NVIB does not read
    them. ``None`` if a ``forward`` of one's own has kwargs, which may hold anything.
    """
    kinds = {parameter.kind for parameter in inspect.signature(base.forward).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds and not type(base).forward.__module__.startswith("transformers."):
        return None
    return argument_names(base.forward) | argument_names(base.base_model.forward) | RECORDED


class NvibEncoderModel(NvibPreTrainedModel):
    r"""A pretrained encoder with a head, whose self-attentions read distributions: what its subclasses share.

    The loss is the head's own loss plus

    .. math:: \beta_G \lambda_G \, \overline{KL_G} + \beta_D \lambda_D \, \overline{KL_D}

    The KLs are means over the NVIB layers and over the examples. The model works with the plain ``Trainer``, and with
    :class:`~nvib_hf.KLAnnealingCallback`.

    Args:
        config: the configuration. Its ``attentions`` are ``{"encoder": ...}``; by default all layers.
        base: the model to wrap, changed in place. ``None`` makes a fresh one from ``config.base_config``.

    Source: Fehr et al. (2025), fine-tuning with NVIB in encoders.
    """

    accepts_loss_kwargs = False  # the head's loss is a mean over the batch; the Trainer does the division
    _autos: tuple[type, ...]

    def __init__(self, config: NvibConfig, base: PreTrainedModel | None = None) -> None:
        warn_if_untested()
        config.check()  # loading may have changed settings
        attentions = {"encoder": "all"} if config.attentions is None else config.attentions
        if set(attentions) != {"encoder"}:
            raise ValueError(
                f"attentions are {list(attentions)}, but an encoder with a head has 'encoder' only. Leave attentions "
                "out for all layers, or pass {'encoder': [...]}."
            )
        if config.latent_prior is not None:
            raise ValueError("latent_prior needs a decoder, but an encoder with a head has none. Leave it out.")
        check_settings_of_a_decoder(config)
        super().__init__(config)
        if base is None:
            architecture = classifier_class(config.base_config, self._autos, config.base_architecture)
            base = architecture._from_config(config.base_config)
        else:
            check_unwrapped(base)
            for module in base.modules():
                module._is_hf_initialized = True  # else post_init draws the weights of unknown modules anew
        config.attentions, config.is_encoder_decoder = attentions, False
        # The live configuration: both sides then see a change of the attention implementation.
        config.base_config, config.base_architecture = base.config, architecture_name(type(base))
        self.main_input_name = base.main_input_name
        self._auto_name = auto_class(base, self._autos)
        self.base = base
        self._put_into_self_attention({"encoder": base})
        self._argument_names = argument_names_of(base)  # once: a pass that reads signatures cannot be compiled
        self.register_buffer("kl_beta", torch.ones(3))  # of lambda_gaussian, lambda_dirichlet, lambda_vectors
        self.post_init()

    @classmethod
    def _load_base(cls, name_or_path: str, **kwargs) -> PreTrainedModel:
        return load_base(name_or_path, partial(classifier_class, autos=cls._autos, architecture=None), **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> NvibClassifierOutput:
        """Logits and, with ``labels``, the loss.

        Args:
            input_ids, attention_mask, token_type_ids, inputs_embeds, pixel_values, input_values, kwargs: as the base
                takes them.
            labels: as the base takes them.
            generator: for the draws of training.

        Raises:
            TypeError: an argument that the base does not read.
        """
        known = self._argument_names
        if known is not None and not kwargs.keys() <= known:
            check_known([name for name, value in kwargs.items() if value is not None], type(self).__name__, known)
        if generator is not None:
            self._check_generator(generator)
        if not torch.compiler.is_compiling():  # they may have been set since
            check_settings_of_a_decoder(self.config)
            check_merges_as_made(self.config.encoder_merge_share, self._made_to_merge)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "labels": labels,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        is_target = None
        if labels is not None and not labels.is_floating_point():
            is_target = (labels != IGNORED).any()  # without a target, the base's mean over targets would be nan
            given["labels"] = torch.where(is_target, labels, 0)
        records: dict | None = None if labels is None and is_exporting() else {}
        with ForwardPass(generator, records=records):
            outputs = self.base(**given, **kwargs, return_dict=True)
        terms, charged = layer_terms(None, self._self_attentions(), records or {})
        loss = outputs.loss
        regularisation = regulariser(
            charged, self.kl_beta if self.training else None, self.config
        )  # None where layer drop skipped all of them
        cross_entropy = loss if loss is None or is_target is None else loss * is_target
        if loss is not None and regularisation is not None:
            loss = loss + regularisation.mean()
            loss = loss if is_target is None else loss * is_target
        elif loss is None and self.training and torch.is_grad_enabled():
            warn_of_a_loss_without_terms(self.config)
        return NvibClassifierOutput(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_entropy=cross_entropy,
            kl_gaussian=charged.kl_gaussian,
            kl_dirichlet=charged.kl_dirichlet,
            layer_kl_gaussian=terms.kl_gaussian,
            layer_kl_dirichlet=terms.kl_dirichlet,
            layer_prop_vectors=terms.prop_vectors,
        )

    def _read(self, batch: dict[str, Tensor]) -> None:
        self(**{name: value.to(self.device) for name, value in batch.items() if name != "labels"})


class NvibForSequenceClassification(NvibEncoderModel):
    """A classifier of texts, images or sounds with NVIB in its encoder; see :class:`NvibEncoderModel`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> bert = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))
        >>> model = NvibForSequenceClassification.from_base_pretrained(bert, lambda_gaussian=0.01)
        >>> model.eval()(input_ids=torch.tensor([[5, 6, 7, 2]])).logits.shape
        torch.Size([1, 3])
    """

    _autos = (AutoModelForSequenceClassification, AutoModelForImageClassification, AutoModelForAudioClassification)


class NvibForTokenClassification(NvibEncoderModel):
    """A classifier of tokens with NVIB in its encoder; see :class:`NvibEncoderModel`."""

    _autos = (AutoModelForTokenClassification,)


logger = logging.get_logger(__name__)

OF_A_DECODER = {"merge_share": 1, "training_merge_share": 1, "merge_cost": 0, "encode_sound_only": False}


def check_settings_of_a_decoder(config: NvibConfig) -> None:
    """Raise ValueError for settings that an encoder with a head would ignore."""
    for name, off in OF_A_DECODER.items():
        if getattr(config, name) != off:
            raise ValueError(
                f"{name}={getattr(config, name)} changes what a decoder reads, but an encoder with a head has no "
                "decoder. Leave it out."
            )


def warn_of_a_loss_without_terms(config: NvibConfig) -> None:
    """Warn once that the KLs have weights, but a training computes its own loss from the logits without them."""
    if max(config.lambda_gaussian, config.lambda_dirichlet, config.lambda_vectors) > 0:
        logger.warning_once(
            "A training pass got no labels, so no loss has the KLs. A Trainer's label_smoothing_factor and "
            "compute_loss_func take the labels away. Leave them out, or add the output's kl_gaussian and kl_dirichlet "
            "to your loss."
        )
