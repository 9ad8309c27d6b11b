"""A search, without training, for the ``tau_*`` that suit a pretrained model on another domain best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import ModuleType

from ..configuration_nvib import TAUS
from ..layers.settings import KINDS
from ..wrapping.pretrained import NvibPreTrainedModel

# For each kind of attention, from Fehr & Henderson (COLM 2024).
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
    r"""Try several regularisations of a pretrained model and keep the best.

    Each trial sets ``tau_alpha`` and ``tau_sigma`` of every kind of attention that has NVIB
    (:meth:`~nvib_hf.NvibForConditionalGeneration.set_taus`), and scores the model on validation data of the new
    domain. The first trial is the identity, so on this data the best trial is never worse than the pretrained model.
    Call ``fit_prior`` on data of the training domain first.

    Args:
        model: in ``eval()``, with evaluation ``"mixture"``. With ``"means"``, variances only shift weights.
        score: returns the score of the model, for instance its word error rate over the validation data.
        num_trials: how many trials, including the identity.
        direction: ``"minimize"`` the score, or ``"maximize"`` it.
        ranges: ``{"tau_alpha": {"encoder": (0.0, 5.0), ...}, "tau_sigma": ...}``, in place of :data:`RANGES`. A kind
            that you leave out stays at the identity.
        seed: seed of the trials: 10 are random, TPE proposes the later ones.

    Returns:
        The trials in their order: ``tau_alpha`` and ``tau_sigma``, dicts by kind, and ``score``. The model has the
        taus of the best one. If ``score`` raises an error, the model has the taus it had before.

    Raises:
        ImportError: optuna is not installed.
        ValueError: fewer than one trial; another direction; ranges for an unknown tau or kind; a score that is nan.

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
            "The model has evaluation='means', where tau_sigma only shifts weights. Set model.config.evaluation = "
            "'mixture' before the search.",
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
    package.logging.set_verbosity(package.logging.WARNING)  # otherwise it logs every trial
    study = package.create_study(direction=direction, sampler=package.samplers.TPESampler(seed=seed))
    package.logging.set_verbosity(verbosity)
    return study


def _check_ranges(ranges: dict) -> None:
    for name, by_kind in ranges.items():
        if name not in IDENTITY:
            raise ValueError(f"ranges must be for tau_alpha or tau_sigma, but got one for {name!r}.")
        for kind, bounds in by_kind.items():
            if kind not in KINDS:
                raise ValueError(
                    f"ranges[{name!r}] must be for {', '.join(map(repr, KINDS))}, but got one for {kind!r}."
                )
            low, high = bounds
            if not low <= high:
                raise ValueError(f"ranges[{name!r}][{kind!r}] must be (low, high), but got {bounds}.")
