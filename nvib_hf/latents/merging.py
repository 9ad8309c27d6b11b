r"""Latents with fewer vectors: close vectors are merged into one, which has the mass of all.

Attention reads the direction of a vector and its mass :math:`w_j = e^{b_j}`, with the key bias :math:`b_j` of the
evaluation (:mod:`nvib_hf.layers.denoising_attention`). After merging, :math:`\log\pi` gives each merged vector the
mass of all the vectors that it replaces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..layers.exporting import check_not_exporting
from ..layers.merging import Groups, Limit, assign, reduced
from ..layers.settings import check_one_limit, checked
from .latents import NvibLatents

if TYPE_CHECKING:
    from ..configuration_nvib import NvibConfig
    from ..layers.distributions import NvibOutput

logger = logging.get_logger(__name__)

UNTRACEABLE = (
    "the number of merges depends on the vectors, so one graph cannot hold them. Compile with fullgraph=False, or set "
    "merge_share=1, merge_cost=0 and training_merge_share=1"
)


def merged(latents: NvibLatents, scale: float, evaluation: str, **how: Any) -> NvibLatents:
    """The latents of :func:`merged_groups`, whose arguments these are."""
    fewer: NvibLatents = merged_groups(latents, scale, evaluation, **how)[0]
    return fewer


@torch.compiler.disable(reason=UNTRACEABLE)  # type: ignore[untyped-decorator]
def merged_groups(
    latents: NvibLatents,
    scale: float,
    evaluation: str,
    *,
    num_vectors: int | Sequence[int] | Tensor | None = None,
    share: Limit | None = None,
    cost: Limit | None = None,
    order: str = "neighbours",
    first: int | None = None,
    posterior: NvibLatents | None = None,
) -> tuple[NvibLatents, Groups]:
    r"""Each latent of a batch, merged by :func:`~nvib_hf.layers.merging.merge`.

    .. math:: \log \pi_C = \log \sum_{j \in C} e^{b_j} - b(m, v)

    where :math:`b(m, v)` is the bias of the merged vector at :math:`\log\pi = 0`. Then all weights of a latent are
    multiplied by one number, so that their sum does not change.

    Args:
        latents: a posterior or a sample. A posterior's variances grow by the spread of the merged vectors.
        scale: the attention's scale ``s``.
        evaluation: ``"means"`` or ``"mixture"``: how attention reads the masses.
        num_vectors, share, cost, order: as in :func:`~nvib_hf.layers.merging.merge`.
        first: how many vectors at the beginning are neither merged nor counted: by default the prior's component, if
            there is one. Nor are the last ``num_stored`` of the latents.
        posterior: what a sample was drawn from. It then decides which vectors are merged, so that training merges
            what evaluation does: the noise of draws would hide which vectors are close. ``first`` is of its vectors.
            Of several draws, the first ones of a group are merged, the second ones, and so on.

    Returns:
        Latents without dropped vectors, and without padding between vectors. The KLs do not change. Counts are of
        merged vectors. Pseudo-counts keep their sum, and have the ratios of the weights. And which were merged. A
        latent with a NaN that attention would read is NaN, as it is without merging.
    """
    check_not_exporting(
        "Merging", "Export with model.config.merge_share = 1 and merge_cost = 0, and no such arguments."
    )
    if first is None:
        first = 0 if latents.log_alpha is None else 1 if latents.kappa is None else int(latents.kappa[0])
    chosen_by = latents if posterior is None else posterior
    place = torch.arange(chosen_by.z.shape[1], device=latents.device)
    draws = 1 if posterior is not None or latents.kappa is None else latents.kappa  # of each of its vectors
    stored = None if latents.num_stored is None else latents.num_stored * draws
    fixed = (place < first) | _is_last(chosen_by.log_pi, stored)
    before = latents.log_pi > float("-inf")
    assignment = assign(
        chosen_by.z,
        chosen_by.log_pi + _bias_without_weight(chosen_by, scale, evaluation),
        num_vectors,
        share,
        cost,
        chosen_by.logvar,
        fixed,
        order,
    )
    if (kappa := latents.z.shape[1] // len(place)) > 1:
        draw = torch.arange(kappa, device=latents.device).repeat(len(place))
        assignment = assignment.repeat_interleave(kappa, dim=1)
        assignment = torch.where(assignment < 0, -1, kappa * assignment + draw)
    log_mass = latents.log_pi + _bias_without_weight(latents, scale, evaluation)
    made = reduced(latents.z, log_mass, latents.logvar, assignment)
    there = made.counts > 0
    broken = log_mass.isnan().any(-1, keepdim=True)
    result = NvibLatents(made.z, made.log_mass.masked_fill(broken, math.nan), there, made.logvar)
    log_pi = made.log_mass - _bias_without_weight(result, scale, evaluation)
    result.log_pi = log_pi.log_softmax(-1) + latents.log_pi.logsumexp(-1, keepdim=True)
    for name in ("kl_gaussian", "kl_dirichlet", "relaxed_prop_vectors", "kappa", "scale", "num_stored"):
        setattr(result, name, getattr(latents, name))
    if latents.log_alpha is not None:
        alphas = latents.log_alpha.masked_fill(~before, float("-inf")).logsumexp(-1, keepdim=True)
        result.log_alpha = result.log_pi.log_softmax(-1) + alphas
    if latents.num_vectors is not None and latents.prop_vectors is not None:
        old, new = ((x.sum(-1) - kappa * first).float() for x in (before, there))
        result.num_vectors = new / (1 if latents.kappa is None else latents.kappa)
        result.prop_vectors = latents.prop_vectors * new / old.clamp(min=1)
        weights = result.log_pi.detach().softmax(-1)
        result.effective_vectors = torch.special.entr(weights).sum(-1).exp()
    return result, Groups(assignment, log_mass)


@torch.compiler.disable(reason=UNTRACEABLE)  # type: ignore[untyped-decorator]
def merged_so_far(
    latents: NvibLatents,
    scale: float,
    evaluation: str,
    limit: dict[str, float | Tensor],
    posterior: NvibLatents | None,
) -> tuple[NvibLatents, Groups]:
    """:func:`merged_groups` by a limit of :func:`merge_limit`.

    Warns once if a cost merges all vectors of an input into one.
    """
    fewer, groups = merged_groups(latents, scale, evaluation, **limit, first=1, posterior=posterior)
    if (cost := limit.get("cost")) is not None:
        given = latents if posterior is None else posterior
        draws = latents.z.shape[1] // given.z.shape[1]
        there = given.log_pi > float("-inf"), fewer.log_pi[:, ::draws] > float("-inf")
        stored = 0 if latents.num_stored is None else latents.num_stored
        before, after = (x.sum(-1) - 1 - stored for x in there)
        if ((before > 1) & (after == 1)).any():
            logger.warning_once(
                f"merge_cost={cost} merges all vectors of an input into one. Costs have the scale of the model's "
                "vectors. To find one, see how many vectors some leave: for cost in (0.001, 0.01, 0.1, 1, 10, 100): "
                "print(cost, model.merge_latents(latents, cost=cost).num_vectors)."
            )
    return fewer, groups


def posterior_of(made: NvibOutput | NvibLatents) -> NvibLatents | None:
    """What a sample of an NVIB layer was drawn from: what it dropped is dropped. ``None`` if it is no sample."""
    if isinstance(made, NvibLatents) or made.kappa is None:
        return None
    given = made.posterior
    there = made.log_pi[:, :: made.kappa] > float("-inf")
    log_pi = given.log_alpha.masked_fill(~there, float("-inf")).log_softmax(-1)
    return NvibLatents(given.mu, log_pi, given.mask, given.logvar)


def _is_last(log_pi: Tensor, number: Tensor | None) -> Tensor:
    """True for the last ``number`` ``(B,)`` of the vectors that there are, ``(B, Nl)``; for none with ``None``."""
    there = log_pi > float("-inf")
    return there & (there.flip(-1).cumsum(-1).flip(-1) <= (0 if number is None else number[:, None]))


def _bias_without_weight(latents: NvibLatents, scale: float, evaluation: str) -> Tensor:
    """The key bias ``(B, Nl)`` of vectors with weight 1."""
    return dataclasses.replace(latents, log_pi=torch.zeros_like(latents.log_pi)).attended(scale, evaluation).bias


def limit_of_call(merge_share: float | None = None, merge_cost: float | None = None) -> dict[str, float] | None:
    """How far the arguments of a call say to merge; ``None`` if they leave it to the configuration.

    Raises:
        ValueError: both are given, or one is outside its range. TypeError: one is not a single number.
    """
    asked = {"merge_share": merge_share, "merge_cost": merge_cost}
    given: dict[str, float] = {name: checked(name, value) for name, value in asked.items() if value is not None}
    check_one_limit(**given)
    return {"merge_share": 1.0, "merge_cost": 0.0, **given} if given else None


# How far a whole call of generate() merges: it may encode several times, as Whisper's does, and is never one graph.
_LIMIT: ContextVar[dict[str, float] | None] = ContextVar("nvib_merge_limit", default=None)


@contextmanager
def merging(limit: dict[str, float] | None) -> Iterator[None]:
    """What ``generate()`` encodes inside is merged so far (:func:`limit_of_call`)."""
    token = _LIMIT.set(limit)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def limit_of_generation() -> dict[str, float] | None:
    """The limit of :func:`merging`."""
    return _LIMIT.get()


def merge_limit(
    config: NvibConfig,
    training: bool,
    like: Tensor,
    generator: torch.Generator | None = None,
    asked: dict[str, float] | None = None,
) -> dict[str, float | Tensor]:
    """How far latents are merged now, an argument of :func:`merged`; empty if not at all.

    The limit that a call ``asked`` for comes first, then a share that training draws for each example, then the
    configuration's.
    """
    if not torch.compiler.is_compiling():
        for name in ("merge_share", "merge_cost", "training_merge_share"):  # they may have been set since
            checked(name, getattr(config, name))
        check_one_limit(config.merge_share, config.merge_cost)
    if asked is None and training and config.training_merge_share < 1:
        drawn = torch.rand(
            len(like), generator=generator, device=like.device if generator is None else generator.device
        )
        return {"share": (1 - (1 - config.training_merge_share) * drawn).to(like.device)}
    limit = asked or {"merge_share": config.merge_share, "merge_cost": config.merge_cost}
    if limit["merge_share"] < 1:
        return {"share": limit["merge_share"]}
    return {"cost": limit["merge_cost"]} if limit["merge_cost"] > 0 else {}
