"""The loss against its definition, written out in loops, and as the model puts it together."""

import math
from itertools import pairwise

import pytest
import torch
from tiny_models import tiny_base, tiny_inputs, tiny_labels
from torch.nn import functional as F

from nvib_hf import NvibConfig, NvibForConditionalGeneration
from nvib_hf.loss import Charged, nvib_loss, regulariser

B, NT, V = 4, 7, 11
LENGTHS = (7, 1, 4, 0)  # target tokens of each example


@pytest.fixture
def batch():
    torch.manual_seed(3)
    logits = torch.randn(B, NT, V, dtype=torch.float64, requires_grad=True)
    kl = (5 * torch.rand(B, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(V, (B, NT))
    for row, length in zip(labels, LENGTHS, strict=True):
        row[length:] = -100
    return logits, labels, kl


def by_hand(logits, labels, kl, smoothing=0.0):
    """Sum of the cross-entropies and of the KLs, each token of an example paying for its example's KL."""
    nll = kls = 0.0
    for b in range(B):
        for t in range(NT):
            if labels[b, t] != -100:
                p = [math.exp(x) for x in logits[b, t].tolist()]
                log_p = [math.log(x / sum(p)) for x in p]
                nll -= (1 - smoothing) * log_p[labels[b, t]] + smoothing * sum(log_p) / V
                kls += kl[b].item()
    return nll, kls


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_its_definition(batch, smoothing):
    logits, labels, kl = batch
    nll, kls = by_hand(logits, labels, kl, smoothing)
    loss, cross_entropy = nvib_loss(logits, labels, kl, label_smoothing=smoothing)
    assert loss.item() == pytest.approx((nll + kls) / sum(LENGTHS), rel=1e-6)
    assert cross_entropy.item() == pytest.approx(nll / sum(LENGTHS), rel=1e-6)


def test_smoothing_is_that_of_torch(batch):
    logits, labels, _ = batch
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3)
    for value in nvib_loss(logits, labels, None, label_smoothing=0.3):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up(batch, as_tensor):
    """Cut anywhere, loss and gradients are those of the whole: the KL's weight follows the target tokens."""
    logits, labels, kl = batch
    whole, _ = nvib_loss(logits, labels, kl)
    expected = torch.autograd.grad(whole, (logits, kl))
    items = torch.tensor(sum(LENGTHS)) if as_tensor else sum(LENGTHS)
    for cuts in ((0, 1, 4), (0, 2, 4), (0, 1, 2, 3, 4)):
        parts = [nvib_loss(logits[i:j], labels[i:j], kl[i:j], items)[0] for i, j in pairwise(cuts)]
        torch.testing.assert_close(sum(parts), whole)
        torch.testing.assert_close(torch.autograd.grad(sum(parts), (logits, kl)), expected)


def test_batch_without_a_target_costs_nothing(batch):
    logits, labels, kl = batch
    loss, cross_entropy = nvib_loss(logits, torch.full_like(labels, -100), kl)
    assert loss.item() == cross_entropy.item() == 0
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, (logits, kl)))


def test_half_precision_logits_are_summed_in_single():
    """4096 tokens of about 9 nats are beyond what half precision can count."""
    logits, labels = torch.zeros(1, 4096, 8192, dtype=torch.float16), torch.zeros(1, 4096, dtype=torch.long)
    assert nvib_loss(logits, labels, None)[1].item() == pytest.approx(math.log(8192), rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_model_weighs_its_terms(training):
    model = NvibForConditionalGeneration.from_base_pretrained(
        tiny_base("bart"), lambda_gaussian=0.25, lambda_dirichlet=3.0, kappa=2, label_smoothing=0.1
    ).train(training)
    model.kl_beta.copy_(torch.tensor([0.5, 0.125, 1.0]))
    labels = tiny_labels("bart")
    out = model(**tiny_inputs("bart"), labels=labels, generator=torch.Generator().manual_seed(0))
    smoothed = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    count = (labels != -100).sum(-1)
    gaussian, dirichlet = (0.5, 0.125) if training else (1, 1)  # an evaluation counts moving weights as 1
    kls = gaussian * 0.25 * out.kl_gaussian + dirichlet * 3.0 * out.kl_dirichlet
    assert len(set(count.tolist())) > 1 and kls.min() > 0.1 * smoothed
    torch.testing.assert_close(out.cross_entropy, smoothed)
    torch.testing.assert_close(out.loss, smoothed + (count * kls).sum() / count.sum())


def test_without_weights_the_loss_is_the_cross_entropy():
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("t5"))
    out = model(**tiny_inputs("t5"), labels=tiny_labels("t5"))
    assert out.loss == out.cross_entropy and out.kl_gaussian.min() > 0


