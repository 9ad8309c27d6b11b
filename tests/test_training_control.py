"""Steered training: against a simulated training whose answer is known, and in every Trainer, stopped and resumed."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_training import TRAINERS, WITH_COMPILE, tiny_model, trainer_of
from tiny_text import tiny_collator
from transformers import Trainer

from nvib_hf import CollapseCallback, ConstraintCallback, NvibTrainer, ThresholdCallback

DROPPING = {"alpha_threshold": 0.1, "lambda_vectors": 1.0}
TRACE = {
    "constraint_beta",
    "constraint_cross_entropy",
    "constraint_prop_vectors",
    "constraint_tolerance",
    "threshold_share",
}


def simulate(callback, steps, cross_entropy, kept=lambda beta: 1.0, lag=50, noise=0.0, model=None):
    """A training that answers to a multiplier with a lag: what the callback made of it, one multiplier a step."""
    model = model or tiny_model(**DROPPING)
    state = SimpleNamespace(global_step=0, stateful_callbacks={}, log_history=[{}])
    args = SimpleNamespace(device="cpu")
    callback.on_train_begin(args, state, None, model=model)
    generator = torch.Generator().manual_seed(0)
    settled, betas = math.log(callback.beta), []
    for step in range(1, steps + 1):
        settled += (math.log(callback.beta) - settled) / lag
        factor = math.exp(noise * torch.randn((), generator=generator).item())
        means = {
            "cross_entropy": factor * cross_entropy(step, math.exp(settled)),
            "prop_vectors": kept(math.exp(settled)),
        }
        callback.measured = lambda device, means=means: means
        state.global_step = step
        callback.on_step_end(args, state, None, model=model)
        betas.append(callback.beta)
        assert model.kl_beta.tolist() == pytest.approx([callback.beta] * 3)
    callback.on_train_end(args, state, None, model=model)
    return betas


# -------------------------------------------------------------------------------------------- the controller
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("lag", [1, 50, 200])
def test_settles_where_the_constraint_is_met(lag, noise):
    """Cross-entropy 0.05 + beta / 10, so 0.15 is met by a multiplier of 1."""
    betas = simulate(
        ConstraintCallback(cross_entropy=0.15, start_beta=0.01),
        4000,
        lambda step, beta: 0.05 + beta / 10,
        lag=lag,
        noise=noise,
    )
    assert max(betas) < 2.5  # an overshoot is what makes a VAE collapse
    last = betas[3000:]
    assert sum(last) / len(last) == pytest.approx(1.0, abs=0.1)
    assert max(last) - min(last) < 0.1 + 4 * noise  # no oscillation


def test_begins_when_the_constraint_is_met_and_not_before():
    model = tiny_model(**DROPPING)
    callback = ConstraintCallback(cross_entropy=0.15, start_beta=0.02)
    betas = simulate(callback, 400, lambda step, beta: 2.0, model=model)
    assert set(betas) == {callback.beta} and callback.beta == pytest.approx(0.02)
    assert model.nvib.threshold_share == 0
    betas = simulate(callback, 400, lambda step, beta: 0.1, model=model)
    assert betas[-1] > 0.02
    assert model.nvib.threshold_share == pytest.approx(callback.threshold_share)


def test_gives_way_when_the_reconstruction_is_lost():
    """A text that is lost at step 500 brings the weights down, and they come back with it."""
    betas = simulate(
        ConstraintCallback(cross_entropy=0.15),
        1500,
        lambda step, beta: 2.0 if 500 < step <= 1000 else 0.1,
    )
    assert betas[999] < 0.1 * betas[499] and betas[-1] > 3 * betas[999]


@pytest.mark.parametrize("start", [0.01, 3.0])
def test_settles_at_the_share_of_vectors(start):
    """Kept is 1 / (1 + beta), so 0.4 is kept at 1.5."""
    betas = simulate(
        ConstraintCallback(target_prop_vectors=0.4, start_beta=start),
        4000,
        lambda step, beta: 0.1,
        kept=lambda beta: 1 / (1 + beta),
    )
    assert betas[-1] == pytest.approx(1.5, rel=0.05)


def test_a_metric_moves_the_tolerance():
    callback = ConstraintCallback(cross_entropy=0.1, metric="eval_bleu", metric_target=90.0)
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 50.0})
    assert callback.tolerance == 0.1  # nothing is compressed yet
    simulate(callback, 20, lambda step, beta: 0.05)
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 81.0})
    assert callback.tolerance == pytest.approx(0.1 * math.exp(-0.5))
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 90.9})
    assert callback.tolerance == pytest.approx(0.1 * math.exp(-0.45))
    with pytest.raises(ValueError, match=r"eval_bleu.* not among .*eval_loss"):
        callback.on_evaluate(None, None, None, metrics={"eval_loss": 1.0})


def test_threshold_callback_leaves_the_weights():
    model = tiny_model(alpha_threshold=0.1)
    callback = ThresholdCallback(cross_entropy=0.2, threshold_share=0.5)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    args = SimpleNamespace(device="cpu")
    callback.on_train_begin(args, state, None, model=model)
    assert model.nvib.threshold_share == 0
    for cross_entropy, expected in ((1.0, 0.0), (0.01, 0.0), (0.0, 0.0), *[(0.0, None)] * 8, (5.0, 0.5)):
        callback.measured = lambda device, value=cross_entropy: {"cross_entropy": value, "prop_vectors": 1.0}
        state.global_step += 10
        callback.on_step_end(args, state, None, model=model)
        if expected is not None:
            assert model.nvib.threshold_share == expected  # once begun it stays
    assert model.kl_beta.tolist() == [1.0] * 3


# -------------------------------------------------------------------------------------------- in a training
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_traced_in_any_trainer(trainer_class, tmp_path):
    model = tiny_model(**DROPPING)
    callback = ConstraintCallback(cross_entropy=1e3, start_beta=0.5, interval=2)
    trainer = trainer_of(trainer_class, model, tmp_path, max_steps=8, callbacks=[callback])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 8 and set(logs[-1]) >= TRACE
    assert logs[0]["constraint_beta"] == pytest.approx(0.5) and logs[0]["threshold_share"] == 0
    assert logs[-1]["constraint_beta"] > 0.5 and logs[-1]["threshold_share"] == 0.7
    assert logs[-1]["constraint_cross_entropy"] == pytest.approx(4, abs=2)
    assert model.kl_beta.tolist() == pytest.approx([callback.beta] * 3)
    assert not model._forward_hooks


@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one(trainer_class, restore, tmp_path):
    def train(folder, resume=None):
        callback = ConstraintCallback(cross_entropy=10.0, start_beta=0.5, rate=0.05, interval=2)
        trainer = trainer_of(
            trainer_class,
            tiny_model(**DROPPING),
            folder,
            max_steps=12,
            save_strategy="steps",
            save_steps=6,
            learning_rate=1e-3,
            restore_callback_states_from_checkpoint=restore,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, [(x["loss"], x["constraint_beta"]) for x in trainer.state.log_history if "loss" in x]

    _, whole = train(tmp_path / "whole")
    assert whole[-1][1] != whole[5][1]
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["ConstraintCallback"]
    assert saved["attributes"]["started"] is True
    trainer, resumed = train(tmp_path / "resumed", str(checkpoint))
    assert [b for _, b in resumed] == pytest.approx([b for _, b in whole])
    assert resumed[-1][0] == pytest.approx(whole[-1][0], rel=1e-4)
    assert trainer.model.nvib.threshold_share == pytest.approx(0.7)


@WITH_COMPILE
def test_under_torch_compile(tmp_path):
    def trace(**arguments):
        callbacks = [ConstraintCallback(cross_entropy=1e3, interval=1, threshold_share=1.0), CollapseCallback()]
        model = tiny_model(**DROPPING)
        trainer = trainer_of(Trainer, model, tmp_path, max_steps=3, callbacks=callbacks, **arguments)
        trainer.train()
        return [x["constraint_cross_entropy"] for x in trainer.state.log_history if "constraint_cross_entropy" in x]

    assert trace(torch_compile=True, torch_compile_backend="eager") == pytest.approx(trace(), rel=1e-3)


def test_evaluations_on_the_way_are_not_measured(tmp_path):
    def trace(**arguments):
        callback = ConstraintCallback(cross_entropy=1e3, interval=2)
        trainer = trainer_of(Trainer, tiny_model(**DROPPING), tmp_path, max_steps=6, callbacks=[callback], **arguments)
        trainer.train()
        return [x["constraint_cross_entropy"] for x in trainer.state.log_history if "constraint_cross_entropy" in x]

    assert trace(eval_strategy="steps", eval_steps=1) == pytest.approx(trace(), rel=1e-3)


def test_a_training_that_was_broken_off_leaves_nothing_behind(tmp_path):
    model, callback = tiny_model(**DROPPING), ConstraintCallback()
    trainer = trainer_of(Trainer, model, tmp_path, max_steps=2, callbacks=[callback])
    with pytest.raises(TypeError):
        trainer.data_collator = None
        trainer.train()
    trainer.data_collator = tiny_collator(model)
    trainer.train()
    assert not model._forward_hooks


# -------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cross_entropy": 0.0}, "cross_entropy must be a positive number, but got 0.0"),
        ({"start_beta": -1.0}, "start_beta must be a positive number, but got -1.0"),
        ({"rate": 0.0}, "rate must be a positive number"),
        ({"gain": -1.0}, "gain must be 0 or positive, but got -1.0"),
        ({"interval": 0}, "interval must be a positive number, but got 0"),
        ({"threshold_share": 0.0}, "threshold_share must be in .* but got 0.0"),
        ({"target_prop_vectors": 1.0}, "target_prop_vectors must be in .* but got 1.0"),
        ({"metric": "eval_bleu"}, "metric='eval_bleu' and metric_target=None belong together"),
        ({"metric": "x", "metric_target": 1.0, "target_prop_vectors": 0.5}, "two constraints on one multiplier"),
    ],
)
def test_refuses_arguments_outside_their_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConstraintCallback(**arguments)


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (ConstraintCallback(target_prop_vectors=0.5), {"alpha_threshold": 0.1}, "lambda_vectors"),
        (ConstraintCallback(), {"lambda_gaussian": 0.0, "lambda_dirichlet": 0.0}, "lambda_.* are 0"),
        (ThresholdCallback(), {}, "alpha_threshold=0"),
    ],
)
def test_refuses_a_model_it_cannot_steer(callback, settings, message, tmp_path):
    trainer = trainer_of(Trainer, tiny_model(**settings), tmp_path, max_steps=1, callbacks=[callback])
    with pytest.raises(ValueError, match=message):
        trainer.train()
