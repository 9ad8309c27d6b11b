"""``encode``: an encoder's inputs to latents, and latents to what the decoder reads of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from .base_model import STATES, gathering, run_encoder, source_padding
from .checks import check_known, check_length_is_left, check_states_are_whole
from .latent import NvibLatents
from .outputs import LatentOutput
from .packing import pack
from .posterior import NvibOutput
from .stacked_attention import left_of, shortening


class NvibEncodingMixin:
    """Before ``PreTrainedModel`` and ``NvibLayersMixin``, for a model with ``base``, ``nvib``, ``scale``, ``config``.

    ``_encoder_argument_names`` are those that the base's encoder takes, ``_argument_names`` those of the whole model.
    """

    _encoder_argument_names: frozenset[str]
    _argument_names: frozenset[str]

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        **inputs,
    ) -> NvibLatents:
        """Inputs to latents.

        Args:
            input_ids, attention_mask, inputs: what the base's encoder takes. Or, in place of them, what an earlier
                call of the model returned as ``encoder_last_hidden_state`` ``(B, Ns, H)``, with its mask if it has one
                (``(B, Ns)``, or as the encoder took it): a frozen encoder need not run again.
            sample: draw from the posterior (``kappa`` vectors per component), or take the posterior itself; by
                default as in training or evaluation, whichever mode the model is in. (In the encoder's own attentions
                the mode decides.)
            generator: for the draws.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        self._check_names(inputs)
        return self._encode_alone(inputs, sample, generator)[0]

    def _encode(
        self,
        inputs: dict,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        decode_only: bool = False,
    ) -> tuple[NvibLatents, BaseModelOutput]:
        """Latents, and the encoder's own output; with ``decode_only`` what decoding reads of them, and can see."""
        states, stacked = inputs.get(STATES), self._stacked()
        if states is None:
            for module in self._self_attentions().values():
                module.nvib_generator = generator
            with shortening(stacked, decode_only and not self.training):
                outputs, mask = run_encoder(self.base, self._encoder_arguments(inputs))
        else:
            check_states_are_whole(stacked)
            outputs, mask = BaseModelOutput(last_hidden_state=states), inputs.get("attention_mask")
        left = left_of(stacked)
        if left is None:
            padding = source_padding(self.base.get_encoder(), mask, outputs.last_hidden_state.shape[1])
        else:
            padding, share = left
            check_length_is_left(padding, outputs.last_hidden_state)
        latents = self._latents(self.nvib(outputs.last_hidden_state, padding, sample, generator, decode_only))
        if left is not None and latents.prop_vectors is not None:  # of the source, not of what its layers left of it
            latents.prop_vectors = latents.prop_vectors * share
        if decode_only and latents.logvar is None:  # of a sample, draws decide what there is to see
            latents = latents.compact()
        return latents, outputs

    def _latents(self, output: NvibOutput) -> NvibLatents:
        """Latents of what the layer returned."""
        return NvibLatents.of(output)

    def _encode_alone(self, *args, **kwargs) -> tuple[NvibLatents, BaseModelOutput]:
        """:meth:`_encode` outside of ``forward``."""
        try:
            return gathering(self, "_encode")(*args, **kwargs)
        finally:
            for module in self._self_attentions().values():
                module.nvib_generator = None

    def _encoder_arguments(self, inputs: dict) -> dict:
        return {k: v for k, v in inputs.items() if k in self._encoder_argument_names and v is not None}

    def _check_names(self, inputs: dict) -> None:
        given = [name for name, value in inputs.items() if value is not None]
        check_known(given, type(self).__name__, self._argument_names)

    def _packed(self, latents: NvibLatents, states: BaseModelOutput | None = None) -> LatentOutput:
        """What the decoder reads of latents, in the place of the encoder's output, with its other ``states``."""
        packed = pack(latents.attended(self.scale, self.config.evaluation))
        return (
            LatentOutput(packed) if states is None else LatentOutput(packed, states.hidden_states, states.attentions)
        )
