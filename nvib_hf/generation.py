"""``generate()`` from inputs or from latents: what it overrides of Transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from .base_model import STATES
from .checks import check_batch, check_encoder_outputs, check_latents
from .latent import NvibLatents
from .whisper_generation import generate_as_base, has_prompts


class NvibGenerationMixin(GenerationMixin):
    """Encodes once, drops the vectors that decoding cannot see, and decodes with any strategy."""

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As ``GenerationMixin.generate``; ``encoder_outputs`` may be :class:`~nvib_hf.NvibLatents`.

        Latents are left as they are. From inputs, the posterior is decoded in ``eval()`` and a sample of it in
        ``train()``; likewise from ``encoder_last_hidden_state``, which ``encode`` takes too, with the
        ``attention_mask`` that belongs to it. Whisper generates by its own ``generate()``, with its arguments
        (``language``, ``task``, ``return_timestamps``), unless ``decoder_input_ids`` say what to begin with.
        """
        if kwargs.get(STATES) is not None:
            states = {name: kwargs.pop(name, None) for name in (STATES, "attention_mask")}
            with torch.no_grad():
                latents, _ = self._encode_alone(states, decode_only=True)
            kwargs["encoder_outputs"] = self._packed(latents)
        elif kwargs.get("encoder_outputs") is not None:
            kwargs["encoder_outputs"] = self._packed_encoder_outputs(kwargs["encoder_outputs"])
        if kwargs.get("decoder_input_ids") is None:
            if has_prompts(self.generation_config):
                return generate_as_base(self, inputs, generation_config, **kwargs)
        elif kwargs.get("encoder_outputs") is not None:
            check_batch(kwargs["encoder_outputs"].last_hidden_state, kwargs["decoder_input_ids"])
        return super().generate(inputs, generation_config, **kwargs)

    def _packed_encoder_outputs(self, latents: NvibLatents | BaseModelOutput) -> BaseModelOutput:
        """What decoding reads of the latents. What is packed already is handed on: nothing changes it in place."""
        check_encoder_outputs(latents)
        if not isinstance(latents, NvibLatents):
            return latents
        check_latents(latents, self.nvib)
        return self._packed(latents.compact())

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """What the base's encoder takes is known, too."""
        others = {name: value for name, value in model_kwargs.items() if name not in self._encoder_argument_names}
        super()._validate_model_kwargs(others)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ) -> dict[str, Any]:
        recorded = {
            "output_attentions": generation_config.output_attentions or None,
            "output_hidden_states": generation_config.output_hidden_states or None,
        }
        name = model_input_name or self.main_input_name
        latents, states = self._encode_alone({**model_kwargs, **recorded, name: inputs_tensor}, decode_only=True)
        if model_kwargs.get("decoder_input_ids") is not None:
            check_batch(latents.z, model_kwargs["decoder_input_ids"])
        model_kwargs["encoder_outputs"] = self._packed(latents, states)
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeats all but the latents: the beams of a source share them, and their keys and values."""
        packed = model_kwargs.pop("encoder_outputs")
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "encoder_outputs": packed}

    def _reorder_cache(self, cache, beam_idx):
        """Beams change places among those of their source, whose keys and values they share."""
        cache.self_attention_cache.reorder_cache(beam_idx)
        return cache
