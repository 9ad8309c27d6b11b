"""How to load a base model, and how to run its encoder and its decoder."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
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
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from ..layers.distributions import noise
from ..layers.exporting import is_exporting
from ..versions import CACHE, installed_and_tested
from .architecture import architecture_class

if TYPE_CHECKING:
    pass

# The encoder's output, which you can pass in place of its inputs.
STATES = "encoder_last_hidden_state"

# The decoder of these is a causal model of its own. It is called directly, because the projection between the halves
# must read the encoder's states, not the latent.
JOINED = (EncoderDecoderModel, SpeechEncoderDecoderModel, VisionEncoderDecoderModel)
NOTHING_TO_READ = (
    "The decoder has nothing to read. Pass labels, decoder_input_ids or decoder_inputs_embeds; to write text call "
    "generate()."
)


@dataclass
class LatentOutput(BaseModelOutput):
    """A packed latent in place of an encoder's output.

    Some decoders read more than the states: Moonshine reads the mask, mixtures of experts read the encoder's router
    logits. Both are ``None`` here, because the latent holds its masks.
    """

    attention_mask: Tensor | None = None
    router_logits: Tensor | None = None


def check_decoder_call(base: PreTrainedModel, cached: bool) -> None:
    """Raise ValueError unless the base takes the arguments that :func:`run_decoder` passes by name."""
    if isinstance(base, JOINED):
        called, needed = base.decoder, {"input_ids", "encoder_hidden_states"}
    else:
        called, needed = base, {"decoder_input_ids", "encoder_outputs"}
    if cached:
        needed.add(CACHE)
    if missing := needed - argument_names(called.forward):
        raise ValueError(
            f"{type(called).__name__}.forward takes no argument {' or '.join(map(repr, sorted(missing)))}, but NVIB "
            f"passes the latent and the cache by these names. {installed_and_tested()}. Install a tested version."
        )


def freeze_unused(base: PreTrainedModel) -> None:
    """Freeze parameters that no encoder-decoder uses, because distributed training fails on unused parameters."""
    pooler = getattr(base.get_encoder(), "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)


def argument_names(forward) -> frozenset[str]:
    """The names of a function's arguments."""
    return frozenset(inspect.signature(forward).parameters)


def gathering(model: nn.Module, name: str) -> Callable:
    """A model's method to call outside of ``forward``. FSDP2 must be told to gather parameters for it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if isinstance(model, FSDPModule):
            gathered = f"{name}_gathered"
            if gathered not in vars(model):
                setattr(model, gathered, getattr(model, name))
                register_fsdp_forward_method(model, gathered)
            return getattr(model, gathered)
    return getattr(model, name)


def other_names_of_the_source(base: PreTrainedModel, encoder_names: Iterable[str]) -> dict[str, str]:
    """The encoder's names of the source, by the base's names, where the two differ.

    Pop2Piano's sound becomes its encoder's embeddings. A joined speech model passes any input on to its encoder.
    """
    encoder = base.get_encoder()
    own = "inputs_embeds" if "inputs_embeds" in encoder_names else encoder.main_input_name
    taken = argument_names(base.forward) & {"input_features", "input_values", "pixel_values", "inputs"}
    return dict.fromkeys(sorted(taken - set(encoder_names)), own)


def check_mask_of_tokens(inputs: dict) -> None:
    """Raise ValueError for a mask of another shape than its tokens, which some attentions would ignore."""
    tokens, mask = inputs.get("input_ids", inputs.get("inputs_embeds")), inputs.get("attention_mask")
    if tokens is None or mask is None or mask.dim() > 2 or is_exporting():
        return
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the tokens have {tuple(tokens.shape[:2])}. Pass one "
            "value for each token."
        )


def check_mask_of_states(base: PreTrainedModel, mask: Tensor, states: Tensor) -> None:
    """Raise ValueError for a mask that does not fit an encoder's output. Without it, attention would read padding."""
    has_rule = hasattr(base.get_encoder(), "_get_feature_vector_attention_mask")
    fits = mask.dim() == 2 and mask.shape[0] == states.shape[0]
    if not fits or mask.shape[1] < states.shape[1] or (mask.shape[1] > states.shape[1] and not has_rule):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but {STATES} {tuple(states.shape)} needs "
            f"{tuple(states.shape[:2])}. Pass one value for each vector."
        )


