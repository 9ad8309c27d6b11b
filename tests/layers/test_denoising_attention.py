"""Denoising attention against its definition, in float64, and the fused kernel against the explicit one."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional as F
from torch.testing import assert_close

from nvib_hf.layers.denoising_attention import (
    append_bias,
    attended_means,
    attended_mixture,
    attended_points,
    denoising_attention,
    naive_denoising_attention,
    three_summands,
)

NO_VARIANCE = float("-inf")


class Problem(NamedTuple):
    """A latent, queries, and the projections of one attention layer with ``Hk`` heads for keys and values."""

    query: Tensor  # (B, H, Nt, E)
    mu: Tensor  # (B, Nl, P)
    logvar: Tensor  # (B, Nl, P)
    log_pi: Tensor  # (B, Nl)
    key_weight: Tensor  # (Hk, E, P)
    value_weight: Tensor  # (Hk, E, P)
    key_bias: Tensor  # (Hk, E)
    value_bias: Tensor  # (Hk, E)


def random_problem(heads=4, key_heads=4, logvar=None, batch=3, targets=4, length=6, head_dim=5, width=12):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    log_pi = 2 * normal(batch, length)
    log_pi[0, 2] = log_pi[1:2, 3:] = float("-inf")  # a weight of 0, and padding
    if logvar is None:  # every order of magnitude, 0 and 1e4 included
        values = torch.tensor([NO_VARIANCE, -80.0, -6.0, -1.0, 0.0, 2.0, math.log(1e4)], dtype=torch.float64)
        logvar = values[torch.randint(len(values), (batch, length, width))]
    else:
        logvar = torch.full((batch, length, width), logvar, dtype=torch.float64)
    weights = (normal(key_heads, head_dim, width) / width**0.5 for _ in range(2))
    biases = (normal(key_heads, head_dim) for _ in range(2))
    query, mu = 2 * normal(batch, heads, targets, head_dim), 2 * normal(batch, length, width)
    return Problem(query, mu, logvar, log_pi.log_softmax(-1), *weights, *biases)


def attend(problem: Problem, scale: float, sampled: bool = False, means: bool = False, **kwargs):
    """What a cross-attention module does: project the memory's vectors, then the core."""
    if sampled:
        memory = attended_points(problem.mu, problem.log_pi, scale)
    else:
        of_posterior = attended_means if means else attended_mixture
        memory = of_posterior(problem.mu, problem.logvar, problem.log_pi, scale)
    key, value = (
        torch.einsum("bjp,hep->bhje", memory.vectors, weight) + bias[None, :, None]
        for weight, bias in ((problem.key_weight, problem.key_bias), (problem.value_weight, problem.value_bias))
    )
    weights = {"key_weight": problem.key_weight, "value_weight": problem.value_weight}
    return denoising_attention(
        problem.query, key, value, memory.bias, scale, shrinkage=memory.shrinkage, **weights, **kwargs
    )


def naive(problem: Problem, scale: float, **kwargs) -> Tensor:
    groups = problem.query.shape[1] // problem.key_weight.shape[0]
    key_weight, value_weight, key_bias, value_bias = (x.repeat_interleave(groups, 0) for x in problem[4:])
    return naive_denoising_attention(
        *problem[:4], key_weight, value_weight, scale, key_bias=key_bias, value_bias=value_bias, **kwargs
    )


