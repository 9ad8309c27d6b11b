"""The latent as a memory for ``nn.TransformerDecoder``: a tuple that passes through it untouched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .denoising_attention import at_least_float32
from .distributions import log_of_positive


class _Fields(NamedTuple):
    z: Tensor
    pi: Tensor
    mu: Tensor
    logvar: Tensor


class NvibMemory(_Fields):
    """``(z, pi, mu, logvar)`` with ``log_pi`` beside them, so that nothing goes through ``log(pi)``.

    ``z``, ``mu``, ``logvar`` ``(Nl, B, P)`` and ``pi``, ``log_pi`` ``(Nl, B, 1)``, or ``(B, Nl, ...)`` from a layer
    that is ``batch_first``; weights may be given without the last dimension. Training attends to ``z`` with weights
    ``pi``, evaluation to the mixture of Gaussians ``mu``, ``logvar``, ``pi``. ``pi = 0`` (``log_pi = -inf``) masks a
    vector. ``points`` says that every variance is 0, so that evaluation attends to ``z`` as well. ``dropped`` and
    ``full_log_pi``, ``(Nl, B)`` or ``(B, Nl)``, are those of :class:`~nvib_hf.posterior.Posterior`, ``None`` but for
    hard draws in training.

    A tuple of four, as published code unpacks it and ``nn.TransformerDecoder`` hands it on; what is beside them are
    attributes, which a NamedTuple's own ``__new__`` and ``_replace`` would not set.

    Raises:
        ValueError: ``pi`` or ``log_pi`` is not one weight for each vector of ``z``.
    """

    log_pi: Tensor
    points: bool
    dropped: Tensor | None = None
    full_log_pi: Tensor | None = None

    def __new__(
        cls,
        z: Tensor,
        pi: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_pi: Tensor | None = None,
        points: bool = False,
    ) -> NvibMemory:
        pi = _column("pi", pi, z)
        if log_pi is None:
            log_pi = log_of_positive(at_least_float32(pi))
        memory = super().__new__(cls, z, pi, mu, logvar)
        memory.log_pi, memory.points = _column("log_pi", log_pi, z), points
        return memory

    def _replace(self, **fields: Tensor) -> NvibMemory:
        """As of any NamedTuple; ``log_pi`` is kept unless ``pi`` is replaced, ``points`` unless a Gaussian is."""
        kept = {} if "pi" in fields else {"log_pi": self.log_pi}
        if not fields.keys() & {"mu", "logvar"}:
            kept["points"] = self.points
        memory = type(self)(**self._asdict() | kept | fields)
        if "pi" not in fields:
            memory.dropped, memory.full_log_pi = self.dropped, self.full_log_pi
        return memory


def _column(name: str, weights: Tensor, z: Tensor) -> Tensor:
    """Weights with the trailing dimension of 1. Whether they have it their number of dimensions says, never a size."""
    column = weights[..., None] if weights.dim() == z.dim() - 1 else weights
    if column.shape != (*z.shape[:-1], 1):
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}, but z has {tuple(z.shape)}: pass one weight for each vector, "
            f"{(*z.shape[:-1], 1)}, the last dimension optional."
        )
    return column


def as_memory(memory: object) -> NvibMemory:
    """``memory`` itself, or an :class:`NvibMemory` of a plain tuple ``(z, pi, mu, logvar)``.

    Raises:
        TypeError: for anything else. ValueError: ``pi`` does not fit ``z``.
    """
    if isinstance(memory, NvibMemory):
        return memory
    if isinstance(memory, tuple) and len(memory) == 4 and all(isinstance(x, torch.Tensor) for x in memory):
        return NvibMemory(*memory)
    raise TypeError(
        f"Denoising attention needs a memory (z, pi, mu, logvar), but got {type(memory).__name__}. Pass the "
        "'z' entry of an Nvib layer's output, or Nvib.sample(...)."
    )
