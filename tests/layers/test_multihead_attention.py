"""The module against unmodified nn.MultiheadAttention, and both its forms against the definition."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nvib_hf import DenoisingMultiheadAttention, Nvib, NvibMemory, naive_denoising_attention

BATCH, TARGETS, LENGTH, WIDTH = 3, 4, 6, 12


def memory_like_vectors(z: Tensor, scale: float, batch_first: bool = False, padding: Tensor | None = None):
    """A latent whose weights undo the bias: log pi = s/2 ||z||^2 + const, and without any variance."""
    log_pi = 0.5 * scale * z.square().sum(-1)
    if padding is not None:
        log_pi = log_pi.masked_fill(padding if batch_first else padding.T, float("-inf"))
    log_pi = log_pi.log_softmax(1 if batch_first else 0)
    return NvibMemory(z, log_pi.exp(), z, torch.full_like(z, float("-inf")), log_pi=log_pi)


def random_memory(batch_first=False, width=WIDTH, dtype=torch.float64, batch=BATCH, length=LENGTH):
    shape = (batch, length, width) if batch_first else (length, batch, width)
    z, mu, logvar = (torch.randn(shape, dtype=dtype) for _ in range(3))
    log_pi = torch.randn(shape[:2], dtype=dtype).log_softmax(1 if batch_first else 0)
    return NvibMemory(z, log_pi.exp(), mu, 2 * logvar, log_pi=log_pi)


def queries(batch_first=False, dtype=torch.float64):
    return torch.randn((BATCH, TARGETS, WIDTH) if batch_first else (TARGETS, BATCH, WIDTH), dtype=dtype)


def pair(heads=3, dtype=torch.float64, **kwargs):
    """Torch's module and ours, with the same parameters, none of them zero."""
    plain = nn.MultiheadAttention(WIDTH, heads, dtype=dtype, **kwargs)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.5)
    denoising = DenoisingMultiheadAttention(WIDTH, heads, dtype=dtype, **kwargs)
    denoising.load_state_dict(plain.state_dict())
    return plain, denoising


