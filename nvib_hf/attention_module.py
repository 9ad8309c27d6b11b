"""What denoising cross- and self-attention share: a base's module, read through its row of a table.

A module keeps its parameters, names and hooks: only its class changes, to a subclass of its own.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvertedAttention(nn.Module):
    """Mixed in before an attention's own class; ``nvib_row`` says what its parts are called."""

    nvib_row: object
    nvib_arguments: tuple[str, ...]

    def _given(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of a call, by name."""
        return dict(zip(self.nvib_arguments, args, strict=False)) | kwargs

    def _by_head(self, x: Tensor) -> Tensor:
        """``(B, N, H * E)`` to ``(B, H, N, E)``."""
        return x.view(*x.shape[:-1], -1, getattr(self, self.nvib_row.head_dim)).transpose(1, 2)

    def _joined(self, output: Tensor) -> Tensor:
        """``(B, H, N, E)`` to what the module returns of it, ``(B, N, C)``."""
        row, output = self.nvib_row, output.transpose(1, 2).flatten(2)
        if row.output is not None:
            output = getattr(self, row.output)(output)
        if row.output_dropout is not None:
            output = F.dropout(output, self._probability(row.output_dropout))
        return output

    def _needs_weights(self, inputs: dict) -> bool:
        config = getattr(self, "config", None)
        return inputs.get("output_attentions") or getattr(config, "_attn_implementation", "") == "eager"

    def _probability(self, name: str) -> float:
        if not self.training:
            return 0.0
        dropout = getattr(self, name)
        return dropout.p if isinstance(dropout, nn.Dropout) else dropout


def projection_matrix(projection: nn.Module, like: Tensor) -> Tensor:
    """The matrix ``(out, P)`` of a linear map.

    A plain ``nn.Linear`` is read. Anything else (LoRA, quantised weights, Conv1D, offloaded weights) is applied to
    the identity, so that whatever it does counts.
    """
    plain = type(projection) is nn.Linear and type(projection.weight) is nn.Parameter
    hooked = hasattr(projection, "_hf_hook") or projection._forward_hooks or projection._forward_pre_hooks
    if plain and not hooked and projection.weight.dtype == like.dtype:
        return projection.weight
    eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None]
    return (projection(eye) - projection(torch.zeros_like(eye[:, :1]))).squeeze(0).transpose(0, 1)


@functools.cache
def converted_class(mixin: type[ConvertedAttention], base: type[nn.Module], row: object) -> type[nn.Module]:
    """A subclass of ``base`` that computes ``mixin``'s attention."""
    names = tuple(inspect.signature(base.forward).parameters)[1:]
    fields = {"nvib_row": row, "nvib_arguments": names, "__module__": base.__module__}
    return type(f"Denoising{base.__name__}", (mixin, base), fields)


def own_class(module: ConvertedAttention) -> type[nn.Module]:
    """The class that a module had before it was converted."""
    return type(module).__bases__[1]


def set_class(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Change the class, also beneath a hook of accelerate, which keeps the ``forward`` it calls on the instance."""
    module.__class__ = module_class
    if "_old_forward" in vars(module):
        module._old_forward = module_class.forward.__get__(module)
