"""A constraint holds what is measured on held-out texts, and says why it compresses nothing, or nothing any more."""

import math
import re
import warnings

import pytest
import torch
from tiny_text import tiny_collator, tiny_examples
from tiny_training import TRAINERS, tiny_model, trainer_of
from transformers import Trainer, TrainerState

from nvib_hf import (
    ConstraintCallback,
    ConstraintWarning,
    KLAnnealingCallback,
    NvibTrainer,
    NvibTrainerMixin,
    ThresholdCallback,
)
from nvib_hf.training.held_out import HeldOut


class Args:
    """What a callback reads of the Trainer's arguments."""

    device, fp16, bf16, world_size, process_index, per_device_eval_batch_size = "cpu", False, False, 1, 0, 2


class Simulation:
    """A training of which every measurement is given: of its texts, of held-out ones (or none), nats of a vector."""

    def __init__(self, callback, max_steps=1000, model=None):
        self.callback, self.model = callback, model or tiny_model(alpha_threshold=0.1)
        self.state = TrainerState(max_steps=max_steps, log_history=[{}], epoch=0.0)
        self.held_out, self.messages = None, []
        callback.on_train_begin(Args, self.state, None, model=self.model)

    def run(self, steps, training, held_out=None, nats=10.0, epoch=0.0) -> "Simulation":
        width = self.model.nvib.size_out
        means = {"cross_entropy": training, "prop_vectors": 1.0, "kl_gaussian": nats / width, "kl_dirichlet": 0.0}
        self.callback.measured = lambda device: means
        if held_out is not None:
            self.callback._held_out = self
            self.held_out = held_out
        self.state.epoch = epoch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                self.state.global_step += 1
                self.callback.on_step_end(Args, self.state, None, model=self.model)
        self.messages += [str(w.message) for w in caught if w.category is ConstraintWarning]
        return self

    def batches(self, args):
        """In the place of ``HeldOut``: the measurement itself, which ``cross_entropy_of`` is made to return."""
        return self.held_out


@pytest.fixture
def measured(monkeypatch):
    """Held-out texts whose cross-entropy the simulation says."""
    monkeypatch.setattr("nvib_hf.training.constraint.cross_entropy_of", lambda model, batches, args: batches or None)


# ------------------------------------------------------------------------------------------------- what is held
def test_what_only_training_texts_satisfy_is_not_compressed(measured):
    run = Simulation(ConstraintCallback(0.4)).run(500, training=0.05, held_out=3.0)
    assert not run.callback.started and run.callback.beta == pytest.approx(0.03)
    run.run(200, training=0.05, held_out=0.2)  # and as soon as held-out texts are learnt, it is
    assert run.callback.started and run.callback.beta > 0.05
    before = run.callback.beta
    run.run(200, training=0.05, held_out=1.0)  # and given back where they are lost
    assert run.callback.beta < 0.5 * before


def test_training_counts_where_it_is_the_worse(measured):
    run = Simulation(ConstraintCallback(0.4)).run(500, training=1.0, held_out=0.1)
    assert not run.callback.started


def test_a_metric_knows_of_held_out_texts_itself(measured):
    callback = ConstraintCallback(metric="eval_bleu", metric_target=50.0)
    run = Simulation(callback).run(100, training=2.5, held_out=3.5)
    callback.on_evaluate(Args, run.state, None, metrics={"eval_bleu": 50.0})
    run.run(300, training=2.0, held_out=3.5)
    assert callback.tolerance == 2.5 and callback.beta > 0.03


# -------------------------------------------------------------------------------------------------- the metric
def test_the_metric_alone_decides_when_to_begin():
    """At 2.5 nats a token, where no default would ever be met; and not at 0.01 where the target is not reached."""
    callback = ConstraintCallback(metric="eval_bleu", metric_target=3.0)
    run = Simulation(callback).run(50, training=2.5)
    callback.on_evaluate(Args, run.state, None, metrics={"eval_bleu": 5.3})
    assert callback.started and callback.tolerance == pytest.approx(2.5 * math.exp(0.5))
    run.run(300, training=2.5)
    assert callback.beta > 0.1
    before = callback.tolerance
    callback.on_evaluate(Args, run.state, None, metrics={"eval_bleu": 2.0})
    assert callback.tolerance < before
    callback = ConstraintCallback(metric="eval_bleu", metric_target=30.0)
    run = Simulation(callback).run(50, training=0.01)
    callback.on_evaluate(Args, run.state, None, metrics={"eval_bleu": 5.3})
    assert not run.run(200, training=0.01).callback.started


def test_a_metric_in_a_training(tmp_path):
    """Of a Trainer whose cross-entropy is nowhere near the default."""
    callback = ConstraintCallback(metric="eval_bleu", metric_target=3.0, interval=1)
    trainer = trainer_of(
        NvibTrainer, tiny_model(), tmp_path, callbacks=[callback], max_steps=6, eval_strategy="steps", eval_steps=2
    )
    trainer.compute_metrics = lambda prediction: {"bleu": 5.0}
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert logs[0]["constraint_beta"] < logs[-1]["constraint_beta"] and logs[-1]["cross_entropy"] > 1


