"""Every setting is checked by type and range, in one table: by the configuration, and by the layer."""

import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import BartConfig, PreTrainedConfig

from nvib_hf import Nvib, NvibConfig
from nvib_hf.configuration_nvib import TAUS, setting_names
from nvib_hf.layers.settings import CHOICES, RANGES, SWITCHES, checked

NUMBERS = sorted(set(RANGES) & {field.name for field in fields(NvibConfig)})


def test_every_field_of_the_configuration_is_in_the_table():
    by_hand = {"base_config", "base_architecture", "attentions", "encoder_merge_share", "latent_prior"}
    by_hand |= {"prior_mu", "prior_var"}
    own = {field.name for field in fields(NvibConfig)} - {field.name for field in fields(PreTrainedConfig)}
    assert own - by_hand == {*RANGES, *CHOICES, *SWITCHES} - {"scale", "size_in", "size_out", "is_encoder_decoder"}
    assert setting_names() >= {*TAUS, *CHOICES}


@pytest.mark.parametrize("wrong", [True, None, "much", [2], {}, 1j, torch.ones(2)], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_no_other_type(name, wrong):
    if (name in TAUS and wrong == {}) or (name == "word_dropout_token_id" and wrong is None):
        return  # which say something
    with pytest.raises(TypeError, match=f"^{name} must be a number, but got .*Pass"):
        NvibConfig(**{name: wrong})


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_finite(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} must be .*{wrong}"):
        NvibConfig(**{name: wrong})


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"tau_alpha"}))
def test_a_number_is_in_its_range(name):
    with pytest.raises(ValueError, match=f"^{name} must be {re.escape(RANGES[name].words)}, but got -1"):
        NvibConfig(**{name: -1})


@pytest.mark.parametrize("wrong", ["false", "True", 0, 1, None, []], ids=repr)
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false(name, wrong):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, but got {wrong!r}".replace("[", r"\[")):
        NvibConfig(**{name: wrong, "evaluation": "mixture"})


@pytest.mark.parametrize("wrong", [3, None, "EXP", ["exp"], True], ids=repr)
@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_them(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} must be one of '{CHOICES[name][0]}'"):
        NvibConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("prior_var", "a", TypeError, "prior_var must be a number, or one for each channel, but got 'a'"),
        ("prior_mu", {}, TypeError, "prior_mu must be a number, or one for each channel"),
        ("prior_mu", True, TypeError, "prior_mu must be a number, or one for each channel, but got True"),
        ("prior_mu", [[1.0, 2.0]], ValueError, r"prior_mu has shape \(1, 2\)"),
        ("prior_var", float("inf"), ValueError, "prior_var must be finite, but got inf"),
        ("attentions", 3, TypeError, "attentions must be a list of 'cross', 'encoder', 'decoder'.* but got 3"),
        ("attentions", [["cross"]], ValueError, "attentions must be one of 'cross'"),
        ("attentions", {"encoder": True}, ValueError, r"attentions\['encoder'\] must be 'all' or numbers of layers"),
        ("attentions", {"encoder": [True]}, ValueError, r"attentions\['encoder'\] must be 'all' or numbers of layers"),
        ("base_config", "facebook/bart-base", TypeError, r"base_config .*'facebook/bart-base'. Pass .*AutoConfig"),
        ("base_architecture", 3, TypeError, "base_architecture must be the name of a class, but got 3"),
        ("config_version", "2", TypeError, "config_version must be a number, but got '2'"),
        ("config_version", 0, ValueError, "config_version must be a whole number of at least 1, but got 0"),
    ],
)
def test_the_others_are_named_too(name, wrong, error, message):
    with pytest.raises(error, match=message):
        NvibConfig(**{name: wrong})


@pytest.mark.parametrize("name", ["alpha_threshold", "delta", "kappa", "prior_alpha", "scale", "dropping_share"])
@pytest.mark.parametrize("wrong", ["2", True, [2], -1, float("inf"), float("nan")], ids=repr)
def test_the_layer_refuses_them_too(name, wrong):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be "):
        Nvib(4, 4, **{name: wrong})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 0), "size_in must be a whole number of at least 1, but got 0"),
        ((4, 0), "size_out must be a whole number of at least 1, but got 0"),
        ((-1, 4), "size_in must be a whole number of at least 1, but got -1"),
        ((4, 4.5), "size_out must be a whole number of at least 1, but got 4.5"),
        ((4, "4"), "size_out must be a number, but got '4'"),
    ],
)
def test_sizes_of_the_layer(sizes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Nvib(*sizes)


def test_numbers_of_numpy_and_torch_are_numbers():
    assert checked("kappa", np.int64(3)) == checked("kappa", torch.tensor(3.0)) == 3
    assert checked("delta", np.float32(0.5)) == checked("delta", torch.tensor([0.5])) == 0.5
    assert checked("accumulate_alpha", np.bool_(True)) is True
    assert Nvib(np.int64(4), 4.0, kappa=torch.tensor(2)).kappa == 2


def test_nothing_is_said_of_what_is_right():
    right = {"attentions": {"cross": "all", "encoder": range(1)}, "word_dropout_token_id": 0, "tau_sigma": {}}
    config = NvibConfig(base_config=BartConfig(), base_architecture="BartForConditionalGeneration", **right)
    assert config.attentions == {"cross": "all", "encoder": [0]}
