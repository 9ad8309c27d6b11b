"""The latent as a memory for ``nn.TransformerDecoder``: a tuple that passes through it untouched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .denoising_attention import at_least_float32


class _Fields(NamedTuple):
    z: Tensor
    pi: Tensor
    mu: Tensor
    logvar: Tensor


class NvibMemory(_Fields):
    """``(z, pi, mu, logvar)`` with ``log_pi`` beside them, so that nothing goes through ``log(pi)``.

    ``z``, ``mu``, ``logvar`` ``(Nl, B, P)`` and ``pi``, ``log_pi`` ``(Nl, B)``, or ``(B, Nl, ...)`` from a layer
    that is ``batch_first``. Training attends to ``z`` with weights ``pi``, evaluation to the mixture of Gaussians
    ``mu``, ``logvar``, ``pi``. ``pi = 0`` (``log_pi = -inf``) masks a vector. ``points`` says that every variance is
    0, so that evaluation attends to ``z`` as well.
    """

    log_pi: Tensor
    points: bool

    def __new__(
        cls,
        z: Tensor,
        pi: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_pi: Tensor | None = None,
        points: bool = False,
    ) -> NvibMemory:
        memory = super().__new__(cls, z, pi, mu, logvar)
        if log_pi is None:
            masked = pi <= 0
            log_pi = at_least_float32(pi).masked_fill(masked, 1).log().masked_fill(masked, float("-inf"))
        memory.log_pi, memory.points = log_pi, points
        return memory

    def _replace(self, **fields: Tensor) -> NvibMemory:
        """As of any NamedTuple; ``log_pi`` is kept unless ``pi`` is replaced, ``points`` unless a Gaussian is."""
        kept = {} if "pi" in fields else {"log_pi": self.log_pi}
        if not fields.keys() & {"mu", "logvar"}:
            kept["points"] = self.points
        return type(self)(**self._asdict() | kept | fields)

    def __reduce__(self):
        return type(self), (*self, self.log_pi, self.points)


def as_memory(memory: object) -> NvibMemory:
    """``memory`` itself, or an :class:`NvibMemory` of a plain tuple ``(z, pi, mu, logvar)``.

    A trailing dimension of 1 of ``pi`` is dropped.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(memory, NvibMemory):
        return memory
    if isinstance(memory, tuple) and len(memory) == 4 and all(isinstance(x, torch.Tensor) for x in memory):
        z, pi, mu, logvar = memory
        return NvibMemory(z, pi.squeeze(-1) if pi.dim() == z.dim() else pi, mu, logvar)
    raise TypeError(
        f"Denoising attention needs a memory (z, pi, mu, logvar), but got {type(memory).__name__}. Pass the "
        "'z' entry of an Nvib layer's output, or Nvib.sample(...)."
    )
