"""The memory behaves as the tuple (z, pi, mu, logvar) and loses no log-weight on any way a tuple can go."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nvib_hf import DenoisingMultiheadAttention, Nvib, NvibMemory
from nvib_hf.layers.published import as_memory


def fields(length=3, batch=2, width=4):
    z, mu, logvar = (torch.randn(length, batch, width) for _ in range(3))
    return z, torch.rand(length, batch), mu, logvar


@pytest.fixture
def memory():
    """With log-weights that no pi can hold."""
    log_pi = torch.tensor([[0.0, -1e-9], [-1e6, -3e20], [float("-inf"), -200.0]])[..., None]
    z, _, mu, logvar = fields()
    return NvibMemory(z, log_pi.exp(), mu, logvar, log_pi=log_pi)


def test_it_is_the_tuple_of_the_published_interface(memory):
    z, pi, mu, logvar = memory
    assert isinstance(memory, tuple) and len(memory) == 4
    assert z is memory.z is memory[0]
    assert pi is memory.pi is memory[1]
    assert mu is memory.mu is memory[2]
    assert logvar is memory.logvar is memory[3]
    assert (pi[1] == 0).all() and memory.log_pi[1, :, 0].tolist() == [-1e6, torch.tensor(-3e20).item()]


@pytest.mark.parametrize(
    "way",
    [
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.copy,
        copy.deepcopy,
        lambda m: m._replace(z=m.z.clone()),
        as_memory,
    ],
    ids=["pickle", "copy", "deepcopy", "replace", "as_memory"],
)
def test_log_weights_survive(memory, way):
    other = way(memory)
    assert type(other) is NvibMemory
    assert_close(tuple(other), tuple(memory))
    assert torch.equal(other.log_pi, memory.log_pi)


def test_replaced_weights_bring_their_own_logarithm(memory):
    uniform = memory._replace(pi=torch.full((3, 2), 1 / 3))
    assert uniform.pi.shape == (3, 2, 1)
    assert_close(uniform.log_pi.exp(), uniform.pi)
    assert_close(memory._replace(log_pi=uniform.log_pi).log_pi, uniform.log_pi)


@pytest.mark.parametrize("trailing", [False, True])
def test_a_plain_tuple_is_accepted(trailing):
    z, pi, mu, logvar = fields()
    memory = as_memory((z, pi[..., None] if trailing else pi, mu, logvar))
    assert memory.z is z and memory.mu is mu and memory.logvar is logvar
    assert_close(memory.pi, pi[..., None])
    assert_close(memory.log_pi, pi[..., None].double().log().float())


def test_a_weight_of_zero_in_a_plain_tuple_has_no_gradient():
    """The derivative of log(0) is infinite; times the attention's 0 it would be NaN in every parameter."""
    z, _, mu, logvar = fields()
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.5], [float("-inf"), -0.1]], requires_grad=True)
    memory = as_memory((z, logits.softmax(0), mu, logvar))
    attention = DenoisingMultiheadAttention(4, 2).train()
    attention(torch.randn(5, 2, 4), memory)[0].square().sum().backward()
    assert memory.log_pi[2, 0] == float("-inf")
    assert logits.grad.isfinite().all()
    assert logits.grad[2, 0] == 0 and logits.grad.abs().sum() > 0


def test_weights_in_half_precision_have_logarithms_in_fp32():
    z, pi, mu, logvar = fields()
    memory = as_memory((z, pi.bfloat16(), mu, logvar))
    assert_close(memory.log_pi, pi.bfloat16().float().log()[..., None])


@pytest.mark.parametrize(
    "other",
    [torch.zeros(3, 2, 4), None, fields()[:3], list(fields()), (*fields()[:3], 0.0), {"z": fields()}],
    ids=["tensor", "None", "3-tuple", "list", "number", "dict"],
)
def test_anything_else_is_refused(other):
    with pytest.raises(TypeError, match=rf"\(z, pi, mu, logvar\), but got {type(other).__name__}.*'z' entry"):
        as_memory(other)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 2, 4), (3, 1, 1), (3, 2, 1, 1)], ids=str)
def test_weights_of_another_shape_are_refused(shape):
    z, _, mu, logvar = fields()
    message = rf"pi has shape \({shape[0]},.* but z has \(3, 2, 4\). Pass one weight for each vector, \(3, 2, 1\)"
    with pytest.raises(ValueError, match="^" + message):
        as_memory((z, torch.ones(shape), mu, logvar))
    with pytest.raises(ValueError, match="^log_" + message):
        NvibMemory(z, torch.ones(3, 2), mu, logvar, log_pi=torch.ones(shape))


def test_it_goes_through_a_transformer_decoder_untouched(memory):
    seen = []

    class Spy(DenoisingMultiheadAttention):
        def forward(self, query, key, value=None, **kwargs):
            seen.append((key, value))
            return super().forward(query, key, value, **kwargs)

    layer = nn.TransformerDecoderLayer(4, nhead=2, dim_feedforward=8)
    layer.multihead_attn = Spy(4, 2)
    nn.TransformerDecoder(layer, num_layers=2)(torch.randn(5, 2, 4), memory)
    assert len(seen) == 2
    assert all(key is memory and value is memory for key, value in seen)


def test_the_layer_hands_on_log_weights_that_pi_cannot_hold():
    layer = Nvib(4, 4).eval()
    with torch.no_grad():
        layer.alpha_bias.fill_(1000.0)
    memory = layer(torch.randn(3, 2, 4))["z"]
    assert (memory.pi[0] == 0).all()
    assert_close(memory.log_pi[0], torch.full((2, 1), -1000.0), rtol=0.01, atol=0)


def test_points_stand_for_variances_of_zero_until_a_gaussian_is_replaced():
    memory = Nvib(4, 4).sample(2, torch.zeros(2, 3, dtype=torch.bool))
    assert memory.points and (memory.logvar == -float("inf")).all()
    assert copy.deepcopy(memory).points and memory._replace(z=memory.z + 1).points
    assert not memory._replace(logvar=torch.zeros_like(memory.z)).points
    assert not Nvib(4, 4).eval()(torch.randn(3, 2, 4))["z"].points
