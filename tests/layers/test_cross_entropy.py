"""Cross-entropy by rows against that of torch on the whole."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nvib_hf.layers import cross_entropy as module
from nvib_hf.layers.cross_entropy import cross_entropy

N, V = 10, 7
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 3 * V, 5 * V + 2, N * V], ids=["a row", "3 rows", "5 rows", "all"])
def at_a_time(request, monkeypatch):
    monkeypatch.setitem(module.AT_A_TIME, "cpu", request.param)


@pytest.fixture
def labels():
    labels = torch.tensor([3, -100, 0, 6, 6, -100, -100, 1, 2, 5])
    assert len(labels) == N
    return labels


def logits(dtype):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, V, generator=generator).mul(4).to(dtype).requires_grad_()


def of_torch(x, labels, smoothing):
    """Value and gradient in double precision."""
    x = x.detach().double().requires_grad_()
    value = F.cross_entropy(x, labels, reduction="sum", label_smoothing=smoothing)
    return value, torch.autograd.grad(3 * value, x)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient_are_those_of_torch(at_a_time, labels, dtype, smoothing):
    x = logits(dtype)
    value = cross_entropy(x, labels, smoothing)
    (gradient,) = torch.autograd.grad(3 * value, x)
    expected, expected_gradient = of_torch(x, labels, smoothing)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == single and gradient.dtype == dtype
    torch.testing.assert_close(value, expected.to(single))
    rounded_once = expected_gradient.to(dtype)
    torch.testing.assert_close(gradient, rounded_once, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-6)
    assert gradient[labels == -100].eq(0).all()


def test_compiled_is_the_same_without_a_loop(labels, monkeypatch):
    monkeypatch.setitem(module.AT_A_TIME, "cpu", V)
    sizes = []

    def backend(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph

    compiled = torch.compile(cross_entropy, fullgraph=True, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        x = logits(dtype)
        value, expected = compiled(x, labels, 0.1), cross_entropy(x, labels, 0.1)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(expected, x))
    assert len(sizes) == 2 and max(sizes) < N


@pytest.mark.parametrize("change", [lambda x: x.T.contiguous().T, lambda x: x[:, :1].expand(N, V)])
def test_layout_does_not_matter(at_a_time, labels, change):
    x = change(logits(torch.float32)).detach().requires_grad_()
    value = cross_entropy(x, labels)
    expected, expected_gradient = of_torch(x, labels, 0.0)
    torch.testing.assert_close(value, expected.float())
    torch.testing.assert_close(torch.autograd.grad(3 * value, x)[0], expected_gradient.float())


def test_under_autocast(at_a_time, labels):
    x = logits(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = cross_entropy(x, labels)
    torch.testing.assert_close(value, cross_entropy(x, labels), rtol=0, atol=0)


def test_second_derivatives(at_a_time, labels):
    x = logits(torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, labels, 0.2), x)


def test_gradients_of_single_examples(at_a_time, labels):
    """What ``torch.func`` makes of it: one gradient a token, their sum the whole's."""
    x = logits(torch.float64).detach()
    weight = torch.eye(V, dtype=torch.float64)

    def loss(weight, x, label):
        return cross_entropy(x[None] @ weight, label[None])

    by_token = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, x, labels)
    whole = torch.func.grad(lambda weight: cross_entropy(x @ weight, labels))(weight)
    assert by_token[labels == -100].eq(0).all() and by_token[0].abs().max() > 0
    torch.testing.assert_close(by_token.sum(0), whole)


def test_nothing_but_ignored_labels_costs_nothing(at_a_time):
    x = logits(torch.float32)
    value = cross_entropy(x, torch.full((N,), -100))
    assert value == 0 and torch.autograd.grad(value, x)[0].eq(0).all()
    assert cross_entropy(x[:0], torch.zeros(0, dtype=torch.long)) == 0


@pytest.mark.parametrize("label", [-1, V])
def test_refuses_labels_outside_the_vocabulary(labels, label):
    labels[4] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        cross_entropy(logits(torch.float32), labels)


class LargestSingle(TorchDispatchMode):
    """Number of elements of the largest tensor in single precision that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.largest = max(self.largest, x.numel())
        return result


def test_no_copy_in_single_precision(monkeypatch, labels):
    monkeypatch.setitem(module.AT_A_TIME, "cpu", 3 * V)
    x = logits(torch.bfloat16)
    with LargestSingle() as seen:
        cross_entropy(x, labels).backward()
    assert 0 < seen.largest <= 3 * V
    with LargestSingle() as seen:
        F.cross_entropy(x.float(), labels, reduction="sum").backward()
    assert seen.largest == N * V