def run_encoder(
    base: PreTrainedModel, inputs: dict, encoder: nn.Module | None = None
) -> tuple[BaseModelOutput, Tensor | None]:
    """The encoder's output, projected to the decoder's width, and its mask (or its inputs' mask, or ``None``).

    ``inputs`` are the encoder's inputs by name. ``encoder`` replaces the base's encoder. If the encoder shortens its
    input, the mask may be as long as the input; see :func:`shortened_mask`.
    """
    encoder = base.get_encoder() if encoder is None else encoder
    if base.training and "input_features" in inputs and hasattr(base.base_model, "_mask_input_features"):
        # Whisper's SpecAugment, which works in place
        sound, mask = inputs["input_features"].clone(), inputs.get("attention_mask")
        inputs = {**inputs, "input_features": base.base_model._mask_input_features(sound, attention_mask=mask)}
    outputs = encoder(**inputs, return_dict=True)
    states, downsampled = outputs.last_hidden_state, getattr(outputs, "attention_mask", None)
    if isinstance(base, JOINED) and hasattr(base, "enc_to_dec_proj"):
        states = base.enc_to_dec_proj(states)
    outputs = BaseModelOutput(
        last_hidden_state=states,
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )
    return outputs, inputs.get("attention_mask") if downsampled is None else downsampled


def shortened_mask(encoder: nn.Module, attention_mask: Tensor, length: int) -> Tensor | None:
    """The mask of an encoder's output ``(B, length)``, from its longer input's mask; ``None`` if it has no rule."""
    if not hasattr(encoder, "_get_feature_vector_attention_mask"):
        return None
    return encoder._get_feature_vector_attention_mask(length, attention_mask)


