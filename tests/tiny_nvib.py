"""Tiny NVIB models whose posterior is not trivial, and what tests read off a model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_base
from torch import Tensor, nn
from transformers import GenerationMixin

from nvib_hf import NvibForConditionalGeneration


def tiny_nvib(
    family: str = "bart", seed: int = 0, base: dict | None = None, **settings
) -> NvibForConditionalGeneration:
    """A wrapped tiny model in ``eval()``: variances and pseudo-counts differ by vector, the prior's weight is seen.

    ``base`` are settings of the base's configuration.
    """
    settings = {"tau_alpha": 1.0, "tau_sigma": 0.3, **settings}
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family, seed, **(base or {})), **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.nvib.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, those that are not saved included."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


def cross_attention(model: nn.Module) -> list[nn.Module]:
    """The converted cross-attention modules of a model."""
    return [module for module in model.modules() if hasattr(module, "nvib_spec")]


def generate(model: nn.Module, inputs: dict, **settings) -> Tensor:
    """Plain generation: Whisper's own ``generate`` is about timestamps and chunks."""
    settings = {"max_new_tokens": 7, "do_sample": False, "num_beams": 1} | settings
    if isinstance(model, NvibForConditionalGeneration):
        return model.generate(**inputs, **settings)
    return GenerationMixin.generate(model, **inputs, **settings)


def add_adapter_or_skip(model: NvibForConditionalGeneration, config) -> None:
    """Transformers' own way to an adapter, where it takes the PEFT that is installed: 5.24 asks for one to come."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
