r"""Latents in fewer vectors: what is close is merged, with the mass of all.

The mass of a vector is what attention reads beside its direction, :math:`w_j = e^{b_j}`, with the key bias
:math:`b_j` of the evaluation (:mod:`nvib_hf.layers.denoising_attention`). After merging, :math:`\log\pi` is what gives
each merged vector the mass of all that it stands for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layers.exporting import check_not_exporting
from ..layers.merging import Limit, merge
from ..layers.settings import checked
from .latents import NvibLatents

if TYPE_CHECKING:
    from ..configuration_nvib import NvibConfig

UNTRACEABLE = (
    "how often vectors are merged depends on them, so that no graph holds it. Compile with fullgraph=False, or set "
    "merge_share=1"
)


@torch.compiler.disable(reason=UNTRACEABLE)  # type: ignore[untyped-decorator]
def merged(
    latents: NvibLatents,
    scale: float,
    evaluation: str,
    *,
    num_vectors: int | Sequence[int] | Tensor | None = None,
    share: Limit | None = None,
    cost: Limit | None = None,
    order: str = "neighbours",
    first: int | None = None,
    last: int = 0,
) -> NvibLatents:
    r"""Latents of which each row is merged by :func:`~nvib_hf.layers.merging.merge`.

    .. math:: \log \pi_C = \log \sum_{j \in C} e^{b_j} - b(m, v)

    with :math:`b(m, v)` the bias of the merged vector at :math:`\log\pi = 0`; then all weights of a row are multiplied
    by one number, so that they sum to what they did.

    Args:
        latents: a posterior, whose spread is added to the variances, or a sample.
        scale: the attention's scale ``s``.
        evaluation: ``"means"`` or ``"mixture"``: by which the masses are read.
        num_vectors, share, cost, order: as :func:`~nvib_hf.layers.merging.merge` takes them.
        first, last: how many vectors at the beginning and at the end are never merged, nor counted as what may be;
            by default those of the prior's component, where there is one, and none.

    Returns:
        Latents without padding between vectors and without what was dropped. The KLs are what they were. Counts are of
        merged vectors. Pseudo-counts keep their sum, in the ratios of the weights.
    """
    check_not_exporting("Merging", "Export with model.config.merge_share = 1.")
    if first is None:
        first = 0 if latents.log_alpha is None else 1 if latents.kappa is None else int(latents.kappa[0])
    place = torch.arange(latents.z.shape[1], device=latents.device)
    fixed = (place < first) | (place >= len(place) - last)
    before = latents.log_pi > float("-inf")
    own = _bias_without_weight(latents, scale, evaluation)
    made = merge(
        latents.z,
        latents.log_pi + own,
        num_vectors=num_vectors,
        share=share,
        cost=cost,
        logvar=latents.logvar,
        fixed=fixed.expand(latents.log_pi.shape),
        order=order,
    )
    there = made.counts > 0
    result = NvibLatents(made.z, made.log_mass, there, made.logvar)
    log_pi = made.log_mass - _bias_without_weight(result, scale, evaluation)
    result.log_pi = log_pi.log_softmax(-1) + latents.log_pi.logsumexp(-1, keepdim=True)
    for name in ("kl_gaussian", "kl_dirichlet", "relaxed_prop_vectors", "kappa", "scale"):
        setattr(result, name, getattr(latents, name))
    if latents.log_alpha is not None:
        alphas = latents.log_alpha.masked_fill(~before, float("-inf")).logsumexp(-1, keepdim=True)
        result.log_alpha = result.log_pi.log_softmax(-1) + alphas
    if latents.num_vectors is not None and latents.prop_vectors is not None:
        old, new = ((x.sum(-1) - first).float() for x in (before, there))
        result.num_vectors = new / (1 if latents.kappa is None else latents.kappa)
        result.prop_vectors = latents.prop_vectors * new / old.clamp(min=1)
        weights = result.log_pi.detach().softmax(-1)
        result.effective_vectors = torch.special.entr(weights).sum(-1).exp()
    return result


def _bias_without_weight(latents: NvibLatents, scale: float, evaluation: str) -> Tensor:
    """The bias ``(B, Nl)`` that attention reads of vectors of weight 1."""
    return dataclasses.replace(latents, log_pi=torch.zeros_like(latents.log_pi)).attended(scale, evaluation).bias


# The share of a call of encode() or generate(), wherever in it something is encoded: Whisper's generate() does often.
_SHARE: ContextVar[float | None] = ContextVar("nvib_merge_share", default=None)


@contextmanager
def sharing(share: float | None) -> Iterator[None]:
    """Everything that is encoded inside is merged to this share; ``None`` leaves it to the configuration.

    Raises:
        ValueError: a share outside (0, 1]. TypeError: it is not one number.
    """
    token = _SHARE.set(_SHARE.get() if share is None else checked("merge_share", share))
    try:
        yield
    finally:
        _SHARE.reset(token)


def merge_share_of(config: NvibConfig) -> float:
    """To which share of their vectors latents are merged now."""
    share = None if torch.compiler.is_compiling() else _SHARE.get()
    return config.merge_share if share is None else share
