"""The settings of the layer and the configuration: their types and ranges in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

ALPHA_ACTIVATIONS = ("exp", "relu")

EVALUATIONS = ("means", "mixture")

KL_WEIGHTS = ("drawn", "pseudo_counts")

KINDS = ("cross", "encoder", "decoder")  # of attention

DROPPINGS = ("threshold", "relaxed")


class Range(NamedTuple):
    """The finite numbers that a setting allows, in words and as a test, and what the setting means."""

    words: str
    holds: Callable[[float], bool]
    what: str = ""
    whole: bool = False


POSITIVE = Range("a positive number", lambda x: x > 0)
NOT_NEGATIVE = Range("0 or positive", lambda x: x >= 0)
SHARE = Range("in [0, 1]", lambda x: 0 <= x <= 1)
LESS_THAN_ALL = Range("in [0, 1)", lambda x: 0 <= x < 1)
MORE_THAN_NOTHING = Range("in (0, 1]", lambda x: 0 < x <= 1)
COUNT = Range("a whole number of at least 1", lambda x: x >= 1 and x % 1 == 0, whole=True)

RANGES: dict[str, Range] = {
    "prior_alpha": POSITIVE,
    "delta": SHARE._replace(what="it is the share of the source length that the prior expects to keep."),
    "kappa": COUNT,
    "alpha_threshold": NOT_NEGATIVE._replace(words="0 (drop nothing) or positive"),
    "dropping_share": SHARE._replace(what="it is the share of the training examples in which vectors are dropped."),
    "merge_share": MORE_THAN_NOTHING._replace(
        what="it is the share of the vectors that merging leaves, and 1 merges nothing."
    ),
    "merge_cost": NOT_NEGATIVE._replace(
        what="pairs of vectors that cost at most this are merged, and 0 merges nothing."
    ),
    "training_merge_share": MORE_THAN_NOTHING._replace(
        what="it is the least share that training merges to, and 1 draws no shares."
    ),
    "tau_alpha": Range("finite", math.isfinite),
    "tau_sigma": NOT_NEGATIVE,
    "tau_mu": SHARE,
    "lambda_gaussian": NOT_NEGATIVE,
    "lambda_dirichlet": NOT_NEGATIVE,
    "lambda_vectors": NOT_NEGATIVE,
    "free_bits_gaussian": NOT_NEGATIVE,
    "free_bits_dirichlet": NOT_NEGATIVE,
    "word_dropout": LESS_THAN_ALL,
    "word_dropout_token_id": Range("a token's number, from 0 on", lambda x: x >= 0 and x % 1 == 0, whole=True),
    "label_smoothing": LESS_THAN_ALL,
    "config_version": COUNT,
    "scale": POSITIVE._replace(words="positive", what="it is the attention's scale s."),
    "size_in": COUNT,
    "size_out": COUNT,
}

CHOICES: dict[str, tuple[str, ...]] = {
    "alpha_activation": ALPHA_ACTIVATIONS,
    "dropping": DROPPINGS,
    "evaluation": EVALUATIONS,
    "kl_weights": KL_WEIGHTS,
}

# New names of settings by their old names, in configurations and in the buffers of state dicts.
RENAMED = {"threshold_share": "dropping_share"}

SWITCHES = ("accumulate_alpha", "encode_sound_only", "exact_attention", "is_encoder_decoder", "latent_prior_frozen")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number of Python or NumPy."""
    return not isinstance(value, bool) and isinstance(value, Real)


