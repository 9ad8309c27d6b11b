"""Graphs that are exported, which hold all that is computed, whether anything returns it or not."""

import torch


def is_exporting() -> bool:
    """Whether this pass is recorded by ``torch.export`` or ``torch.onnx``, as a graph for inputs of other sizes."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
