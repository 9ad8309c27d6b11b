"""Outputs of the model and of its halves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .latent import NvibLatents
from .layer_terms import LayerTerms
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
        kl_gaussian, kl_dirichlet: the two KL terms, ``(B,)``, unweighted; means over the NVIB layers.
        num_vectors, prop_vectors, effective_vectors: of the latents, ``(B,)``: source vectors kept, their share of
            the source length, and ``exp(entropy(pi))``.
        layer_kl_gaussian, layer_kl_dirichlet, layer_prop_vectors: of each NVIB layer, ``(B,)``, by its name
            (``"cross"``, ``"encoder.0"``, ...); ``None`` where self-attention has none.
        latents: the :class:`~nvib_hf.NvibLatents` that were decoded; ``None`` at a step of generation, and from
            ``nn.DataParallel``, which gathers a mapping by what it iterates over.
    """

    cross_entropy: Tensor | None = None
    kl_gaussian: Tensor | None = None
    kl_dirichlet: Tensor | None = None
    num_vectors: Tensor | None = None
    prop_vectors: Tensor | None = None
    effective_vectors: Tensor | None = None
    layer_kl_gaussian: dict[str, Tensor] | None = None
    layer_kl_dirichlet: dict[str, Tensor] | None = None
    layer_prop_vectors: dict[str, Tensor] | None = None
    latents: NvibLatents | None = None


def joined_output(
    outputs: Seq2SeqLMOutput,
    states: BaseModelOutput | None,
    latents: NvibLatents | None,
    terms: LayerTerms,
    loss: Tensor | None,
    cross_entropy: Tensor | None,
    with_latents: bool,
) -> NvibSeq2SeqLMOutput:
    """What the decoder returned, the encoder's ``states``, and what the layers cost if they ran here."""
    states = BaseModelOutput() if states is None else states
    measured = ("num_vectors", "prop_vectors", "effective_vectors")
    charged, of_layers = terms.charged(), {}
    if set(terms.kl_gaussian) - {"cross"}:
        names = ("kl_gaussian", "kl_dirichlet", "prop_vectors")
        of_layers = {f"layer_{name}": getattr(terms, name) for name in names}
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
        kl_gaussian=charged.kl_gaussian,
        kl_dirichlet=charged.kl_dirichlet,
        **{name: None if latents is None else getattr(latents, name) for name in measured},
        **of_layers,
        latents=latents if with_latents else None,
    )