def checked(name: str, value: Any) -> Any:
    """A setting as plain Python: a float, an int, a bool or a str, depending on its name.

    Raises:
        TypeError: the value has another type. ValueError: the value is outside the setting's range.
    """
    if name in CHOICES:
        check_choice(name, value, CHOICES[name])
        return value
    if (value.numel() if isinstance(value, Tensor) else getattr(value, "size", 0)) == 1:  # of PyTorch or NumPy
        value = value.item()
    if name in SWITCHES:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, but got {value!r}. Pass one of the two.")
        return value
    allowed = RANGES[name]
    if not is_number(value):
        raise TypeError(f"{name} must be a number, but got {value!r}. Pass one that is {allowed.words}.")
    if math.isinf(value) and not allowed.whole:
        raise ValueError(f"{name} must be finite, but got {value}. Pass a number that is {allowed.words}.")
    if not allowed.holds(value):
        what = f": {allowed.what}" if allowed.what else "."
        raise ValueError(f"{name} must be {allowed.words}, but got {value}{what}")
    return int(value) if allowed.whole else value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if name == "dropping" and value == "hard":
        raise ValueError(
            "dropping='hard' was removed: with as few vectors a threshold reconstructs far more of the texts. Set "
            "alpha_threshold=0.1 and dropping='threshold', or dropping='relaxed' if the decoder is frozen."
        )
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def check_number(
    name: str,
    value: object,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise ValueError unless a value is a finite number in a range. ``above`` and ``below`` are not in the range."""
    low, high = above if above is not None else least, below if below is not None else most
    if is_number(value) and math.isfinite(value) and low <= value <= high and value not in (above, below):
        return
    if high < math.inf:
        what = f"in {'[' if above is None else '('}{low:g}, {high:g}{']' if below is None else ')'}"
    elif low > -math.inf:
        what = "a positive number" if above == 0 else "0 or positive" if least == 0 else f"at least {low:g}"
    else:
        what = "a number"
    raise ValueError(f"{name} must be {what}, but got {value!r}.")


def check_whole(name: str, value: object, least: int = 1, unit: str = "") -> None:
    """Raise ValueError unless a value is a whole number of at least ``least``."""
    if not is_number(value) or value % 1 != 0:  # nan and inf have a remainder of nan
        raise ValueError(f"{name} must be a whole number of at least {least}{unit}, but got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{unit}, but got {value!r}.")


def check_prior(
    prior_mu: float | Sequence[float] | Tensor,
    prior_var: float | Sequence[float] | Tensor,
    prior_alpha: float,
    width: int | None = None,
) -> None:
    """Raise ValueError or TypeError unless mean and variance have one or ``width`` values, all in range."""
    for name, value in (("prior_mu", prior_mu), ("prior_var", prior_var)):
        try:
            values = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            values = None
        if values is None or values.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise TypeError(f"{name} must be a number, or one for each channel, but got {value!r}.")
        values = values.float()
        if values.dim() > 1 or (values.dim() == 1 and width is not None and values.shape != (width,)):
            raise ValueError(
                f"{name} has {values.numel()} values but this model's width is {width}. "
                f"Pass one number or {width} values."
                if values.dim() == 1
                else f"{name} has shape {tuple(values.shape)}. Pass one number, or one for each channel."
            )
        if values.is_meta:
            continue
        if not values.isfinite().all():
            raise ValueError(f"{name} must be finite, but got {value}.")
        if name == "prior_var" and not (values > 0).all():
            raise ValueError(f"prior_var must be positive, but its smallest value is {values.min().item()}.")
    checked("prior_alpha", prior_alpha)


def check_dropping(dropping: str, alpha_threshold: float) -> None:
    """Raise ValueError if two settings both decide what is dropped."""
    if dropping != "threshold" and alpha_threshold > 0:
        raise ValueError(
            f"alpha_threshold={alpha_threshold} and dropping={dropping!r} both decide which vectors are dropped. Set "
            "alpha_threshold=0, or dropping='threshold'."
        )


def checked_tau(name: str, value: Any) -> float | dict[str, float]:
    """``tau_alpha``, ``tau_sigma`` or ``tau_mu``: a number, or one for each kind of attention."""
    if not isinstance(value, dict):
        tau: float = checked(name, value)
        return tau
    for kind in value:
        check_choice(f"A key of {name}", kind, KINDS)
    return {kind: checked(name, tau) for kind, tau in value.items()}


def shares_by_layer(shares: Any) -> dict[int, float] | None:
    """To which share of its vectors an encoder layer's output is merged, ``{number: share}``; of JSON, too.

    Raises:
        TypeError: no mapping. ValueError: what is no number of a layer, or no share.
    """
    if shares is None:
        return None
    if not hasattr(shares, "items"):
        raise TypeError(
            f"encoder_merge_share must be shares by the numbers of layers, but got {shares!r}. Pass for instance "
            "{1: 0.5, 3: 0.5}."
        )
    by_layer: dict[int, float] = {}
    for number, share in shares.items():
        if not str(number).isdecimal():
            raise ValueError(
                f"encoder_merge_share must name layers by their numbers, counted from 0, but got {number!r}."
            )
        by_layer[int(number)] = float(checked("merge_share", share))
    return dict(sorted(by_layer.items())) or None


def check_one_limit(merge_share: float = 1.0, merge_cost: float = 0.0) -> None:
    """Raise ValueError for two answers to how far latents are merged."""
    if merge_share < 1 and merge_cost > 0:
        raise ValueError(
            f"merge_share={merge_share} and merge_cost={merge_cost} both say how far to merge. Set merge_cost to 0, "
            "or merge_share to 1."
        )


def check_mass_is_read(encoder_merge_share: dict[int, float] | None, attentions: dict[str, Any]) -> None:
    """Raise ValueError for merging inside an encoder without NVIB, whose attention would not read the mass."""
    if encoder_merge_share and "encoder" not in attentions:
        raise ValueError(
            f"encoder_merge_share={encoder_merge_share} needs NVIB in the encoder, whose attention reads the mass. "
            f"Wrap the base with attentions={[*attentions, 'encoder']}, or set encoder_merge_share to None."
        )


def attentions_by_kind(attentions: Any) -> dict[str, str | list[int]] | None:
    """Which layers of which kinds of attention, as ``{kind: "all" or numbers}``. Also takes a list of kinds.

    Raises:
        ValueError: it names an unknown kind, or values that are not layers.
    """
    if attentions is None:
        return None
    if isinstance(attentions, str):
        attentions = [attentions]
    if not hasattr(attentions, "items") and not isinstance(attentions, (list, tuple, set, frozenset)):
        raise TypeError(
            f"attentions must be a list of {', '.join(map(repr, KINDS))}, or their layers by name, but got "
            f"{attentions!r}. Pass for instance {{'cross': 'all', 'encoder': [3, 4, 5]}}."
        )
    for kind in attentions:
        check_choice("attentions", kind, KINDS)
    by_kind: dict[str, str | list[int]]
    by_kind = dict(attentions) if hasattr(attentions, "items") else dict.fromkeys(attentions, "all")
    for kind, layers in by_kind.items():
        is_all = isinstance(layers, str) and layers == "all"
        if kind == "cross" and not is_all:
            raise ValueError(
                f"attentions['cross'] must be 'all', but got {layers!r}: all layers read the same latent."
            )
        if not is_all:
            numbers = list(layers) if isinstance(layers, (list, tuple, set, frozenset, range)) else []
            if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
                raise ValueError(
                    f"attentions[{kind!r}] must be 'all' or numbers of layers, counted from 0, but got {layers!r}."
                )
            by_kind[kind] = sorted(set(numbers))
    if not by_kind:
        raise ValueError("attentions is empty. Name at least one kind of attention, or leave it out.")
    return by_kind


def check_boolean(name: str, mask: Tensor | None, or_additive: bool = False) -> None:
    """Raise TypeError for a mask of whole numbers, because 0 and 1 could each mean masked."""
    if mask is None or mask.dtype == torch.bool or (or_additive and mask.is_floating_point()):
        return
    kinds = "boolean (True = masked) or floating (added to the scores)" if or_additive else "boolean (True = padding)"
    raise TypeError(
        f"{name} must be {kinds}, but got {mask.dtype}. Pass mask.bool() if its ones mean masked, or mask == 0 if its "
        "ones mean visible, as in a tokenizer's attention_mask."
    )
