"""The training loss: cross-entropy, and what the latent costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .layers.cross_entropy import IGNORED, cross_entropy

if TYPE_CHECKING:
    from .configuration_nvib import NvibConfig
    from .latents.latents import NvibLatents
    from .wrapping.self_attention import DenoisingSelfAttention, LayerRecord

# What to do if a Trainer's own label smoothing would replace this loss.
SMOOTHING = "Set label_smoothing_factor to 0 in TrainingArguments and use NvibConfig(label_smoothing=...) instead"

# The Trainer has taken the labels out of the inputs.
LABELS_WERE_TAKEN = (
    f"The Trainer took the labels out of the inputs, so its loss would lack the KL terms. {SMOOTHING}. If you use "
    "compute_loss_func, override Trainer.compute_loss instead."
)

TERMS = ("gaussian", "dirichlet", "vectors")  # what ``lambda_*`` weigh, in the order of the model's ``kl_beta``


class Charged(NamedTuple):
    """What the loss charges an example for, ``(B,)`` each: fields of latents by the same names, or means over layers.

    A term that does not exist is ``None``.
    """

    kl_gaussian: Tensor | None
    kl_dirichlet: Tensor | None
    relaxed_prop_vectors: Tensor | None


class LayerTerms(NamedTuple):
    """What the loss charges and the share of vectors kept, ``(B,)`` each, by the names of the NVIB layers.

    Only layers that can drop vectors have ``relaxed_prop_vectors``.
    """

    kl_gaussian: dict[str, Tensor]
    kl_dirichlet: dict[str, Tensor]
    prop_vectors: dict[str, Tensor]
    relaxed_prop_vectors: dict[str, Tensor]


def layer_terms(
    latents: NvibLatents | None,
    attentions: dict[str, DenoisingSelfAttention],
    records: dict[torch.nn.Module, LayerRecord],
    targets: Tensor | None = None,
) -> tuple[LayerTerms, Charged]:
    """What each NVIB layer of a model costs in one pass, and the means over the layers, which the loss charges.

    Args:
        latents: of the layer between the halves, ``"cross"``. Latents that encode no text cost nothing.
        attentions: the self-attentions with NVIB, by the names of their layers.
        records: what the self-attentions recorded in this pass, for each one that ran.
        targets: ``(B, Nt)``, True where a decoder's position has a target; by default True wherever its mask is.
    """
    terms = LayerTerms({}, {}, {}, {})
    for name, module in attentions.items():
        if module not in records:
            continue
        posterior, source_mask, sources = records[module]
        if targets is not None and name.startswith("decoder"):
            source_mask = targets
        if source_mask is not None:
            mask = F.pad(source_mask, (1, 0), value=True)
            posterior = posterior._replace(mask=mask, keep=posterior.keep & mask)
        terms.kl_gaussian[name], terms.kl_dirichlet[name] = module.nvib.kl(posterior, posterior, kappa=1)
        statistics = posterior.statistics()
        share = statistics["prop_vec"] if sources is None else statistics["num_vec"] / sources.clamp(min=1)
        terms.prop_vectors[name] = share
        if (relaxed := module.nvib.relaxed_share(posterior)) is not None:
            terms.relaxed_prop_vectors[name] = relaxed
    if latents is not None and latents.kl_gaussian is not None and latents.kl_dirichlet is not None:
        for field in LayerTerms._fields:
            if (value := getattr(latents, field)) is not None:
                getattr(terms, field)["cross"] = value
    means = {}
    for field in Charged._fields:
        values = list(getattr(terms, field).values())
        means[field] = torch.stack(values).mean(0) if values else None
    return terms, Charged(**means)


def regulariser(charged: Charged, beta: Tensor | None, config: NvibConfig) -> Tensor | None:
    r"""What one target token of an example pays for its latent, ``(B,)``; ``None`` if the latents encode no text.

    .. math::
        k = \beta_G \lambda_G \max(KL_G, f_G) + \beta_D \lambda_D \max(KL_D, f_D) + \beta_V \lambda_V \, \mathrm{share}

    with the free bits :math:`f` and the relaxed share of vectors kept.

    Args:
        charged: the terms. Latents with KLs work too.
        beta: the current multipliers ``(3,)`` of the terms, which a callback moves; ``None`` means 1 each.
        config: the model's configuration, for ``lambda_*`` and ``free_bits_*``.

    Source: Henderson & Fehr (ICLR 2023), section 3.3; free bits, Kingma et al. (NeurIPS 2016), here for each example.
    """
    if charged.kl_gaussian is None or charged.kl_dirichlet is None:
        return None
    weights: list[float] | Tensor = [1.0] * len(TERMS) if beta is None else beta.to(charged.kl_gaussian.dtype)
    total = weights[0] * config.lambda_gaussian * charged.kl_gaussian.clamp(min=config.free_bits_gaussian)
    total = total + weights[1] * config.lambda_dirichlet * charged.kl_dirichlet.clamp(min=config.free_bits_dirichlet)
    if config.lambda_vectors > 0 and charged.relaxed_prop_vectors is not None:
        total = total + weights[2] * config.lambda_vectors * charged.relaxed_prop_vectors
    return total


def nvib_loss(
    logits: Tensor,
    labels: Tensor,
    regularisation: Tensor | None,
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Loss and cross-entropy, both scalars, in nats per target token.

    .. math::
        \frac1N \sum_b \Bigl( \sum_t \mathrm{nll}_{bt} + n_b \, k_b \Bigr)

    An example has :math:`n_b` target tokens; the whole optimisation step has :math:`N`. So the KL's mean weighs
    examples as the cross-entropy does, and the loss of a step is exactly the sum over its micro-batches.

    Args:
        logits: ``(B, Nt, V)``.
        labels: ``(B, Nt)``; -100 is ignored.
        regularisation: ``k``, ``(B,)``, from :func:`regulariser`.
        num_items_in_batch: ``N``; by default the target tokens of this batch. Without any, the loss is 0.
        label_smoothing: smoothing of the cross-entropy's targets.
    """
    labels = labels.to(logits.device)
    nll = cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing)
    tokens = (labels != IGNORED).sum(-1)  # (B,)
    own = tokens.sum().clamp(min=1)
    total = nll if regularisation is None else nll + (tokens * regularisation.to(nll.device)).sum()
    of_step = own if num_items_in_batch is None else count_of_step(num_items_in_batch, nll.device)
    return total / of_step, nll / own


def count_of_step(items: int | Tensor, device: torch.device) -> Tensor:
    """The target tokens of an optimisation step to divide by. It is 1 if there are none: the sum is 0 anyway.

    Raises:
        ValueError: a negative number. A number on a device is not checked: the check would wait for it.
    """
    is_known = not isinstance(items, Tensor) or (items.device.type == "cpu" and not torch.compiler.is_compiling())
    if is_known and not items >= 0:
        raise ValueError(f"num_items_in_batch must be the number of target tokens of the step, but got {items}.")
    return torch.as_tensor(items, device=device).clamp(min=1)
