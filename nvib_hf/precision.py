"""What stays in single precision when a model is cast to half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HALF = 2  # bytes: less than single precision


class SinglePrecisionMixin:
    """Before ``nn.Module``: what is a module's own, not its children's, is never narrower than fp32.

    ``half()``, ``bfloat16()`` and ``to(dtype)`` leave them in fp32, ``double()`` and ``float()`` cast them as they
    cast all others, and moves between devices move them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(lambda value: _at_least_single(value, fn(value)), recurse=False)


def _at_least_single(value: Tensor, applied: Tensor) -> Tensor:
    """``applied``, which a function made of ``value``; with the value's own bits where those would be lost."""
    if applied.is_floating_point() and applied.element_size() <= HALF:
        return value.to(applied.device, torch.float32)
    return applied
