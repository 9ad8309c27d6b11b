"""What a wrapped model takes from its base: the halves of an encoder-decoder, embeddings, the base's own methods."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.cross_entropy import IGNORED
from .base import resize_token_embeddings

# Attributes that only some bases have. A wrap has an attribute if its base has it.
OF_SOME_BASES = (
    "disable_ngram_loss",
    "encoder_output_dim",
    "freeze_encoder",
    "freeze_feature_encoder",
    "get_mel_conditioner_outputs",
    "max_target_positions",
    "model_dim",
    "model_type",
    "num_experts",
    "num_labels",
    "padding_idx",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "set_lightweight_tuning",
)


def _of_the_base(name: str) -> property:
    return property(lambda model: getattr(model.base, name), doc=f"``{name}`` of the base.")


class OfTheBaseMixin:
    """For a model around a ``base``: attributes that only some bases have."""


for _name in OF_SOME_BASES:
    setattr(OfTheBaseMixin, _name, _of_the_base(_name))


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
        """As in the base. If a joined encoder and decoder share a vocabulary, both are resized."""
        return self._resized(resize_token_embeddings(self.base, new_num_tokens, *args, **kwargs))

    @property
    def resize_decoder_token_embeddings(self):
        """For a Marian model whose halves have their own vocabularies."""
        resize = self.base.resize_decoder_token_embeddings
        return lambda new_num_tokens: self._resized(resize(new_num_tokens))

    def _resized(self, embeddings: nn.Module) -> nn.Module:
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        return embeddings

    @property
    def vocab_size(self) -> int:
        """The base's vocabulary size, if the base has this attribute."""
        return self.base.vocab_size

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's inputs for these labels, by the base's own rule if it has one."""
        if hasattr(self.base, "prepare_decoder_input_ids_from_labels"):
            return self.base.prepare_decoder_input_ids_from_labels(labels)
        start, pad = self.base.config.decoder_start_token_id, self.base.config.pad_token_id
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = start
        return shifted.masked_fill(shifted == IGNORED, pad)
