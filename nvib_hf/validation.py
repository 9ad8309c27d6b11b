"""Checks of settings, shared by the layer and the configuration, and of what the layer is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALPHA_ACTIVATIONS = ("exp", "relu")
EVALUATIONS = ("means", "mixture")
KL_WEIGHTS = ("drawn", "pseudo_counts")
KINDS = ("cross", "encoder", "decoder")  # of attention
DROPPINGS = ("threshold", "relaxed", "hard")


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


def check_taus(tau_alpha: float, tau_sigma: float, tau_mu: float) -> None:
    """Raise ValueError for a setting of the identity initialisation outside its range."""
    if not tau_sigma >= 0:
        raise ValueError(f"tau_sigma must be 0 or positive, but got {tau_sigma}.")
    if not 0 <= tau_mu <= 1:
        raise ValueError(f"tau_mu must be in [0, 1], but got {tau_mu}.")
    if not abs(tau_alpha) < float("inf"):
        raise ValueError(f"tau_alpha must be finite, but got {tau_alpha}.")


def attentions_by_kind(attentions: object) -> dict[str, str | list[int]] | None:
    """Which layers of which kinds of attention: ``{kind: "all" or numbers}`` of that, or of a list of kinds.

    Raises:
        ValueError: it names another kind, or something else than layers.
    """
    if attentions is None:
        return None
    if isinstance(attentions, str):
        attentions = [attentions]
    by_kind = dict(attentions) if hasattr(attentions, "items") else dict.fromkeys(attentions, "all")
    for kind, layers in by_kind.items():
        check_choice("attentions", kind, KINDS)
        if kind == "cross" and layers != "all":
            raise ValueError(f"attentions['cross'] must be 'all', but got {layers!r}: all layers read one latent.")
        if layers != "all":
            numbers = [] if isinstance(layers, str) or not hasattr(layers, "__iter__") else sorted(set(layers))
            if not numbers or any(not isinstance(n, int) or n < 0 for n in numbers):
                raise ValueError(
                    f"attentions[{kind!r}] must be 'all' or numbers of layers, counted from 0, but got {layers!r}."
                )
            by_kind[kind] = numbers
    if not by_kind:
        raise ValueError("attentions is empty. Name at least one kind of attention, or leave it out.")
    return by_kind


def check_source(hidden_states: Tensor, padding_mask: Tensor | None, width: int) -> None:
    """Raise ValueError unless vectors are ``(B, Ns, width)`` and their mask, if any, is ``(B, Ns)``."""
    batch, length, given = hidden_states.shape
    if given != width:
        raise ValueError(f"The input is {given} wide, but this layer was made with size_in={width}.")
    if padding_mask is not None and padding_mask.shape != (batch, length):
        raise ValueError(
            f"The padding mask has shape {tuple(padding_mask.shape)}, but the input needs {(batch, length)}: "
            "one entry per source vector, batch first."
        )


def check_rows_of_prior(padding_mask: Tensor, number_samples: int) -> None:
    """Raise ValueError unless a mask has one row per sample, each with a vector at least."""
    if padding_mask.shape[0] != number_samples:
        raise ValueError(
            f"memory_key_padding_mask has {padding_mask.shape[0]} rows, but number_samples is {number_samples}. Give "
            "one row per sample."
        )
    if padding_mask.bool().all(-1).any():
        raise ValueError("memory_key_padding_mask has a row that is all padding. Leave it at least one vector.")
