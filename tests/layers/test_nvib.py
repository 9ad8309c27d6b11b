"""The layer: its equations, its draws, what it counts, and that extremes stay finite and stay in their row."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from nvib_hf import DenoisingMultiheadAttention, Nvib, NvibMemory, kl_dirichlet, kl_gaussian

WIDTH = 8
KEYS = {
    "z",
    "pi",
    "mu",
    "logvar",
    "alpha",
    "log_alpha",
    "memory_key_padding_mask",
    "keep",
    "batch_first",
    "avg_num_vec",
    "avg_prop_vec",
    "avg_effective_num_vec",
    "avg_alpha0",
}


def random_layer(size_in=WIDTH, size_out=WIDTH, batch_first=True, **kwargs) -> Nvib:
    """All parameters random, so that no term of the equations is missed."""
    layer = Nvib(size_in, size_out, batch_first=batch_first, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def layer_of_given_counts(**kwargs) -> Nvib:
    """A layer whose log pseudo-counts (``relu``: pseudo-counts) are the input's first channel."""
    layer = Nvib(WIDTH, WIDTH, batch_first=True, **kwargs)
    with torch.no_grad():
        layer.alpha_weight.zero_()[0] = 1
        layer.alpha_bias.zero_()
    return layer


def inputs(batch=3, length=5, width=WIDTH, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Vectors ``(B, Ns, H)`` and a mask ``(B, Ns)`` with rows of 5, 2 and 0 vectors."""
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[1:2, 2:] = padding[2:3] = True
    return torch.randn(batch, length, width, dtype=dtype), padding


def decoder(batch_first=True, width=WIDTH, **kwargs) -> nn.TransformerDecoderLayer:
    layer = nn.TransformerDecoderLayer(width, 2, dim_feedforward=16, dropout=0.0, batch_first=batch_first)
    layer.multihead_attn = DenoisingMultiheadAttention(width, 2, batch_first=batch_first)
    return layer


# The posterior


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_keys(training, kappa, batch_first):
    layer = random_layer(6, WIDTH, batch_first=batch_first, kappa=kappa).train(training)
    x, padding = inputs(width=6)
    latent = layer(x if batch_first else x.transpose(0, 1), padding)
    length = 6 * kappa if training else 6
    by_vector = (3, length) if batch_first else (length, 3)
    assert set(latent) == KEYS
    assert latent["batch_first"] is batch_first
    for name in ("pi", "alpha", "log_alpha"):
        assert latent[name].shape == (*by_vector, 1)
    assert latent["z"].log_pi.shape == (*by_vector, 1)
    for tensor in (latent["z"].z, latent["mu"], latent["logvar"]):
        assert tensor.shape == (*by_vector, WIDTH)
    assert latent["memory_key_padding_mask"].shape == latent["keep"].shape == (3, length)
    assert all(latent[name].dim() == 0 for name in KEYS if name.startswith("avg_"))
    memory = latent["z"]
    assert memory.pi is latent["pi"] and memory.mu is latent["mu"] and memory.logvar is latent["logvar"]
    assert_close(latent["pi"].sum(1 if batch_first else 0), torch.ones(3, 1))


def test_sequence_first_is_the_transpose():
    layer = random_layer()
    x, padding = inputs()
    torch.manual_seed(1)
    first = layer(x, padding)
    layer.batch_first = False
    torch.manual_seed(1)
    second = layer(x.transpose(0, 1), padding)
    for name in ("pi", "mu", "logvar", "alpha", "log_alpha"):
        assert_close(second[name].transpose(0, 1), first[name], rtol=0, atol=0)
    assert_close(second["z"].z.transpose(0, 1), first["z"].z, rtol=0, atol=0)
    assert_close(second["z"].log_pi.transpose(0, 1), first["z"].log_pi, rtol=0, atol=0)
    assert_close(second["memory_key_padding_mask"], first["memory_key_padding_mask"])


@pytest.mark.parametrize("activation", ["exp", "relu"])
def test_the_posterior_is_the_papers(activation):
    prior_mu, prior_var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    layer = random_layer(6, 4, prior_mu=prior_mu, prior_var=prior_var, prior_alpha=0.7, alpha_activation=activation)
    layer = layer.double().eval()
    x, padding = inputs(width=6, dtype=torch.float64)
    latent = layer(x, padding)
    weight, bias = layer.mu_logvar.weight, layer.mu_logvar.bias
    linear = x @ layer.alpha_weight + layer.alpha_bias
    if activation == "exp":
        alpha = (linear + x**2 @ layer.alpha_quadratic).exp()
    else:
        assert layer.alpha_quadratic is None
        alpha = linear.relu()
    real = ~padding
    assert_close(latent["mu"][:, 1:][real], (x @ weight[:4].T + bias[:4])[real])
    assert_close(latent["logvar"][:, 1:][real], (x @ weight[4:].T + bias[4:])[real])
    assert_close(latent["alpha"][:, 1:, 0][real], alpha[real])
    assert_close(latent["log_alpha"].exp(), latent["alpha"])
    # The prior's component: first, in every row, also where nothing else is.
    assert not latent["memory_key_padding_mask"][:, 0].any()
    assert_close(latent["mu"][:, 0], prior_mu.expand(3, 4))
    assert_close(latent["logvar"][:, 0], prior_var.log().expand(3, 4), rtol=1e-6, atol=1e-6)  # log taken in fp32
    assert_close(latent["alpha"][:, 0, 0], torch.full((3,), 0.7, dtype=torch.float64), rtol=1e-6, atol=0)
    # Evaluation: the posterior's means, and its expected weights.
    alpha = torch.cat([alpha.new_full((3, 1), 0.7), alpha.masked_fill(padding, 0)], dim=1)
    assert latent["z"].z is latent["mu"] or torch.equal(latent["z"].z, latent["mu"])
    assert_close(latent["pi"][..., 0], alpha / alpha.sum(1, keepdim=True), rtol=1e-6, atol=1e-8)
    assert_close(latent["z"].log_pi, latent["pi"].log())


def test_padding_is_masked_and_zero():
    layer = random_layer(kappa=2)
    x, padding = inputs()
    for training in (True, False):
        latent = layer.train(training)(x, padding)
        masked = latent["memory_key_padding_mask"]
        assert_close(masked[:, :: 2 if training else 1][:, 1:], padding)
        for name in ("pi", "alpha", "mu", "logvar"):
            assert (latent[name][masked] == 0).all()
        assert (latent["z"].z[masked] == 0).all()
        assert (latent["z"].log_pi[masked] == float("-inf")).all()
        assert (latent["log_alpha"][masked] == float("-inf")).all()
        assert (latent["pi"][2] > 0).sum() == (2 if training else 1)  # nothing but the prior


def test_positions_do_not_mix():
    layer = random_layer().eval()
    x, _ = inputs()
    changed = x.clone()
    changed[1, 3] += 1
    before, after = layer(x), layer(changed)
    for name in ("mu", "logvar", "log_alpha"):
        different = (before[name] != after[name]).reshape(3, 6, -1).any(-1).nonzero().tolist()
        assert different == [[1, 4]]


def test_padding_is_invisible():
    layer = random_layer().eval()
    x, padding = inputs()
    short, long = layer(x[1:2, :2]), layer(x, padding)
    for name in ("pi", "mu", "logvar", "log_alpha"):
        assert_close(long[name][1:2, :3], short[name])
    for kl in (layer.kl_gaussian, layer.kl_dirichlet):
        assert_close(kl(**long)[1:2], kl(**short))


def test_a_batch_is_its_examples():
    layer, read = random_layer().eval(), decoder().eval()
    x, padding = inputs()
    latent, target = layer(x, padding), torch.randn(3, 4, WIDTH)
    output = read(target, latent["z"], memory_key_padding_mask=latent["memory_key_padding_mask"])
    for i in range(3):
        one = layer(x[i : i + 1], padding[i : i + 1])
        assert_close(one["pi"][0], latent["pi"][i])
        assert_close(layer.kl_gaussian(**one)[0], layer.kl_gaussian(**latent)[i])
        assert_close(layer.kl_dirichlet(**one)[0], layer.kl_dirichlet(**latent)[i])
        assert_close(read(target[i : i + 1], one["z"])[0], output[i])


def test_an_empty_source_has_the_prior_alone():
    for training in (True, False):
        latent = random_layer(prior_mu=2.0).train(training)(torch.randn(3, 0, WIDTH))
        assert_close(latent["mu"], torch.full((3, 1, WIDTH), 2.0))
        assert_close(latent["pi"], torch.ones(3, 1, 1))
        assert latent["avg_num_vec"] == latent["avg_prop_vec"] == 0


# The draws of training


@pytest.mark.parametrize("kappa", [1, 2, 4])
def test_weights_of_a_components_vectors_sum_to_a_dirichlet(kappa):
    """Sums over a component's vectors are Dirichlet(alpha), their shares of it Dirichlet(alpha_i / kappa, ...)."""
    draws = 40000
    layer = layer_of_given_counts(kappa=kappa, prior_alpha=0.8)
    alpha = torch.tensor([0.8, 0.2, 3.0, 1.1])
    x = torch.zeros(1, 3, WIDTH)
    x[0, :, 0] = alpha[1:].log()
    latent = layer(x.expand(draws, -1, -1))
    assert_close(latent["alpha"][0, :, 0], (alpha / kappa).repeat_interleave(kappa))
    pi = latent["pi"].detach().view(draws, 4, kappa)
    dirichlet = torch.distributions.Dirichlet(alpha)
    sums = pi.sum(-1)
    assert_close(sums.mean(0), dirichlet.mean, rtol=0, atol=5 * 0.5 / draws**0.5)
    expected = dirichlet.mean.diag() - torch.outer(dirichlet.mean, dirichlet.mean)
    assert_close(sums.T.cov(), expected / (alpha.sum() + 1), rtol=0, atol=0.004)
    if kappa > 1:
        # The share of one of kappa is Beta(alpha_i/kappa, alpha_i (kappa-1)/kappa): mean 1/kappa and this variance.
        # (Where log-weights differ by thousands the shares themselves are taken in log space.)
        log_pi = latent["z"].log_pi.detach().view(draws, 4, kappa)
        shares = log_pi.softmax(-1)[..., 0]
        variance = (1 / kappa) * (1 - 1 / kappa) / (alpha + 1)
        assert_close(shares.mean(0), torch.full((4,), 1 / kappa), rtol=0, atol=5 * 0.5 / draws**0.5)
        assert_close(shares.var(0), variance, rtol=0.05, atol=0)


@pytest.mark.parametrize("kappa", [1, 3])
def test_vectors_are_independent_gaussians(kappa):
    draws = 20000
    layer = random_layer(size_out=4, kappa=kappa, prior_mu=-1.0, prior_var=0.3)
    x = torch.randn(1, 2, WIDTH)
    latent = layer(x.expand(draws, -1, -1))
    mu, logvar = (latent[name][0].detach() for name in ("mu", "logvar"))  # (3 * kappa, 4)
    noise = ((latent["z"].z.detach() - mu) / (logvar / 2).exp()).flatten(1)
    assert (noise.mean(0).abs() < 5 / draws**0.5).all()
    assert_close(noise.T.cov(), torch.eye(noise.shape[1]), rtol=0, atol=6 / draws**0.5)
    for j in range(kappa):  # the vectors of a component stand side by side
        assert_close(mu[j::kappa], layer.eval()(x)["mu"][0], rtol=1e-6, atol=1e-6)


def test_a_generator_makes_draws_reproducible():
    layer = random_layer(kappa=2)
    x, padding = inputs()
    first, second, third = (layer(x, padding, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["z"].z, second["z"].z) and torch.equal(first["z"].log_pi, second["z"].log_pi)
    assert not torch.equal(first["z"].z, third["z"].z) and not torch.equal(first["pi"], third["pi"])
    state = torch.get_rng_state()
    layer(x, padding, torch.Generator().manual_seed(1))
    layer.sample(3, padding[:, :1] & False, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_draws_nothing():
    layer = random_layer().eval()
    x, padding = inputs()
    state = torch.get_rng_state()
    first, second = layer(x, padding), layer(x, padding)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["z"].z, second["z"].z) and torch.equal(first["pi"], second["pi"])


@pytest.mark.parametrize("training", [True, False])
def test_inputs_are_left_alone(training):
    layer = random_layer(kappa=2).train(training)
    x, padding = inputs()
    x[1, 3] = float("nan")
    x_before, padding_before = x.clone(), padding.clone()
    state = copy.deepcopy(layer.state_dict())
    latent = layer(x, padding)
    memory = copy.deepcopy(NvibMemory(*(t.detach() for t in latent["z"]), log_pi=latent["z"].log_pi.detach()))
    layer.kl_gaussian(**latent), layer.kl_dirichlet(**latent)
    decoder().train(training)(torch.randn(3, 4, WIDTH), latent["z"])
    assert_close(x, x_before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(padding, padding_before)
    assert_close(dict(layer.state_dict()), dict(state), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(latent["z"], memory, strict=True))
    assert torch.equal(latent["z"].log_pi, memory.log_pi)


def test_a_component_without_pseudo_count_has_no_influence():
    """There is no floor under a weight that a mean of large norm could overcome."""
    layer = layer_of_given_counts()
    attention = DenoisingMultiheadAttention(WIDTH, 1, bias=False, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.eye(WIDTH).repeat(3, 1))
        layer.mu_logvar.weight[:WIDTH].copy_(torch.eye(WIDTH))
        layer.mu_logvar.bias.zero_()
    x = torch.randn(500, 3, WIDTH)
    x = 100 * x / x.norm(dim=-1, keepdim=True)
    x[..., 0] = -60.0
    query = x[:, :1].detach()  # as close to a mean as can be
    memory = layer(x)["z"]
    prior_alone = NvibMemory(*(t[:, :1] for t in memory), log_pi=memory.log_pi[:, :1])
    expected = attention(query, prior_alone, need_weights=False)[0]
    for need_weights in (False, True):
        assert_close(attention(query, memory, need_weights=need_weights)[0], expected, rtol=0, atol=1e-5)
    floored = memory._replace(log_pi=memory.log_pi.clamp(min=math.log(torch.finfo(torch.float32).tiny)))
    assert ((attention(query, floored)[0] - expected).abs().amax((1, 2)) > 1).all()


# Divergences


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_kl_methods_are_the_functions_with_the_layers_prior(training, batch_first):
    prior_mu, prior_var = torch.randn(WIDTH), torch.rand(WIDTH) + 0.5
    layer = random_layer(
        batch_first=batch_first, prior_mu=prior_mu, prior_var=prior_var, prior_alpha=0.6, delta=0.3, kappa=3
    ).train(training)
    x, padding = inputs()
    latent = layer(x if batch_first else x.transpose(0, 1), padding)
    kappa = 3 if training else 1
    gaussian = kl_gaussian(**latent, prior_mu=prior_mu, prior_var=prior_var, kappa=kappa)
    dirichlet = kl_dirichlet(**latent, prior_alpha=0.6, delta=0.3, kappa=kappa)
    assert gaussian.shape == dirichlet.shape == (3,)
    assert gaussian[0] > 0.01 and dirichlet[0] > 0.001
    assert_close(layer.kl_gaussian(**latent), gaussian)
    assert_close(layer.kl_dirichlet(**latent), dirichlet)
    posterior = layer.posterior(x, padding)
    assert_close(
        layer.kl(posterior, layer.sample_posterior(posterior)[2] if training else posterior, kappa),
        (gaussian, dirichlet),
    )
    assert_close(gaussian[2], torch.tensor(0.0), atol=1e-6, rtol=0)  # only the prior's component


def test_kl_gaussian_counts_each_of_kappa_draws():
    layer = random_layer(kappa=4)
    x, padding = inputs()
    in_training, in_evaluation = (layer.train(mode).kl_gaussian(**layer(x, padding)) for mode in (True, False))
    assert_close(in_training, 4 * in_evaluation)


def test_kl_of_the_gaussians_is_computed_once_per_component():
    """Nothing as wide as the vectors is kept for the backward pass once per draw."""
    layer, sizes = random_layer(kappa=4), []
    posterior = layer.posterior(*inputs())
    drawn = layer.sample_posterior(posterior)[2]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        layer.kl(posterior, drawn, kappa=4)
    assert max(sizes) == posterior.mu.numel()


@pytest.mark.parametrize("kl_weights", ["drawn", "pseudo_counts"])
@pytest.mark.parametrize("kappa", [1, 3])
def test_what_the_threshold_spares_in_training_costs(kappa, kl_weights):
    """Against torch.distributions: an example that keeps all pays for all, the others for those that are kept."""
    settings = {"alpha_threshold": 0.5, "dropping_share": 0.5, "kl_weights": kl_weights}
    layer = layer_of_given_counts(kappa=kappa, **settings).train()
    x, padding = torch.randn(40, 4, WIDTH), torch.zeros(40, 4, dtype=torch.bool)
    x[..., 0] = torch.tensor([2.0, 0.1, 0.3, 1.0]).log()
    padding[:20, 3] = True
    posterior = layer.posterior(x, padding)
    divergence = kl_divergence(Normal(posterior.mu, (0.5 * posterior.logvar).exp()), Normal(0.0, 1.0)).mean(-1)
    alpha = posterior.log_alpha.exp() * posterior.mask
    count = posterior.mask.sum(1, keepdim=True)

    def expected(keep: Tensor) -> Tensor:
        weights = keep / count if kl_weights == "drawn" else alpha / alpha.sum(1, keepdim=True)
        return kappa * (weights * divergence).sum(1)

    drawn = layer.sample_posterior(posterior)[2]
    latent = layer(x, padding)  # other examples keep all
    for keep, gaussian in (
        (drawn.keep[:, ::kappa], layer.kl(posterior, drawn, kappa)[0]),
        (latent["keep"][:, ::kappa], layer.kl_gaussian(**latent)),
    ):
        keep_all = (keep == posterior.mask).all(1)
        assert 0 < keep_all[:20].sum() < 20 and 0 < keep_all[20:].sum() < 20
        assert torch.equal(keep[~keep_all], posterior.keep[~keep_all])
        assert_close(gaussian, expected(keep))
    in_evaluation = layer.eval().kl_gaussian(**layer(x, padding))
    assert_close(in_evaluation, expected(posterior.keep) / kappa)


# The prior


@pytest.mark.parametrize("tensors", [True, False])
def test_priors_are_saved_with_the_module(tensors):
    prior_mu, prior_var = (torch.randn(WIDTH), torch.rand(WIDTH) + 0.5) if tensors else (0.4, 2.5)
    layer = random_layer(prior_mu=prior_mu, prior_var=prior_var, prior_alpha=0.3)
    restored = Nvib(WIDTH, WIDTH, batch_first=True)
    restored.load_state_dict(layer.state_dict())
    x, padding = inputs()
    first, second = layer.eval()(x, padding), restored.eval()(x, padding)
    for name in ("mu", "logvar", "log_alpha"):
        assert torch.equal(first[name], second[name])
    assert_close(second["mu"][0, 0], torch.as_tensor(prior_mu).expand(WIDTH))
    assert_close(second["logvar"][0, 0].exp(), torch.as_tensor(prior_var).expand(WIDTH))
    assert_close(second["alpha"][:, 0], torch.full((3, 1), 0.3))
    for method in ("kl_gaussian", "kl_dirichlet"):
        assert torch.equal(getattr(layer, method)(**first), getattr(restored, method)(**second))
    assert not any(name.startswith("prior") for name, _ in layer.named_parameters())


@pytest.mark.parametrize("batch_first", [False, True])
def test_samples_have_exactly_the_masks_vectors(batch_first):
    layer = Nvib(6, WIDTH, batch_first=batch_first)
    padding = torch.tensor([[False, False, False], [False, True, False], [True, True, False]])
    memory = layer.sample(3, padding)
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    assert type(memory) is NvibMemory
    assert order(memory.z).shape == (3, 3, WIDTH) and order(memory.pi).shape == (3, 3, 1)
    assert torch.equal(order(memory.pi)[..., 0] == 0, padding)
    assert torch.equal(order(memory.log_pi)[..., 0] == float("-inf"), padding)
    assert (order(memory.z)[padding] == 0).all() and (order(memory.z)[~padding] != 0).all()
    assert_close(order(memory.pi).sum(1), torch.ones(3, 1))
    assert torch.equal(memory.mu, memory.z)
    assert (memory.logvar.exp() == 0).all()
    assert all(t.device.type == "meta" for t in layer.sample(3, padding, device="meta"))


@pytest.mark.parametrize("prior_alpha, delta", [(1.0, 1.0), (0.4, 0.25), (2.0, 0.0)])
def test_samples_are_distributed_as_the_prior(prior_alpha, delta):
    draws, prior_mu, prior_var = 40000, torch.tensor([-3.0, 0.5]), torch.tensor([0.2, 4.0])
    layer = Nvib(6, 2, prior_mu, prior_var, prior_alpha, delta, batch_first=True, kappa=3)
    padding = torch.zeros(draws, 4, dtype=torch.bool)
    padding[::2, 3] = True  # half of the samples have 3 vectors
    memory = layer.sample(draws, padding)
    for rows, n in ((slice(0, None, 2), 3), (slice(1, None, 2), 4)):
        pi, z = memory.pi[rows, :n, 0], memory.z[rows, :n]
        variance = (1 / n) * (1 - 1 / n) / (prior_alpha + delta * (n - 1) + 1)
        assert_close(pi.mean(0), torch.full((n,), 1 / n), rtol=0, atol=5 * (variance / (draws / 2)) ** 0.5)
        assert_close(pi.var(0), torch.full((n,), variance), rtol=0.05, atol=0)
        assert_close(z.mean((0, 1)), prior_mu, rtol=0, atol=0.05)
        assert_close(z.flatten(0, 1).var(0), prior_var, rtol=0.05, atol=0)


def test_samples_are_reproducible_and_need_a_vector_in_each_row():
    layer, padding = Nvib(WIDTH, WIDTH), inputs()[1]
    some = padding[:2]
    first, second, third = (layer.sample(2, some, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.z, second.z) and torch.equal(first.log_pi, second.log_pi)
    assert not torch.equal(first.z, third.z) and not torch.equal(first.pi, third.pi)
    with pytest.raises(ValueError, match="has a batch of 3, but number_samples is 2"):
        layer.sample(2, padding)
    with pytest.raises(ValueError, match="a sample that is all padding"):
        layer.sample(3, padding)


# What is counted


DROPPING_ALPHA = torch.tensor([[3.0, 0.1, 0.05, 0.11, 0.0], [0.0, 1.0, 9.0, 9.0, 9.0], [9.0] * 5])
DROPPING_KEPT = [[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]  # the prior's component first


@pytest.fixture(params=["exp", "relu"])
def activation(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def training(request):
    return request.param


@pytest.fixture(params=[1, 3], ids="kappa={}".format)
def dropping(request, activation, training):
    """A layer with a threshold, one without, inputs of ``DROPPING_ALPHA``, their padding, vectors per component."""
    x, padding = inputs()
    x[..., 0] = DROPPING_ALPHA.log().clamp(min=-80) if activation == "exp" else DROPPING_ALPHA
    settings = {"kappa": request.param, "prior_alpha": 0.05, "alpha_activation": activation}
    layer = layer_of_given_counts(alpha_threshold=0.1001, **settings).train(training)
    all_kept = layer_of_given_counts(**settings).train(training)
    all_kept.load_state_dict(layer.state_dict())
    return layer, all_kept, x, padding, request.param if training else 1


def test_a_threshold_drops_in_training_as_in_evaluation(dropping):
    layer, _, x, padding, step = dropping
    latent = layer(x, padding)
    kept = ((latent["pi"] > 0) | (latent["z"].log_pi > float("-inf")))[:, ::step, 0]
    assert kept.int().tolist() == DROPPING_KEPT
    assert (latent["pi"][:, ::step][~kept] == 0).all()
    assert_close(latent["avg_num_vec"].item(), (2 + 1 + 0) / 3)
    assert_close(latent["avg_prop_vec"].item(), (2 / 5 + 1 / 2 + 0) / 3)


def test_dropped_components_count_in_the_totals_and_in_both_divergences(dropping):
    """Only padding does not."""
    layer, all_kept, x, padding, step = dropping
    latent = layer(x, padding)
    assert_close(latent["memory_key_padding_mask"][:, ::step][:, 1:], padding)
    total = 0.05 + DROPPING_ALPHA.masked_fill(padding, 0).sum(1)
    assert_close(latent["avg_alpha0"], total.mean())
    assert_close(latent["alpha"].sum((1, 2)), total)
    for kl in ("kl_gaussian", "kl_dirichlet"):
        assert_close(getattr(layer, kl)(**latent), getattr(all_kept, kl)(**all_kept(x, padding)))


def test_dropped_components_have_their_gradient_from_the_divergences(dropping):
    layer, _, x, padding, _ = dropping
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x, padding)["z"].pi.square().sum(), x)
    dropped = ~torch.tensor(DROPPING_KEPT).bool()[:, 1:] & ~padding
    assert (grad[dropped] == 0).all()
    (grad,) = torch.autograd.grad(layer.kl_dirichlet(**layer(x, padding)).sum(), x)
    positive = dropped & (DROPPING_ALPHA > 0)
    assert (grad[positive][:, 0] != 0).all() and grad.isfinite().all()


def test_a_pseudo_count_at_the_threshold_is_dropped_and_the_prior_never_is():
    layer = layer_of_given_counts(alpha_activation="relu", alpha_threshold=0.5, prior_alpha=1e-3).eval()
    x = torch.zeros(1, 2, WIDTH)
    x[0, :, 0] = torch.tensor([0.5, 0.5001])
    assert (layer(x)["pi"] > 0).tolist() == [[[True], [False], [True]]]


@pytest.mark.parametrize("training", [True, False])
def test_without_a_threshold_only_relu_drops(training):
    x, padding = inputs()
    x[..., 0] = torch.tensor([-90.0, 1.0, -1.0, 2.0, 0.0])
    exp, relu = (layer_of_given_counts(alpha_activation=name).train(training)(x, padding) for name in ("exp", "relu"))
    assert exp["avg_prop_vec"].item() == pytest.approx((1 + 1 + 0) / 3)
    assert relu["avg_num_vec"].item() == pytest.approx((2 + 1 + 0) / 3)
    assert (relu["alpha"][0, :, 0] == torch.tensor([1.0, 0, 1, 0, 2, 0])).all()
    assert (relu["z"].log_pi[0, [1, 3, 5]] == float("-inf")).all()
    assert (exp["z"].log_pi[0] > float("-inf")).all()


@pytest.mark.parametrize("training", [True, False])
def test_effective_number_of_vectors_is_the_perplexity_of_the_weights(training):
    layer = layer_of_given_counts(prior_alpha=2.0, kappa=2).train(training)
    x, padding = inputs()
    x[..., 0] = math.log(2.0)
    latent = layer(x, padding)  # uniform over 6, 3 and 1 components
    assert_close(latent["avg_effective_num_vec"].item(), (6 + 3 + 1) / 3)
    assert_close(latent["avg_num_vec"].item(), (5 + 2 + 0) / 3)  # repeats counted once


# Extremes


@pytest.mark.parametrize("shape", ["ragged", "single"])
@pytest.mark.parametrize("norm", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("logvar", [-80.0, 0.0, 10.0])
@pytest.mark.parametrize("log_alpha", [-60.0, 0.0, 60.0, "identity"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_finite(dtype, training, log_alpha, logvar, norm, shape):
    layer, read = Nvib(WIDTH, WIDTH, batch_first=True, kappa=2 if shape == "ragged" else 1), decoder()
    layer.identity_init()
    with torch.no_grad():
        layer.mu_logvar.bias[WIDTH:] = logvar
        if log_alpha != "identity":
            layer.alpha_quadratic.zero_()
            layer.alpha_bias.fill_(log_alpha)
    layer, read = layer.to(dtype).train(training), read.to(dtype).train(training)
    x, padding = inputs() if shape == "ragged" else (inputs(length=1)[0], torch.tensor([[False], [False], [True]]))
    x = norm * x / x.norm(dim=-1, keepdim=True)
    x[padding] = float("nan")
    x[2, 0] = float("inf")  # row 2 is all padding
    x = x.to(dtype).requires_grad_()
    latent = layer(x, padding)
    output = read(torch.randn(3, 4, WIDTH, dtype=dtype), latent["z"])
    divergences = layer.kl_gaussian(**latent), layer.kl_dirichlet(**latent)
    for value in (output, *divergences, latent["alpha"], latent["pi"], latent["z"].z, latent["avg_alpha0"]):
        assert value.isfinite().all()
    loss = (output.float() * torch.randn(3, 4, WIDTH)).sum() + divergences[0].sum() + divergences[1].sum()
    loss.backward()
    for name, parameter in [("x", x), *layer.named_parameters(), *read.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert (x.grad[padding] == 0).all()
    assert norm == 0 or x.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", [1e3, 1e-6, float("nan")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("log_alpha", [-60.0, 60.0, None])
def test_an_extreme_row_leaves_the_others_unchanged(monkeypatch, log_alpha, training, norm):
    if training:  # for given draws: Gamma draws reject, so the number of random bits depends on the row
        monkeypatch.setattr(torch, "_standard_gamma", lambda alpha, generator=None: alpha)
    layer, read = random_layer(kappa=2).train(training), decoder().train(training)
    (x, _), target = inputs(batch=4), torch.randn(4, 4, WIDTH)
    x[..., 0] = 0.3
    extreme = x.clone()
    extreme[3] *= norm / x[3].norm(dim=-1, keepdim=True)
    if log_alpha is not None:  # in the extreme row; of order 1 in the others
        with torch.no_grad():
            layer.alpha_weight.zero_()[0] = log_alpha / extreme[3, :, 0].abs().nan_to_num(1.0).clamp(min=1).max()
            layer.alpha_quadratic.zero_()
    results = []
    for source in (x, extreme):
        torch.manual_seed(1)
        latent = layer(source)
        output = read(target, latent["z"])
        results.append((latent, output, layer.kl_gaussian(**latent), layer.kl_dirichlet(**latent)))
    (latent, *values), (other, *other_values) = results
    for name in ("pi", "mu", "logvar", "log_alpha", "alpha"):
        assert_close(other[name][:3], latent[name][:3], rtol=0, atol=0)
    assert_close(other["z"].z[:3], latent["z"].z[:3], rtol=0, atol=0)
    for value, other_value in zip(values, other_values, strict=True):
        assert_close(other_value[:3], value[:3], rtol=1e-6, atol=1e-6)
        assert not torch.equal(other_value[3], value[3])


@pytest.mark.parametrize("training", [True, False])
def test_nan_in_padding_changes_nothing(training):
    layer = random_layer(kappa=2).train(training)
    x, padding = inputs()
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        source = x.masked_fill(padding[..., None], fill)
        torch.manual_seed(1)
        latent = layer(source, padding)
        layer.zero_grad()
        loss = latent["z"].z.sum() + latent["pi"].square().sum() + layer.kl_gaussian(**latent).sum()
        loss.backward()
        results.append((latent["z"].z, latent["pi"], [p.grad.clone() for p in layer.parameters()]))
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=0)


# The rest of an nn.Module


@pytest.mark.parametrize("kappa", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_into_one_graph(training, kappa):
    torch._dynamo.reset()
    layer = random_layer(kappa=kappa, alpha_threshold=0.5).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, padding = inputs()
    torch.manual_seed(1)
    expected = layer(x, padding)
    torch.manual_seed(1)
    latent = compiled(x, padding)
    for name in KEYS - {"z", "batch_first"}:
        assert_close(latent[name], expected[name])
    assert type(latent["z"]) is NvibMemory
    assert_close(latent["z"].z, expected["z"].z)
    assert_close(latent["z"].log_pi, expected["z"].log_pi)
    (grad,) = torch.autograd.grad(latent["pi"].square().sum(), layer.alpha_weight)
    (expected_grad,) = torch.autograd.grad(expected["pi"].square().sum(), layer.alpha_weight)
    assert_close(grad, expected_grad)


def test_training_from_scratch_starts_at_the_prior():
    """Variances of the prior's order and pseudo-counts near 1, so that neither divergence starts large."""
    layer = Nvib(64, 64, batch_first=True).eval()
    latent = layer(torch.randn(20, 10, 64))
    assert (latent["logvar"] == 0).all()
    assert (latent["alpha"].log().abs() < 0.5).all()
    assert layer.kl_gaussian(**latent).max() < 1 and layer.kl_dirichlet(**latent).max() < 0.1
    alpha = Nvib(64, 64, batch_first=True, alpha_activation="relu")(torch.randn(20, 10, 64))["alpha"]
    assert (alpha > 0).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"kappa": 0}, "kappa must be a whole number of at least 1, but got 0"),
        ({"kappa": 1.5}, "kappa must be .* but got 1.5"),
        ({"kappa": float("inf")}, "kappa must be .* but got inf"),
        ({"kappa": float("nan")}, "kappa must be .* but got nan"),
        ({"delta": -0.1}, r"delta must be in \[0, 1\], but got -0.1"),
        ({"delta": 1.1}, r"delta must be in \[0, 1\], but got 1.1"),
        ({"delta": float("nan")}, "delta must be .* but got nan"),
        ({"prior_var": 0.0}, "prior_var must be positive, but its smallest value is 0.0"),
        ({"prior_var": torch.tensor([1.0] * 7 + [-2.0])}, "prior_var must be positive, .* is -2.0"),
        ({"prior_var": torch.ones(512)}, "prior_var has 512 values but this model's width is 8. Pass one number or 8"),
        ({"prior_mu": torch.ones(3)}, "prior_mu has 3 values but this model's width is 8"),
        ({"prior_mu": float("nan")}, "prior_mu must be finite, but got nan"),
        ({"prior_var": float("inf")}, "prior_var must be finite, but got inf"),
        ({"prior_alpha": 0.0}, "prior_alpha must be a positive number, but got 0.0"),
        ({"prior_alpha": float("inf")}, "prior_alpha must be finite, but got inf"),
        ({"alpha_threshold": -1.0}, "alpha_threshold must be .* but got -1.0"),
        ({"alpha_activation": "softplus"}, "alpha_activation must be one of 'exp', 'relu', but got 'softplus'"),
        ({"scale": 0.0}, "scale must be positive, but got 0.0"),
        ({"scale": -0.5}, "scale must be positive, but got -0.5"),
    ],
)
def test_arguments_outside_their_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Nvib(WIDTH, WIDTH, **kwargs)


def test_a_whole_number_of_another_type_is_a_kappa():
    assert Nvib(WIDTH, WIDTH, kappa=2.0)(torch.randn(3, 1, WIDTH))["pi"].shape == (8, 1, 1)


def test_inputs_that_do_not_fit_are_refused():
    layer = random_layer()
    x, padding = inputs()
    with pytest.raises(ValueError, match="input is 5 wide, but this layer was made with size_in=8"):
        layer(x[..., :5])
    with pytest.raises(ValueError, match=r"mask has shape \(5, 3\), but the input needs \(3, 5\)"):
        layer(x, padding.T)


def test_its_description_names_its_settings():
    text = repr(Nvib(6, WIDTH, delta=0.25, kappa=3, alpha_activation="relu", alpha_threshold=0.1))
    for setting in ("size_in=6", "size_out=8", "delta=0.25", "kappa=3", "'relu'", "alpha_threshold=0.1"):
        assert setting in text
