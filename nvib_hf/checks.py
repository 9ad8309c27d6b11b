"""What the model refuses, each with what to do instead; its way of the data is in ``encoding.py`` and in the model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .architectures import attention_scale, find_cross_attention
from .attention_module import ConvertedAttention
from .latent import NvibLatents
from .loss import SMOOTHING

if TYPE_CHECKING:
    from .configuration_nvib import NvibConfig

logger = logging.get_logger(__name__)
NOTHING_TO_READ = (
    "The decoder has nothing to read. Pass labels, decoder_input_ids or decoder_inputs_embeds; to write text call "
    "generate()."
)


# Wrapping and loading


def check_base(base: PreTrainedModel) -> None:
    """Raise ValueError unless a model can be wrapped: nothing has been changed by then."""
    check_unwrapped(base)
    find_cross_attention(base)
    if not base.config.is_encoder_decoder or not base.can_generate():
        raise ValueError(
            f"{type(base).__name__} is no encoder-decoder model that generates, so there is nothing to put NVIB "
            "between. Pass a ...ForConditionalGeneration, or join an encoder and a decoder with "
            "NvibForConditionalGeneration.from_encoder_decoder_pretrained(encoder, decoder)."
        )


def check_unwrapped(base: PreTrainedModel) -> None:
    """Raise ValueError for a model that has NVIB in it, or lies on several devices."""
    name = type(base).__name__
    if any(isinstance(module, ConvertedAttention) for module in base.modules()):
        raise ValueError(
            f"{name} is part of an NVIB model already, or one itself. Wrap another base, or call unwrap() on that "
            "model first."
        )
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            f"{name} is spread over several devices by its device_map. Load it on one, wrap it, save it with "
            "save_pretrained, and load that with from_pretrained(..., device_map=...) of the NVIB model."
        )


def check_attentions(attentions: dict | None) -> dict:
    """The attentions of an encoder-decoder, by default the cross-attention; ValueError if they lack that."""
    if attentions is not None and "cross" not in attentions:
        raise ValueError(
            f"attentions are {list(attentions)}, but the latents of an encoder-decoder are what its cross-attention "
            "reads: name 'cross' too. As it is initialised it computes what the base computes."
        )
    return {"cross": "all"} if attentions is None else attentions


def check_one_scale(name: str, cross_attention: list[nn.Module]) -> None:
    """Raise ValueError unless all layers of the model ``name`` have the same scale."""
    scales = {attention_scale(module) for module in cross_attention}
    if len(scales) > 1:
        raise ValueError(
            f"The cross-attention layers of {name} have different scales ({sorted(scales)}), but one latent with one "
            "norm term serves them all. For GPT-2 set scale_attn_by_inverse_layer_idx=False."
        )


def check_name_to_load(name: object, state_dict: dict | None) -> None:
    """Raise ValueError where there is nothing to load from."""
    if name is None and state_dict is None:
        raise ValueError(
            "There is no name to load an NVIB model by. If this is for an adapter, the model had not been saved "
            "when that was put on it: wrap the base again and call PeftModel.from_pretrained(model, adapter)."
        )


def check_nothing_is_missing(name: object, missing: Iterable[str]) -> None:
    """Raise OSError for a checkpoint that lacks weights."""
    if missing := sorted(missing):
        raise OSError(
            f"The checkpoint {name} lacks {len(missing)} of the model's weights "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Fetch it again, or pass "
            "ignore_mismatched_sizes=True to start those weights afresh."
        )


# Inputs


def check_known(arguments: Iterable[str], taker: str, known: Iterable[str] = ()) -> None:
    """Raise TypeError for arguments that are not ``known``, with the nearest name; else a mask misspelt is none."""
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Leave it out."
            raise TypeError(f"{taker} takes no argument {name!r}. {hint}")


def check_labels_were_left(labels: Tensor | None, num_items_in_batch: int | Tensor | None) -> None:
    """Raise ValueError where the Trainer has taken the labels to compute the loss itself."""
    if labels is None and num_items_in_batch is not None:
        raise ValueError(
            f"The Trainer took the labels out of the inputs, so its loss would lack the KL terms. {SMOOTHING}; "
            "in place of a compute_loss_func, override Trainer.compute_loss."
        )


def check_positions(name: str, tokens: Tensor | None, positions: int | None) -> None:
    """Raise ValueError for more tokens than the decoder has positions."""
    if tokens is not None and positions is not None and tokens.shape[-1] > positions:
        raise ValueError(
            f"{name} are {tokens.shape[-1]} tokens long, but the decoder has {positions} positions. Truncate "
            f"them: tokenizer(..., max_length={positions}, truncation=True)."
        )


def check_decoder_reads(decoder: nn.Module, args: tuple, inputs: dict) -> None:
    """Raise ValueError for a call of the decoder without tokens: a forward pre-hook, with keywords."""
    if not args and all(inputs.get(name) is None for name in ("input_ids", "inputs_embeds")):
        raise ValueError(NOTHING_TO_READ)


def warn_of_a_loss_without_terms(config: NvibConfig) -> None:
    """Say once that a training's loss, made elsewhere of the logits, lacks the KLs that are weighed."""
    if max(config.lambda_gaussian, config.lambda_dirichlet, config.lambda_vectors) > 0:
        logger.warning_once(
            "A training pass got no labels, so the KLs are in no loss: label_smoothing_factor and compute_loss_func "
            "of a Trainer take the labels away. Leave them out, or add the output's kl_gaussian and kl_dirichlet to "
            "your loss."
        )


