"""A collapse is noticed, by each of its signs, and nothing else is."""

import warnings

import pytest
import torch
from test_training import tiny_model, trainer_of
from transformers import Trainer

from nvib_hf import CollapseCallback, CollapseWarning, NvibTrainer
from nvib_hf.collapse import active_units


def test_active_units_by_hand():
    torch.manual_seed(0)
    mu, mask = torch.randn(4, 6, 5), torch.rand(4, 6) > 0.3
    mu[..., 1] = 0.3  # constant
    mu[..., 3] *= 0.05  # varies by 0.0025
    mu[~mask] = 100.0
    active = [mu[mask][:, channel].var(correction=0).item() > 0.01 for channel in range(5)]
    assert active == [True, False, True, False, True]
    assert active_units(mu, mask).item() == pytest.approx(3 / 5)


def collapsed(sign: str):
    """A model of which one sign alone tells that its latent says nothing."""
    model = tiny_model(alpha_threshold=1e-3, lambda_gaussian=0.0, lambda_dirichlet=0.0)
    width = model.nvib.size_out
    with torch.no_grad():
        model.nvib.alpha_quadratic.zero_()
        model.nvib.alpha_bias.zero_()
        if sign == "vectors kept":
            model.nvib.alpha_bias.fill_(-20.0)
        if sign in ("active units", "KL terms"):
            model.nvib.mu_logvar.weight.zero_()
            model.nvib.mu_logvar.bias.zero_()
        if sign == "active units":
            model.nvib.mu_logvar.bias[:width] = 1.0  # far from the prior, and the same for every text
    return model


def collapse_warnings(model, trainer_class, folder, callbacks=()) -> list[str]:
    trainer = trainer_of(trainer_class, model, folder, max_steps=3, learning_rate=0.0, callbacks=callbacks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not model._forward_hooks and not model._forward_pre_hooks
    return [str(w.message) for w in caught if w.category is CollapseWarning]


@pytest.mark.parametrize("sign", ["vectors kept", "active units"])
@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
def test_each_sign_is_noticed_once(sign, trainer_class, tmp_path):
    callbacks = [] if trainer_class is NvibTrainer else [CollapseCallback()]
    messages = collapse_warnings(collapsed(sign), trainer_class, tmp_path, callbacks)
    assert len(messages) == 1
    assert sign in messages[0] and "at step 2" in messages[0] and "lambda_gaussian" in messages[0]


def test_a_posterior_that_is_the_prior(tmp_path):
    model = collapsed("KL terms")
    model.nvib.prior_log_alpha.fill_(-2.0)  # so that the pseudo-counts of 1 are not the prior's
    messages = collapse_warnings(model, Trainer, tmp_path, [CollapseCallback(min_nats=1e3)])
    assert any("KL terms" in message and "below 1000" in message for message in messages)


@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
def test_a_healthy_training_is_left_alone(trainer_class, tmp_path):
    callbacks = [] if trainer_class is NvibTrainer else [CollapseCallback()]
    assert collapse_warnings(tiny_model(), trainer_class, tmp_path, callbacks) == []


def test_a_callback_of_ones_own_takes_the_place(tmp_path):
    mine = CollapseCallback(min_prop_vectors=0.0, min_active_units=0.0, min_nats=0.0)
    assert collapse_warnings(collapsed("vectors kept"), NvibTrainer, tmp_path, [mine]) == []
