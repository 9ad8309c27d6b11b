"""Graphs that are exported: they hold all that is computed, returned or not, and run at any size."""

import torch


def is_exporting() -> bool:
    """Whether this pass is recorded by ``torch.export`` or ``torch.onnx``, as a graph for inputs of other sizes."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def check_not_exporting(what: str, remedy: str) -> None:
    """Raise ValueError in an exported graph, for what makes a number of vectors that depends on values."""
    if is_exporting():
        raise ValueError(f"{what} makes as many vectors as the inputs' values say, which no graph can. {remedy}")