def run_decoder(base: PreTrainedModel, latent: LatentOutput, inputs: dict):
    """Run the base's decoder over a packed latent, and return the base's output.

    ``inputs`` have the names of an encoder-decoder's ``forward`` (``decoder_input_ids``, ``use_cache``, ...).
    There is no attention mask: masked vectors have a bias of ``-inf``.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if isinstance(base, JOINED):
        inputs = {name.removeprefix("decoder_"): value for name, value in inputs.items()}
        outputs = base.decoder(encoder_hidden_states=latent.last_hidden_state, **inputs, return_dict=True)
        return Seq2SeqLMOutput(
            logits=outputs.logits,
            **{CACHE: outputs.get(CACHE)},
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
    return base(encoder_outputs=latent, **inputs, return_dict=True)


def run_decoder_over_source(base: PreTrainedModel, latent: LatentOutput, inputs: dict):
    """:func:`run_decoder` with the tokens that the base makes from ``input_ids``.

    Raises:
        ValueError: the base cannot make them, so its decoder has nothing to read.
    """
    refusal = base.get_decoder().register_forward_pre_hook(check_decoder_reads, with_kwargs=True)
    try:
        return run_decoder(base, latent, inputs)
    finally:
        refusal.remove()


def drop_words(
    decoder_input_ids: Tensor, share: float, token_id: int | None, generator: torch.Generator | None = None
) -> Tensor:
    """A copy of the decoder's inputs ``(B, Nt)`` where each token but the first becomes ``token_id`` at random.

    ``share`` is the probability. A decoder that cannot read all of its past must read the latent.

    Source: Bowman et al. (CoNLL 2016), section 3.1.
    """
    if token_id is None:
        raise ValueError("word_dropout needs a token that replaces words. Set word_dropout_token_id.")
    dropped = noise(torch.rand, decoder_input_ids.float(), generator) < share
    dropped[:, 0] = False  # the decoder's start token
    return decoder_input_ids.masked_fill(dropped, token_id)


def check_decoder_reads(decoder: nn.Module, args: tuple, inputs: dict) -> None:
    """Raise ValueError for a call of the decoder without tokens: a forward pre-hook, with keywords."""
    if not args and all(inputs.get(name) is None for name in ("input_ids", "inputs_embeds")):
        raise ValueError(NOTHING_TO_READ)


def decoder_positions(base: PreTrainedModel) -> int | None:
    """How many positions the decoder has; ``None`` if they are relative or made as needed."""
    names = ("embed_positions", "position_embeddings", "wpe")
    for name, table in base.get_decoder().named_modules():
        made_as_needed = hasattr(table, "make_weight")
        if name.rsplit(".", 1)[-1] in names and isinstance(table, nn.Embedding) and not made_as_needed:
            # The table's first rows can be unused: an offset in BART, rows up to the padding's in RoBERTa.
            padding = 0 if table.padding_idx is None else table.padding_idx + 1
            # ProphetNet's predicting streams are one position ahead of their token.
            ahead = 1 if hasattr(base.config, "ngram") else 0
            return table.num_embeddings - getattr(table, "offset", padding) - ahead
    return None


def resize_token_embeddings(base: PreTrainedModel, new_num_tokens: int | None, *args, **kwargs) -> nn.Module:
    """Resize the base's embeddings. If a joined encoder and decoder share a vocabulary, both are resized.

    Raises:
        ValueError: the two halves have different vocabularies.
    """
    halves = [base]
    if isinstance(base, JOINED) and new_num_tokens is not None:
        halves = [base.decoder]
        if base.encoder.main_input_name == "input_ids":
            halves = [base.encoder, base.decoder]
            sizes = [half.get_input_embeddings().num_embeddings for half in halves]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"The encoder has a vocabulary of {sizes[0]} tokens and the decoder one of {sizes[1]}. Resize the "
                    "one you mean: model.base.encoder.resize_token_embeddings(n) or "
                    "model.base.decoder.resize_token_embeddings(n)."
                )
    for half in halves:
        embeddings = half.resize_token_embeddings(new_num_tokens, *args, **kwargs)
    return embeddings


def base_class(config: PreTrainedConfig, architecture: str | None = None) -> type[PreTrainedModel]:
    """The class of the encoder-decoder model that a configuration belongs to.

    Raises:
        ValueError: there is no class that generates, or no class with the name ``architecture``.
    """
    if architecture is not None:
        return architecture_class(architecture)
    joined = {model.config_class: model for model in JOINED}
    if type(config) in joined:
        return joined[type(config)]
    for auto in (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError(
        f"A model of type {config.model_type!r} is not an encoder-decoder that generates, so it has no "
        "cross-attention for NVIB. Pass an encoder-decoder (BART, T5, ...), or join an encoder and a decoder with "
        "NvibForConditionalGeneration.from_encoder_decoder_pretrained(encoder, decoder)."
    )


@contextmanager
def damage_explained(name_or_path: object) -> Iterator[None]:
    """If a checkpoint cannot be read, say which one, and what to do."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError) as error:
        raise OSError(
            f"The checkpoint {name_or_path} is damaged ({error}): one of its files was cut short when it was saved, "
            "copied or downloaded. Fetch it again, or use an earlier one."
        ) from error


def load_base(
    name_or_path: str, find: Callable[[PreTrainedConfig], type[PreTrainedModel]] = base_class, **kwargs
) -> PreTrainedModel:
    """Load a pretrained model by name or path; ``kwargs`` go to ``from_pretrained``.

    Args:
        find: returns the class for a configuration; by default an encoder-decoder's.
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
    """Join an encoder and a decoder with cross-attention; ``kwargs`` go to ``from_pretrained`` of both.

    If a pretrained decoder lacks cross-attention, it gets a fresh one. A configuration gives a fresh decoder.
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
    """Take unset start, end and padding tokens of generation from the decoder."""
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


# Inputs


def check_known(arguments: Iterable[str], taker: str, known: Iterable[str] = ()) -> None:
    """Raise TypeError for arguments that are not ``known``, and suggest the nearest name.

    Otherwise a misspelt mask would be ignored silently.
    """
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Leave it out."
            if name in ("merge_share", "merge_cost", "training_merge_share") and STATES in known:  # it has latents
                hint = f"Set model.config.{name}."
            raise TypeError(f"{taker} takes no argument {name!r}. {hint}")
