"""How the model that NVIB wraps is found, loaded, or joined of two halves."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    SpeechEncoderDecoderModel,
    VisionEncoderDecoderModel,
)

from .base_model import JOINED


def base_class(config: PreTrainedConfig, architecture: str | None = None) -> type[PreTrainedModel]:
    """The class of the encoder-decoder model a configuration belongs to.

    Raises:
        ValueError: there is none with a head that generates.
    """
    if architecture is not None and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    joined = {model.config_class: model for model in JOINED}
    if type(config) in joined:
        return joined[type(config)]
    for auto in (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError(
        f"A model of type {config.model_type!r} is no encoder-decoder that generates, so there is no "
        "cross-attention for NVIB. Pass one (BART, T5, Marian, ...), or join an encoder and a decoder with "
        "NvibForConditionalGeneration.from_encoder_decoder_pretrained(encoder, decoder)."
    )


@contextmanager
def damage_explained(name_or_path: object) -> Iterator[None]:
    """Say which checkpoint it is that cannot be read, and what to do."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError) as error:
        raise OSError(
            f"The checkpoint {name_or_path} is damaged ({error}): one of its files was cut short when it was saved, "
            "copied or downloaded. Fetch it again, or take an earlier one."
        ) from error


def load_base(
    name_or_path: str, find: Callable[[PreTrainedConfig], type[PreTrainedModel]] = base_class, **kwargs
) -> PreTrainedModel:
    """A pretrained model by name or path; ``kwargs`` are those of ``from_pretrained``.

    Args:
        find: the class for a configuration, by default an encoder-decoder's.
    """
    hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "subfolder", "trust_remote_code") if k in kwargs}
    config = AutoConfig.from_pretrained(name_or_path, **hub)
    if config.model_type == "nvib":
        raise ValueError(
            f"{name_or_path} is an NVIB model already. Load it with from_pretrained, for instance "
            "NvibForConditionalGeneration.from_pretrained."
        )
    with damage_explained(name_or_path):
        return find(config).from_pretrained(name_or_path, **kwargs)


def join_encoder_decoder(
    encoder: str | PreTrainedModel, decoder: str | PreTrainedModel | PreTrainedConfig, **kwargs
) -> PreTrainedModel:
    """One model of an encoder and a decoder with cross-attention; ``kwargs`` go to both ``from_pretrained``.

    Cross-attention that a pretrained decoder lacks is fresh, as is all of a decoder given as a configuration.
    """
    if not isinstance(encoder, PreTrainedModel):
        config = AutoConfig.from_pretrained(encoder)
        if hasattr(config, "is_decoder"):
            config.is_decoder = config.add_cross_attention = False
        encoder = AutoModel.from_pretrained(encoder, config=config, **kwargs)
    if not isinstance(decoder, PreTrainedModel):
        given = isinstance(decoder, PreTrainedConfig)
        config = copy.deepcopy(decoder) if given else AutoConfig.from_pretrained(decoder)
        config.is_decoder = config.add_cross_attention = True
        if given:
            decoder = AutoModelForCausalLM.from_config(config)
        else:
            decoder = AutoModelForCausalLM.from_pretrained(decoder, config=config, **kwargs)
    if "encoder_hidden_states" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(
            f"{type(decoder).__name__} cannot cross-attend: its forward takes no encoder_hidden_states. Pass a "
            "decoder that can, such as a BERT, RoBERTa or GPT-2 model or configuration."
        )
    by_input = {"pixel_values": VisionEncoderDecoderModel, "input_ids": EncoderDecoderModel}
    model = by_input.get(encoder.main_input_name, SpeechEncoderDecoderModel)(encoder=encoder, decoder=decoder)
    _set_special_tokens(model)
    return model


def _set_special_tokens(model: PreTrainedModel) -> None:
    """Take the tokens with which generation starts, ends and pads from the decoder where they are not set."""
    decoder, generation = model.config.decoder, model.generation_config
    first = (getattr(decoder, name, None) for name in ("decoder_start_token_id", "bos_token_id", "cls_token_id"))
    start = next((token for token in first if token is not None), None)
    end = getattr(decoder, "eos_token_id", None)
    pad = getattr(decoder, "pad_token_id", None)
    found = {
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end if pad is None else pad,
    }
    for name, token in found.items():
        for config in (model.config, generation):
            if getattr(config, name, None) is None:
                setattr(config, name, token)
