"""``generate()`` from inputs or from latents."""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from .latent import NvibLatents


class NvibGenerationMixin(GenerationMixin):
    """Encodes once, drops the vectors that decoding cannot see, and decodes with any strategy."""

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As ``GenerationMixin.generate``; ``encoder_outputs`` may be :class:`~nvib_hf.NvibLatents`.

        Latents are left as they are. From inputs, the posterior is decoded in ``eval()`` and a sample of it in
        ``train()``.
        """
        if kwargs.get("encoder_outputs") is not None:
            kwargs["encoder_outputs"] = self._packed_encoder_outputs(kwargs["encoder_outputs"])
        return super().generate(inputs, generation_config, **kwargs)

    def _packed_encoder_outputs(self, latents: NvibLatents | BaseModelOutput) -> BaseModelOutput:
        """A new object each time: beam search repeats what it is given in place."""
        if isinstance(latents, NvibLatents):
            return BaseModelOutput(last_hidden_state=self._pack(latents.compact()))
        return BaseModelOutput(**latents)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ) -> dict[str, Any]:
        recorded = {
            "output_attentions": generation_config.output_attentions,
            "output_hidden_states": generation_config.output_hidden_states,
        }
        name = model_input_name or self.main_input_name
        latents, states = self._encode({**model_kwargs, **recorded, name: inputs_tensor})
        packed = self._packed_encoder_outputs(latents)
        packed.hidden_states, packed.attentions = states.hidden_states, states.attentions
        model_kwargs["encoder_outputs"] = packed
        return model_kwargs
