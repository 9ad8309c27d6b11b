"""What the modules for plain PyTorch refuse, as PyTorch's own do, and empty batches."""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nvib_hf import DenoisingMultiheadAttention, Nvib

PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
WHOLE_NUMBERS = [torch.int64, torch.int32, torch.uint8]


def memory_of(batch=2, **settings):
    return Nvib(8, 8, **settings).eval()(torch.randn(5, batch, 8))["z"]


@pytest.mark.parametrize("dtype", WHOLE_NUMBERS, ids=str)
def test_a_layer_refuses_a_mask_of_whole_numbers(dtype):
    """Of ones for what is seen, as a tokenizer makes it, it would hide all but the padding."""
    layer, mask = Nvib(8, 8), PADDING.to(dtype)
    with pytest.raises(
        TypeError, match=re.escape(f"src_key_padding_mask must be boolean (True = padding), but got {dtype}")
    ):
        layer(torch.randn(5, 2, 8), mask)
    with pytest.raises(TypeError, match="memory_key_padding_mask must be boolean"):
        layer.sample(2, mask)
    assert layer(torch.randn(5, 2, 8), PADDING)["keep"].sum() == 2 + 8


@pytest.mark.parametrize("dtype", WHOLE_NUMBERS, ids=str)
@pytest.mark.parametrize("name, mask", [("key_padding_mask", PADDING), ("attn_mask", torch.zeros(3, 6))])
def test_attention_refuses_a_mask_of_whole_numbers_as_pytorch_does(name, mask, dtype):
    query, memory = torch.randn(3, 2, 8), memory_of()
    mask = torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask], dim=1) if mask is PADDING else mask
    with pytest.raises((AssertionError, RuntimeError)):  # PyTorch's own
        nn.MultiheadAttention(8, 2)(query, memory.z, memory.z, **{name: mask.to(dtype)})
    with pytest.raises(TypeError, match=f"{name} must be boolean .* but got {dtype}.*mask == 0"):
        DenoisingMultiheadAttention(8, 2)(query, memory, **{name: mask.to(dtype)})
    for kind in (torch.bool, torch.float32):
        DenoisingMultiheadAttention(8, 2)(query, memory, **{name: mask.to(kind)})


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_memory_for_many_queries_is_refused(batch_first):
    attention = DenoisingMultiheadAttention(8, 2, batch_first=batch_first)
    memory = memory_of(1) if not batch_first else Nvib(8, 8, batch_first=True).eval()(torch.randn(1, 5, 8))["z"]
    query = torch.randn((5, 3, 8) if batch_first else (3, 5, 8))
    with pytest.raises(
        ValueError, match=r"memory has a batch of 1, but the query one of 5\. Pass one latent per example"
    ):
        attention(query, memory)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("evaluation", ["means", "mixture"])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training, evaluation, exact):
    attention = DenoisingMultiheadAttention(8, 2, evaluation=evaluation, exact=exact).train(training)
    output, weights = attention(torch.randn(3, 0, 8), memory_of(0))
    assert output.shape == (3, 0, 8) and weights.shape == (0, 3, 6)
    assert attention(torch.randn(3, 0, 8), memory_of(0), need_weights=False)[0].shape == (3, 0, 8)


def test_an_empty_batch_is_no_row_of_a_full_one():
    """And the shapes that this took leave a full batch what it was: its rows one by one."""
    attention, memory, query = DenoisingMultiheadAttention(8, 2).eval(), memory_of(), torch.randn(3, 2, 8)
    together = attention(query, memory)[0]
    for row in range(2):
        alone = type(memory)(*(x[:, row : row + 1] for x in memory))
        assert_close(attention(query[:, row : row + 1], alone)[0], together[:, row : row + 1])
