"""The learned decision what to keep: its logit, its draws, that what is dropped is gone, and that it learns."""

import itertools
import math

import pytest
import torch
from tiny_models import tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib
from torch.testing import assert_close

from nvib_hf import (
    ConstraintCallback,
    DenoisingMultiheadAttention,
    Nvib,
    NvibConfig,
    NvibForConditionalGeneration,
    ThresholdCallback,
)
from nvib_hf.layers.denoising_attention import attended_points, denoising_attention
from nvib_hf.layers.dropping import hard_draw, relaxed_log_gate

LEARNED = pytest.mark.parametrize("dropping", ["relaxed", "hard"])
TRAINING = pytest.mark.parametrize("training", [True, False])


def layer(dropping: str, **settings) -> Nvib:
    torch.manual_seed(0)
    return Nvib(8, 8, delta=0.5, batch_first=True, dropping=dropping, **settings)


def deciding(model, scale: float = 3.0):
    """The model, with logits of either sign."""
    nvib = getattr(model, "nvib", model)
    with torch.no_grad():
        nvib.keep_weight.normal_(std=scale)
        nvib.keep_bias.zero_()
    return model


def logits_by_hand(nvib: Nvib, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return torch.einsum("bnh,h->bn", normed, nvib.keep_weight) + nvib.keep_bias


# The decision


@LEARNED
def test_the_decision_is_that_of_one_linear_unit_and_not_of_the_norm(dropping):
    model, x = deciding(layer(dropping)).eval(), torch.randn(3, 7, 8)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    posterior = model.posterior(x, padding)
    expected = (logits_by_hand(model, x) > 0) & ~padding
    assert expected.any() and not expected.all()
    assert torch.equal(posterior.keep[:, 1:], expected) and posterior.keep[:, 0].all()
    assert torch.equal(posterior.keep, model.posterior(3 * x, padding).keep)
    latent = model(x, padding)
    assert torch.equal(latent["z"].log_pi[:, 1:, 0] == -math.inf, ~expected)
    assert_close(latent["avg_num_vec"], expected.sum(-1).float().mean())
    assert_close(latent["avg_prop_vec"], (expected.sum(-1) / (~padding).sum(-1)).mean())
    share = (torch.sigmoid(logits_by_hand(model, x)) * ~padding).sum(-1) / (~padding).sum(-1)
    assert_close(model.relaxed_share(posterior), share)


@LEARNED
def test_everything_is_kept_at_the_start(dropping):
    for model in (
        layer(dropping),
        NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), dropping=dropping),
    ):
        nvib = getattr(model, "nvib", model)
        assert nvib.keep_weight.eq(0).all() and nvib.keep_bias.item() == 3
    deciding(nvib)
    nvib.identity_init()
    assert nvib.keep_weight.eq(0).all() and nvib.keep_bias.item() == 3


@LEARNED
@TRAINING
def test_a_share_of_0_drops_nothing(dropping, training):
    model = deciding(layer(dropping, threshold_share=0.0)).train(training)
    x = torch.randn(50, 4, 8)
    assert model.posterior(x).keep.all()
    torch.manual_seed(1)
    gated = model(x)["z"].log_pi
    plain = Nvib(8, 8, delta=0.5, batch_first=True).train(training)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert model.relaxed_share(model.posterior(x)).eq(1).all()  # and nothing is gained by a low logit
    assert (gated > -math.inf).all() and (training or torch.equal(gated, plain(x)["z"].log_pi))


def test_a_share_of_the_examples_is_spared():
    model = layer("hard", threshold_share=0.25).train()
    with torch.no_grad():
        model.keep_bias.fill_(-20)
    dropped = (model(torch.randn(4000, 3, 8))["z"].log_pi[:, 1:] == -math.inf).float()
    assert (dropped.mean(1) % 1 == 0).all()
    assert dropped.mean().item() == pytest.approx(0.25, abs=0.03)


# The draws of training


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_hard_draws_keep_with_the_probability_that_is_paid_for(logit):
    logits = torch.full((20000,), logit, requires_grad=True)
    keep, dropped = hard_draw(logits)
    probability = 1 / (1 + math.exp(-logit))
    assert keep.float().mean().item() == pytest.approx(probability, abs=0.015)
    assert torch.equal(dropped, (~keep).float())
    dropped.sum().backward()
    assert_close(logits.grad, -probability * (~keep).float())


