"""Word dropout: a decoder that cannot read all of its own past has to ask the latent."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributions import noise


def drop_words(
    decoder_input_ids: Tensor, share: float, token_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """A copy of the decoder's inputs ``(B, Nt)`` in which each token but the first is ``token_id`` with that chance.

    Source: Bowman et al. (CoNLL 2016), section 3.1.
    """
    dropped = noise(torch.rand, decoder_input_ids.float(), generator) < share
    dropped[:, 0] = False  # what the decoder starts with
    return decoder_input_ids.masked_fill(dropped, token_id)
