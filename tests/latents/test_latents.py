"""Latents as a batch of their own, and packed for their way through a decoder."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tiny_latents import INF, WIDTH, assert_same, mixture, sample
from torch.utils import _pytree as pytree

from nvib_hf import NvibLatents, concatenate_latents
from nvib_hf.latents.latents import interpolate
from nvib_hf.layers.denoising_attention import AttendedLatent, pack, unpack


@pytest.mark.parametrize(
    "index, rows",
    [
        (1, [1]),
        (-1, [3]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0, 2], [2, 0, 2]),
        ([True, False, False, True], [0, 3]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([False, True, True, False]), [1, 2]),
        (torch.tensor([True, False, False, False]), [0]),
        (np.array([3, 1]), [3, 1]),
        (np.array([2]), [2]),
        (np.array([True, False, False, True]), [0, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [mixture, sample])
def test_index_selects_rows_of_every_field(make, index, rows):
    latents = make()
    expected = {name: torch.stack([value[row] for row in rows]) for name, value in latents.items()}
    assert_same(latents[index], NvibLatents(**expected))


@pytest.mark.parametrize("index", [4, -5])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=f"index {index} is out of range for 4 latents"):
        mixture()[index]


@pytest.mark.parametrize(
    "index",
    [(0, 1), (..., 0), None, 1.0, np.eye(4, dtype=bool), torch.zeros(2, 2, dtype=torch.long), [[0, 1], [1, 2]]],
)
def test_what_selects_no_rows_is_refused(index):
    with pytest.raises(TypeError, match="The index of latents must be a number"):
        mixture()[index]


def test_no_rows():
    assert len(mixture()[[]]) == 0 and mixture()[[]].z.shape[1:] == mixture().z.shape[1:]


def test_fields_by_name():
    latents = mixture()
    assert latents["z"] is latents.z
    assert (latents.batch_size, latents.device) == (4, torch.device("cpu"))


def test_to_casts_vectors_and_leaves_logarithms_and_masks_in_full_precision():
    latents = mixture()
    half = latents.to("cpu", torch.bfloat16)
    changed = {name for name, value in latents.items() if half[name].dtype != value.dtype}
    assert changed == {"z", "logvar"}
    assert half.z.dtype == torch.bfloat16
    assert_same(latents.to("cpu"), mixture())
    assert_same(latents, mixture())


def test_to_moves_every_field():
    assert {value.device.type for value in dict(mixture().to("meta")).values()} == {"meta"}


def test_detach():
    latents = mixture()
    latents.z.requires_grad_()
    latents.log_pi.requires_grad_()
    assert not any(value.requires_grad for value in dict(latents.detach()).values())
    assert latents.z.requires_grad


@pytest.mark.parametrize("make", [mixture, sample])
def test_copies_pickles_and_trees(make):
    latents = make()
    assert_same(pickle.loads(pickle.dumps(latents)), latents)
    assert_same(copy.deepcopy(latents), latents)
    leaves, tree = pytree.tree_flatten(latents)
    assert len(leaves) == len(latents.keys())
    assert_same(pytree.tree_unflatten(leaves, tree), latents)


def test_compact_drops_what_decoding_cannot_see_and_keeps_the_order():
    latents = mixture(batch=3, length=6)  # 6, 5 and 4 vectors
    latents.log_pi[0, [1, 4]] = -INF  # dropped by a threshold: 4 kept
    latents.log_pi[1, 0] = -INF  # 4 kept
    kept = [[0, 2, 3, 5], [1, 2, 3, 4], [0, 1, 2, 3]]
    rows = torch.arange(3)[:, None]
    compact = latents.compact()
    assert compact.z.shape == (3, 4, WIDTH)
    for name in ("z", "log_pi", "logvar", "attention_mask", "log_alpha"):
        assert torch.equal(compact[name], latents[name][rows, kept]), name
    assert torch.equal(compact.kl_gaussian, latents.kl_gaussian)


def test_compact_of_full_latents_is_itself():
    latents = sample()
    assert latents.compact() is latents


def test_concatenate_pads_shorter_latents():
    first, second = mixture(batch=2, length=5), mixture(batch=3, length=3, seed=1)
    both = concatenate_latents([first, second])
    assert both.z.shape == (5, 5, WIDTH)
    assert_same(both[:2], first)
    tail = both[2:]
    assert (tail.log_pi[:, 3:] == -INF).all() and (tail.log_alpha[:, 3:] == -INF).all()
    assert not tail.attention_mask[:, 3:].any()
    assert (tail.z[:, 3:] == 0).all() and tail.logvar[:, 3:].isfinite().all()
    trimmed = {name: value[:, :3] if value.dim() > 1 else value for name, value in tail.items()}
    assert_same(NvibLatents(**trimmed), second)


def test_concatenate_a_text_with_a_sample():
    text, drawn = mixture(batch=2), sample(batch=2)
    both = concatenate_latents([text, drawn])
    assert set(both.keys()) == {"z", "log_pi", "logvar", "attention_mask"}  # the rest is unknown for the sample
    assert (both.logvar[2:, :3] == -INF).all()  # variance 0: attended to as the sample it is
    assert torch.equal(both.log_pi[2:, :3], drawn.log_pi)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_shrinkage", [False, True], ids=["sample", "mixture"])
def test_packing_keeps_vectors_and_24_bits_of_the_bias(dtype, with_shrinkage):
    vectors = torch.randn(2, 7, WIDTH).to(dtype)
    bias = -1000 * torch.rand(2, 7)
    bias[0, 3] = -INF
    shrinkage = torch.rand(2, 7, WIDTH).to(dtype) if with_shrinkage else None
    packed = pack(AttendedLatent(vectors, bias, shrinkage))
    assert packed.dtype == dtype
    memory = unpack(packed, WIDTH)
    assert torch.equal(memory.vectors, vectors)
    assert memory.shrinkage is None if shrinkage is None else torch.equal(memory.shrinkage, shrinkage)
    moved = bias - bias.amax(-1, keepdim=True)  # a softmax does not see a constant
    torch.testing.assert_close(memory.bias, moved, rtol=2**-20, atol=2**-14)


def test_means_pack_no_shrinkage():
    """Points, as a sample: ``P + 8`` wide, where a mixture is ``2 P + 8``; a sample is points in both."""
    latents, drawn = mixture(), sample()
    widths = {kind: pack(latents.attended(0.5, kind)).shape[-1] for kind in ("means", "mixture")}
    assert widths == {"means": WIDTH + 8, "mixture": 2 * WIDTH + 8}
    means, of_sample = latents.attended(0.5, "means"), [drawn.attended(0.5, kind) for kind in widths]
    assert means.shrinkage is None and torch.equal(means.vectors, latents.z)
    squares = latents.z.square() + latents.logvar.exp()  # E z^2
    torch.testing.assert_close(means.bias, latents.log_pi - 0.25 * squares.sum(-1))
    for memory in of_sample:
        assert memory.shrinkage is None and torch.equal(memory.bias, of_sample[0].bias)
    both = concatenate_latents([latents, drawn]).attended(0.5, "means")  # the sample, now a mixture without variance
    torch.testing.assert_close(both.bias[4:, :3], of_sample[0].bias)


def test_packing_carries_gradients_to_vectors_and_bias():
    vectors, bias = torch.randn(1, 4, WIDTH, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    memory = unpack(pack(AttendedLatent(vectors, bias)), WIDTH)
    memory.bias[0, 2].backward(retain_graph=True)
    assert bias.grad[0, 2] == 1
    memory.vectors[0, 1, 3].backward()
    assert vectors.grad.nonzero().tolist() == [[0, 1, 3]]


def test_unpack_refuses_what_is_no_latent():
    with pytest.raises(ValueError, match=r"6 wide where a latent of this model is 14 or 20.*encode\(\)"):
        unpack(torch.zeros(1, 3, WIDTH), WIDTH)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, torch.tensor([0.0, 0.3, 0.9, 1.0])], ids=str)
@pytest.mark.parametrize("first, second", [(mixture, mixture), (mixture, sample), (sample, mixture), (sample, sample)])
def test_interpolation_is_the_mixture_of_the_two(first, second, weight):
    a, b = first(seed=3), second(length=3, seed=4)
    between = interpolate(a, b, weight)
    t = torch.as_tensor(weight).expand(4)[:, None]
    expected = torch.cat([(1 - t) * a.log_pi.exp(), t * b.log_pi.exp()], dim=1)
    torch.testing.assert_close(between.log_pi.exp(), expected)
    torch.testing.assert_close(between.log_pi.exp().sum(-1), torch.ones(4))
    assert torch.equal(between.z, torch.cat([a.z, b.z], dim=1))
    assert torch.equal(between.attention_mask, torch.cat([a.attention_mask, b.attention_mask], dim=1))
    if a.logvar is None and b.logvar is None:
        assert between.logvar is None
    else:
        variances = [torch.zeros_like(x.z) if x.logvar is None else x.logvar.exp() for x in (a, b)]
        torch.testing.assert_close(between.logvar.exp(), torch.cat(variances, dim=1))
    assert between.kl_gaussian is None and between.log_alpha is None  # of no text


def test_interpolation_in_half_precision_keeps_weights_in_full():
    a, b = mixture().to(torch.bfloat16), mixture(seed=5).to(torch.bfloat16)
    between = interpolate(a, b, 0.3)
    assert between.z.dtype == torch.bfloat16 and between.log_pi.dtype == torch.float32
    torch.testing.assert_close(between.log_pi.exp().sum(-1), torch.ones(4))


@pytest.mark.parametrize("weight", [0.25, torch.linspace(0, 1, 5)], ids=["number", "five"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (5, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("first, second", [(mixture, mixture), (mixture, sample)])
def test_interpolation_repeats_a_batch_of_one(first, second, sizes, weight):
    a, b = first(batch=sizes[0], seed=3), second(batch=sizes[1], length=3, seed=4)
    between = interpolate(a, b, weight)
    size = max(*sizes, *torch.as_tensor(weight).shape)
    assert between.batch_size == size
    for row, t in enumerate(torch.as_tensor(weight).expand(size).tolist()):
        one_by_one = interpolate(a[min(row, sizes[0] - 1)], b[min(row, sizes[1] - 1)], t)
        assert_same(between[row], one_by_one)


@pytest.mark.parametrize("sizes, weights", [((2, 3), 1), ((1, 4), 3), ((4, 1), 3), ((4, 4), 0), ((2, 3), 6)], ids=str)
def test_interpolation_of_sizes_that_do_not_fit(sizes, weights):
    with pytest.raises(ValueError, match=r"batch sizes too unless one of them is 1|for each of the 4 latents"):
        interpolate(mixture(batch=sizes[0]), mixture(batch=sizes[1]), torch.full((weights,), 0.5))


def test_they_are_printed_in_a_line():
    latents = mixture(batch=3)
    batch, length, width = latents.z.shape
    size = f"{length} vectors, the prior's included"
    assert repr(latents) == f"NvibLatents(3 posteriors of up to {size}, {width} wide, torch.float32, cpu)"
    assert "samples" in repr(NvibLatents(latents.z, latents.log_pi, latents.attention_mask)) and batch == 3