def check_replacement(token_id: int | None) -> None:
    """Raise ValueError unless there is a token to put in place of words."""
    if token_id is None:
        raise ValueError("word_dropout needs a token in place of words: set word_dropout_token_id.")


def check_states_are_whole(stacked: list) -> None:
    """Raise ValueError for an encoder's output in place of its inputs where its layers hand on what they dropped."""
    if stacked:
        raise ValueError(
            "encoder_last_hidden_state does not say what this encoder's layers dropped. Pass the inputs, or latents "
            "as encoder_outputs."
        )


def check_length_is_left(gone: Tensor, states: Tensor) -> None:
    """Raise ValueError where an encoder changes the length after the layers that drop vectors."""
    if gone.shape[1] != states.shape[1]:
        raise ValueError(
            f"The encoder's layers leave {gone.shape[1]} vectors, of which it makes {states.shape[1]}, so that nobody "
            "knows which are dropped. Leave 'encoder' out of attentions."
        )


# Latents


def check_batch(packed: Tensor, decoder_inputs: Tensor) -> None:
    """Raise ValueError unless there is a latent for every row: one would be broadcast to all without a word."""
    if len(packed) != len(decoder_inputs):
        raise ValueError(
            f"There are {len(packed)} latents but {len(decoder_inputs)} decoder inputs. Pass one latent for each "
            "row of labels or decoder_input_ids: latents[[0] * n] repeats the first n times."
        )


def check_latents(latents: NvibLatents, layer: nn.Module) -> None:
    """Raise ValueError unless latents can be those of a model with this NVIB layer."""
    if latents.z.shape[-1] != layer.size_out:
        raise ValueError(
            f"The latents are {latents.z.shape[-1]} wide, but this model's are {layer.size_out}: they come "
            "from another model. Encode the texts with this one."
        )
    shapes = {name: tuple(x.shape) for name, x in latents.items() if name in ("z", "logvar", "log_pi")}
    if shapes["log_pi"] != shapes["z"][:2] or shapes.get("logvar", shapes["z"]) != shapes["z"]:
        raise ValueError(
            f"The latents' fields do not belong together: {shapes}. z and logvar are (B, Nl, P), log_pi (B, Nl)."
        )
    if latents.kappa is not None and (latents.kappa != layer.kappa).any():
        raise ValueError(
            f"The latents were drawn with kappa={latents.kappa.unique().tolist()}, but this model has kappa="
            f"{layer.kappa}: they come from another model. Encode the texts with this one."
        )


def check_encoder_outputs(given: object) -> None:
    """Raise TypeError for what ``generate()`` cannot decode."""
    if not isinstance(given, (NvibLatents, BaseModelOutput)):
        raise TypeError(
            f"encoder_outputs must be latents, but got {type(given).__name__}. Pass what encode(), "
            "sample_latents(), interpolate_latents() or concatenate_latents([...]) returned."
        )


def check_counts(num_samples: int, num_vectors: int | Sequence[int] | Tensor, counts: Tensor) -> None:
    """Raise ValueError for numbers of latents or of their vectors, as given and as a tensor, that nothing can have."""
    if num_samples != int(num_samples) or num_samples < 1:
        raise ValueError(f"num_samples must be a whole number of at least 1, but got {num_samples}.")
    if counts.is_floating_point() or (counts < 1).any():
        raise ValueError(f"num_vectors must be whole numbers of at least 1, but got {num_vectors}.")
    if counts.dim() > 1 or (counts.dim() == 1 and len(counts) != num_samples):
        raise ValueError(
            f"num_vectors must be one number or one for each of num_samples={num_samples}, but got {num_vectors}."
        )
