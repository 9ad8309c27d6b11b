"""What latents must be for a model to decode them."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..layers.nvib import NvibLayer
    from .latents import NvibLatents

# The sum of a latent's weights may differ from 1 by this much, which is more than any rounding.
WEIGHTS_TOLERANCE = 0.02


def refuse_batch(packed: Tensor, others: Tensor, what: str = "decoder inputs") -> NoReturn:
    """Raise ValueError because latents and examples differ in number. One latent would silently serve all examples."""
    raise ValueError(
        f"There are {len(packed)} latents but {len(others)} {what}. Pass one latent for each example of labels or "
        "decoder_input_ids, and no other inputs: latents[[0] * n] repeats the first n times."
    )


def check_latents(latents: NvibLatents, layer: NvibLayer) -> None:
    """Raise unless a model with this NVIB layer can decode the latents.

    Raises:
        TypeError: a field is not a tensor, or has a wrong dtype. ValueError: the latents are of another model; fields
            do not fit together; vectors or weights are not a distribution.
    """
    check_kinds(latents)
    if latents.z.shape[-1] != layer.size_out:
        raise ValueError(
            f"The latents are {latents.z.shape[-1]} wide, but this model's are {layer.size_out} wide: they come "
            "from another model. Encode the texts with this one."
        )
    check_shapes(latents)
    if torch.compiler.is_compiling() or latents.z.is_meta:  # there are no values to look at
        return
    for name, own in (("kappa", layer.kappa), ("scale", layer.scale)):
        given = getattr(latents, name)
        if given is not None and not torch.allclose(given.double(), torch.full_like(given, own, dtype=torch.float64)):
            how = "drawn with kappa" if name == "kappa" else "made for attention of scale"
            raise ValueError(
                f"The latents were {how}={given.unique().tolist()}, but this model has {name}={own}: they come from "
                "another model. Encode the texts with this one."
            )
    check_values(latents)


def check_kinds(latents: NvibLatents) -> None:
    """Raise TypeError for a field that is not a tensor, or has a wrong dtype."""
    if not hasattr(latents, "log_pi"):
        raise TypeError(
            f"latents must be NvibLatents, but got {type(latents).__name__}. Pass what model.encode() returns."
        )
    for name in ("z", "log_pi", "attention_mask"):
        value = getattr(latents, name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} of the latents must be a tensor, but got {value!r}.")
    for name, value in latents.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} of the latents must be a tensor, but got {value!r}.")
        whole = name == "attention_mask" and value.dtype != torch.bool
        if whole or (name in ("z", "logvar", "log_pi", "log_alpha") and not value.is_floating_point()):
            kind = "boolean" if whole else "floating"
            raise TypeError(f"{name} of the latents must be {kind}, but got {value.dtype}.")


def check_shapes(latents: NvibLatents) -> None:
    """Raise ValueError for fields whose shapes do not fit together."""
    shapes = {name: tuple(value.shape) for name, value in latents.items()}
    batch, *_ = shape = shapes["z"]
    by_kind = {"z": shape, "logvar": shape, **dict.fromkeys(("log_pi", "attention_mask", "log_alpha"), shape[:2])}
    if len(shape) != 3 or any(shape != by_kind.get(name, (batch,)) for name, shape in shapes.items()):
        shown = {name: shapes[name] for name in ("z", "log_pi", "attention_mask", "logvar") if name in shapes}
        raise ValueError(
            f"The shapes of the latents' fields do not fit together: {shown}. z and logvar must be (B, Nl, P), log_pi "
            "and attention_mask (B, Nl), and a field with one number for each latent (B,)."
        )


def check_values(latents: NvibLatents) -> None:
    """Raise ValueError unless each latent is a distribution over finite vectors. One test covers all latents."""
    log_pi, keep = latents.log_pi, latents.log_pi > -math.inf
    total = log_pi.float().logsumexp(-1)
    vectors = latents.z.isfinite() | ~keep[..., None]
    if latents.logvar is not None:  # -inf is a variance of 0
        vectors = vectors & ((latents.logvar < math.inf) | ~keep[..., None])
    wrong = [
        (log_pi.isnan() | (log_pi == math.inf)).any(-1),
        ~keep.any(-1),
        total.abs() > WEIGHTS_TOLERANCE,
        ~vectors.all(-1).all(-1),
    ]
    rows = torch.stack(wrong)
    if not bool(rows.any()):
        return
    kind, row = rows.nonzero()[0].tolist()
    what = (
        "log_pi holds NaN or infinity",
        "log_pi is -inf for every vector: leave at least one vector",
        f"its weights sum to {total[row].exp().item():.4g}, not to 1; log_pi holds logarithms, and "
        "log_pi.log_softmax(-1) makes the weights sum to 1",
        "its vectors hold NaN or infinity",
    )[kind]
    raise ValueError(f"Latent {row} is not a distribution: {what}.")


def shared_scale(*latents: NvibLatents) -> Tensor | None:
    """The scale ``(B,)`` of latents of the same batch size; ``None`` if one of them has no known scale.

    Raises:
        ValueError: they have different scales.
    """
    known = [x.scale for x in latents if x.scale is not None]
    values = sorted({float(value) for scale in known for value in scale.unique()})
    if len(values) > 1 and not math.isclose(values[0], values[-1], rel_tol=1e-5):
        raise ValueError(f"The latents have scales {values}: they come from different models and make no batch.")
    return known[0] if len(known) == len(latents) else None


def check_number(name: str, value: object) -> float:
    """A number, or a tensor with one number, as a float; TypeError for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, but got {value!r}.")
    return float(value)


def check_count(name: str, value: object, least: int = 1) -> int:
    """A whole number of at least ``least``; ValueError for anything else."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or not least <= count < 2**31:
        raise ValueError(f"{name} must be a whole number of at least {least}, but got {value!r}.")
    return count
