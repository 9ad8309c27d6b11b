"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput

from .latents.latents import NvibLatents


@dataclass
class NvibSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Output of :class:`NvibForConditionalGeneration`: the fields of a sequence-to-sequence model, and these.

    Args:
        cross_entropy: the reconstruction term of the loss, nats per target token, scalar.
        kl_gaussian, kl_dirichlet: the two KL terms, ``(B,)``, unweighted; means over the NVIB layers.
        num_vectors, prop_vectors, effective_vectors: of the latents, ``(B,)``: source vectors kept, their share of
            the source length, and ``exp(entropy(pi))``.
        layer_kl_gaussian, layer_kl_dirichlet, layer_prop_vectors: the same for each NVIB layer, ``(B,)``, by its name
            (``"cross"``, ``"encoder.0"``, ...); ``None`` if no self-attention has NVIB.
        latents: the decoded :class:`~nvib_hf.NvibLatents`. ``None`` at a step of generation, and with
            ``nn.DataParallel``, which gathers nothing but tensors.

    A graph that ``torch.export`` or ``torch.onnx`` makes without ``labels`` has none of these.
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


@dataclass
class NvibClassifierOutput(ModelOutput):
    """What a classifier with NVIB returns.

    Args:
        loss: with ``labels``: the head's own loss and the weighted KLs.
        logits: of the head: ``(B, C)``, or ``(B, N, C)`` for tokens.
        hidden_states, attentions: of the encoder, if asked for.
        cross_entropy: the head's own loss.
        kl_gaussian, kl_dirichlet: ``(B,)``, unweighted means over the NVIB layers.
        layer_kl_gaussian, layer_kl_dirichlet, layer_prop_vectors: of each layer, ``(B,)``, by its name
            (``"encoder.0"``, ...).

    A graph that is exported without ``labels`` has no KLs.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_entropy: Tensor | None = None
    kl_gaussian: Tensor | None = None
    kl_dirichlet: Tensor | None = None
    layer_kl_gaussian: dict[str, Tensor] | None = None
    layer_kl_dirichlet: dict[str, Tensor] | None = None
    layer_prop_vectors: dict[str, Tensor] | None = None
