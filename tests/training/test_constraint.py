"""Steered training: against a simulated training whose answer is known, and in every Trainer, stopped and resumed."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny_text import tiny_collator
from tiny_training import TRAINERS, WITH_COMPILE, tiny_model, trainer_of
from transformers import Trainer, TrainerState

from nvib_hf import CollapseCallback, ConstraintCallback, NvibTrainer, ThresholdCallback

DROPPING = {"alpha_threshold": 0.1, "lambda_vectors": 1.0}
TRACE = {
    "constraint_beta",
    "constraint_beta_vectors",
    "constraint_cross_entropy",
    "constraint_prop_vectors",
    "constraint_tolerance",
    "dropping_share",
}


@dataclass
class Step:
    """Of a simulated training: the multipliers after it, and what was measured at it."""

    beta: float
    beta_vectors: float
    share: float
    cross_entropy: float


def simulate(
    callback, steps, cross_entropy, kept=lambda beta: 1.0, lag=50, noise=0.0, model=None, is_over=True
) -> list[Step]:
    """A training that answers to its multipliers with a lag, and ends unless ``is_over`` is False.

    ``cross_entropy(step, beta, share)`` is what the model settles at, ``kept(beta_vectors)`` the share that it falls
    to. Dropping is a cliff: what was dropped comes back ten times as slowly as it went.
    """
    model = model or tiny_model(**DROPPING)
    state = TrainerState(max_steps=10**6, log_history=[{}])
    args = SimpleNamespace(device="cpu")
    callback.on_train_begin(args, state, None, model=model)
    noises = torch.randn(steps, 2, generator=torch.Generator().manual_seed(0)) * noise * torch.tensor([1.0, 0.05])
    settled, settled_vectors, share = math.log(callback.beta), math.log(callback.beta_vectors), 1.0
    trace = []
    for step, (factor, factor_of_share) in enumerate(noises.exp().tolist(), start=1):
        settled += (math.log(callback.beta) - settled) / lag
        settled_vectors += (math.log(callback.beta_vectors) - settled_vectors) / lag
        change = kept(math.exp(settled_vectors)) - share
        share += change / (lag if change < 0 else 10 * lag)
        measured = factor * cross_entropy(step, math.exp(settled), share)
        means = {"cross_entropy": measured, "prop_vectors": factor_of_share * share}
        callback.measured = lambda device, means=means: means
        state.global_step = step
        callback.on_step_end(args, state, None, model=model)
        trace.append(Step(callback.beta, callback.beta_vectors, share, measured))
        if step % 100 == 0:
            assert model.kl_beta.tolist() == pytest.approx([callback.beta] * 2 + [callback.beta_vectors])
    if is_over:
        callback.on_train_end(args, state, None, model=model)
    return trace


def mean(trace: list[Step], name: str) -> float:
    return sum(getattr(step, name) for step in trace) / len(trace)


# -------------------------------------------------------------------------------------------- the controllers
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("lag", [1, 50, 200])
def test_settles_where_the_constraint_is_met(lag, noise):
    """Cross-entropy 0.05 + beta / 10, so 0.15 is met by a multiplier of 1."""
    trace = simulate(
        ConstraintCallback(cross_entropy=0.15, start_beta=0.01),
        4000,
        lambda step, beta, share: 0.05 + beta / 10,
        lag=lag,
        noise=noise,
    )
    assert max(step.beta for step in trace) < 2.5  # an overshoot is what makes a VAE collapse
    assert all(step.beta_vectors == step.beta for step in trace)  # there is no share to hold
    last = trace[3000:]
    assert mean(last, "beta") == pytest.approx(1.0, abs=0.1)
    assert max(step.beta for step in last) - min(step.beta for step in last) < 0.1 + 4 * noise  # no oscillation


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("lag", [1, 50, 200])
@pytest.mark.parametrize("target", [0.45, 0.6])
def test_holds_a_share_and_compresses_what_is_kept(target, lag, noise):
    """The share falls to 1 / (1 + beta_vectors^2), and what is dropped costs up to 0.05 nats of the 0.3 accepted."""
    trace = simulate(
        ConstraintCallback(cross_entropy=0.3, target_prop_vectors=target),
        6000,
        lambda step, beta, share: 0.05 + beta / 20 + 0.05 * (1 - share),
        kept=lambda beta: 1 / (1 + beta**2),
        lag=lag,
        noise=noise,
    )
    assert min(step.share for step in trace) > target - 0.03
    last = trace[5000:]
    assert all(abs(step.share - target) < 0.05 for step in last)
    assert mean(last, "cross_entropy") == pytest.approx(0.3, rel=0.03)
    assert max(step.cross_entropy for step in trace) < 0.3 * (1.5 + 5 * noise)
    assert mean(last, "beta") == pytest.approx(20 * (0.25 - 0.05 * (1 - target)), rel=0.05)
    assert mean(last, "beta") > 2 * mean(last, "beta_vectors")  # one multiplier would have stopped there


def test_the_weights_of_the_kls_go_on_rising_where_the_share_is_reached():
    trace = simulate(
        ConstraintCallback(cross_entropy=0.3, target_prop_vectors=0.6),
        5000,
        lambda step, beta, share: 0.2,  # whatever the multipliers: there is room left
        kept=lambda beta: 1 / (1 + beta**2),
    )
    reached = next(i for i, step in enumerate(trace) if step.share < 0.63)
    assert reached < 4000
    assert trace[-1].beta > 5 * trace[reached].beta and trace[-1].share == pytest.approx(0.6, abs=0.03)


def test_the_share_comes_before_the_kls_and_the_reconstruction_before_the_share():
    """A share that costs all but 0.06 of the 0.3 accepted, then one that cannot be paid for."""

    def last(cross_entropy) -> list[Step]:
        callback = ConstraintCallback(cross_entropy=0.3, target_prop_vectors=0.5)
        return simulate(callback, 8000, cross_entropy, kept=lambda beta: 1 / (1 + beta**2))[7000:]

    trace = last(lambda step, beta, share: 0.04 + beta / 20 + 0.4 * (1 - share))
    assert mean(trace, "share") == pytest.approx(0.5, abs=0.03)
    assert mean(trace, "beta") == pytest.approx(20 * (0.26 - 0.4 * (1 - mean(trace, "share"))), rel=0.05)
    trace = last(lambda step, beta, share: 0.05 + beta / 20 + (1 - share))
    assert mean(trace, "share") > 0.7
    assert mean(trace, "cross_entropy") < 1.1 * 0.3


def test_the_share_yields_when_the_reconstruction_is_lost():
    trace = simulate(
        ConstraintCallback(cross_entropy=0.3, target_prop_vectors=0.5),
        2000,
        lambda step, beta, share: 2.0 if 1000 < step <= 1500 else 0.1,
        kept=lambda beta: 1 / (1 + beta**2),
    )
    before, lost, after = trace[999], trace[1499], trace[-1]
    assert before.share > 0.5  # still on its way down
    assert lost.beta_vectors < 0.1 * before.beta_vectors and after.beta_vectors > 2 * lost.beta_vectors


def test_begins_when_the_constraint_is_met_and_not_before():
    model = tiny_model(**DROPPING)
    callback = ConstraintCallback(cross_entropy=0.15, start_beta=0.02)
    trace = simulate(callback, 400, lambda step, beta, share: 2.0, model=model)
    assert all(step.beta == step.beta_vectors == pytest.approx(0.02) for step in trace)
    assert model.nvib.dropping_share == 0
    trace = simulate(callback, 400, lambda step, beta, share: 0.1, model=model)
    assert trace[-1].beta > 0.02
    assert model.nvib.dropping_share == pytest.approx(callback.dropping_share)


def test_gives_way_when_the_reconstruction_is_lost():
    """A text that is lost at step 500 brings the weights down, and they come back with it."""
    trace = simulate(
        ConstraintCallback(cross_entropy=0.15),
        1500,
        lambda step, beta, share: 2.0 if 500 < step <= 1000 else 0.1,
    )
    assert trace[999].beta < 0.1 * trace[499].beta and trace[-1].beta > 3 * trace[999].beta


@pytest.mark.parametrize("start", [0.01, 3.0])
def test_settles_at_the_share_of_vectors(start):
    """Kept is 1 / (1 + beta), so 0.4 is kept at 1.5."""
    trace = simulate(
        ConstraintCallback(target_prop_vectors=0.4, start_beta=start),
        6000,
        lambda step, beta, share: 0.1,
        kept=lambda beta: 1 / (1 + beta),
    )
    assert trace[-1].beta_vectors == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_metric_moves_the_tolerance(share):
    callback = ConstraintCallback(cross_entropy=0.1, metric="eval_bleu", metric_target=90.0, target_prop_vectors=share)
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 95.0})
    simulate(callback, 20, lambda step, beta, share: 0.05, is_over=False)
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 81.0})
    assert callback.tolerance == 0.1 and not callback.started  # nothing is compressed yet
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 90.0})
    assert callback.tolerance == 0.1 and callback.started
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 81.0})
    assert callback.tolerance == pytest.approx(0.1 * math.exp(-0.5))
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 90.9})
    assert callback.tolerance == pytest.approx(0.1 * math.exp(-0.45))
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": math.nan})
    callback.on_evaluate(None, None, None, metrics={"eval_test_bleu": 1.0})  # of another dataset
    callback.on_train_end(None, None, None)
    callback.on_evaluate(None, None, None, metrics={"eval_bleu": 10.0})  # after the training
    assert callback.tolerance == pytest.approx(0.1 * math.exp(-0.45))


def test_a_metric_that_no_evaluation_has():
    """Known before the next step: of several datasets the last may have it."""
    callback = ConstraintCallback(cross_entropy=0.1, metric="eval_second_bleu", metric_target=90.0)
    for metrics in ({"eval_first_bleu": 50.0}, {"eval_second_bleu": 50.0}):
        callback.on_evaluate(None, None, None, metrics=metrics)
    simulate(callback, 20, lambda step, beta, share: 0.05, is_over=False)
    callback = ConstraintCallback(cross_entropy=0.1, metric="eval_bleu", metric_target=90.0)
    callback.on_evaluate(None, None, None, metrics={"eval_loss": 1.0})
    with pytest.raises(ValueError, match=r"eval_bleu.* not among .*eval_loss"):
        simulate(callback, 20, lambda step, beta, share: 0.05, is_over=False)


def test_a_tolerance_runs_up_no_debt():
    """However often it is evaluated, as the multiplier cannot follow that fast."""
    callback = ConstraintCallback(cross_entropy=0.1, metric="eval_bleu", metric_target=50.0)
    simulate(callback, 20, lambda step, beta, share: 0.05, is_over=False)
    for _ in range(100):
        callback.on_evaluate(None, None, None, metrics={"eval_bleu": 99.0})
    assert math.e * 0.05 <= callback.tolerance <= math.e * math.exp(0.5) * 0.05


def test_a_step_that_mixed_precision_skips_is_not_measured():
    steps = iter([0.05, math.nan, math.inf])
    callback = ConstraintCallback(cross_entropy=0.1, interval=10)
    trace = simulate(callback, 30, lambda step, beta, share: next(steps) if step % 10 == 0 else 0.05)
    assert callback.average_cross_entropy == 0.05 and math.isfinite(trace[-1].beta)


def test_threshold_callback_leaves_the_weights():
    model = tiny_model(alpha_threshold=0.1)
    callback = ThresholdCallback(cross_entropy=0.2, dropping_share=0.5)
    state = TrainerState(max_steps=10**6)
    args = SimpleNamespace(device="cpu")
    callback.on_train_begin(args, state, None, model=model)
    assert model.nvib.dropping_share == 0
    for cross_entropy, expected in ((1.0, 0.0), (0.01, 0.0), (0.0, 0.0), *[(0.0, None)] * 8, (5.0, 0.5)):
        callback.measured = lambda device, value=cross_entropy: {"cross_entropy": value, "prop_vectors": 1.0}
        state.global_step += 10
        callback.on_step_end(args, state, None, model=model)
        if expected is not None:
            assert model.nvib.dropping_share == expected  # once begun it stays
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
    assert logs[0]["constraint_beta"] == pytest.approx(0.5) and logs[0]["dropping_share"] == 0
    assert logs[-1]["constraint_beta"] > 0.5 and logs[-1]["dropping_share"] == 0.7
    assert logs[-1]["constraint_cross_entropy"] == pytest.approx(4, abs=2)
    assert model.kl_beta.tolist() == pytest.approx([callback.beta] * 3)
    assert not model._forward_hooks


@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
@pytest.mark.parametrize(("restore", "saved_at"), [(False, 6), (True, 6), (False, 5), (True, 5)])
def test_a_resumed_training_is_the_uninterrupted_one(trainer_class, restore, saved_at, tmp_path):
    """Saved at a measurement, or between two."""

    def train(folder, resume=None):
        callback = ConstraintCallback(
            cross_entropy=10.0, target_prop_vectors=0.5, start_beta=0.5, rate=0.05, interval=2
        )
        trainer = trainer_of(
            trainer_class,
            tiny_model(**DROPPING),
            folder,
            max_steps=12,
            save_strategy="steps",
            save_steps=saved_at,
            learning_rate=1e-3,
            restore_callback_states_from_checkpoint=restore,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume)
        names = ("loss", "constraint_beta", "constraint_beta_vectors")
        return trainer, [[x[name] for name in names] for x in trainer.state.log_history if "loss" in x]

    _, whole = train(tmp_path / "whole")
    assert whole[-1][1] != whole[5][1]
    checkpoint = tmp_path / "whole" / f"checkpoint-{saved_at}"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["ConstraintCallback"]
    assert saved["attributes"]["started"] is True
    trainer, resumed = train(tmp_path / "resumed", str(checkpoint))
    assert whole[-1][1] != whole[-1][2] and saved["attributes"]["slow_average_kept"] == pytest.approx(1.0)
    assert [x[1:] for x in resumed] == [pytest.approx(x[1:]) for x in whole]
    assert resumed[-1][0] == pytest.approx(whole[-1][0], rel=1e-4)
    assert trainer.model.nvib.dropping_share == pytest.approx(0.7)


@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
def test_a_checkpoint_of_a_training_without_the_callback(trainer_class, tmp_path):
    """It starts there; a ``NvibTrainer`` has a ``CollapseCallback`` that the checkpoint of another lacks."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(Trainer, tiny_model(), tmp_path, max_steps=2, **saving).train()
    callback = ConstraintCallback(cross_entropy=1e3, start_beta=0.5, interval=2)
    trainer = trainer_of(trainer_class, tiny_model(), tmp_path, max_steps=4, callbacks=[callback], **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["ConstraintCallback"]["attributes"]["started"]


def test_it_goes_on_from_the_multipliers_of_the_model(tmp_path):
    """Also if it is resumed, when the model has others."""

    def train(folder, resume=None):
        model = tiny_model()
        model.kl_beta.fill_(7.0)
        callback = ConstraintCallback(cross_entropy=1e3, start_beta=None, rate=0.1, interval=2)
        saving = {"save_strategy": "steps", "save_steps": 4}
        trainer = trainer_of(NvibTrainer, model, folder, max_steps=8, callbacks=[callback], **saving)
        trainer.train(resume_from_checkpoint=resume)
        return callback, [x["constraint_beta"] for x in trainer.state.log_history if "loss" in x]

    callback, whole = train(tmp_path / "whole")
    assert whole[0] == pytest.approx(7.0) and whole[-1] > 8 and callback.start_beta == 7.0
    callback, resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed == pytest.approx(whole) and callback.start_beta == 7.0
    model = tiny_model()
    model.kl_beta.zero_()
    with pytest.raises(ValueError, match=r"start_beta=None, the model's kl_beta, must be .*but got 0"):
        simulate(ConstraintCallback(start_beta=None), 1, lambda *given: 1.0, model=model)


def test_the_state_of_other_arguments_is_not_taken_in_silence(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}

    def train(start_beta, **more):
        callback = ConstraintCallback(cross_entropy=1e3, start_beta=start_beta, interval=2)
        trainer_of(NvibTrainer, tiny_model(), tmp_path, max_steps=4, callbacks=[callback], **saving).train(**more)

    train(0.5)
    with pytest.warns(UserWarning, match="another ConstraintCallback, made with .*'start_beta': 0.5.*starts anew"):
        train(0.6, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_another_model_starts_anew(tmp_path):
    """As in a search over settings, where one callback sees many models; the same model goes on."""
    callback, model = ConstraintCallback(cross_entropy=1e3, start_beta=0.5, rate=0.1, interval=1), tiny_model()

    def betas(model):
        trainer = trainer_of(NvibTrainer, model, tmp_path, max_steps=4, callbacks=[callback])
        trainer.train()
        return [entry["constraint_beta"] for entry in trainer.state.log_history if "loss" in entry]

    first, second, third = betas(model), betas(model), betas(tiny_model())
    assert second[0] > first[-1]
    assert third == pytest.approx(first)


@WITH_COMPILE
def test_under_torch_compile(tmp_path):
    def trace(**arguments):
        callbacks = [ConstraintCallback(cross_entropy=1e3, interval=1, dropping_share=1.0), CollapseCallback()]
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
        ({"interval": 0}, "interval must be at least 1 step, but got 0"),
        ({"dropping_share": 0.0}, "dropping_share must be in .* but got 0.0"),
        ({"target_prop_vectors": 1.0}, "target_prop_vectors must be in .* but got 1.0"),
        ({"metric": "eval_bleu"}, "metric='eval_bleu' and metric_target=None belong together"),
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