# The reference itself


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("exact", [True, False])
def test_naive_is_the_posterior_mean_by_quadrature(scale, exact):
    """E[x | u] for x from the mixture and u = x + Normal(0, 1 / s), integrated on a grid over the plane."""
    p = random_problem(heads=2, key_heads=2, batch=1, targets=3, length=3, head_dim=2, width=2)
    p = p._replace(
        log_pi=torch.randn(1, 3, dtype=torch.float64).log_softmax(-1),
        logvar=torch.empty(1, 3, 2, dtype=torch.float64).uniform_(-2, 2),
    )
    axis = torch.linspace(-25, 25, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)  # (G, 2)
    output = naive_denoising_attention(*p[:6], scale, exact=exact)
    for head in range(2):
        for t in range(3):
            u = p.query[0, head, t] @ p.key_weight[head]
            seen = Normal(grid, scale**-0.5).log_prob(u).sum(-1)  # log p(u | x)
            joint = (Normal(p.mu[0][:, None], (p.logvar[0] / 2).exp()[:, None]).log_prob(grid).sum(-1) + seen).exp()
            if not exact:  # as published: each component's density without its term in u * u
                total = p.logvar[0].exp() + 1 / scale
                joint = joint * torch.exp(0.5 * (u**2 / total).sum(-1))[:, None]
            joint = (p.log_pi[0].exp()[:, None] * joint).sum(0)
            mean = (joint[:, None] * grid).sum(0) / joint.sum()
            assert_close(output[0, head, t], p.value_weight[head] @ mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exact", [True, False])
def test_naive_without_variance_is_bayes_over_the_vectors(exact):
    """For a discrete mixture a_j is proportional to pi_j Normal(u; z_j, 1 / s), in both forms of the score."""
    p, scale = random_problem(logvar=NO_VARIANCE), 0.7
    u = torch.einsum("bhte,hep->bhtp", p.query, p.key_weight)
    likelihood = Normal(p.mu[:, None, None], scale**-0.5).log_prob(u[:, :, :, None]).sum(-1).exp()
    weights = p.log_pi.exp()[:, None, None] * likelihood
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhtj,bjp,hep->bhte", weights, p.mu, p.value_weight)
    assert_close(naive_denoising_attention(*p[:6], scale, exact=exact), expected)


# The core against the reference


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [1.0, 5**-0.5])
def test_sampled_form_is_the_definition_without_variance(scale, key_heads, softcap, need_weights):
    p = random_problem(key_heads=key_heads, logvar=NO_VARIANCE)
    output, _ = attend(p, scale, sampled=True, softcap=softcap, need_weights=need_weights)
    assert_close(output, naive(p, scale, softcap=softcap), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [1.0, 5**-0.5])
def test_mixture_form_is_the_definition(scale, key_heads, softcap, exact):
    p = random_problem(key_heads=key_heads)
    output, weights = attend(p, scale, softcap=softcap, exact=exact)
    assert weights is None
    assert_close(output, naive(p, scale, softcap=softcap, exact=exact), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("logvar", [NO_VARIANCE, -80.0, 0.0, math.log(1e4)])
def test_mixture_form_at_every_variance(logvar, exact):
    p = random_problem(logvar=logvar)
    output, _ = attend(p, 0.5, exact=exact)
    assert_close(output, naive(p, 0.5, exact=exact), rtol=1e-9, atol=1e-9)
    if logvar == NO_VARIANCE:
        assert_close(output, attend(p, 0.5, sampled=True)[0])


def moderate_problem(**kwargs) -> Problem:
    """With variances around 1, so that no mean is out of sight; some are 0."""
    p = random_problem(**kwargs)
    logvar = torch.randn_like(p.mu) - 1
    logvar[:, 1] = NO_VARIANCE
    return p._replace(logvar=logvar)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [1.0, 5**-0.5])
def test_means_are_the_definition_at_the_means(scale, key_heads, softcap, need_weights):
    """Points ``mu`` without variance, whose weights are ``log_pi - s/2 sum sigma^2``."""
    p = moderate_problem(key_heads=key_heads)
    output, _ = attend(p, scale, means=True, softcap=softcap, need_weights=need_weights)
    log_pi = p.log_pi - 0.5 * scale * p.logvar.exp().sum(-1)
    points = p._replace(logvar=torch.full_like(p.logvar, NO_VARIANCE), log_pi=log_pi)
    assert_close(output, naive(points, scale, softcap=softcap), rtol=1e-9, atol=1e-9)
    assert (output - attend(p, scale, softcap=softcap)[0]).abs().max() > 0.1  # the mixture is something else


def test_means_are_scored_as_their_samples_are_on_average():
    p, scale = moderate_problem(), 0.7
    z = p.mu + (0.5 * p.logvar).exp() * torch.randn(20000, *p.mu.shape, dtype=torch.float64)
    scores = attended_points(z, p.log_pi, scale).bias
    memory, finite = attended_means(p.mu, p.logvar, p.log_pi, scale), p.log_pi > float("-inf")
    error = scores.std(0)[finite] / 20000**0.5
    assert ((memory.bias - scores.mean(0))[finite].abs() <= 5 * error + 1e-9).all() and error.max() < 0.1
    assert memory.shrinkage is None and torch.equal(memory.vectors, p.mu)
    assert (memory.bias[~finite] == float("-inf")).all()


