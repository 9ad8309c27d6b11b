"""The laws by which multipliers follow an error: numbers in, numbers out."""

from __future__ import annotations

import math

# The share of vectors is extrapolated: by four times what it lost against its mean over about 20 measurements. Dropped
# vectors come back slowly or never. With a smaller factor, simulated trainings fall below the target.
SLOW, LEAD = 0.05, 4.0

# The share's multiplier stops rising when the cross-entropy is this far above the tolerance, in log.
MARGIN = 0.1


def multiplier(integral: float, error: float, gain: float) -> float:
    r"""A multiplier that follows an error by a slow integral and a proportional part.

    .. math::
        \log \beta = I + \mathrm{gain} \cdot e, \qquad I \leftarrow I + \mathrm{rate} \cdot e \text{ every step}
    """
    return math.exp(integral + gain * error)


def reconstruction_error(cross_entropy: float, tolerance: float) -> float:
    r""":math:`e = \log(\tau / \mathrm{CE})`, clipped to [-1, 1]. It is positive if there is room to compress."""
    return _clip(math.log(tolerance / max(cross_entropy, 1e-9)))


def share_error(kept: float, slow_kept: float, target: float, error: float) -> float:
    r"""How far the share of vectors kept is above its target, limited by the reconstruction, in [-1, 1].

    .. math::
        s = \log \frac{\mathrm{kept} - 4 \max(\overline{\mathrm{kept}} - \mathrm{kept}, 0)}{\mathrm{target}}, \qquad
        e_V = \min(s, 0) + \max(s, 0) \min(\max(1 + 10 e, 0), 1) + \min(e, 0)

    So the error is smaller while the share still falls, is at most 0 while the cross-entropy is a tenth above the
    tolerance, and falls with :math:`e`. The reconstruction comes first, then the share, then the KLs.

    Args:
        kept: the share, as a mean over about five measurements.
        slow_kept: the share, as a mean over about twenty measurements.
        error: :math:`e`, from :func:`reconstruction_error`.
    """
    extrapolated = kept - LEAD * max(slow_kept - kept, 0.0)
    share = math.log(max(extrapolated, 1e-9) / target)
    allowed = min(max(1 + error / MARGIN, 0.0), 1.0)
    return _clip(min(share, 0.0) + allowed * max(share, 0.0) + min(error, 0.0))


def running_mean(mean: float | None, value: float, weight: float = 0.2) -> float:
    """The mean after one more value. It covers about the last ``1 / weight`` values."""
    return value if mean is None else mean + weight * (value - mean)


def _clip(error: float) -> float:
    return min(max(error, -1.0), 1.0)