# ------------------------------------------------------------------------------------------ bounds, and warnings
def test_multipliers_are_bounded():
    """By ten times the weight of the evidence lower bound, which sums over channels, or what is given."""
    model = tiny_model(alpha_threshold=0.1, lambda_vectors=1.0)
    for bound, arguments in ((10 * model.nvib.size_out / 0.2, {}), (5.0, {"max_beta": 5.0})):
        callback = ConstraintCallback(1.0, rate=0.1, target_prop_vectors=0.5, **arguments)
        run = Simulation(callback, model=model).run(2000, training=1e-3)
        assert callback.beta == callback.beta_vectors == pytest.approx(bound)
        run.run(100, training=10.0)
        assert callback.beta < 0.01 * bound  # no debt of what was above


def test_a_multiplier_does_not_fall_for_ever():
    run = Simulation(ConstraintCallback(1.0)).run(100, training=0.5).run(20_000, training=50.0)
    assert run.callback.beta > 1e-6


def test_empty_vectors_stop_the_multiplier():
    run = Simulation(ConstraintCallback(1.0)).run(300, training=0.1)
    before = run.callback.beta
    run.run(1000, training=0.1, nats=0.2)
    assert run.callback.beta < 2 * before
    (message,) = run.messages
    assert "the latent says next to nothing" in message and re.search(r"a vector says 0\.\d+ nats", message)
    assert "no held-out texts show" in message and "eval_dataset" in message


def test_a_runaway_names_its_cause(measured):
    run = Simulation(ConstraintCallback(5.0, rate=0.1)).run(500, training=0.1, held_out=4.0)
    message = next(message for message in run.messages if "rises no further" in message or "by heart" in message)
    run.run(20_000, training=0.1, held_out=0.2, nats=0.5)
    assert any(
        "0.1 nats per token, that of held-out texts is 4: the training texts are known" in m for m in run.messages
    )
    assert message.count("multiplier") >= 1


def test_learnt_by_heart_is_said_early(measured):
    run = Simulation(ConstraintCallback(0.8)).run(200, training=0.05, held_out=3.2)
    (message,) = run.messages
    assert "learnt by heart" in message and "0.05 nats per token, that of held-out texts is 3.2" in message
    assert "more texts" in message and "cross_entropy=3.5" in message


@pytest.mark.parametrize("one", [ConstraintCallback, ThresholdCallback])
def test_a_constraint_that_is_not_met_says_what_could_be(one):
    """After a third of the training, once, with the value that it is now."""
    run = Simulation(one(0.4)).run(320, training=2.5)
    assert run.messages == []
    (message,) = run.run(600, training=2.5).messages
    assert one.__name__ in message and "at step 340" in message and "is 2.5 nats per token" in message
    assert "accepted 0.4" in message and "cross_entropy=2.8" in message


def test_so_does_a_metric():
    callback = ConstraintCallback(metric="eval_bleu", metric_target=50.0)
    run = Simulation(callback).run(10, training=2.5)
    callback.on_evaluate(Args, run.state, None, metrics={"eval_bleu": 20.0})
    (message,) = run.run(900, training=2.5).messages
    assert "eval_bleu is 20 and has been below its target of 50" in message and "metric_target=19" in message


def test_many_passes_with_nothing_held_out():
    run = Simulation(ConstraintCallback(1.0)).run(100, training=0.1, epoch=19.0)
    assert run.messages == []
    (message,) = run.run(100, training=0.1, epoch=21.0).messages
    assert "each training text was seen 21 times" in message and "eval_dataset" in message


def test_a_healthy_training_is_left_alone(measured):
    assert Simulation(ConstraintCallback(0.4)).run(100, 2.0, 2.1).run(900, 0.39, 0.3, epoch=30.0).messages == []


