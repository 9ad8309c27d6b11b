"""The learned decision what to keep: its logit, its draws, that what is dropped is gone, and that it learns."""

import json
import math

import pytest
import torch
from tiny_models import tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib
from torch.testing import assert_close

from nvib_hf import (
    ConstraintCallback,
    Nvib,
    NvibConfig,
    NvibForConditionalGeneration,
    ThresholdCallback,
)
from nvib_hf.layers.denoising_attention import attended_points, denoising_attention
from nvib_hf.layers.dropping import relaxed_log_gate

TRAINING = pytest.mark.parametrize("training", [True, False])


def layer(**settings) -> Nvib:
    torch.manual_seed(0)
    return Nvib(8, 8, delta=0.5, batch_first=True, dropping="relaxed", **settings)


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


def test_the_decision_is_that_of_one_linear_unit_and_not_of_the_norm():
    model, x = deciding(layer()).eval(), torch.randn(3, 7, 8)
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


def test_everything_is_kept_at_the_start():
    for model in (
        layer(),
        NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), dropping="relaxed"),
    ):
        nvib = getattr(model, "nvib", model)
        assert nvib.keep_weight.eq(0).all() and nvib.keep_bias.item() == 3
    deciding(nvib)
    nvib.identity_init()
    assert nvib.keep_weight.eq(0).all() and nvib.keep_bias.item() == 3


@TRAINING
def test_a_share_of_0_drops_nothing(training):
    model = deciding(layer(dropping_share=0.0)).train(training)
    x = torch.randn(50, 4, 8)
    assert model.posterior(x).keep.all()
    torch.manual_seed(1)
    gated = model(x)["z"].log_pi
    plain = Nvib(8, 8, delta=0.5, batch_first=True).train(training)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert model.relaxed_share(model.posterior(x)).eq(1).all()  # and nothing is gained by a low logit
    assert (gated > -math.inf).all() and (training or torch.equal(gated, plain(x)["z"].log_pi))


def test_a_share_of_the_examples_keeps_all():
    """In which no gate makes a weight small; in the others all are about exp(-20 / 0.3)."""
    model = layer(dropping_share=0.25).train()
    with torch.no_grad():
        model.keep_bias.fill_(-20)
    small = (model(torch.randn(4000, 3, 8))["z"].log_pi[:, 1:] < -30).float()
    assert (small.mean(1) % 1 == 0).all()
    assert small.mean().item() == pytest.approx(0.25, abs=0.03)


# The draws of training


def test_relaxed_draws_are_those_of_a_concrete_gate():
    """log sigmoid(u / 0.3) <= c exactly where the noise is below 0.3 * logit(exp(c)) - l."""
    gates = relaxed_log_gate(torch.full((20000,), 0.5))
    for level in (-8.0, -1.0, -0.01):
        noise = 0.3 * (level - math.log1p(-math.exp(level))) - 0.5
        assert (gates <= level).float().mean().item() == pytest.approx(1 / (1 + math.exp(-noise)), abs=0.015)


def test_draws_are_finite_at_the_extremes():
    logits = torch.tensor([-1e4, -80.0, 0.0, 80.0, 1e4, math.inf]).repeat(1000, 1).requires_grad_()
    gates = relaxed_log_gate(logits)
    assert gates[:, -3:].eq(0).all() and gates.isfinite().all()
    gates.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kappa", [1, 3])
def test_weights_are_the_dirichlets_times_the_gates(kappa):
    plain = Nvib(8, 8, delta=0.5, batch_first=True, kappa=kappa).train()
    model = deciding(layer(kappa=kappa)).train()
    posterior = model.posterior(torch.randn(5, 6, 8))
    torch.manual_seed(2)
    _, log_pi, drawn = model.sample_posterior(posterior)
    assert torch.equal(drawn.keep, log_pi > -math.inf)
    assert_close(log_pi.exp().sum(-1), torch.ones(5))
    torch.manual_seed(2)
    torch.rand(5, 1)  # which examples keep all
    gates = relaxed_log_gate(posterior.keep_logit).repeat_interleave(kappa, dim=1)
    ungated = plain.sample_posterior(posterior._replace(keep_logit=None, keep=posterior.mask))[1]
    assert_close(log_pi, (ungated + gates).log_softmax(-1))


# What is dropped is gone


def test_what_a_threshold_drops_transmits_nothing():
    """In training: logits and gradients know nothing of vectors under the threshold, whatever they are."""
    model = tiny_nvib(alpha_threshold=1.0).train()
    states = torch.randn(2, 6, 32)
    with torch.no_grad():  # the pseudo-count is exp(-6) where the first channel is high, exp(6) where it is low
        for name in ("alpha_weight", "alpha_quadratic", "alpha_bias"):
            model.nvib.get_parameter(name).zero_()
        model.nvib.alpha_weight[0] = -1
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


