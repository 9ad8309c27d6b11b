"""Outputs of the model and of its halves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .latent import NvibLatents


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


# What the output repeats of the latents.
MEASURED = ("kl_gaussian", "kl_dirichlet", "num_vectors", "prop_vectors", "effective_vectors")