def test_relaxed_draws_are_those_of_a_concrete_gate():
    """log sigmoid(u / 0.3) <= c exactly where the noise is below 0.3 * logit(exp(c)) - l."""
    gates = relaxed_log_gate(torch.full((20000,), 0.5))
    for level in (-8.0, -1.0, -0.01):
        noise = 0.3 * (level - math.log1p(-math.exp(level))) - 0.5
        assert (gates <= level).float().mean().item() == pytest.approx(1 / (1 + math.exp(-noise)), abs=0.015)


def test_draws_are_finite_at_the_extremes():
    logits = torch.tensor([-1e4, -80.0, 0.0, 80.0, 1e4, math.inf]).repeat(1000, 1).requires_grad_()
    gates = relaxed_log_gate(logits)
    keep, dropped = hard_draw(logits)
    assert gates[:, -3:].eq(0).all() and gates.isfinite().all()
    assert keep[:, -3:].all() and not keep[:, :2].any() and torch.equal(dropped, (~keep).float())
    (gates + dropped).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_gradient_of_hard_draws_is_that_of_the_expected_loss(softcap):
    """For a loss that is linear in attention's output: over all 2^4 draws of 4 vectors beside one that is kept."""
    draws = torch.tensor(list(itertools.product([True, False], repeat=4)))  # (16, 4)
    query, key, value = (torch.randn(1, 2, n, 8, dtype=torch.float64).expand(16, -1, -1, -1) for n in (3, 5, 5))
    bias, costs = torch.randn(5, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    kept = torch.cat([torch.ones(16, 1, dtype=torch.bool), draws], dim=1)
    biases = bias.expand(16, 5)
    plain, _ = denoising_attention(
        query, key, value, biases.masked_fill(~kept, -math.inf), 0.7, softcap=softcap, need_weights=True
    )
    probability = torch.where(draws, torch.sigmoid(logits), torch.sigmoid(-logits)).prod(-1)
    losses = (plain * costs).sum((1, 2, 3))
    (expected,) = torch.autograd.grad((probability * losses).sum(), logits)

    dropped = torch.cat([torch.zeros(16, 1), (~draws).double()], dim=1)
    dropped[:, 1:] -= torch.sigmoid(logits.detach()) * (~draws) * (logits - logits.detach())
    output, _ = denoising_attention(query, key, value, biases, 0.7, softcap=softcap, dropped=dropped)
    assert_close(output, plain)
    (found,) = torch.autograd.grad((probability.detach() * (output * costs).sum((1, 2, 3))).sum(), logits)
    assert_close(found, expected)


@LEARNED
@pytest.mark.parametrize("kappa", [1, 3])
def test_weights_are_the_dirichlets_times_the_gates(dropping, kappa):
    plain = Nvib(8, 8, delta=0.5, batch_first=True, kappa=kappa).train()
    model = deciding(layer(dropping, kappa=kappa)).train()
    posterior = model.posterior(torch.randn(5, 6, 8))
    torch.manual_seed(2)
    _, log_pi, drawn = model.sample_posterior(posterior)
    assert torch.equal(drawn.keep, log_pi > -math.inf)
    assert_close(log_pi.exp().sum(-1), torch.ones(5))
    torch.manual_seed(2)
    torch.rand(5, 1)  # which examples are spared
    if dropping == "relaxed":
        gates = relaxed_log_gate(posterior.keep_logit).repeat_interleave(kappa, dim=1)
        ungated = plain.sample_posterior(posterior._replace(keep_logit=None, keep=posterior.mask))[1]
        assert_close(log_pi, (ungated + gates).log_softmax(-1))
    else:
        keep, _ = hard_draw(posterior.keep_logit)
        keep = keep.repeat_interleave(kappa, dim=1)
        assert not keep.all() and torch.equal(drawn.dropped, (~keep).float()) and torch.equal(drawn.keep, keep)
        assert torch.equal(drawn.full_log_pi[keep], log_pi[keep]) and drawn.full_log_pi.isfinite().all()


def test_the_weights_of_hard_draws_are_a_dirichlet_of_what_is_kept():
    """Its means, and what a dropped vector would weigh beside it: Gamma draws, over the total of the kept."""
    model = layer("hard").train()
    log_alpha = torch.tensor([0.5, 1.0, 2.0, 0.0])
    logit = torch.tensor([math.inf, 30.0, 30.0, -30.0])
    posterior = model.posterior(torch.randn(20000, 3, 8))
    posterior = posterior._replace(log_alpha=log_alpha.expand(20000, 4), keep_logit=logit.expand(20000, 4))
    _, log_pi, drawn = model.sample_posterior(posterior)
    alpha = log_alpha.exp()
    assert_close(log_pi.exp().mean(0)[:3], alpha[:3] / alpha[:3].sum(), atol=0.01, rtol=0)
    assert log_pi[:, 3].eq(-math.inf).all()
    mean = alpha[3] / (alpha[:3].sum() - 1)  # of a Gamma over an independent one
    assert_close(drawn.full_log_pi.exp().mean(0)[3], mean, atol=0.01, rtol=0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_hard_draws_reach_a_decoder_of_plain_pytorch(batch_first):
    model = deciding(layer("hard")).train()
    model.batch_first = batch_first
    decoder = torch.nn.TransformerDecoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=batch_first)
    decoder.multihead_attn = DenoisingMultiheadAttention(8, 2, batch_first=batch_first)
    x, targets = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    memory = model(x)["z"]
    masked = type(memory)(*memory, log_pi=memory.log_pi)  # without the gradient of what is dropped
    assert (memory.log_pi == -math.inf).any()
    outputs = [decoder.train()(targets, each) for each in (memory, masked)]
    assert_close(*outputs)
    for output, learns in zip(outputs, (True, False), strict=True):
        model.zero_grad()
        output.square().sum().backward(retain_graph=True)
        assert (model.keep_weight.grad is not None and model.keep_weight.grad.ne(0).any().item()) == learns


# What is dropped is gone


def tiny(dropping: str, **settings) -> NvibForConditionalGeneration:
    return tiny_nvib(dropping=dropping, **settings)


def test_a_keep_probability_near_0_transmits_nothing():
    """In training: logits and gradients know nothing of vectors whose keep probability is 0, whatever they are."""
    model = tiny("hard").train()
    states = torch.randn(2, 6, 32)
    with torch.no_grad():  # the logit is far below 0 where the first channel is high, far above where it is low
        model.nvib.keep_weight.zero_()[0] = -200
        model.nvib.keep_bias.zero_()
    states[..., 0] = 6
    states[:, ::2, 0] *= -1
    labels = tiny_labels("bart", batch=2)
    other = states.clone()
    other[:, 1::2, 1:] = 5 * torch.randn(2, 3, 31)
    outputs = []
    for source in (states, other):
        source.requires_grad_()
        torch.manual_seed(1)
        outputs.append(model(encoder_last_hidden_state=source, labels=labels))
        outputs[-1].cross_entropy.backward()
        assert source.grad[:, 1::2].eq(0).all() and source.grad[:, ::2].ne(0).any()
    assert_close(outputs[0].logits, outputs[1].logits)
    latents = outputs[0].latents
    with torch.no_grad():  # a draw of training stays what it is for a model in evaluation
        decoded = model.eval()(encoder_outputs=latents, labels=labels).logits
        assert_close(decoded, model(encoder_outputs=latents.compact(), labels=labels).logits)
        assert_close(decoded, outputs[0].logits.detach())
    assert latents.log_pi[:, 2::2].eq(-math.inf).all() and (latents.log_pi[:, 1::2] > -math.inf).all()


@LEARNED
@TRAINING
def test_only_what_is_kept_costs(dropping, training):
    model = deciding(layer(dropping, kl_weights="drawn")).train(training)
    x = torch.randn(3, 6, 8)
    latent = model(x)
    terms = torch.stack(
        [model.kl_gaussian(**{**latent, "keep": torch.arange(7).eq(i).expand(3, 7)}) for i in range(7)]
    )  # what each vector by itself costs
    seen = latent["z"].log_pi[..., 0] > -math.inf
    assert_close(model.kl_gaussian(**latent), (terms.T * seen).sum(-1))
    assert seen.all() == (training and dropping == "relaxed")


@LEARNED
@torch.no_grad()
def test_decoding_by_the_kept_alone(dropping):
    """What generation computes without the vectors that it drops is what all of them give, and batches are rows."""
    model, inputs = deciding(tiny(dropping), 1.0), tiny_inputs("bart")
    tokens = torch.tensor([[2, 7, 9, 11]] * 3)
    latents = model.encode(**inputs)
    dropped = (latents.log_pi == -math.inf) & latents.attention_mask
    assert dropped.any() and not dropped[:, 1:].all()
    full = model(encoder_outputs=latents, decoder_input_ids=tokens).logits
    assert latents.compact().z.shape[1] < latents.z.shape[1]
    assert_close(model(encoder_outputs=latents.compact(), decoder_input_ids=tokens).logits, full)
    for settings in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 6, "do_sample": False, **settings}
        expected = model.generate(encoder_outputs=latents, **settings)
        assert torch.equal(model.generate(**inputs, **settings), expected)
        assert torch.equal(model.generate(**inputs, use_cache=False, **settings), expected)
        for row in range(3):
            length = int(inputs["attention_mask"][row].sum())
            alone = model.generate(**{name: x[row : row + 1, :length] for name, x in inputs.items()}, **settings)
            assert torch.equal(alone[0], expected[row, : alone.shape[1]])


