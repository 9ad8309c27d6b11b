"""Outputs of the model and of its halves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .latent import NvibLatents
from .versions import CACHE


@dataclass
class LatentOutput(BaseModelOutput):
    """A packed latent in the place of an encoder's output.

    Some decoders read more of it than the states: Moonshine its mask, mixtures of experts the encoder's router.
    Masks stand in the latent, so both are ``None``.
    """

    attention_mask: Tensor | None = None
    router_logits: Tensor | None = None


@dataclass
class NvibSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Output of :class:`NvibForConditionalGeneration`: that of a sequence-to-sequence model, and

    Args:
        cross_entropy: the reconstruction term of the loss, nats per target token, scalar.
        kl_gaussian, kl_dirichlet: the two KL terms, ``(B,)``, unweighted.
        num_vectors, prop_vectors, effective_vectors: of the latents, ``(B,)``: source vectors kept, their share of
            the source length, and ``exp(entropy(pi))``.
        latents: the :class:`~nvib_hf.NvibLatents` that were decoded; ``None`` at a step of generation, and from
            ``nn.DataParallel``, which gathers a mapping by what it iterates over.
    """

    cross_entropy: Tensor | None = None
    kl_gaussian: Tensor | None = None
    kl_dirichlet: Tensor | None = None
    num_vectors: Tensor | None = None
    prop_vectors: Tensor | None = None
    effective_vectors: Tensor | None = None
    latents: NvibLatents | None = None


def joined_output(
    outputs: Seq2SeqLMOutput,
    states: BaseModelOutput | None,
    latents: NvibLatents | None,
    loss: Tensor | None,
    cross_entropy: Tensor | None,
    with_latents: bool,
) -> NvibSeq2SeqLMOutput:
    """What the decoder returned, the encoder's ``states`` and what the latents cost, if they were made here."""
    states = BaseModelOutput() if states is None else states
    measured = ("kl_gaussian", "kl_dirichlet", "num_vectors", "prop_vectors", "effective_vectors")
    return NvibSeq2SeqLMOutput(
        loss=loss,
        logits=outputs.logits,
        **{CACHE: outputs.get(CACHE)},
        decoder_hidden_states=outputs.get("decoder_hidden_states"),
        decoder_attentions=outputs.get("decoder_attentions"),
        cross_attentions=outputs.get("cross_attentions"),
        encoder_last_hidden_state=states.last_hidden_state,
        encoder_hidden_states=states.hidden_states,
        encoder_attentions=states.attentions,
        cross_entropy=cross_entropy,
        **{name: None if latents is None else getattr(latents, name) for name in measured},
        latents=latents if with_latents else None,
    )
