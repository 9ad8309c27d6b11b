"""A causal prior of Gaussians that is trained with the VAE, and the training of this one and of the package's."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae as example
import torch
from latent_prior import BATCH_SIZE, Vae, average
from torch import Tensor, nn
from torch.nn import functional as F

from nvib_hf import NvibLatents, encode_texts, reconstruct
from nvib_hf.evaluation.texts import (
    as_read,
    encoder_inputs,
    evaluating,
    labels_of,
    negative_log_likelihood,
    reconstruction_scores,
)
from nvib_hf.latents.learned import vectors_of
from nvib_hf.layers.causal_transformer import Cache, CausalTransformer
from nvib_hf.layers.cross_entropy import IGNORED
from nvib_hf.layers.latent_prior import LatentPrior
from nvib_hf.layers.nvib import NvibLayer
from nvib_hf.training.control import multiplier, reconstruction_error, running_mean
from nvib_hf.training.latent_prior_training import optimizer_and_schedule, shuffled_batches

MAX_LENGTH, DROPOUT = example.MAX_LENGTH, 0.1
INTERVAL, HELD_OUT_INTERVAL = 10, 50  # steps between two moves of the multiplier, two measurements of watched texts
BOUND = 10.0  # of the multiplier, times that of the evidence lower bound


# ----------------------------------------------------------------------------------------------- the priors
class CausalGaussian(nn.Module):
    r"""A density of a text's latent vectors, in their order, and of how many there are.

    .. math:: p(z_1 \dots z_n) = p(n) \prod_i \mathcal N(z_i \mid m(z_{<i}, n), \operatorname{diag} s(z_{<i}, n)^2)

    At the start all means are 0 and all variances 1, as of the prior that the VAE was trained with.

    Args:
        like: a fitted prior of codes, whose :math:`p(n)` and sizes this one has.
    """

    log_lengths: Tensor

    def __init__(self, like: LatentPrior, d_model: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("log_lengths", like.log_lengths.clone())
        self.start, self.vectors = nn.Parameter(torch.zeros(d_model)), nn.Linear(like.width, d_model)
        self.places, self.remaining = (nn.Embedding(like.max_length + 1, d_model) for _ in range(2))
        self.transformer = CausalTransformer(d_model, num_layers, num_heads, DROPOUT)
        self.head = nn.Linear(d_model, 2 * like.width)
        for weight in (self.places.weight, self.remaining.weight):
            nn.init.normal_(weight, std=0.02)
        for weight in self.head.parameters():
            nn.init.zeros_(weight)

    def predicted(
        self, before: Tensor, place: Tensor, lengths: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means and log-variances ``(B, n, P)`` at the places, after what is before each, ``(B, n, d_model)``."""
        remaining = (lengths[:, None] - place).clamp(min=0)
        x = before + self.places(place) + self.remaining(remaining)
        return self.head(self.transformer(F.dropout(x, DROPOUT, self.training), cache)).chunk(2, -1)

    def forward(self, z: Tensor, mu: Tensor, logvar: Tensor, mask: Tensor) -> Tensor:
        r"""What posteriors :math:`\mathcal N(\mu_i, \sigma_i^2)` of texts cost, in nats: ``(B,)``.

        .. math:: -\log p(n) + \sum_i \mathrm{KL}(\mathcal N(\mu_i, \sigma_i^2) \,\|\, p(z_i \mid z_{<i}, n))

        With ``z`` drawn from the posteriors, all ``(B, n, P)``, its mean is the divergence of the draws.
        """
        lengths, start = mask.sum(-1), self.start.expand(len(z), 1, -1)
        before = torch.cat([start, self.vectors(z[:, :-1])], dim=1)
        mean, wide = self.predicted(before, torch.arange(z.shape[1]), lengths)
        nats = 0.5 * (((mu - mean).square() + logvar.exp()) * (-wide).exp() - 1 + wide - logvar).sum(-1)
        return nats.masked_fill(~mask, 0).sum(-1) - self.log_lengths[lengths - 1]

    @torch.no_grad()
    def sample(self, count: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Vectors ``(B, n, P)``, whose deviations are ``noise`` times what the prior says, and their mask."""
        lengths = 1 + torch.multinomial(self.log_lengths.exp(), count, replacement=True, generator=generator)
        cache, drawn, before = self.transformer.empty_cache(), [], self.start.expand(count, 1, -1)
        for i in range(int(lengths.max())):
            mean, wide = self.predicted(before, torch.tensor([i]), lengths, cache)
            drawn.append(mean + noise * (0.5 * wide).exp() * torch.randn(mean.shape, generator=generator))
            before = self.vectors(drawn[-1])
        mask = torch.arange(len(drawn)) < lengths[:, None]
        return torch.cat(drawn, dim=1).masked_fill(~mask[..., None], 0), mask


class JointNvib(NvibLayer):
    """NVIB whose ``kl_gaussian`` is, in training, what the drawn vectors cost under the prior ``charge``."""

    charge: nn.Module

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if not self.training:
            return output
        of_texts = (x[:, 1:] for x in (output.z, output.posterior.mu, output.posterior.logvar, output.posterior.mask))
        length = output.posterior.mask.sum(-1)
        return output._replace(kl_gaussian=self.charge(*of_texts) / (length * self.size_out))


# ------------------------------------------------------------------------------------------------ measures
def nats_of_texts(vae: Vae, texts: Sequence[str], **encoding) -> tuple[Tensor, int]:
    """What the decoder pays for each text ``(N,)``, and how many tokens they have together."""
    nats, tokens = [], 0
    with evaluating(vae.model):
        for start in range(0, len(texts), BATCH_SIZE):
            some = texts[start : start + BATCH_SIZE]
            labels = labels_of(vae.model, vae.tokenizer, some, MAX_LENGTH)
            latents = vae.model.encode(**encoder_inputs(vae.model, vae.tokenizer, some), **encoding)
            nats.append(negative_log_likelihood(vae.model, labels, encoder_outputs=latents))
            tokens += int((labels != IGNORED).sum())
    return torch.cat(nats), tokens


def rate(vae: Vae, generator: torch.Generator, latents: NvibLatents) -> Tensor:
    """What posteriors cost under their prior, their number included, in nats ``(B,)``."""
    charge = getattr(vae.model.nvib, "charge", None)
    if not isinstance(charge, CausalGaussian):
        return vae.model.rate(latents)
    mu, mask, logvar = vectors_of(latents)
    z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator)
    with evaluating(charge):
        return charge(z, mu, logvar, mask)


def look(vae: Vae, texts: Sequence[str]) -> dict[str, float]:
    """The share of texts that are reconstructed exactly, and their rate."""
    again, chance = reconstruct(vae.model, vae.tokenizer, texts), torch.Generator().manual_seed(0)
    return {
        "exact_match": reconstruction_scores(again, as_read(vae.tokenizer, texts))["exact_match"],
        "rate": average(partial(rate, vae, chance), encode_texts(vae.model, vae.tokenizer, texts)),
    }


# ------------------------------------------------------------------------------------------------ training
class Steering:
    """The multiplier of the KLs, which holds the cross-entropy where the VAE's own training did."""

    def __init__(self, vae: Vae, purpose: example.Purpose) -> None:
        self.vae, self.purpose = vae, purpose
        self.state = {"integral": vae.model.kl_beta[0].log().item(), "average": None, "held_out": None}
        self.recent: list[float] = []

    def after(self, step: int, cross_entropy: float) -> None:
        """After a step of training with this cross-entropy per token."""
        self.recent.append(cross_entropy)
        if step % INTERVAL:
            return
        state, model = self.state, self.vae.model
        state["average"] = running_mean(state["average"], sum(self.recent) / len(self.recent))
        self.recent.clear()
        if step % HELD_OUT_INTERVAL == 0 or state["held_out"] is None:
            nats, tokens = nats_of_texts(self.vae, self.vae.watched)
            state["held_out"] = nats.sum().item() / tokens
        error = reconstruction_error(max(state["average"], state["held_out"]), self.purpose.cross_entropy)
        state["integral"] += self.purpose.rate * INTERVAL * error
        model.kl_beta.fill_(min(multiplier(state["integral"], error, 1.0), BOUND * model.nvib.size_out))


def train(vae: Vae, purpose: example.Purpose, settings: dict, checkpoint: Path) -> list[dict[str, float]]:
    """Train all of a model that is not frozen, its prior too.

    Args:
        purpose: with the cross-entropy to accept.
        settings: ``steps``, ``look_every`` and ``seed``.
        checkpoint: a file that keeps the state at every look; a training continues from it.

    Returns:
        The looks at the watched texts: ``step``, ``exact_match``, ``rate``, and ``beta``, the multiplier of nats.
    """
    model, steps = vae.model, settings["steps"]
    optimizer, schedule = optimizer_and_schedule(model, steps, weight_decay=0.0)  # the main job has no decay
    generator, steering = torch.Generator().manual_seed(settings["seed"]), Steering(vae, purpose)
    step, waiting, looks = 0, [], []
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, holder in stateful.items():
            holder.load_state_dict(state[name])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        step, waiting, looks, steering.state = (state[name] for name in ("step", "waiting", "looks", "steering"))
    lengths = [len(ids) for ids in vae.ids(vae.texts)]
    while step < steps:
        waiting = waiting or list(shuffled_batches(lengths, BATCH_SIZE, generator))
        texts = [vae.texts[i] for i in waiting.pop()]
        model.train()
        labels = labels_of(model, vae.tokenizer, texts, MAX_LENGTH)
        outputs = model(**encoder_inputs(model, vae.tokenizer, texts), labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        steering.after(step, outputs.cross_entropy.item())
        if step % settings["look_every"] == 0 or step == steps:
            looks.append(
                {"step": step, **look(vae, vae.watched), "beta": float(model.kl_beta[0] / model.nvib.size_out)}
            )
            print(looks[-1], flush=True)
            state = {name: holder.state_dict() for name, holder in stateful.items()}
            state |= {"generator": generator.get_state(), "random": torch.get_rng_state(), "step": step}
            unfinished = Path(f"{checkpoint}.{os.getpid()}")
            torch.save({**state, "waiting": waiting, "looks": looks, "steering": steering.state}, unfinished)
            unfinished.replace(checkpoint)
    return looks
