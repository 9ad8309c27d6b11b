"""Schedules for the weights of the KL terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import TrainerCallback

from ..layers.settings import check_choice, check_number, check_whole
from ..loss import TERMS
from .recording import find_nvib_model

SCHEDULES = ("constant", "linear", "cosine", "cyclic")


def annealed(
    progress: float, schedule: str, warmup_ratio: float = 0.25, start_ratio: float = 0.0, cycles: int = 4
) -> float:
    r"""The weight :math:`\beta` at a share ``progress`` in [0, 1] of the training steps.

    :math:`x` is the progress of the warm-up, from 0 at ``start_ratio`` to 1 at ``start_ratio + warmup_ratio``.

    * ``"constant"``: 0 before ``start_ratio``, 1 from there;
    * ``"linear"``: :math:`x`;
    * ``"cosine"`` (monotonic): :math:`(1 - \cos \pi x) / 2`;
    * ``"cyclic"``: the steps from ``start_ratio`` on are divided into ``cycles`` equal parts. In each part
      :math:`\beta` rises linearly over the first ``warmup_ratio`` of the part, then stays at 1.

    Source: Bowman et al. (CoNLL 2016); cyclic: Fu et al. (NAACL 2019).
    """
    elapsed = progress - start_ratio
    if elapsed < 0:
        return 0.0
    if schedule == "constant":
        return 1.0
    if schedule == "cyclic":
        elapsed = round(elapsed * cycles / max(1 - start_ratio, 1e-12), 9) % 1.0
    ramp = min(elapsed / warmup_ratio, 1.0) if warmup_ratio > 0 else 1.0
    return 0.5 * (1 - math.cos(math.pi * ramp)) if schedule == "cosine" else ramp


class KLAnnealingCallback(TrainerCallback):
    r"""Anneals the weights of the KL terms: :math:`\beta(t)` in the loss of the model.

    The value depends on the step alone, so a resumed training continues it. The last value stays in the model and is
    saved with it; later training starts with it. In evaluation the loss has all weights at 1.

    Args:
        schedule: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"cyclic"``, see
            :func:`~nvib_hf.training.annealing.annealed`.
        warmup_ratio: length of the warm-up as a share of the training steps (of a cycle, if cyclic), in [0, 1].
        start_ratio: share of the training steps before the warm-up, in [0, 1]. Unless cyclic, ``start_ratio`` and
            ``warmup_ratio`` add up to at most 1.
        cycles: number of cycles.
        terms: the terms whose ``lambda_*`` it anneals, out of ``("gaussian", "dirichlet", "vectors")``; by default
            all. Use two callbacks for two schedules.

    Raises:
        ValueError: an argument outside its range, or a warm-up that would not end within the training.
    """

    def __init__(
        self,
        schedule: str = "linear",
        warmup_ratio: float = 0.25,
        start_ratio: float = 0.0,
        cycles: int = 4,
        terms: Sequence[str] = TERMS,
    ) -> None:
        check_choice("schedule", schedule, SCHEDULES)
        check_number("warmup_ratio", warmup_ratio, 0, 1)
        check_number("start_ratio", start_ratio, 0, 1)
        check_whole("cycles", cycles)
        if schedule in ("linear", "cosine") and start_ratio + warmup_ratio > 1 + 1e-9:
            raise ValueError(
                f"start_ratio={start_ratio} and warmup_ratio={warmup_ratio} add up to more than 1, so the training "
                f"would end before the weight is 1. Take a warmup_ratio of at most {1 - start_ratio:.3g}."
            )
        terms = (terms,) if isinstance(terms, str) else tuple(terms)
        if not terms or not all(term in TERMS for term in terms):
            raise ValueError(f"terms must be some of {', '.join(map(repr, TERMS))}, but got {terms}.")
        self.schedule, self.warmup_ratio, self.start_ratio = schedule, warmup_ratio, start_ratio
        self.cycles, self.terms = cycles, terms

    def beta(self, progress: float) -> float:
        """The weight at a share ``progress`` in [0, 1] of the training steps."""
        return annealed(progress, self.schedule, self.warmup_ratio, self.start_ratio, self.cycles)

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        beta = self.beta(state.global_step / max(state.max_steps, 1))
        weights = find_nvib_model(model).kl_beta
        with torch.no_grad():
            for term in self.terms:
                weights[TERMS.index(term)] = beta