@TRAINING
def test_only_what_is_kept_costs(training):
    model = deciding(layer(kl_weights="drawn")).train(training)
    x = torch.randn(3, 6, 8)
    latent = model(x)
    terms = torch.stack(
        [model.kl_gaussian(**{**latent, "keep": torch.arange(7).eq(i).expand(3, 7)}) for i in range(7)]
    )  # what each vector by itself costs
    seen = latent["z"].log_pi[..., 0] > -math.inf
    assert_close(model.kl_gaussian(**latent), (terms.T * seen).sum(-1))
    assert seen.all() == training


@torch.no_grad()
def test_decoding_by_the_kept_alone():
    """What generation computes without the vectors that it drops is what all of them give, and batches are rows."""
    model, inputs = deciding(tiny_nvib(dropping="relaxed"), 1.0), tiny_inputs("bart")
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


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, inputs = deciding(tiny_nvib(dropping="relaxed"), 1.0), tiny_inputs("bart")
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.dropping == "relaxed"
    assert torch.equal(loaded.nvib.keep_weight, model.nvib.keep_weight)
    assert torch.equal(loaded.encode(**inputs).log_pi, model.encode(**inputs).log_pi)
    half = NvibForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.nvib.keep_weight.dtype == torch.float32
    assert torch.equal(half.nvib.keep_weight, model.nvib.keep_weight)


# Learning


def test_it_learns_which_vectors_the_text_needs():
    """Attention that is frozen reads the first two of six vectors alone: the others go, and they stay."""
    model = layer().train()
    model.identity_init()
    x = torch.randn(100, 6, 8)
    x[..., 0] = -4.0
    x[:, :2, 0] = 4.0
    query = torch.zeros(100, 1, 1, 8)
    query[..., 0] = 3.0
    optimizer = torch.optim.Adam([model.keep_weight, model.keep_bias], lr=0.05)
    for _ in range(150):
        posterior = model.posterior(x)
        _, log_pi, _ = model.sample_posterior(posterior)
        memory = attended_points(posterior.mu, log_pi, 1.0)
        vectors = memory.vectors[:, None]
        output, _ = denoising_attention(query, vectors, vectors, memory.bias, 1.0)
        loss = (output[..., 0] - 4).square().mean() + model.relaxed_share(posterior).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keep = model.eval().posterior(x).keep[:, 1:]
    assert keep[:, :2].any(-1).all() and not keep[:, 2:].any()


def test_the_loss_pays_for_the_probabilities():
    settings = {"dropping": "relaxed", "tau_alpha": 1.0, "tau_sigma": 0.3}
    plain = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), **settings).eval()
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), lambda_vectors=5.0, **settings).eval()
    inputs, labels = tiny_inputs("bart"), tiny_labels("bart")
    loss = model(**inputs, labels=labels).loss
    assert_close(loss, plain(**inputs, labels=labels).loss + 5 / (1 + math.exp(-3)))
    loss.backward()
    assert model.nvib.keep_bias.grad > 0


@pytest.mark.parametrize("callback", [ThresholdCallback(), ConstraintCallback(target_prop_vectors=0.2)])
def test_callbacks_take_it(callback):
    settings = {"base_config": tiny_base("bart").config, "dropping": "relaxed"}
    callback.check(NvibConfig(**settings, lambda_vectors=1.0))
    if isinstance(callback, ConstraintCallback):
        with pytest.raises(ValueError, match=r"target_prop_vectors=0.2 .*dropping='relaxed'"):
            callback.check(NvibConfig(**settings))


# Refusals


def test_refuses_two_rules_and_unknown_ones():
    with pytest.raises(ValueError, match=r"alpha_threshold=0.1 and dropping='relaxed' both decide"):
        layer(alpha_threshold=0.1)
    with pytest.raises(ValueError, match="dropping must be one of 'threshold', 'relaxed', but got 'soft'"):
        NvibConfig(base_config=tiny_base("bart").config, dropping="soft")


def test_the_decision_that_was_removed_says_what_to_take(tmp_path):
    """Of a layer, of a new configuration and of one that was saved with it."""
    says = r"dropping='hard' was removed.*alpha_threshold=0.1 and dropping='threshold', or dropping='relaxed'"
    with pytest.raises(ValueError, match=says):
        Nvib(8, 8, dropping="hard")
    with pytest.raises(ValueError, match=says):
        NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), dropping="hard")
    tiny_nvib(dropping="relaxed").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dropping"] == "relaxed"
    (tmp_path / "config.json").write_text(json.dumps(config | {"dropping": "hard"}))
    for load in (NvibConfig.from_pretrained, NvibForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match=says):
            load(tmp_path)


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
