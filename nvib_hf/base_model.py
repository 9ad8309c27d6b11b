"""What NVIB needs to know of the model it wraps: how to run its encoder and its decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderModel, PreTrainedModel, SpeechEncoderDecoderModel, VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .checks import check_decoder_reads
from .distributions import noise
from .loss import IGNORED
from .outputs import LatentOutput
from .versions import CACHE, installed_and_tested

# What stands for the encoder's inputs: its output.
STATES = "encoder_last_hidden_state"

# Their decoder is a causal model of its own, which is called directly: the projection between the two must see the
# encoder's states, not the latent.
JOINED = (EncoderDecoderModel, SpeechEncoderDecoderModel, VisionEncoderDecoderModel)


def check_decoder_call(base: PreTrainedModel, cached: bool) -> None:
    """Raise ValueError unless the base takes by name what :func:`run_decoder` hands it."""
    if isinstance(base, JOINED):
        called, needed = base.decoder, {"input_ids", "encoder_hidden_states"}
    else:
        called, needed = base, {"decoder_input_ids", "encoder_outputs"}
    if cached:
        needed.add(CACHE)
    if missing := needed - argument_names(called.forward):
        raise ValueError(
            f"{type(called).__name__}.forward takes no argument {' or '.join(map(repr, sorted(missing)))}, by which "
            f"NVIB hands it the latent and the cache. {installed_and_tested()}. Install a tested version."
        )


def freeze_unused(base: PreTrainedModel) -> None:
    """Take parameters that no encoder-decoder uses out of training: distributed training trips over them."""
    pooler = getattr(base.get_encoder(), "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)


def argument_names(forward) -> frozenset[str]:
    """The names of a function's arguments."""
    return frozenset(inspect.signature(forward).parameters)


def gathering(model: nn.Module, name: str) -> Callable:
    """A method of a model that is called outside of ``forward``, for which FSDP2 gathers parameters only if told."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if isinstance(model, FSDPModule):
            gathered = f"{name}_gathered"
            if gathered not in vars(model):
                setattr(model, gathered, getattr(model, name))
                register_fsdp_forward_method(model, gathered)
            return getattr(model, gathered)
    return getattr(model, name)


def run_encoder(base: PreTrainedModel, inputs: dict) -> tuple[BaseModelOutput, Tensor | None]:
    """The encoder's output, projected to the decoder's width, and its mask or that of its inputs, or ``None``.

    ``inputs`` are the encoder's, by name. :func:`source_padding` makes of the mask where the output is padding.
    """
    encoder = base.get_encoder()
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


def source_padding(encoder: nn.Module, attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Where the encoder's output is padding, ``(B, Ns)``: downsampled where the encoder shortens its input."""
    if attention_mask is None:
        return None
    if attention_mask.shape[1] != length:
        if not hasattr(encoder, "_get_feature_vector_attention_mask"):
            return None
        attention_mask = encoder._get_feature_vector_attention_mask(length, attention_mask)
    return attention_mask == 0


def run_decoder(base: PreTrainedModel, latent: LatentOutput, inputs: dict):
    """Logits of the base's decoder over a packed latent, as the base's output.

    ``inputs`` are named as in an encoder-decoder's ``forward`` (``decoder_input_ids``, ``use_cache``, ...).
    No attention mask is passed: masked vectors carry a bias of ``-inf``.
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
    """:func:`run_decoder`, its tokens being what the base makes of ``input_ids``.

    Raises:
        ValueError: the base has no rule for that, so its decoder has nothing to read.
    """
    refusal = base.get_decoder().register_forward_pre_hook(check_decoder_reads, with_kwargs=True)
    try:
        return run_decoder(base, latent, inputs)
    finally:
        refusal.remove()


def shift_right(base: PreTrainedModel, labels: Tensor) -> Tensor:
    """The decoder's inputs for these labels: the base's own rule where it has one."""
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return base.prepare_decoder_input_ids_from_labels(labels)
    start, pad = base.config.decoder_start_token_id, base.config.pad_token_id
    shifted = labels.roll(1, dims=-1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, pad)


def drop_words(
    decoder_input_ids: Tensor, share: float, token_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """A copy of the decoder's inputs ``(B, Nt)`` in which each token but the first is ``token_id`` with that chance.

    A decoder that cannot read all of its own past has to ask the latent.

    Source: Bowman et al. (CoNLL 2016), section 3.1.
    """
    dropped = noise(torch.rand, decoder_input_ids.float(), generator) < share
    dropped[:, 0] = False  # what the decoder starts with
    return decoder_input_ids.masked_fill(dropped, token_id)


def decoder_positions(base: PreTrainedModel) -> int | None:
    """How many tokens the decoder has positions for; ``None`` where they are relative or made as needed."""
    names = ("embed_positions", "position_embeddings", "wpe")
    for name, table in base.get_decoder().named_modules():
        made_as_needed = hasattr(table, "make_weight")
        if name.rsplit(".", 1)[-1] in names and isinstance(table, nn.Embedding) and not made_as_needed:
            # The first rows may be left out: by an offset in BART, up to the padding's own in RoBERTa.
            padding = 0 if table.padding_idx is None else table.padding_idx + 1
            # ProphetNet's predicting streams stand one position further than their token.
            ahead = 1 if hasattr(base.config, "ngram") else 0
            return table.num_embeddings - getattr(table, "offset", padding) - ahead
    return None


def joined_vocabularies(base: PreTrainedModel) -> list[PreTrainedModel]:
    """The halves of a joined model that share a vocabulary: the decoder, and an encoder of text as large."""
    if base.encoder.main_input_name != "input_ids":
        return [base.decoder]
    sizes = [half.get_input_embeddings().num_embeddings for half in (base.encoder, base.decoder)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The encoder has a vocabulary of {sizes[0]} tokens and the decoder one of {sizes[1]}. Resize the one "
            "you mean: model.base.encoder.resize_token_embeddings(n) or model.base.decoder.resize_token_embeddings(n)."
        )
    return [base.encoder, base.decoder]