@LEARNED
@torch.no_grad()
def test_saved_and_loaded(dropping, tmp_path):
    model, inputs = deciding(tiny(dropping), 1.0), tiny_inputs("bart")
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.dropping == dropping
    assert torch.equal(loaded.nvib.keep_weight, model.nvib.keep_weight)
    assert torch.equal(loaded.encode(**inputs).log_pi, model.encode(**inputs).log_pi)
    half = NvibForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.nvib.keep_weight.dtype == torch.float32
    assert torch.equal(half.nvib.keep_weight, model.nvib.keep_weight)


# Learning


@LEARNED
def test_it_learns_which_vectors_the_text_needs(dropping):
    """Attention that is frozen reads the first two of six vectors alone: the others go, and they stay."""
    model = layer(dropping).train()
    model.identity_init()
    x = torch.randn(100, 6, 8)
    x[..., 0] = -4.0
    x[:, :2, 0] = 4.0
    query = torch.zeros(100, 1, 1, 8)
    query[..., 0] = 3.0
    optimizer = torch.optim.Adam([model.keep_weight, model.keep_bias], lr=0.05)
    for _ in range(150):
        posterior = model.posterior(x)
        _, log_pi, drawn = model.sample_posterior(posterior)
        log_pi = log_pi if drawn.dropped is None else drawn.full_log_pi
        memory = attended_points(posterior.mu, log_pi, 1.0)
        vectors = memory.vectors[:, None]
        output, _ = denoising_attention(query, vectors, vectors, memory.bias, 1.0, dropped=drawn.dropped)
        loss = (output[..., 0] - 4).square().mean() + model.relaxed_share(posterior).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keep = model.eval().posterior(x).keep[:, 1:]
    assert keep[:, :2].any(-1).all() and not keep[:, 2:].any()


