"""Whisper's own ``generate()`` over latents: languages and tasks, timestamps, recordings of any length.

It is a loop around plain generation that a class of Transformers brings along. Here the base runs it, as a view of
itself in which the encoder's output is a latent.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .outputs import LatentOutput


def has_prompts(generation_config: GenerationConfig) -> bool:
    """Whether a model of this configuration is told by tokens what to write: Whisper's checkpoints are."""
    return getattr(generation_config, "no_timestamps_token_id", None) is not None


class LatentView:
    """Mixed in before a base's own class by :func:`view_of_base`: what it encodes and runs is the NVIB model."""

    def __call__(self, *args, encoder_outputs=None, input_features=None, **kwargs):
        if encoder_outputs is None and self.packed is not None:  # asked for a language, outside of plain generation
            encoder_outputs, input_features = self._of_rows(input_features), None
        source = {"encoder_outputs": encoder_outputs, "input_features": input_features}
        return self.model_of_latents(*args, **source, **kwargs)

    def get_compiled_call(self, *args, **kwargs):
        return self.model_of_latents.get_compiled_call(*args, **kwargs)

    def _of_rows(self, sound: Tensor) -> LatentOutput:
        """The latents of the rows that are left: each value of the sound that stands for them is a row's number."""
        return LatentOutput(self.packed.last_hidden_state[sound[:, 0, 0].long()])

    def _prepare_text_encoder_decoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        if self.packed is not None:
            return {**model_kwargs, "encoder_outputs": self._of_rows(inputs_tensor)}
        prepare = self.model_of_latents._prepare_text_encoder_decoder_kwargs_for_generation
        return prepare(inputs_tensor, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, *args, **kwargs):
        return self.model_of_latents._expand_inputs_for_generation(*args, **kwargs)

    def _reorder_cache(self, *args, **kwargs):
        return self.model_of_latents._reorder_cache(*args, **kwargs)


@functools.cache
def _view_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(base.__name__, (LatentView, base), {"__module__": base.__module__})


def view_of_base(model, packed: LatentOutput | None = None) -> PreTrainedModel:
    """The base of an NVIB model, of the same parameters, that generates from latents; the base is left as it is.

    Args:
        packed: latents in place of those of its inputs.
    """
    view = copy.copy(model.base)
    view.__class__ = _view_class(type(model.base))
    # Beside the modules: the base has not got the model in it.
    vars(view).update(model_of_latents=model, packed=packed, generation_config=model.generation_config)
    return view


def generate_as_base(model, inputs=None, generation_config: GenerationConfig | None = None, **kwargs):
    """``generate()`` of the base's own class over the latents of ``model``.

    Latents, packed as ``encoder_outputs``, are of one window of sound, which is written in one go.

    Raises:
        ValueError: ``return_token_timestamps``, which are read off attention to all frames of the sound.
    """
    if kwargs.get("return_token_timestamps"):
        raise ValueError(
            "return_token_timestamps=True reads times off cross-attention to every frame, which a latent lacks. Pass "
            "return_timestamps=True for the times of segments."
        )
    packed = kwargs.pop("encoder_outputs", None)
    if packed is not None:
        config, latents = model.base.config, packed.last_hidden_state
        # What Whisper measures the sound by, and takes rows out of: a window of it.
        rows = torch.arange(len(latents), device=latents.device, dtype=torch.float32)
        inputs = rows[:, None, None].expand(-1, config.num_mel_bins, 2 * config.max_source_positions)
        kwargs.pop("input_features", None)
        kwargs["force_unique_generate_call"] = True
    given = () if inputs is None else (inputs,)
    return view_of_base(model, packed).generate(*given, generation_config=generation_config, **kwargs)
