"""The search for taus on validation data."""

import sys

import pytest
import torch
from tiny_models import tiny_base, tiny_inputs, tiny_labels

from nvib_hf import NvibForConditionalGeneration, search_taus
from nvib_hf.training.tau_search import RANGES

ALL = ["cross", "encoder", "decoder"]


def model_of(attentions=ALL, **settings):
    settings = {"evaluation": "mixture", **settings}
    base = tiny_base("bart")
    return NvibForConditionalGeneration.from_base_pretrained(base, attentions=attentions, **settings).eval()


def distance(model):
    """Least at tau_alpha 2 of the encoder and tau_sigma 0.15 of the cross-attention."""
    encoder, cross = model.config.taus("encoder"), model.config.taus("cross")
    return (encoder["tau_alpha"] - 2) ** 2 + (10 * (cross["tau_sigma"] - 0.15)) ** 2


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_it_finds_the_optimum(direction):
    model, sign = model_of(), 1 if direction == "minimize" else -1
    trials = search_taus(model, lambda model: sign * distance(model), 40, direction=direction)
    assert len(trials) == 40
    best = min(sign * trial["score"] for trial in trials)
    assert best < 0.1 and distance(model) == pytest.approx(best)
    assert model.nvib_layers()["encoder.0"].alpha_bias.item() == pytest.approx(model.config.tau_alpha["encoder"])
    for trial in trials[1:]:
        for name, by_kind in RANGES.items():
            assert set(trial[name]) == set(ALL)
            assert all(by_kind[kind][0] <= value <= by_kind[kind][1] for kind, value in trial[name].items())


def test_the_first_trial_is_the_pretrained_model():
    model, inputs, labels = model_of(), tiny_inputs("bart"), tiny_labels("bart")
    expected = tiny_base("bart")(**inputs, labels=labels).loss.item()

    def score(model):
        with torch.no_grad():
            return model(**inputs, labels=labels).cross_entropy.item()

    trials = search_taus(model, score, 6)
    assert trials[0]["score"] == pytest.approx(expected, rel=1e-3)
    assert trials[0]["tau_alpha"] == dict.fromkeys(ALL, 10.0)
    assert len({trial["score"] for trial in trials}) == 6
    assert score(model) == min(trial["score"] for trial in trials)


def test_a_seed_determines_the_trials():
    runs = [search_taus(model_of(), distance, 5, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_kinds_without_nvib_and_without_a_range_are_left_alone():
    model = model_of(["cross", "decoder"])
    trials = search_taus(model, lambda model: 0.0, 3, ranges={"tau_alpha": {"decoder": (3.0, 4.0), "encoder": (0, 1)}})
    assert all(set(trial["tau_alpha"]) == {"cross", "decoder"} for trial in trials)
    assert {trial["tau_alpha"]["cross"] for trial in trials} == {10.0}
    assert all(3 <= trial["tau_alpha"]["decoder"] <= 4 for trial in trials[1:])


@pytest.mark.parametrize("fault", [RuntimeError("no such file"), float("nan")])
def test_an_error_leaves_the_taus_as_they_were(fault):
    model, calls = model_of(tau_alpha=7.0), []

    def score(model):
        calls.append(model.config.tau_alpha)
        if len(calls) < 3:
            return 1.0
        if isinstance(fault, float):
            return fault
        raise fault

    with pytest.raises((RuntimeError, ValueError), match=r"no such file|score is nan"):
        search_taus(model, score, 5)
    assert model.config.tau_alpha == 7.0
    assert {layer.alpha_bias.item() for layer in model.nvib_layers().values()} == {7.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_trials": 0}, "num_trials"),
        ({"direction": "down"}, "direction"),
        ({"ranges": {"tau_mu": {}}}, "tau_mu"),
        ({"ranges": {"tau_alpha": {"self": (0, 1)}}}, "'self'"),
        ({"ranges": {"tau_alpha": {"cross": (1, 0)}}}, r"\(low, high\)"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        search_taus(model_of(), distance, **{"num_trials": 2, **arguments})


def test_evaluation_by_the_means_is_warned_of():
    with pytest.warns(UserWarning, match="mixture"):
        search_taus(model_of(evaluation="means"), distance, 1)


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"nvib-hf\[search\]"):
        search_taus(model_of(), distance, 1)
