"""What the NVIB layer between encoder and decoder is given: the encoder's vectors, or those of an earlier call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from .base import STATES, check_mask_of_states, check_mask_of_tokens, run_encoder, shortened_mask
from .sound import check_silence_is_stored, hear, heard_before
from .stacked_encoder import check_merges_as_made, check_states_are_whole, left_by_layers


class Source(NamedTuple):
    """Vectors ``(B, Ns, H)`` for the layer, and the encoder's own ``outputs``.

    ``padding`` ``(B, Ns)``, True = no vector. ``log_mass`` ``(B, Ns)`` where some stand for many. The last
    ``num_stored`` ``(B,)`` are not the encoder's. ``share`` ``(B,)``: of the source's length, what ``Ns`` is without
    padding; ``None`` where that is all.
    """

    outputs: BaseModelOutput
    vectors: Tensor
    padding: Tensor | None
    log_mass: Tensor | None = None
    num_stored: Tensor | None = None
    share: Tensor | None = None


def read_source(model, inputs: dict) -> Source:
    """Run the encoder of a model over its inputs, by name, or take its output from them."""
    read = {model._renamed.get(name, name): value for name, value in inputs.items() if value is not None}
    given = {name: value for name, value in read.items() if name in model._encoder_argument_names}
    stacked, states = model._has_stacked_encoder, inputs.get(STATES)
    if not torch.compiler.is_compiling():  # it may have been set since
        check_merges_as_made(model.config.encoder_merge_share, model._made_to_merge)
    if model.config.encode_sound_only:
        check_silence_is_stored(model)
        if states is None:
            heard = hear(model.base, given, model.silence, stacked)
        else:
            check_states_are_whole(stacked)
            heard = heard_before(model.base, states, inputs.get("attention_mask"), model.silence)
        share = None if heard.padding is None else (~heard.padding).sum(-1) / heard.window
        return Source(heard.outputs, heard.vectors, heard.padding, heard.log_mass, heard.num_stored, share)
    if states is None:
        check_mask_of_tokens(given)
        outputs, mask = run_encoder(model.base, given)
    else:
        check_states_are_whole(stacked)
        outputs, mask = BaseModelOutput(last_hidden_state=states), inputs.get("attention_mask")
        if mask is not None:
            check_mask_of_states(model.base, mask, states)
    vectors = outputs.last_hidden_state
    left = left_by_layers(vectors) if stacked else None
    if left is not None:
        share = left.keep.sum(-1) / left.sources.clamp(min=1)  # of the source, not of what its layers left of it
        return Source(outputs, vectors, ~left.keep, left.log_mass, share=share)
    if mask is not None and mask.shape[1] != vectors.shape[1]:
        mask = shortened_mask(model.base.get_encoder(), mask, vectors.shape[1])
    return Source(outputs, vectors, None if mask is None else mask == 0)
