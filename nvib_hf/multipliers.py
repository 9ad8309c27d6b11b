"""How callbacks weigh the terms of the loss: schedules of annealing, and multipliers that follow an error."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine", "cyclic")

# The share of vectors is extrapolated by four times what it lost against its mean over about 20 measurements, because
# vectors that are dropped come back slowly, if at all: with less, simulated trainings pass below the target.
SLOW, LEAD = 0.05, 4.0
# Above the tolerance by this much, in log, the share's multiplier does not rise any more.
MARGIN = 0.1


def annealed(
    progress: float, schedule: str, warmup_ratio: float = 0.25, start_ratio: float = 0.0, cycles: int = 4
) -> float:
    r"""The weight :math:`\beta` at a share ``progress`` in [0, 1] of the training steps.

    With progress :math:`x` of the warm-up, from 0 at ``start_ratio`` to 1 at ``start_ratio + warmup_ratio``:

    * ``"constant"``: 0 before ``start_ratio``, 1 from there;
    * ``"linear"``: :math:`x`;
    * ``"cosine"`` (monotonic): :math:`(1 - \cos \pi x) / 2`;
    * ``"cyclic"``: the steps from ``start_ratio`` are ``cycles`` equal parts, and in each :math:`\beta` rises linearly
      over the first ``warmup_ratio`` of it, then stays at 1.

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


def multiplier(integral: float, error: float, gain: float) -> float:
    r"""A multiplier that follows an error by a slow integral and a proportional part.

    .. math::
        \log \beta = I + \mathrm{gain} \cdot e, \qquad I \leftarrow I + \mathrm{rate} \cdot e \text{ every step}
    """
    return math.exp(integral + gain * error)


def reconstruction_error(cross_entropy: float, tolerance: float) -> float:
    r""":math:`e = \log(\tau / \mathrm{CE})`, clipped to [-1, 1]: positive where there is room to compress."""
    return _clip(math.log(tolerance / max(cross_entropy, 1e-9)))


def share_error(kept: float, slow_kept: float, target: float, error: float) -> float:
    r"""By how much the share of vectors kept is above its target, as far as the reconstruction allows, in [-1, 1].

    .. math::
        s = \log \frac{\mathrm{kept} - 4 \max(\overline{\mathrm{kept}} - \mathrm{kept}, 0)}{\mathrm{target}}, \qquad
        e_V = \min(s, 0) + \max(s, 0) \min(\max(1 + 10 e, 0), 1) + \min(e, 0)

    So it holds back while the share still falls, does not rise while the cross-entropy is a tenth above the tolerance,
    and falls with :math:`e`: the reconstruction comes first, then the share, then the KLs.

    Args:
        kept: the share, as a mean over about five measurements.
        slow_kept: the same over about twenty.
        error: :math:`e`, of :func:`reconstruction_error`.
    """
    extrapolated = kept - LEAD * max(slow_kept - kept, 0.0)
    share = math.log(max(extrapolated, 1e-9) / target)
    allowed = min(max(1 + error / MARGIN, 0.0), 1.0)
    return _clip(min(share, 0.0) + allowed * max(share, 0.0) + min(error, 0.0))


def running_mean(mean: float | None, value: float, weight: float = 0.2) -> float:
    """The mean after one more value, over about ``1 / weight`` of them."""
    return value if mean is None else mean + weight * (value - mean)


def _clip(error: float) -> float:
    return min(max(error, -1.0), 1.0)
