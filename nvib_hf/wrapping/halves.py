"""The halves of an encoder-decoder base and its embeddings, as Transformers asks a model for them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.cross_entropy import IGNORED
from .base import resize_token_embeddings


class BaseHalvesMixin:
    """For a model around an encoder-decoder ``base``."""

    base: PreTrainedModel

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.base.get_encoder() if modality is None else self.base.get_encoder(modality=modality)

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As of the base; of both halves where an encoder and a decoder were joined that share a vocabulary."""
        embeddings = resize_token_embeddings(self.base, new_num_tokens, *args, **kwargs)
        self.vocab_size = embeddings.num_embeddings
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        return embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's inputs for these labels: the base's own rule where it has one."""
        if hasattr(self.base, "prepare_decoder_input_ids_from_labels"):
            return self.base.prepare_decoder_input_ids_from_labels(labels)
        start, pad = self.base.config.decoder_start_token_id, self.base.config.pad_token_id
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = start
        return shifted.masked_fill(shifted == IGNORED, pad)
