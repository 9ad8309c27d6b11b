"""A search for the ``tau_*`` with which a pretrained model does best on another domain, without any training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import ModuleType

from ..configuration_nvib import TAUS
from ..layers.settings import KINDS
from ..wrapping.pretrained import NvibPreTrainedModel

# Of each kind of attention, from Fehr & Henderson (COLM 2024).
RANGES = {
    "tau_alpha": {"cross": (0.0, 5.0), "encoder": (0.0, 5.0), "decoder": (2.0, 5.0)},
    "tau_sigma": {"cross": (0.0, 0.2), "encoder": (0.0, 0.01), "decoder": (0.0, 0.1)},
}

IDENTITY = {name: TAUS[name] for name in RANGES}


def optuna() -> ModuleType:
    """The package optuna.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "The search for taus needs the package optuna, which is not installed. Install it with "
            "`pip install 'nvib-hf[search]'` or `pip install optuna`."
        ) from error
    return optuna


def search_taus(
    model: NvibPreTrainedModel,
    score: Callable[[NvibPreTrainedModel], float],
    num_trials: int = 30,
    *,
    direction: str = "minimize",
    ranges: dict[str, dict[str, tuple[float, float]]] | None = None,
    seed: int = 0,
) -> list[dict]:
    r"""Try regularisations of a pretrained model, keep the best.

    Each trial sets ``tau_alpha`` and ``tau_sigma`` of every kind of attention that has NVIB
    (:meth:`~nvib_hf.NvibForConditionalGeneration.set_taus`), and scores the model on validation data of the domain
    that it is meant for. The first trial is the identity, so there the best one is never worse than the pretrained
    model. Call ``fit_prior`` on data of the training domain first.

    Args:
        model: in ``eval()``, its evaluation ``"mixture"``: by the means, variances only shift weights.
        score: of the model, for instance its word error rate over the validation data.
        num_trials: how many, the identity included.
        direction: ``"minimize"`` the score, or ``"maximize"`` it.
        ranges: ``{"tau_alpha": {"encoder": (0.0, 5.0), ...}, "tau_sigma": ...}``, in place of :data:`RANGES`; a kind
            that is left out stays at the identity.
        seed: of the draws, by TPE after 10 random ones.

    Returns:
        The trials in their order: ``tau_alpha`` and ``tau_sigma``, dicts by kind, and ``score``. The model has the
        taus of the best one. If ``score`` raises an error, the model has the taus it had before.

    Raises:
        ImportError: without the package optuna.
        ValueError: fewer than one trial, another direction, or ranges of an unknown tau or kind; a
            score that is no number.

    Example:
        >>> model.fit_prior(clean_batches)  # doctest: +SKIP
        >>> trials = search_taus(model, lambda model: word_error(model, noisy_speech))  # doctest: +SKIP

    Source: Fehr & Henderson (COLM 2024), section 4.
    """
    if num_trials < 1:
        raise ValueError(f"num_trials must be at least 1, but got {num_trials}.")
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"direction must be 'minimize' or 'maximize', but got {direction!r}.")
    chosen = RANGES if ranges is None else ranges
    _check_ranges(chosen)
    if model.config.evaluation == "means":
        warnings.warn(
            "The model evaluates by the means, to which tau_sigma is a shift of weights alone. Set "
            "model.config.evaluation = 'mixture' before the search.",
            stacklevel=2,
        )
    study = _study(optuna(), direction, seed)
    kinds = [kind for kind in KINDS if kind in model.config.attentions]
    before = {name: getattr(model.config, name) for name in IDENTITY}
    trials: list[dict] = []
    try:
        for number in range(num_trials):
            trial = study.ask()
            taus = {name: dict.fromkeys(kinds, value) for name, value in IDENTITY.items()}
            if number > 0:
                for name, by_kind in chosen.items():
                    taus[name] |= {
                        kind: trial.suggest_float(f"{name}_{kind}", *bounds)
                        for kind, bounds in by_kind.items()
                        if kind in kinds
                    }
            model.set_taus(**taus)
            value = float(score(model))
            if math.isnan(value):
                raise ValueError(f"score is nan for {taus}. Return a number, the worst one if nothing can be scored.")
            study.tell(trial, value)
            trials.append({**taus, "score": value})
    except BaseException:
        model.set_taus(**before)
        raise
    best = (min if direction == "minimize" else max)(trials, key=lambda trial: trial["score"])
    model.set_taus(**{name: best[name] for name in IDENTITY})
    return trials


def _study(package: ModuleType, direction: str, seed: int):
    verbosity = package.logging.get_verbosity()
    package.logging.set_verbosity(package.logging.WARNING)  # it tells of every trial otherwise
    study = package.create_study(direction=direction, sampler=package.samplers.TPESampler(seed=seed))
    package.logging.set_verbosity(verbosity)
    return study


def _check_ranges(ranges: dict) -> None:
    for name, by_kind in ranges.items():
        if name not in IDENTITY:
            raise ValueError(f"ranges are of tau_alpha and tau_sigma, but got one of {name!r}.")
        for kind, bounds in by_kind.items():
            if kind not in KINDS:
                raise ValueError(f"ranges[{name!r}] are of {', '.join(map(repr, KINDS))}, but got one of {kind!r}.")
            low, high = bounds
            if not low <= high:
                raise ValueError(f"ranges[{name!r}][{kind!r}] must be (low, high), but got {bounds}.")
