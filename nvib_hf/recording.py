"""Sums of what a model says of its latents while it trains: nothing is read from the device before it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PER_TOKEN = ("cross_entropy", "kl_gaussian", "kl_dirichlet")
PER_EXAMPLE = ("num_vectors", "prop_vectors", "effective_vectors")


def find_nvib_model(model: nn.Module) -> nn.Module:
    """The NVIB model inside whatever wraps it (PEFT, DDP, ``torch.compile``), its code from here or from a hub."""
    for module in model.modules():
        if "kl_beta" in module._buffers:
            return module
    raise ValueError(f"{type(model).__name__} contains no NvibForConditionalGeneration. Wrap a base model first.")


class Recorder:
    """Means of the terms of the loss and of the vectors kept, since they were last read.

    ``cross_entropy``, ``kl_gaussian``, ``kl_dirichlet`` in nats are means over target tokens; ``num_vectors``,
    ``prop_vectors`` and ``effective_vectors`` over examples.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def hook(self, model, args: tuple, inputs: dict, outputs) -> None:
        """Add a forward pass: a forward hook (``with_kwargs=True``)."""
        labels = inputs.get("labels")
        if labels is None or not hasattr(outputs, "get") or outputs.get("kl_gaussian") is None:
            return
        tokens = (labels != -100).sum(-1)  # (B,)
        terms = [
            outputs.cross_entropy.mean() * tokens.sum(),  # one value, or one a device
            (tokens * outputs.kl_gaussian).sum(),
            (tokens * outputs.kl_dirichlet).sum(),
            *(outputs[name].sum() for name in PER_EXAMPLE),
        ]
        sums = torch.stack([x.detach().float() for x in (*terms, tokens.sum(), torch.ones_like(tokens).sum())])
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)

    def clear(self) -> None:
        self._sums = None

    def read(self, device: torch.device | str) -> dict[str, float]:
        """The means over all processes, each of which has to read, and none of them from here on.

        Args:
            device: where the sums of a process that recorded nothing lie.

        Returns:
            Nothing where nothing was recorded.
        """
        from accelerate.utils import reduce

        nothing = torch.zeros(len(PER_TOKEN) + len(PER_EXAMPLE) + 2, device=device)
        *terms, tokens, examples = reduce(nothing if self._sums is None else self._sums, "sum").tolist()
        self.clear()
        if not tokens:
            return {}
        counts = [tokens] * len(PER_TOKEN) + [examples] * len(PER_EXAMPLE)
        return {
            name: term / count for name, term, count in zip((*PER_TOKEN, *PER_EXAMPLE), terms, counts, strict=True)
        }
