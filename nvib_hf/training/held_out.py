"""Held-out texts that are measured during a training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluation.texts import evaluating
from ..layers.cross_entropy import IGNORED


class HeldOut:
    """A fixed sample of a data set, spread evenly over it, in batches for each process.

    It does not take a data loader's own batches. If you leave an accelerated loader before its end, it disturbs the
    training's loader.

    Args:
        dataset: examples by number, or an iterable.
        collate: makes the model's batch from examples.
        count: how many examples at most.
    """

    def __init__(self, dataset: Any, collate: Callable[[list], dict], count: int) -> None:
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            size = min(count, len(dataset))
            self._examples: Sequence = [dataset[i * len(dataset) // size] for i in range(size)]
        else:
            self._examples = list(itertools.islice(iter(dataset), count))
        self._collate = collate

    @classmethod
    def of(cls, loader, count: int) -> Self | None:
        """A sample of a data loader's data set. ``None`` if there is no data set, or no example."""
        dataset = getattr(loader, "dataset", None)
        if dataset is None or not count:
            return None
        with torch.random.fork_rng(devices=[]):
            held_out = cls(dataset, loader.collate_fn, count)
        return held_out if held_out._examples else None

    def batches(self, args) -> Iterator[dict]:
        """This process's share of the examples. Every process has the same number of batches."""
        share = -(-len(self._examples) // args.world_size)
        first = args.process_index * share
        own = [self._examples[i % len(self._examples)] for i in range(first, first + share)]
        size = args.per_device_eval_batch_size
        for first in range(0, share, size):
            yield self._collate(own[first : first + size])


def evaluated(model: PreTrainedModel, inputs: dict, args):
    """What a model returns for a batch, decoded as in evaluation; ``args`` are the Trainer's."""
    inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    with evaluating(model), torch.autocast(model.device.type, dtype, enabled=args.fp16 or args.bf16):
        return model(**inputs)


def cross_entropy_of(model: PreTrainedModel, batches: Iterable[dict], args) -> float | None:
    """Nats per target token, decoded as in evaluation, over the batches of all processes; ``None`` without a target.

    It leaves the global random state as it is, so it does not change the training.
    """
    from accelerate.utils import reduce

    sums = torch.zeros(2, device=args.device)
    with torch.random.fork_rng(devices=[]):
        for inputs in batches:
            if inputs.get("labels") is None or inputs.get("encoder_outputs") is not None:
                continue  # these are latents of training, not texts
            tokens = (inputs["labels"] != IGNORED).sum().to(args.device)
            cross_entropy = evaluated(model, inputs, args).cross_entropy.detach().float().to(args.device)
            sums += torch.stack([cross_entropy * tokens, tokens])
    total, count = reduce(sums, "sum").tolist()
    return total / count if count else None
