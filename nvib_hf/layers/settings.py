"""Checks of settings, shared by the layer and the configuration, and of what the layer is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALPHA_ACTIVATIONS = ("exp", "relu")

EVALUATIONS = ("means", "mixture")

KL_WEIGHTS = ("drawn", "pseudo_counts")

KINDS = ("cross", "encoder", "decoder")  # of attention

DROPPINGS = ("threshold", "relaxed")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def check_prior(
    prior_mu: float | Sequence[float] | Tensor,
    prior_var: float | Sequence[float] | Tensor,
    prior_alpha: float,
    width: int | None = None,
) -> None:
    """Raise ValueError unless mean and variance have one or ``width`` values and all are in range."""
    for name, value in (("prior_mu", prior_mu), ("prior_var", prior_var)):
        values = torch.as_tensor(value, dtype=torch.float32)
        if values.dim() > 0 and width is not None and values.shape != (width,):
            raise ValueError(
                f"{name} has {values.numel()} values but this model's width is {width}. "
                f"Pass one number or {width} values."
            )
        if values.is_meta:
            continue
        if not values.isfinite().all():
            raise ValueError(f"{name} must be finite, but got {value}.")
        if name == "prior_var" and not (values > 0).all():
            raise ValueError(f"prior_var must be positive, but its smallest value is {values.min().item()}.")
    if not 0 < prior_alpha < float("inf"):
        raise ValueError(f"prior_alpha must be a positive number, but got {prior_alpha}.")


def check_settings(
    delta: float,
    kappa: int,
    alpha_activation: str,
    dropping: str,
    alpha_threshold: float,
    threshold_share: float,
    scale: float | None = None,
) -> None:
    """Raise ValueError for a setting of the layer outside its range."""
    if not 0 <= delta <= 1:
        raise ValueError(
            f"delta must be in [0, 1], but got {delta}: it is the share of the source length that the prior "
            "expects to keep."
        )
    if not (kappa >= 1 and kappa % 1 == 0):
        raise ValueError(f"kappa must be a whole number of at least 1, but got {kappa}.")
    check_choice("alpha_activation", alpha_activation, ALPHA_ACTIVATIONS)
    if not 0 <= alpha_threshold < float("inf"):
        raise ValueError(f"alpha_threshold must be 0 (drop nothing) or positive, but got {alpha_threshold}.")
    if dropping == "hard":
        raise ValueError(
            "dropping='hard' was removed: with as few vectors a threshold reconstructs far more of the texts. Take "
            "alpha_threshold=0.1 with dropping='threshold', or dropping='relaxed' where the decoder is frozen."
        )
    check_choice("dropping", dropping, DROPPINGS)
    if dropping != "threshold" and alpha_threshold > 0:
        raise ValueError(
            f"alpha_threshold={alpha_threshold} and dropping={dropping!r} both decide which vectors are dropped. Set "
            "alpha_threshold=0, or dropping='threshold'."
        )
    if not 0 <= threshold_share <= 1:
        raise ValueError(
            f"threshold_share must be in [0, 1], but got {threshold_share}: it is the share of the training examples "
            "in which vectors are dropped."
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive, but got {scale}: it is the attention's scale s.")


def check_merge_share(merge_share: float) -> None:
    """Raise ValueError unless it is a share of vectors that can be left; TypeError if it is no number."""
    if isinstance(merge_share, bool) or not isinstance(merge_share, (int, float)):
        raise TypeError(
            f"merge_share must be one number, but got {merge_share!r}. For one per row call "
            "merge_latents(encode(...), share=[...])."
        )
    if not 0 < merge_share <= 1:
        raise ValueError(
            f"merge_share must be in (0, 1], but got {merge_share}: it is the share of the vectors that is left, 1 "
            "merges nothing."
        )


def check_taus(tau_alpha: float, tau_sigma: float, tau_mu: float) -> None:
    """Raise ValueError for a setting of the identity initialisation outside its range."""
    if not tau_sigma >= 0:
        raise ValueError(f"tau_sigma must be 0 or positive, but got {tau_sigma}.")
    if not 0 <= tau_mu <= 1:
        raise ValueError(f"tau_mu must be in [0, 1], but got {tau_mu}.")
    if not abs(tau_alpha) < float("inf"):
        raise ValueError(f"tau_alpha must be finite, but got {tau_alpha}.")
