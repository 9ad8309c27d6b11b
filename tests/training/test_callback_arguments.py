"""Every argument of a callback is checked when it is made, and every state when it is read from a checkpoint."""

import json
import math

import pytest
from tiny_training import tiny_model, trainer_of
from transformers import Trainer

from nvib_hf import CollapseCallback, ConstraintCallback, KLAnnealingCallback, NvibTrainer, ThresholdCallback

NOT_NUMBERS = (math.nan, math.inf, -1.0, "1", None, True)
WHOLE = {
    ConstraintCallback: ("interval", "held_out_interval", "held_out_examples"),
    ThresholdCallback: ("interval",),
    CollapseCallback: ("interval",),
    KLAnnealingCallback: ("cycles",),
}
NUMBERS = {
    ConstraintCallback: ("cross_entropy", "start_beta", "rate", "gain", "dropping_share", "max_beta", "min_nats"),
    ThresholdCallback: ("cross_entropy", "dropping_share"),
    CollapseCallback: ("min_nats", "min_prop_vectors", "min_active_units", "max_gap"),
    KLAnnealingCallback: ("warmup_ratio", "start_ratio"),
}
MAY_BE_NONE = {"cross_entropy", "max_beta", "start_beta"}  # of ConstraintCallback


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize(("one", "name"), [(one, name) for one, names in NUMBERS.items() for name in names])
def test_numbers(one, name, value):
    if value is None and one is ConstraintCallback and name in MAY_BE_NONE:
        one(**{name: value})
        return
    with pytest.raises(ValueError, match=f"{name} must be .*but got {value!r}"):
        one(**{name: value})


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.5, 10.5])
@pytest.mark.parametrize(("one", "name"), [(one, name) for one, names in WHOLE.items() for name in names])
def test_whole_numbers(one, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*but got {value!r}"):
        one(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "eval_bleu", "metric_target": math.nan}, "metric_target must be a positive number, but got nan"),
        ({"metric": "eval_bleu", "metric_target": 0}, "metric_target must be a positive number, but got 0"),
        ({"metric": 3, "metric_target": 1.0}, "metric must be the name of a result.* but got 3"),
        *(
            ({"metric": name, "metric_target": 0.2}, f"metric='{name}' is better if smaller.*1 - wer")
            for name in ("eval_wer", "eval_loss", "eval_test_CER", "perplexity")
        ),
        ({"metric_target": 1.0}, "metric=None and metric_target=1.0 belong together"),
        ({"target_prop_vectors": math.nan}, r"target_prop_vectors must be in \(0, 1\), but got nan"),
        ({"start_beta": 2.0, "max_beta": 1.0}, "max_beta must be at least 2, but got 1.0"),
    ],
)
def test_of_a_constraint(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConstraintCallback(**arguments)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_that_would_not_end(schedule):
    with pytest.raises(ValueError, match=r"add up to more than 1.* at most 0\.1"):
        KLAnnealingCallback(schedule, start_ratio=0.9, warmup_ratio=0.9)
    assert KLAnnealingCallback(schedule, start_ratio=0.9, warmup_ratio=0.1).beta(1.0) == pytest.approx(1.0)
    assert KLAnnealingCallback("cyclic", start_ratio=0.9, warmup_ratio=0.9).beta(1.0) == 0  # of a cycle


# -------------------------------------------------------------------------------------------------- checkpoints
def resumed(folder, change, restore=False, callback=lambda: ConstraintCallback(1e3, interval=1)):
    """A training that goes on from a checkpoint whose state of the callback was changed."""
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer_of(Trainer, tiny_model(), folder, callbacks=[callback()], **arguments).train()
    path = folder / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    change(state["stateful_callbacks"]["ConstraintCallback"])
    path.write_text(json.dumps(state))
    arguments |= {"max_steps": 4, "restore_callback_states_from_checkpoint": restore}
    trainer = trainer_of(NvibTrainer, tiny_model(), folder / "on", callbacks=[callback()], **arguments)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, ConstraintCallback))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [("integral", math.nan), ("integral", "x"), ("tolerance", None), ("started", 1), ("average_kept", math.inf)],
)
def test_a_value_that_cannot_have_been_saved(name, value, restore, tmp_path):
    with pytest.raises(ValueError, match=f"trainer_state.json has {name}={value!r} for ConstraintCallback"):
        resumed(tmp_path, lambda state: state["attributes"].update({name: value}), restore)


def test_names_that_are_no_part_of_the_state_are_left_alone(tmp_path):
    """As of another version, or of somebody who means harm: a method stays one."""
    callback = resumed(tmp_path, lambda state: state["attributes"].update(on_step_end=3, measured="x", new=1.0))
    assert callable(callback.on_step_end) and callable(callback.measured) and not hasattr(callback, "new")
    assert callback.started


def test_a_method_that_the_trainer_itself_would_overwrite(tmp_path):
    with pytest.raises(ValueError, match=r"ConstraintCallback.on_step_end is a method, but trainer_state.json has 3"):
        resumed(tmp_path, lambda state: state["attributes"].update(on_step_end=3), restore=True)


def test_a_state_of_fewer_arguments_goes_on(tmp_path):
    """Of a version that did not know one of them, which then had its default."""
    before = []
    callback = resumed(tmp_path, lambda state: before.append((state["args"].pop("min_nats"), state["attributes"])))
    assert callback.integral > before[0][1]["integral"] > math.log(0.03)


def test_a_state_of_other_arguments_does_not(tmp_path):
    callback = resumed(
        tmp_path, lambda state: (state["args"].update(rate=0.5), state["attributes"].update(integral=3.0))
    )
    assert callback.integral < 0