def test_labels_taken_away_are_missed():
    """What the Trainer's own label smoothing does: it would train without the KL terms."""
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"))
    with pytest.raises(ValueError, match=r"label_smoothing_factor.*NvibConfig\(label_smoothing"):
        model(**tiny_inputs("bart"), decoder_input_ids=torch.tensor([[2, 5]] * 3), num_items_in_batch=6)


def test_regulariser_by_hand():
    """Each term by its weight and its multiplier; below its free bits a KL costs those, and has no gradient."""
    config = NvibConfig(
        base_config=tiny_base("bart").config,
        alpha_threshold=0.1,
        lambda_gaussian=0.5,
        lambda_dirichlet=2.0,
        lambda_vectors=3.0,
        free_bits_gaussian=1.0,
        free_bits_dirichlet=0.25,
    )
    kl_gaussian = torch.tensor([0.5, 4.0], requires_grad=True)
    kl_dirichlet = torch.tensor([1.0, 0.125], requires_grad=True)
    share = torch.tensor([0.75, 0.5], requires_grad=True)
    charged = Charged(kl_gaussian, kl_dirichlet, share)
    beta = torch.tensor([0.5, 0.25, 2.0])
    cost = regulariser(charged, beta, config)
    by_hand = [0.25 * 1.0 + 0.5 * 1.0 + 6 * 0.75, 0.25 * 4.0 + 0.5 * 0.25 + 6 * 0.5]
    assert cost.tolist() == pytest.approx(by_hand)
    cost.sum().backward()
    assert kl_gaussian.grad.tolist() == [0.0, 0.25] and kl_dirichlet.grad.tolist() == [0.5, 0.0]
    assert share.grad.tolist() == [6.0, 6.0]
    assert regulariser(Charged(None, None, None), beta, config) is None


def test_the_share_of_vectors_trains_the_pseudo_counts():
    """A model pays for the vectors above its threshold, and gradient descent takes them below it."""
    settings = {"alpha_threshold": 0.1, "tau_alpha": 1.0, "tau_sigma": 0.3}
    plain = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), **settings).eval()
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), lambda_vectors=5.0, **settings).eval()
    inputs, labels = tiny_inputs("bart"), tiny_labels("bart")
    output = model(**inputs, labels=labels)
    share = output.latents.relaxed_prop_vectors
    tokens = (labels != -100).sum(-1)
    expected = plain(**inputs, labels=labels).loss + 5 * (tokens * share).sum() / tokens.sum()
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.nvib.alpha_bias.grad > 0


@pytest.mark.parametrize("name", ["lambda_vectors", "free_bits_gaussian", "free_bits_dirichlet"])
def test_refuses_negative_weights(name):
    with pytest.raises(ValueError, match=f"{name} must be 0 or positive, but got -1"):
        NvibConfig(base_config=tiny_base("bart").config, alpha_threshold=0.1, **{name: -1})


def test_refuses_to_weigh_vectors_that_nothing_drops():
    with pytest.raises(ValueError, match=r"lambda_vectors=0.5 .* alpha_threshold"):
        NvibConfig(base_config=tiny_base("bart").config, lambda_vectors=0.5)