def test_without_variance_means_and_mixture_are_the_sample():
    p = random_problem(logvar=NO_VARIANCE)
    expected = attend(p, 0.5, sampled=True)[0]
    assert_close(attend(p, 0.5, means=True)[0], expected)
    assert_close(attend(p, 0.5)[0], expected)


def test_the_two_scores_differ_only_where_variances_do():
    same, different = random_problem(logvar=0.3), random_problem()
    assert_close(attend(same, 0.5, exact=True)[0], attend(same, 0.5, exact=False)[0])
    assert (attend(different, 0.5, exact=True)[0] - attend(different, 0.5, exact=False)[0]).abs().max() > 0.1


@pytest.mark.parametrize("sampled", [True, False])
def test_a_weight_of_zero_is_a_vector_left_out(sampled):
    p = random_problem()
    kept = [0, 1, 3, 4, 5]  # row 0 has a weight of 0 at 2
    row = Problem(*(x[:1] for x in p[:4]), *p[4:])
    without = Problem(p.query[:1], *(x[:1, kept] for x in p[1:4]), *p[4:])
    assert_close(attend(row, 0.5, sampled)[0], attend(without, 0.5, sampled)[0])


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
def test_attention_mask_is_a_weight_of_zero_for_one_query(boolean, sampled):
    p = random_problem(logvar=NO_VARIANCE if sampled else None)
    allowed = torch.rand(3, 4, 4, 6) > 0.4
    allowed[..., 0] = True
    additive = torch.zeros(3, 4, 4, 6, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    mask = allowed if boolean else additive
    output, _ = attend(p, 0.5, sampled, attention_mask=mask)
    for head in range(4):
        for t in range(4):
            masked = p._replace(log_pi=p.log_pi.masked_fill(~allowed[:, head, t], float("-inf")))
            assert_close(output[:, head, t], naive(masked, 0.5)[:, head, t])


def test_weights_are_the_attention_paid():
    """With one-hot values the output is the weights."""
    p = random_problem(logvar=NO_VARIANCE)
    memory = attended_points(p.mu, p.log_pi, 0.5)
    key = torch.einsum("bjp,hep->bhje", memory.vectors, p.key_weight)
    value = torch.eye(6, dtype=torch.float64).expand(3, 4, 6, 6)
    query, key = F.pad(p.query, (0, 1)), F.pad(key, (0, 1))  # the kernels want equal widths
    output, _ = denoising_attention(query, key, value, memory.bias, 0.5)
    _, weights = denoising_attention(query, key, value, memory.bias, 0.5, need_weights=True)
    assert_close(weights, output)
    assert_close(weights.sum(-1), torch.ones(3, 4, 4, dtype=torch.float64))
    assert (weights[1, ..., 3:] == 0).all()


@pytest.mark.parametrize("sampled, need_weights", [(True, False), (True, True), (False, False)])
def test_dropout_leaves_the_mean_and_zeroes_weights(sampled, need_weights):
    p = random_problem(batch=1, targets=1, logvar=NO_VARIANCE if sampled else 0.0)
    p = p._replace(log_pi=torch.zeros(1, 6, dtype=torch.float64))
    many = p._replace(query=p.query.expand(1, 4, 20000, 5))
    output, _ = attend(many, 0.5, sampled, dropout_p=0.3, need_weights=need_weights)
    expected, deviation = attend(p, 0.5, sampled)[0], output.std(2, keepdim=True)
    assert deviation.min() > 0.01
    assert ((output.mean(2, keepdim=True) - expected).abs() < 5 * deviation / 20000**0.5).all()
    all_dropped, _ = attend(p, 0.5, sampled, dropout_p=1.0, need_weights=need_weights)
    assert (all_dropped == 0).all()


# The fused kernel against the explicit form


def sampled_gradients(p: Problem, need_weights: bool, mask: Tensor | None):
    z, log_pi, query, key_weight, value_weight = (
        x.detach().clone().requires_grad_() for x in (p.mu, p.log_pi, p.query, p.key_weight, p.value_weight)
    )
    leaves = p._replace(mu=z, log_pi=log_pi, query=query, key_weight=key_weight, value_weight=value_weight)
    output, _ = attend(leaves, 0.5, sampled=True, attention_mask=mask, need_weights=need_weights)
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    return output.detach(), [x.grad for x in (z, log_pi, query, key_weight, value_weight)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("head_dim", [5, 7, 8])
def test_gradients_of_the_fused_form_are_those_of_the_explicit_one(head_dim, key_heads, masked):
    p = random_problem(key_heads=key_heads, head_dim=head_dim)
    mask = torch.randn(4, 6, dtype=torch.float64) if masked else None
    fused, fused_grads = sampled_gradients(p, False, mask)
    explicit, explicit_grads = sampled_gradients(p, True, mask)
    assert_close(fused, explicit, rtol=1e-10, atol=1e-10)
    for fused_grad, explicit_grad in zip(fused_grads, explicit_grads, strict=True):
        assert explicit_grad.abs().max() > 1e-3
        assert_close(fused_grad, explicit_grad, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        assert_close(attend(p, 0.5, sampled=True, attention_mask=mask)[0], explicit, rtol=1e-10, atol=1e-10)


def test_gradcheck_of_the_fused_form():
    p = random_problem(heads=2, key_heads=2, batch=1, targets=2, length=3, head_dim=3, width=4)
    bias = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    query = p.query.requires_grad_()
    key, value = (torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def fused(query, key, value, bias):
        bias = torch.cat([bias, bias.new_full((1, 1), float("-inf"))], dim=1)  # and a masked vector
        key, value = (torch.cat([x, x[:, :, :1]], dim=2) for x in (key, value))
        return denoising_attention(query, key, value, bias, 0.4)[0]

    assert torch.autograd.gradcheck(fused, (query, key, value, bias))


def test_gradients_of_the_mixture_form_are_those_of_the_definition():
    p = random_problem()
    p = p._replace(logvar=p.logvar.clamp(min=-20))
    grads = []
    for function in (lambda p: attend(p, 0.5)[0], lambda p: naive(p, 0.5)):
        leaves = Problem(*(x.detach().clone().requires_grad_() for x in p))
        output = function(leaves)
        (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for name, fast, slow in zip(Problem._fields, *grads, strict=True):
        if name != "key_bias":  # cancels in the softmax
            assert_close(fast, slow, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype, learns", [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_the_bias_travels_without_a_mask(monkeypatch, dtype, learns):
    """No mask and head widths in multiples of 8: every fused kernel of PyTorch takes that."""
    calls = []
    kernel = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape[-1], key.shape[-1], value.shape[-1], attn_mask))
        return kernel(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    query, key, value = (torch.randn(2, 4, 6, 13).to(dtype) for _ in range(3))
    output, _ = denoising_attention(query, key, value, torch.randn(2, 6, requires_grad=learns), 0.5)
    assert calls == [(16, 16, 16, None)]
    assert output.shape == query.shape
    if dtype == torch.float32:  # at a decoding step nothing is copied
        denoising_attention(query, key, value, torch.randn(2, 6), 0.5)
        assert calls[1][:3] == (13, 13, 13) and calls[1][3].shape == (2, 1, 1, 6)


# Half precision


def problem_of_large_biases(level: float, length: int = 64, width: int = 32):
    """Scores of order 1 left over from products and biases of order ``level`` that cancel."""
    query, key, value = (torch.randn(2, 4, length, width) for _ in range(3))
    query[..., 0] = 1
    key[..., 0] = (level * torch.rand(2, 1, length) * width**0.5).bfloat16().float()
    query, key, value = (x.bfloat16().float() for x in (query, key, value))
    return query, key, value, torch.randn(2, length) - width**-0.5 * key[:, 0, :, 0]


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [0, 50, 1000])
def test_half_precision_does_not_round_the_bias(level, dtype, learns):
    query, key, value, bias = problem_of_large_biases(level)
    scale = 32**-0.5
    expected = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=bias[:, None, None].double(), scale=scale
    )
    half = [x.to(dtype) for x in (query, key, value)]
    output, _ = denoising_attention(*half, bias.clone().requires_grad_(learns), scale)
    one_channel = F.scaled_dot_product_attention(*half, attn_mask=bias[:, None, None].to(dtype), scale=scale)
    error, rounded = ((x.double() - expected).abs().max() for x in (output.detach(), one_channel))
    assert output.dtype == dtype
    assert error < 0.02  # at level 1000 the kernel's own sums in fp32 keep 1000 / 2 ** 24
    if level > 0 and dtype == torch.bfloat16:
        assert error < rounded / 10


def test_gradients_reach_the_bias_in_bfloat16():
    query, key, value, bias = problem_of_large_biases(50)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = bias.clone().requires_grad_()
        output, _ = denoising_attention(*(x.to(dtype) for x in (query, key, value)), leaf, 32**-0.5)
        output.float().square().sum().backward()
        grads.append(leaf.grad)
    assert_close(grads[1], grads[0], rtol=0.05, atol=0.02 * grads[0].abs().max().item())


def test_three_summands_are_exact_to_24_bits():
    bias = -torch.rand(4, 1000).mul(20).exp()
    bias[:, ::7] = float("-inf")
    bias[0] += 300  # a softmax does not see a shift
    parts = three_summands(bias)
    whole = bias.double() - bias.double().amax(-1, keepdim=True)
    finite = whole.isfinite()
    assert (parts[..., 0].bfloat16()[~finite] == float("-inf")).all()
    assert (parts[..., 1:][~finite] == 0).all()
    in_fp32 = (bias - bias.amax(-1, keepdim=True)).double()
    assert_close(parts.double().sum(-1)[finite], in_fp32[finite], rtol=0, atol=0)
    assert_close(parts.bfloat16().double().sum(-1)[finite], whole[finite], rtol=2**-22, atol=0)
    assert (bias.bfloat16().double() - bias.double())[finite].div(whole[finite]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_vectors_have_no_influence_in_half_precision(dtype):
    query, key, value, bias = problem_of_large_biases(50, length=16)
    bias[:, 9:] = float("-inf")
    half = [x.to(dtype) for x in (query, key, value)]
    output, _ = denoising_attention(*half, bias, 32**-0.5)
    half[1][:, :, 9:], half[2][:, :, 9:] = 100, 1000
    assert_close(denoising_attention(*half, bias, 32**-0.5)[0], output, rtol=0, atol=0)


@pytest.mark.parametrize("sampled", [True, False])
def test_bfloat16_latents_are_close_to_their_float64_attention(sampled):
    """Norms of 20 give biases of about -200 that cancel against log_pi: rounded to bf16 they would be off by 1."""
    p = random_problem(logvar=-4.0, width=16)
    mu = p.mu / p.mu.norm(dim=-1, keepdim=True) * torch.empty(3, 6, 1, dtype=torch.float64).uniform_(15, 25)
    mu = mu.bfloat16().double()
    p = p._replace(mu=mu, query=0.2 * p.query, log_pi=(0.25 * mu.square().sum(-1)).log_softmax(-1))
    half = Problem(*(x.bfloat16() for x in p))._replace(log_pi=p.log_pi.float())
    expected = naive(p._replace(logvar=torch.full_like(p.logvar, NO_VARIANCE)) if sampled else p, 0.5)
    output, _ = attend(half, 0.5, sampled)
    assert output.dtype == torch.bfloat16
    assert_close(output.double(), expected, rtol=0.03, atol=0.15)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_appended_to_the_keys_before_is_the_bias(dtype, need_weights):
    p = random_problem(head_dim=6)
    query, key, value = (x.to(dtype) for x in (p.query, torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)))
    bias, scale = attended_points(p.mu.float(), p.log_pi.float(), 0.3).bias.requires_grad_(), 0.3
    expected = denoising_attention(query, key, value, bias, scale, need_weights=need_weights)
    wider = append_bias(key, value, bias, scale)
    assert [x.shape[-1] for x in wider] == [8 if dtype == torch.float32 else 16] * 2
    assert_close(denoising_attention(query, *wider, bias, scale, need_weights=need_weights), expected, rtol=0, atol=0)