def masks():
    """Keyword arguments of both modules: what torch.nn calls attn_mask and key_padding_mask."""
    forbidden = torch.rand(TARGETS, LENGTH) > 0.6
    forbidden[:, 0] = False
    by_head = torch.rand(3 * BATCH, TARGETS, LENGTH) > 0.6
    by_head[..., 0] = False
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = True
    additive = torch.zeros(BATCH, LENGTH, dtype=torch.float64).masked_fill(padding, float("-inf"))
    causal = torch.ones(TARGETS, LENGTH, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "bool": {"attn_mask": forbidden},
        "float": {"attn_mask": torch.randn(TARGETS, LENGTH, dtype=torch.float64)},
        "bool_3d": {"attn_mask": by_head},
        "float_3d": {"attn_mask": torch.randn(3 * BATCH, TARGETS, LENGTH, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "additive_padding": {"key_padding_mask": additive, "attn_mask": torch.zeros_like(forbidden).double()},
        "both": {"key_padding_mask": padding, "attn_mask": forbidden},
        "causal": {"attn_mask": causal, "is_causal": True},
    }


# A latent without variance whose weights undo the bias is a set of vectors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"kdim": 7, "vdim": 7}, {"kdim": 7, "vdim": 7, "bias": False}]
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_computes_what_multihead_attention_does(batch_first, kwargs, heads, training):
    plain, denoising = (m.train(training) for m in pair(heads, batch_first=batch_first, **kwargs))
    query, z = queries(batch_first), random_memory(batch_first, kwargs.get("kdim", WIDTH)).z
    memory = memory_like_vectors(z, denoising.head_dim**-0.5, batch_first)
    expected, expected_weights = plain(query, z, z)
    output, weights = denoising(query, memory, memory)
    assert_close(output, expected)
    assert_close(weights, expected_weights)
    fused, none = denoising(query, memory, need_weights=False)
    assert none is None
    assert_close(fused, expected)


@pytest.mark.parametrize("need_weights, average", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", masks())
def test_masks_mean_what_they_mean_in_torch(name, training, need_weights, average):
    plain, denoising = (m.train(training) for m in pair())
    query, z, kwargs = queries(), random_memory().z, masks()[name]
    memory = memory_like_vectors(z, 0.5)
    kwargs = kwargs | {"need_weights": need_weights, "average_attn_weights": average}
    expected, expected_weights = plain(query, z, z, **kwargs)
    output, weights = denoising(query, memory, memory, **kwargs)
    assert_close(output, expected)
    if need_weights:
        assert_close(weights, expected_weights)


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_of_zero_masks(training):
    plain, denoising = (m.train(training) for m in pair())
    query, z, padding = queries(), random_memory().z, masks()["padding"]["key_padding_mask"]
    memory = memory_like_vectors(z, 0.5, padding=padding)
    assert_close(denoising(query, memory)[0], plain(query, z, z, key_padding_mask=padding)[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_transformer_decoder_with_every_cross_attention_replaced(batch_first, norm_first, training):
    layer = nn.TransformerDecoderLayer(
        WIDTH, 3, dim_feedforward=16, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    plain = nn.TransformerDecoder(layer, num_layers=2)
    denoising = nn.TransformerDecoder(layer, num_layers=2)
    for decoder_layer in denoising.layers:
        decoder_layer.multihead_attn = DenoisingMultiheadAttention(
            WIDTH, 3, batch_first=batch_first, dtype=torch.float64
        )
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    denoising.load_state_dict(plain.state_dict())
    plain.train(training), denoising.train(training)

    target, z = queries(batch_first), random_memory(batch_first).z
    kwargs = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(TARGETS, dtype=torch.float64),
        "memory_mask": masks()["bool"]["attn_mask"],
        "memory_key_padding_mask": masks()["padding"]["key_padding_mask"],
    }
    memory = memory_like_vectors(z, 0.5, batch_first)
    assert_close(denoising(target, memory, **kwargs), plain(target, z, **kwargs))
    with pytest.raises(AssertionError):
        assert_close(denoising(target, random_memory(batch_first), **kwargs), plain(target, z, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"kdim": 7, "vdim": 7}])
def test_state_dicts_are_interchangeable_and_initialisation_is_the_same(kwargs):
    torch.manual_seed(1)
    plain = nn.MultiheadAttention(WIDTH, 3, **kwargs)
    torch.manual_seed(1)
    denoising = DenoisingMultiheadAttention(WIDTH, 3, **kwargs)
    assert list(plain.state_dict()) == list(denoising.state_dict())
    assert_close(dict(denoising.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    plain.load_state_dict(denoising.state_dict(), strict=True)


# Both forms against the definition


def by_definition(module: DenoisingMultiheadAttention, query: Tensor, mu, logvar, log_pi, exact=False) -> Tensor:
    """Sequence-first, from the module's state dict."""
    state, heads = dict(module.state_dict()), module.num_heads
    if "in_proj_weight" in state:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        state |= dict(zip(names, state["in_proj_weight"].chunk(3), strict=True))
    bias = state.get("in_proj_bias", torch.zeros(3 * WIDTH, dtype=query.dtype)).view(3, heads, -1)
    query_weight, key_weight, value_weight = (state[f"{x}_proj_weight"].unflatten(0, (heads, -1)) for x in "qkv")
    by_head = torch.einsum("tbp,hep->bhte", query, query_weight) + bias[0][None, :, None]
    output = naive_denoising_attention(
        by_head,
        mu.transpose(0, 1),
        logvar.transpose(0, 1),
        log_pi[..., 0].T,
        key_weight,
        value_weight,
        (WIDTH // heads) ** -0.5,
        key_bias=bias[1],
        value_bias=bias[2],
        exact=exact,
    )
    return module.out_proj(output.permute(2, 0, 1, 3).flatten(2))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"kdim": 7, "vdim": 7}])
def test_training_attends_to_the_sample_and_evaluation_to_the_mixture(kwargs, heads, need_weights):
    _, module = pair(heads, **kwargs)
    query, memory = queries(), random_memory(width=kwargs.get("kdim", WIDTH))
    no_variance = torch.full_like(memory.z, float("-inf"))
    in_training = by_definition(module, query, memory.z, no_variance, memory.log_pi)
    in_evaluation = by_definition(module, query, memory.mu, memory.logvar, memory.log_pi)
    assert (in_training - in_evaluation).abs().max() > 0.1
    assert_close(module.train()(query, memory, need_weights=need_weights)[0], in_training)
    assert_close(module.eval()(query, memory, need_weights=need_weights)[0], in_evaluation)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"kdim": 7, "vdim": 7}])
def test_evaluation_by_the_means(kwargs, batch_first, need_weights):
    """By definition at ``mu``, without variance but for what it takes off the scores; training is the same."""
    plain, mixture = pair(batch_first=batch_first, **kwargs)
    module = DenoisingMultiheadAttention(
        WIDTH, 3, dtype=torch.float64, batch_first=batch_first, evaluation="means", **kwargs
    )
    module.load_state_dict(plain.state_dict())
    query, memory = queries(), random_memory(width=kwargs.get("kdim", WIDTH))
    no_variance = torch.full_like(memory.mu, float("-inf"))
    scale = (WIDTH // 3) ** -0.5
    log_pi = memory.log_pi - 0.5 * scale * memory.logvar.exp().sum(-1, keepdim=True)
    expected = by_definition(module, query, memory.mu, no_variance, log_pi)
    in_training = by_definition(module, query, memory.z, no_variance, memory.log_pi)

    def attend(module, memory):
        given = NvibMemory(*(x.transpose(0, 1) for x in memory)) if batch_first else memory
        output, _ = module(query.transpose(0, 1) if batch_first else query, given, need_weights=need_weights)
        return output.transpose(0, 1) if batch_first else output

    assert_close(attend(module.eval(), memory), expected)
    assert_close(attend(module.train(), memory), in_training)
    assert (attend(mixture.eval(), memory) - expected).abs().max() > 0.1
    points = memory._replace(logvar=no_variance)
    assert_close(attend(module.eval(), points), attend(mixture.eval(), points))


def test_exact_keeps_the_query_norm_term():
    _, module = pair()
    module.exact = True
    query, memory = 3 * queries(), random_memory()
    expected = by_definition(module, query, memory.mu, memory.logvar, memory.log_pi, exact=True)
    assert_close(module.eval()(query, memory)[0], expected)
    module.exact = False
    assert (module(query, memory)[0] - expected).abs().max() > 0.01


def test_a_plain_tuple_is_a_memory():
    _, module = pair()
    query, memory = queries(), random_memory()
    expected = module(query, memory)[0]
    assert_close(module(query, tuple(memory))[0], expected)
    z, pi, mu, logvar = memory
    assert_close(module(query, (z, pi[..., 0], mu, logvar))[0], expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_samples_from_the_prior_are_the_same_in_training_and_evaluation(batch_first):
    layer = nn.TransformerDecoderLayer(WIDTH, 3, dim_feedforward=16, dropout=0.0, batch_first=batch_first)
    layer.multihead_attn = DenoisingMultiheadAttention(WIDTH, 3, batch_first=batch_first)
    decoder = nn.TransformerDecoder(layer, num_layers=2)
    padding = masks()["padding"]["key_padding_mask"]
    memory = Nvib(WIDTH, WIDTH, batch_first=batch_first).sample(BATCH, padding)
    target = queries(batch_first, torch.float32)
    training = decoder.train()(target, memory, memory_key_padding_mask=padding)
    evaluation = decoder.eval()(target, memory, memory_key_padding_mask=padding)
    assert_close(training, evaluation)
    assert_close(decoder(target, memory), evaluation)  # the weights carry the padding
    mixture = NvibMemory(*memory, log_pi=memory.log_pi)
    assert memory.points and not mixture.points
    assert_close(decoder(target, mixture), evaluation)  # as a mixture of variance 0


# Training


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_acts_in_training_only_and_leaves_the_mean(need_weights):
    _, module = pair(dropout=0.4)
    memory = memory_like_vectors(random_memory().z, 0.5)
    query = torch.randn(1, BATCH, WIDTH, dtype=torch.float64)
    expected = module.eval()(query, memory, need_weights=need_weights)[0]
    outputs = module.train()(query.expand(20000, -1, -1), memory, need_weights=need_weights)[0].detach()
    deviation = outputs.std(0)
    assert deviation.min() > 0.01
    assert ((outputs.mean(0) - expected[0]).abs() < 5 * deviation / 20000**0.5).all()


@pytest.mark.parametrize("mask", ["none", "padding", "float"])
def test_gradients_do_not_depend_on_the_kernel(mask):
    _, module = pair()
    query, memory, kwargs, grads = queries(), random_memory(), masks()[mask], []
    for need_weights in (True, False):
        leaves = [x.clone().requires_grad_() for x in (query, memory.z, memory.log_pi)]
        latent = NvibMemory(leaves[1], memory.pi, memory.mu, memory.logvar, log_pi=leaves[2])
        output, _ = module(leaves[0], latent, need_weights=need_weights, **kwargs)
        module.zero_grad()
        output.square().sum().backward()
        grads.append([x.grad for x in leaves] + [p.grad.clone() for p in module.parameters()])
    assert grads[0][2].abs().max() > 0.01
    for explicit, fused in zip(*grads, strict=True):
        assert_close(fused, explicit)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_close_to_float32(autocast, training):
    _, module = (m.train(training) for m in pair(dtype=torch.float32))
    query, memory = queries(dtype=torch.float32), random_memory(dtype=torch.float32)
    memory = NvibMemory(
        *(x.bfloat16().float() for x in memory), log_pi=memory.log_pi - 50 * torch.rand(LENGTH, BATCH, 1)
    )
    expected = module(query, memory)[0]
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(query, memory)[0]
    else:
        half = NvibMemory(*(x.bfloat16() for x in memory), log_pi=memory.log_pi)
        output = module.bfloat16()(query.bfloat16(), half)[0]
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


# Refusals


@pytest.mark.parametrize("name", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_are_no_vector_of_the_latent_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=True is refused.*neither weight nor variance"):
        DenoisingMultiheadAttention(WIDTH, 3, **{name: True})


@pytest.mark.parametrize("kwargs", [{"kdim": 7}, {"vdim": 7}, {"kdim": 7, "vdim": 8}])
def test_unequal_widths_of_keys_and_values_are_refused(kwargs):
    with pytest.raises(ValueError, match=r"kdim is (7|12) and vdim is (7|8|12)"):
        DenoisingMultiheadAttention(WIDTH, 3, **kwargs)


def test_values_of_another_memory_are_refused():
    _, module = pair()
    with pytest.raises(ValueError, match="same memory"):
        module(queries(), random_memory(), random_memory())


def test_a_tensor_in_place_of_a_memory_is_refused():
    _, module = pair()
    with pytest.raises(TypeError, match="Tensor"):
        module(queries(), random_memory().z)


def test_is_causal_without_a_mask_is_refused():
    plain, module = pair()
    query, memory = queries(), random_memory()
    with pytest.raises(RuntimeError):
        plain(query, memory.z, memory.z, is_causal=True, need_weights=False)
    with pytest.raises(ValueError, match="attn_mask is None"):
        module(query, memory, is_causal=True)


def test_unbatched_queries_are_refused():
    _, module = pair()
    with pytest.raises(ValueError, match=r"3 dimensions, but has shape \(4, 12\)"):
        module(torch.randn(TARGETS, WIDTH, dtype=torch.float64), random_memory())


def test_the_scale_is_that_of_one_head():
    """A single query and two vectors: the odds are pi_1/pi_0 exp(s (q.k_1 - q.k_0) - s/2 (z_1^2 - z_0^2))."""
    module = DenoisingMultiheadAttention(8, 2, bias=False, dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([eye] * 3))
        module.out_proj.weight.copy_(eye)
    query, z = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(2, 1, 8, dtype=torch.float64)
    pi = torch.tensor([[0.3], [0.7]], dtype=torch.float64)
    _, weights = module(query, (z, pi, z, z), average_attn_weights=False)
    norms = z.square().sum((1, 2))
    for head in range(2):
        dots = (query * z)[:, 0, 4 * head : 4 * head + 4].sum(-1)
        odds = 0.7 / 0.3 * math.exp(0.5 * (dots[1] - dots[0]) - 0.25 * (norms[1] - norms[0]))
        assert_close((weights[0, head, 0, 1] / weights[0, head, 0, 0]).item(), odds)
