"""Notices a decoder that has stopped listening to its latent."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from .latent import NvibLatents
from .text_batches import evaluating
from .training_control import MeasuringCallback

REMEDY = (
    "Lower lambda_gaussian and lambda_dirichlet or let them rise later (KLAnnealingCallback), state the "
    "reconstruction you accept (ConstraintCallback), or give the latent free_bits_gaussian and the decoder "
    "word_dropout."
)


class CollapseWarning(UserWarning):
    """The decoder ignores the latent."""


# A channel is active if its mean varies over the data by more than this, in units of the prior's variance.
ACTIVE_VARIANCE = 0.01


def active_units(mu: Tensor, mask: Tensor, prior_var: Tensor | float = 1.0) -> Tensor:
    r"""Share of the channels whose mean varies with the data: :math:`\mathrm{Var}_x(\mu) > 0.01 \, \sigma_p^2`.

    Args:
        mu: ``(B, Nl, P)``; mask: ``(B, Nl)``, True = a vector that counts.
        prior_var: the prior's variance, a number or ``(P,)``.

    Returns:
        A scalar in [0, 1]; 0 where fewer than two vectors count.

    Source: Burda, Grosse & Salakhutdinov (ICLR 2016), section 5.1, over vectors in place of examples.
    """
    weights = mask.unsqueeze(-1).to(mu.dtype)
    count = weights.sum().clamp(min=1)
    mean = (mu * weights).sum((0, 1)) / count
    variance = ((mu - mean).square() * weights).sum((0, 1)) / count
    return (variance > ACTIVE_VARIANCE * prior_var).to(mu.dtype).mean()


class CollapseCallback(MeasuringCallback):
    """Warns, once for each sign, when a training shows at two logs in a row that the decoder ignores the latent.

    The signs, over the steps since the last log: both KLs together below ``min_nats`` a vector (the posterior is the
    prior); a share of vectors kept below ``min_prop_vectors``; a share of active channels below ``min_active_units``
    (in the last batch). ``NvibTrainer`` brings one; with another ``Trainer`` add it to the callbacks.

    Args:
        min_nats: of ``P * KL_G + KL_D``, nats a latent vector.
        min_prop_vectors: share of the source vectors.
        min_active_units: share of the latent channels.
    """

    kept_in_checkpoints = ("warned", "seen")

    def __init__(self, min_nats: float = 0.1, min_prop_vectors: float = 0.02, min_active_units: float = 0.01) -> None:
        super().__init__(
            {"min_nats": min_nats, "min_prop_vectors": min_prop_vectors, "min_active_units": min_active_units}
        )
        self.min_nats, self.min_prop_vectors = min_nats, min_prop_vectors
        self.min_active_units = min_active_units
        self.warned: list[str] = []
        self.seen: list[str] = []  # at the last log
        self._inputs: dict = {}

    def on_train_end(self, args, state, control, **kwargs) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._inputs = {}

    def record(self, model: nn.Module, inputs: dict, outputs) -> None:
        super().record(model, inputs, outputs)
        self._inputs = inputs

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is None or "loss" not in logs or not (means := self.measured(args.device)):
            return
        width = self._model.nvib.size_out
        nats = width * means["kl_gaussian"] + means["kl_dirichlet"]
        self._check(state, "KL terms", "nats a vector", nats, self.min_nats)
        self._check(state, "vectors kept", "of the source", means["prop_vectors"], self.min_prop_vectors)
        names = self._model._encoder_argument_names & self._inputs.keys()
        if names:  # else the training gives latents in place of texts
            units = self._active_units({name: self._inputs[name] for name in names})
            self._check(state, "active units", "of the channels", units, self.min_active_units)

    def _active_units(self, inputs: dict) -> float:
        model = self._model
        inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        with evaluating(model):
            latents: NvibLatents = model.encode(**inputs, sample=False)
        source = latents.attention_mask.clone()
        source[:, 0] = False  # the prior's own component
        return active_units(latents.z.float(), source, model.nvib.prior_logvar.exp()).item()

    def _check(self, state, what: str, unit: str, value: float, least: float) -> None:
        again = what in self.seen
        self.seen = [sign for sign in self.seen if sign != what] + [what] * (value < least)
        if value >= least or not again or what in self.warned:
            return
        self.warned.append(what)
        if state.is_world_process_zero:
            warnings.warn(
                f"Posterior collapse at step {state.global_step}: {what} are {value:.3g} {unit}, below {least:g}. The "
                f"decoder ignores the latent. {REMEDY}",
                CollapseWarning,
                stacklevel=2,
            )