@pytest.mark.parametrize("annealing_first", [True, False])
def test_the_logged_multiplier_is_the_one_in_force(annealing_first, tmp_path):
    """Beside a callback that sets it, too; which is said."""
    constraint, annealing = ConstraintCallback(1e3, interval=1), KLAnnealingCallback("constant")
    callbacks = [annealing, constraint] if annealing_first else [constraint, annealing]
    trainer = trainer_of(NvibTrainer, tiny_model(), tmp_path, callbacks=callbacks, max_steps=3, learning_rate=0.0)
    with pytest.warns(ConstraintWarning, match="KLAnnealingCallback"):
        trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert entry["constraint_beta"] == entry["constraint_beta_vectors"] == 1.0
        expected = entry["cross_entropy"] + 0.2 * entry["kl_gaussian"] + 0.3 * entry["kl_dirichlet"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------------------- in a training
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_held_out_texts_are_decoded_as_in_evaluation(trainer_class, tmp_path):
    """Of the ``eval_dataset``: of another Trainer from its first evaluation on, before it the training batch."""
    model = tiny_model(dropout=0.3, tau_sigma=1.0, tau_alpha=0.0)
    callback = ConstraintCallback(1e-3, interval=1, held_out_interval=1)
    arguments = {"max_steps": 3, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(trainer_class, model, tmp_path, examples=4, callbacks=[callback], **arguments)
    trainer.train()
    logged = [x["constraint_held_out_cross_entropy"] for x in trainer.state.log_history if "loss" in x]
    with torch.no_grad():
        own, held_out = (
            model.eval()(**tiny_collator(model)(examples)).cross_entropy.item()
            for examples in (tiny_examples(4), tiny_examples(5, seed=1))
        )
    first = held_out if issubclass(trainer_class, NvibTrainerMixin) else own
    assert logged == pytest.approx([first, first, held_out], rel=1e-4)


def test_looking_changes_nothing(tmp_path):
    """Neither draws nor dropout of a training depend on it."""

    def weights(**arguments):
        torch.manual_seed(0)
        model = tiny_model(dropout=0.3, tau_sigma=1.0)
        trainer_of(
            NvibTrainer, model, tmp_path, max_steps=4, callbacks=[ConstraintCallback(1e-3, interval=1, **arguments)]
        ).train()
        return model.state_dict()

    one, other = weights(held_out_examples=0), weights(held_out_interval=1)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_small_corpus_is_not_compressed_away(tmp_path):
    """Eight texts that are soon known by heart, and others: latents keep what they say, and a word is said."""
    model = tiny_model(lambda_gaussian=0.01, lambda_dirichlet=0.01)
    callback = ConstraintCallback(3.0, rate=0.2, interval=5, held_out_interval=5)
    trainer = trainer_of(
        NvibTrainer, model, tmp_path, max_steps=60, callbacks=[callback], learning_rate=5e-3, logging_steps=60
    )
    with pytest.warns(ConstraintWarning, match="learnt by heart"):
        trainer.train()
    assert callback.average_cross_entropy < 3.0 < callback.held_out_cross_entropy
    assert not callback.started and callback.beta == pytest.approx(0.03)


# -------------------------------------------------------------------------------------------------- the sample
def loader(examples, size=2):
    return torch.utils.data.DataLoader(examples, batch_size=size, collate_fn=list)


def test_a_sample_is_spread_and_shared():
    held_out = HeldOut.of(loader(list(range(100))), count=10)
    shares = []
    for rank in range(3):
        args = type("", (Args,), {"world_size": 3, "process_index": rank})
        shares.append(list(held_out.batches(args)))
    assert [len(share) for share in shares] == [2] * 3  # as many passes in each process
    seen = [example for share in shares for batch in share for example in batch]
    assert seen == [*range(0, 100, 10), 0, 10]


def test_of_what_can_only_be_iterated_over():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(7))

    held_out = HeldOut.of(loader(Stream()), count=5)
    assert list(held_out.batches(Args)) == [[0, 1], [2, 3], [4]]


def test_nothing_to_hold_out():
    assert HeldOut.of(None, 5) is HeldOut.of(loader([]), 5) is HeldOut.of(loader([1]), 0) is None


def test_resumed_between_evaluations_held_out_texts_count_as_before(tmp_path):
    """``Trainer`` gives them at its next evaluation only. Till then a batch of training takes not their place."""
    arguments = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 6}

    def train(folder, resume=None):
        callback = ConstraintCallback(cross_entropy=1e3, start_beta=0.5, interval=2, held_out_interval=2)
        trainer = trainer_of(Trainer, tiny_model(), folder, callbacks=[callback], **arguments)
        trainer.train(resume_from_checkpoint=resume)
        name = "constraint_held_out_cross_entropy"
        return callback, [entry[name] for entry in trainer.state.log_history if name in entry and "loss" in entry]

    _, whole = train(tmp_path / "whole")
    callback, resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert callback.has_held_out
    assert resumed[:6] == whole[:6] and resumed[6:9] == whole[5:6] * 3  # of step 6
    assert resumed[-1] == pytest.approx(whole[-1]) and whole[-1] != whole[5]  # evaluated at step 10


def test_a_metric_without_evaluations_is_said(tmp_path):
    callback = ConstraintCallback(metric="eval_bleu", metric_target=30.0, interval=2)
    with pytest.warns(ConstraintWarning, match="no evaluation has told it so far.*eval_strategy='steps'"):
        trainer_of(Trainer, tiny_model(), tmp_path, max_steps=2, callbacks=[callback]).train()
    assert not callback.started


@pytest.mark.parametrize("second", [ThresholdCallback, ConstraintCallback])
def test_two_that_set_the_share_of_dropping_are_told_of_each_other(second, tmp_path):
    """The one that begins finds its share taken back by the other, which waits."""
    model = tiny_model(alpha_threshold=0.1, lambda_vectors=1.0)
    waiting = second(cross_entropy=1e-3, interval=2)
    callbacks = [ConstraintCallback(cross_entropy=1e3, interval=2), waiting]
    with pytest.warns(ConstraintWarning, match="found a dropping_share in the model that it did not set"):
        trainer_of(Trainer, model, tmp_path, max_steps=8, callbacks=callbacks).train()
