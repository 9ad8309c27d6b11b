"""What warnings of a steered training say: the cause, the numbers, what to do."""

from __future__ import annotations


class ConstraintWarning(UserWarning):
    """A constraint that is not met, or that is met by other means than the latent."""


MORE_TEXTS = (
    "Train on more texts, for fewer steps, with a smaller model or vocabulary or with dropout, so that training and "
    "held-out texts are learnt alike"
)

OTHERS = (
    "ConstraintCallback found multipliers in kl_beta that it did not set, so those it computes have no effect. Leave "
    "out KLAnnealingCallback: the constraint raises the weights by itself."
)


def unmet_message(name: str, state, value: float, target: float, metric: str | None = None) -> str:
    """Of a tolerance, or of a metric's target, that has not been met for a third of the training."""
    if metric is not None:
        return (
            f"{name} at step {state.global_step}: {metric} is {value:.4g} and has been below its target of "
            f"{target:.4g} for a third of the training, so nothing is compressed. If it no longer rises, accept less: "
            f"metric_target={0.95 * value:.2g}."
        )
    return (
        f"{name} at step {state.global_step}: the cross-entropy is {value:.3g} nats per token and has been above the "
        f"accepted {target:.3g} for a third of the training, so nothing is compressed or dropped any further. If it "
        f"no longer falls, accept more than it is: cross_entropy={1.1 * value:.2g}."
    )


def memorised_message(state, training: float, held_out: float, tolerance: float) -> str:
    """Of training texts that meet the constraint and held-out ones that do not."""
    return (
        f"ConstraintCallback at step {state.global_step}: training texts are learnt by heart. Their cross-entropy is "
        f"{training:.3g} nats per token, that of held-out texts {held_out:.3g}, where {tolerance:.3g} is accepted. "
        f"Nothing is compressed that only training texts satisfy. {MORE_TEXTS}; or accept what held-out texts reach: "
        f"cross_entropy={1.1 * held_out:.2g}."
    )


def runaway_message(state, beta: float, nats: float | None, training: float, held_out: float | None) -> str:
    """Of a multiplier that rises though the latent says next to nothing."""
    says = "" if nats is None else f", a vector says {nats:.2g} nats"
    seen = f"The cross-entropy of training is {training:.3g} nats per token"
    if held_out is None:
        seen += ", and no texts are held out to show whether they are known by heart. Give the Trainer an eval_dataset"
    elif held_out > training + 0.5:
        seen += f", that of held-out texts {held_out:.3g}: the training texts are known by heart. {MORE_TEXTS}"
    else:
        seen += f", that of held-out texts {held_out:.3g}: the decoder does without the latent. Accept less"
    return (
        f"ConstraintCallback at step {state.global_step}: the constraint is met though the latent says next to "
        f"nothing: the multiplier has come to {beta:.3g}{says}. It rises no further. {seen}."
    )


def unheld_message(state, training: float) -> str:
    """Of many passes over texts of which none are held out."""
    return (
        f"ConstraintCallback at step {state.global_step}: each training text was seen {state.epoch:.0f} times, and "
        f"their cross-entropy of {training:.3g} nats per token is all that the constraint sees. Texts that are known "
        "by heart need no latent, so it would be compressed away. Give the Trainer an eval_dataset."
    )
