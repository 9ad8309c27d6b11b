"""What a model is asked for that its base has: the halves of an encoder-decoder, embeddings, methods of its own."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .base import resize_token_embeddings

# What some bases have beside what every PreTrainedModel has; a wrap has it where its base does.
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
        """As of the base; of both halves where an encoder and a decoder were joined that share a vocabulary."""
        return self._resized(resize_token_embeddings(self.base, new_num_tokens, *args, **kwargs))

    @property
    def resize_decoder_token_embeddings(self):
        """Of a Marian whose halves have vocabularies of their own."""
        resize = self.base.resize_decoder_token_embeddings
        return lambda new_num_tokens: self._resized(resize(new_num_tokens))

    def _resized(self, embeddings: nn.Module) -> nn.Module:
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        return embeddings

    @property
    def vocab_size(self) -> int:
        """Of the base, where that keeps it."""
        return self.base.vocab_size
