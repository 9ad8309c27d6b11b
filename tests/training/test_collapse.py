"""A collapse is noticed, by each of its signs, an evaluation that falls behind as well, and nothing else is."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from tiny_text import tiny_collator, tiny_examples
from tiny_training import TRAINERS, WITH_COMPILE, tiny_model, trainer_of
from transformers import Trainer, TrainerCallback

from nvib_hf import CollapseCallback, CollapseWarning, EvaluationGapWarning, NvibTrainer
from nvib_hf.training.collapse import ChannelMoments


def test_active_units_by_hand():
    torch.manual_seed(0)
    mu, mask = torch.randn(4, 6, 5), torch.rand(4, 6) > 0.3
    mu[..., 1] = 0.3  # constant
    mu[..., 3] *= 0.05  # varies by 0.0025
    mu[~mask] = 100.0
    active = [mu[mask][:, channel].var(correction=0).item() > 0.01 for channel in range(5)]
    assert active == [True, False, True, False, True]
    moments = ChannelMoments()
    for texts in (slice(0, 1), slice(1, 4)):
        moments.add(mu[texts], mask[texts])
    assert moments.active_units() == pytest.approx(3 / 5)
    assert moments.active_units(prior_var=torch.tensor([1.0, 1.0, 1e3, 1e-2, 1.0])) == pytest.approx(3 / 5)
    assert ChannelMoments().active_units() == 0


def test_a_channel_is_active_by_its_variance_around_the_mean():
    """Means far from 0 that are the same for every vector tell nothing, in half precision either."""
    mu = torch.full((8, 16, 2), 300.0, dtype=torch.bfloat16)
    mu[..., 1] += 2 * torch.arange(16)
    moments = ChannelMoments()
    moments.add(mu, torch.ones(8, 16, dtype=torch.bool))
    assert moments.active_units() == 0.5


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


def collapse_warnings(model, trainer_class, folder, callbacks=(), category=CollapseWarning, **arguments) -> list[str]:
    arguments = {"max_steps": 3, "learning_rate": 0.0, **arguments}
    trainer = trainer_of(trainer_class, model, folder, callbacks=callbacks, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not model._forward_hooks and not model._forward_pre_hooks
    return [str(w.message) for w in caught if w.category is category]


@pytest.mark.parametrize("sign", ["vectors kept", "active units"])
@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
def test_each_sign_is_noticed_once(sign, trainer_class, tmp_path):
    callbacks = [CollapseCallback(interval=1)]
    messages = collapse_warnings(collapsed(sign), trainer_class, tmp_path, callbacks)
    assert len(messages) == 1
    assert sign in messages[0] and "at step 2" in messages[0] and "lambda_gaussian" in messages[0]


def test_a_posterior_that_is_the_prior(tmp_path):
    """Means 0, variances 1, and pseudo-counts that add up to what the prior expects: delta each, 1 of its own."""
    model = collapsed("KL terms")
    model.nvib.alpha_bias.data.fill_(math.log(model.config.delta))
    messages = collapse_warnings(model, NvibTrainer, tmp_path)  # which brings the callback along
    assert len(messages) == 1
    assert "KL terms are" in messages[0] and "nats per vector, below 0.1" in messages[0] and "at step 2" in messages[0]
    with torch.no_grad():  # 0.1 nats more a vector, by each of the two terms, and it is not
        model.nvib.mu_logvar.bias[: model.nvib.size_out] = math.sqrt(2 * 0.15 / model.nvib.size_out)
    assert collapse_warnings(model, NvibTrainer, tmp_path) == []


@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
def test_a_healthy_training_is_left_alone(trainer_class, tmp_path):
    callbacks = [CollapseCallback(interval=1)]
    assert collapse_warnings(tiny_model(), trainer_class, tmp_path, callbacks) == []
    assert collapse_warnings(tiny_model(), trainer_class, tmp_path, callbacks, EvaluationGapWarning) == []


def test_a_callback_of_ones_own_takes_the_place(tmp_path):
    mine = CollapseCallback(min_prop_vectors=0.0, min_active_units=0.0, min_nats=0.0)
    assert collapse_warnings(collapsed("vectors kept"), NvibTrainer, tmp_path, [mine]) == []


# -------------------------------------------------------------------------------- training and evaluation apart
@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
def test_an_evaluation_that_falls_behind_is_noticed_once(trainer_class, tmp_path):
    """All vectors are below the threshold, which drops in 0.1 % of the training examples and in all of evaluation."""
    model = tiny_model(
        tau_alpha=0.0, alpha_threshold=1e6, dropping_share=1e-3, lambda_gaussian=0.0, lambda_dirichlet=0.0
    )

    def gaps(**arguments) -> list[str]:
        callback = CollapseCallback(interval=5)
        return collapse_warnings(
            model, trainer_class, tmp_path, [callback], EvaluationGapWarning, examples=4, **arguments
        )

    messages = gaps(max_steps=60, learning_rate=5e-3)
    assert len(messages) == 1
    assert "Evaluation falls behind" in messages[0] and "dropping_share" in messages[0] and "0% of" in messages[0]
    model.config.evaluation = "mixture"
    messages = gaps(max_steps=10)
    assert len(messages) == 1 and 'model.config.evaluation = "means"' in messages[0] and "at step 10" in messages[0]
    model.nvib.dropping_share.zero_()  # off, in evaluation too
    assert gaps(max_steps=10) == []


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_the_batch_is_decoded_as_in_evaluation(trainer_class, tmp_path):
    """Without a word of the training's noise, every second step, at the weights of that step."""
    model = tiny_model(dropout=0.3, tau_sigma=1.0, tau_alpha=0.0, word_dropout=0.5, word_dropout_token_id=3)
    callback = CollapseCallback(interval=2)
    trainer = trainer_of(
        trainer_class, model, tmp_path, examples=4, max_steps=4, learning_rate=0.0, callbacks=[callback]
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["evaluation_cross_entropy" in entry for entry in logs] == [False, True, False, True]
    with torch.no_grad():
        expected = model.eval()(**tiny_collator(model)(tiny_examples(4))).cross_entropy.item()
    assert logs[1]["evaluation_cross_entropy"] == pytest.approx(expected, rel=1e-4)
    if trainer_class is NvibTrainer:
        assert logs[1]["cross_entropy"] != pytest.approx(expected, rel=1e-3)


class States(TrainerCallback):
    """All that a training has at the end of each step, the generators of random numbers included."""

    def __init__(self, watching):
        self.states, self.watching = [], watching

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert all(callback._last is None for callback in self.watching)  # no batch is held from one step to the next
        self.states.append(
            {
                "random": (torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))),
                "python": torch.tensor(random.getstate()[1]),
                "modes": torch.tensor([module.training for module in model.modules()]),
                "gradients": torch.tensor([p.grad is not None for p in model.parameters()]),
                "tensors": [x.detach().clone() for x in (*model.parameters(), *model.buffers())],
            }
        )


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return len(first) == len(second) and all(same(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=str,
)
def test_the_training_is_the_same_with_and_without(arguments, tmp_path):
    def train(callbacks):
        model = tiny_model(dropout=0.3, tau_sigma=0.5, kappa=2, word_dropout=0.3, word_dropout_token_id=3)
        states = States(callbacks)
        trainer = trainer_of(
            Trainer,
            model,
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=2,
            callbacks=[*callbacks, states],
            **arguments,
        )
        trainer.train()
        assert any("evaluation_cross_entropy" in x for x in trainer.state.log_history) == bool(callbacks)
        return states.states

    plain, watched = train([]), train([CollapseCallback(interval=1)])
    assert len(plain) == 4
    for first, second in zip(plain, watched, strict=True):
        assert all(same(first[name], second[name]) for name in first)


@WITH_COMPILE
def test_a_checkpoint_between_two_logs_loses_no_step(tmp_path):
    class Noting(CollapseCallback):
        means: list

        def measured(self, device):
            self.means = [*getattr(self, "means", []), super().measured(device)]
            return self.means[-1]

    def train(folder, resume=None):
        callback = Noting()
        arguments = {"max_steps": 8, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer_of(Trainer, tiny_model(), folder, callbacks=[callback], **arguments).train(
            resume_from_checkpoint=resume
        )
        return callback.means

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed == [pytest.approx(whole[-1])] and whole[0]["prop_vectors"] > 0


def test_under_torch_compile(tmp_path):
    def trace(**arguments):
        trainer = trainer_of(
            Trainer, tiny_model(), tmp_path, max_steps=3, callbacks=[CollapseCallback(interval=1)], **arguments
        )
        trainer.train()
        return [x["evaluation_cross_entropy"] for x in trainer.state.log_history if "loss" in x]

    assert trace(torch_compile=True, torch_compile_backend="eager") == pytest.approx(trace(), rel=1e-3)


def test_refuses_an_interval_below_one():
    with pytest.raises(ValueError, match="interval must be at least 1 step, but got 0"):
        CollapseCallback(interval=0)
