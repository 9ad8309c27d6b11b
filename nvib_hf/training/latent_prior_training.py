"""Training of a learned prior on the latents of texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.denoising_attention import without_autocast
from ..layers.latent_prior import LatentPrior

POOL = 50  # batches whose sequences are sorted by length together
SOME = 100  # latents whose first vectors tell a checkpoint's latents from others
ROUNDING = 0.01  # in units of their deviation


def fit_latent_prior(
    prior: LatentPrior,
    training: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    max_steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    evaluate_every: int = 250,
    patience: int = 4,
    checkpoint: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Fit the codebook, then train by AdamW; the prior ends with the weights that were best on the held-out latents.

    The learning rate rises over the first 100 steps and falls linearly to nothing.

    Args:
        training, held_out: the latents, ``(n, P)`` each.
        evaluate_every: steps between two looks at the held-out latents.
        patience: looks without a better one that end the training.
        checkpoint: a file that keeps the state at every look; the call continues from it if it is there.
        progress: show a bar.

    Returns:
        At each look: ``step``, ``training_loss`` and ``held_out_loss``, nats per sequence by
        :meth:`LatentPrior.loss`.

    Raises:
        ValueError: no latents, or such as do not fit the prior; counts below 1; a ``checkpoint`` of other latents or
            settings.
    """
    for name, rows in (("training", training), ("held_out", held_out)):
        if not len(rows):
            raise ValueError(f"{name} is empty: pass the latents of at least one text.")
    counts = {"max_steps": max_steps, "batch_size": batch_size, "evaluate_every": evaluate_every, "patience": patience}
    for name, value in counts.items():
        if value < 1 or value != int(value):
            raise ValueError(f"{name} must be a whole number of at least 1, but got {value}.")
    settings = {
        "max_steps": max_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    run = _Run(prior, training, held_out, settings)
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(checkpoint)
    else:
        of_device = torch.Generator(prior.centres.device).manual_seed(seed)
        prior.fit_codebook(*padded(training), generator=of_device)
    with without_autocast(prior.centres.device), _bar(max_steps, run.step, progress) as bar:  # of backward passes too
        while run.step < max_steps and run.looks_without_gain() < patience:
            run.train_step()
            bar.update()
            if run.step % evaluate_every == 0 or run.step == max_steps:
                run.look(held_out)
                bar.set_postfix(held_out=f"{run.history[-1]['held_out_loss']:.1f}")
                if checkpoint is not None:
                    run.save(checkpoint)
    prior.load_state_dict(run.best)
    prior.eval()
    return run.history


def optimizer_and_schedule(
    model: nn.Module, max_steps: int, learning_rate: float = 1e-3, weight_decay: float = 0.1
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, whose decay leaves biases and norms out; its rate rises over 100 steps and falls linearly to nothing."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, warm_up = torch.optim.AdamW(groups, lr=learning_rate), min(100, max_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1) * (1 - step / max_steps)
    )
    return optimizer, schedule


class _Run:
    """The state of a training, which a checkpoint holds."""

    def __init__(self, prior, training, held_out, settings: dict[str, Any]) -> None:
        self.prior, self.training, self.batch_size = prior, training, settings["batch_size"]
        how = {name: settings[name] for name in ("max_steps", "learning_rate", "weight_decay")}
        self.optimizer, self.schedule = optimizer_and_schedule(prior, **how)
        self.generator = torch.Generator().manual_seed(settings["seed"])
        shapes = {name: list(value.shape) for name, value in prior.state_dict().items()}
        counts = {"latents": len(training), "held_out": len(held_out), "vectors": sum(map(len, training))}
        self.settings = {**settings, **counts, "shapes of the prior": shapes}
        self.some = torch.stack([row[0] for of in (training, held_out) for row in of[:SOME]]).float().cpu()
        self.step, self.best = 0, prior.state_dict()
        self.waiting: list[list[int]] = []
        self.history: list[dict[str, float]] = []
        self.since_look = (0.0, 0)  # nats and sequences

    def train_step(self) -> None:
        if not self.waiting:
            self.waiting = list(shuffled_batches([len(z) for z in self.training], self.batch_size, self.generator))
        rows = [self.training[i] for i in self.waiting.pop()]
        self.prior.train()
        z, mask = padded(rows)
        loss = self.prior.loss(z, mask).sum()
        self.optimizer.zero_grad()
        (loss / mask.sum()).backward()
        nn.utils.clip_grad_norm_(self.prior.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        nats, sequences = self.since_look
        self.since_look = (nats + loss.item(), sequences + len(rows))

    def look(self, held_out: Sequence[Tensor]) -> None:
        loss = held_out_loss(self.prior, held_out, self.batch_size)
        nats, sequences = self.since_look
        best = min((entry["held_out_loss"] for entry in self.history), default=float("inf"))
        if loss < best:
            self.best = {name: value.clone() for name, value in self.prior.state_dict().items()}
        self.history.append({"step": self.step, "training_loss": nats / sequences, "held_out_loss": loss})
        self.since_look = (0.0, 0)

    def looks_without_gain(self) -> int:
        losses = [entry["held_out_loss"] for entry in self.history]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def save(self, path: str | os.PathLike) -> None:
        """Whole or not at all."""
        state = {
            "prior": self.prior.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),  # of the dropout
            "step": self.step,
            "waiting": self.waiting,
            "history": self.history,
            "settings": self.settings,
            "some": self.some,
        }
        unfinished = Path(f"{path}.{os.getpid()}")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def load(self, path: str | os.PathLike) -> None:
        state = torch.load(path, weights_only=True)
        self._check_is_of_the_same(path, state)
        for name in ("prior", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        self.step, self.waiting, self.history, self.best = (
            state[name] for name in ("step", "waiting", "history", "best")
        )

    def _check_is_of_the_same(self, path: str | os.PathLike, state: dict) -> None:
        """Raise ValueError if the state is of other latents, or made with other settings."""
        remedy = "To start anew, delete the file or pass another path."
        saved = state.get("settings", {})
        for name, value in self.settings.items():
            if saved.get(name) != value:
                told = "others" if isinstance(value, dict) else f"{saved.get(name)} where this one has {value}"
                raise ValueError(f"checkpoint={os.fspath(path)!r} is of another training: {name}: {told}. {remedy}")
        # The same latents differ by roundings, if they were encoded in other batches.
        if (self.some - state["some"]).abs().max() > ROUNDING * self.some.std():
            raise ValueError(f"checkpoint={os.fspath(path)!r} is of other latents. {remedy}")


@torch.no_grad()
def held_out_loss(prior: LatentPrior, latents: Sequence[Tensor], batch_size: int = 64) -> float:
    """The mean of :meth:`LatentPrior.loss`, nats per sequence, without dropout."""
    training = prior.training
    prior.eval()
    order, total = sorted(range(len(latents)), key=lambda i: len(latents[i])), 0.0
    for start in range(0, len(order), batch_size):
        rows = [latents[i] for i in order[start : start + batch_size]]
        total += prior.loss(*padded(rows)).sum().item()
    prior.train(training)
    return total / len(latents)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences ``(n, P)`` as ``z`` ``(B, n, P)`` and ``mask`` ``(B, n)``."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    z = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return z, torch.arange(z.shape[1], device=z.device) < lengths[:, None]


def shuffled_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Indices in batches of similar length, in a random order."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    for start in range(0, len(order), POOL * batch_size):
        pool = sorted(order[start : start + POOL * batch_size], key=lengths.__getitem__)
        batches = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def _bar(total: int, done: int, progress: bool):
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # comes with Transformers; the prior itself needs torch alone

    return tqdm(total=total, initial=done, disable=not progress, desc="latent prior")
