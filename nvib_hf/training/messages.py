"""What warnings of a steered training say: the cause, the numbers, what to do."""

from __future__ import annotations


class ConstraintWarning(UserWarning):
    """A constraint is not met, or is met without the help of the latent."""


MORE_TEXTS = (
    "Train on more texts, for fewer steps, with a smaller model or vocabulary, or with dropout, so that held-out "
    "texts are learnt as well as training texts"
)

OTHERS = (
    "ConstraintCallback found multipliers in kl_beta that it did not set, so its own have no effect. Leave out "
    "KLAnnealingCallback: the constraint raises the weights by itself."
)


def another_message(name: str) -> str:
    """For a share of dropping that something else has set."""
    return (
        f"{name} found a dropping_share in the model that it did not set. Use one of ThresholdCallback and "
        "ConstraintCallback, once: each sets it, and the one that comes last has its way."
    )


UNEVALUATED = (
    "ConstraintCallback has a metric, but no evaluation has told it so far, so nothing is compressed. Give the "
    "Trainer an eval_dataset, and TrainingArguments an eval_strategy, such as eval_strategy='steps', eval_steps=100."
)


def unmet_message(name: str, state, value: float, target: float, metric: str | None = None) -> str:
    """For a tolerance or a metric's target that has not been met for a third of the training."""
    if metric is not None:
        return (
            f"{name} at step {state.global_step}: {metric} is {value:.4g} and has been below its target of "
            f"{target:.4g} for a third of the training, so nothing is compressed. If it no longer rises, accept less, "
            f"such as metric_target={0.95 * value:.2g}."
        )
    return (
        f"{name} at step {state.global_step}: the cross-entropy is {value:.3g} nats per token and has been above the "
        f"accepted {target:.3g} for a third of the training, so nothing is compressed or dropped any further. If it "
        f"no longer falls, accept more, such as cross_entropy={1.1 * value:.2g}."
    )


def memorised_message(state, training: float, held_out: float, tolerance: float) -> str:
    """For training texts that meet the constraint and held-out texts that do not."""
    return (
        f"ConstraintCallback at step {state.global_step}: training texts are learnt by heart. Their cross-entropy is "
        f"{training:.3g} nats per token, that of held-out texts is {held_out:.3g}, and {tolerance:.3g} is accepted. "
        f"Nothing is compressed while only training texts meet this. {MORE_TEXTS}; or accept what held-out texts "
        f"reach: cross_entropy={1.1 * held_out:.2g}."
    )


def runaway_message(state, beta: float, nats: float | None, training: float, held_out: float | None) -> str:
    """For a multiplier that rises although the latent says next to nothing."""
    says = "" if nats is None else f", a vector says {nats:.2g} nats"
    seen = f"The cross-entropy of training is {training:.3g} nats per token"
    if held_out is None:
        seen += (
            ", but no held-out texts show whether training texts are known by heart. Give the Trainer an eval_dataset"
        )
    elif held_out > training + 0.5:
        seen += f", that of held-out texts is {held_out:.3g}: the training texts are known by heart. {MORE_TEXTS}"
    else:
        seen += (
            f", that of held-out texts is {held_out:.3g}: the decoder needs no latent. Accept a lower cross_entropy"
        )
    return (
        f"ConstraintCallback at step {state.global_step}: the constraint is met although the latent says next "
        f"to nothing. The multiplier is {beta:.3g}{says}, and rises no further. {seen}."
    )


def unheld_message(state, training: float) -> str:
    """For many passes over the training texts without held-out texts."""
    return (
        f"ConstraintCallback at step {state.global_step}: each training text was seen {state.epoch:.0f} times, and "
        f"their cross-entropy of {training:.3g} nats per token is all that the constraint sees. A text known by heart "
        "needs no latent, so its latent would be compressed away. Give the Trainer an eval_dataset."
    )