@LEARNED
def test_the_loss_pays_for_the_probabilities(dropping):
    settings = {"dropping": dropping, "tau_alpha": 1.0, "tau_sigma": 0.3}
    plain = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), **settings).eval()
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), lambda_vectors=5.0, **settings).eval()
    inputs, labels = tiny_inputs("bart"), tiny_labels("bart")
    loss = model(**inputs, labels=labels).loss
    assert_close(loss, plain(**inputs, labels=labels).loss + 5 / (1 + math.exp(-3)))
    loss.backward()
    assert model.nvib.keep_bias.grad > 0


@LEARNED
@pytest.mark.parametrize("callback", [ThresholdCallback(), ConstraintCallback(target_prop_vectors=0.2)])
def test_callbacks_take_it(dropping, callback):
    settings = {"base_config": tiny_base("bart").config, "dropping": dropping}
    callback.check(NvibConfig(**settings, lambda_vectors=1.0))
    if isinstance(callback, ConstraintCallback):
        with pytest.raises(ValueError, match=r"target_prop_vectors=0.2 .*dropping='hard'"):
            callback.check(NvibConfig(**settings))


# Refusals


def test_refuses_two_rules_and_unknown_ones():
    with pytest.raises(ValueError, match=r"alpha_threshold=0.1 and dropping='hard' both decide"):
        layer("hard", alpha_threshold=0.1)
    with pytest.raises(ValueError, match="dropping must be one of 'threshold', 'relaxed', 'hard', but got 'soft'"):
        NvibConfig(base_config=tiny_base("bart").config, dropping="soft")


# The encoder's output, computed once


@pytest.mark.parametrize("family", ["bart", "whisper", "speech_to_text", "wav2vec2_to_bert"])
@torch.no_grad()
def test_the_encoders_output_stands_for_its_inputs(family):
    model, inputs, labels = tiny_nvib(family, dropping="relaxed"), tiny_inputs(family), tiny_labels(family)
    expected = model(**inputs, labels=labels)
    mask = {name: x for name, x in inputs.items() if name == "attention_mask"}
    states = expected.encoder_last_hidden_state
    again = model(encoder_last_hidden_state=states, labels=labels, **mask)
    assert torch.equal(again.logits, expected.logits) and torch.equal(again.encoder_last_hidden_state, states)
    latents = model.encode(encoder_last_hidden_state=states, **mask)
    assert torch.equal(latents.log_pi, expected.latents.log_pi)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 1}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(encoder_outputs=latents, **settings), expected)
    assert torch.equal(model.generate(encoder_last_hidden_state=states, **mask, **settings), expected)
