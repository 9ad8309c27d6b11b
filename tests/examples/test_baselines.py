"""The baselines of the experiments against plain models, closed forms and loops."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import PAD, START, VOCAB_SIZE, tiny_base
from tiny_text import tiny_tokenizer
from torch.distributions import Normal, kl_divergence

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.evaluation.evaluate import rate_distortion

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
from baselines import (
    AutoencoderBottleneck,
    PooledBottleneck,
    StridedBottleneck,
    VariableBottleneck,
    with_bottleneck,
    with_stride,
)

ALL = {
    "autoencoder": (AutoencoderBottleneck, {}),
    "variable": (VariableBottleneck, {}),
    "strided": (StridedBottleneck, {"stride": 3}),
    "pooled": (PooledBottleneck, {}),
}
VAES = ("variable", "strided", "pooled")


def baseline(name: str):
    """A tiny model whose means and variances differ by vector."""
    bottleneck, options = ALL[name]
    model = with_bottleneck(tiny_base("bart"), bottleneck, lambda_gaussian=0.1, tau_sigma=0.3, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.nvib.mu_logvar.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def inputs(lengths=(7, 4), seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(START + 1, VOCAB_SIZE, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def hidden_states(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.get_encoder()(**batch).last_hidden_state


def test_autoencoder_is_the_plain_model_in_training_too():
    batch, labels = inputs(), torch.randint(START + 1, VOCAB_SIZE, (2, 5))
    plain = tiny_base("bart")
    expected = plain.eval()(**batch, labels=labels)
    model = with_bottleneck(tiny_base("bart"), AutoencoderBottleneck, lambda_gaussian=9.0, tau_sigma=0.3)
    for mode in (True, False):
        model.train(mode)
        model.base.eval()  # no dropout
        output = model(**batch, labels=labels)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(model.generate(**batch, max_new_tokens=6), plain.generate(**batch, max_new_tokens=6))
    with pytest.raises(ValueError, match="no prior"):
        model.sample_latents(2, 3)


def test_vectors_are_read_by_plain_attention():
    """The plain decoder on the same points gives the same logits."""
    model, batch = baseline("variable"), inputs()
    targets = torch.randint(START + 1, VOCAB_SIZE, (2, 5))
    latents = model.encode(**batch, sample=True, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(encoder_outputs=latents, decoder_input_ids=targets).logits
        plain = model.unwrap()
        points = (latents.z[:, 1:],)
        expected = plain(encoder_outputs=points, attention_mask=batch["attention_mask"], decoder_input_ids=targets)
    assert latents.z.std() > 0.1
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VAES)
def test_kl_and_rate_are_those_of_the_vectors_kept(name):
    model, lengths = baseline(name), (7, 4)
    batch = inputs(lengths)
    latents, states = model.encode(**batch), hidden_states(model, batch)
    for row, length in enumerate(lengths):
        own = states[row, :length]
        kept = {"variable": own, "strided": own[::3], "pooled": own.mean(0, keepdim=True)}[name]
        mu, logvar = model.nvib.mu_logvar(kept).chunk(2, -1)
        divergence = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0))
        torch.testing.assert_close(latents.kl_gaussian[row], divergence.mean())
        cost = latents.kl_gaussian[row] * latents.num_vectors[row] * model.nvib.size_out
        torch.testing.assert_close(cost, divergence.sum())
        seen = latents.log_pi[row] > float("-inf")
        torch.testing.assert_close(latents.z[row, seen], mu)
        assert latents.num_vectors[row] == latents.effective_vectors[row] == len(kept) == seen.sum()
        assert latents.prop_vectors[row] == pytest.approx(len(kept) / length)
    assert latents.kl_dirichlet.tolist() == [0, 0]


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_rate_is_what_they_draw(name):
    model, texts = baseline(name), ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14"]
    nats = tokens = 0.0
    for text in texts:
        ids = torch.tensor([tiny_tokenizer()(text).input_ids])
        states, tokens = hidden_states(model, {"input_ids": ids})[0], tokens + ids.numel()
        kept = {"variable": states, "strided": states[::3], "pooled": states.mean(0, keepdim=True)}[name]
        mu, logvar = model.nvib.mu_logvar(kept).chunk(2, -1)
        nats += kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum().item()
    results = rate_distortion(model, tiny_tokenizer(), texts)
    assert results["rate"] == pytest.approx(nats / 3, rel=1e-4)
    assert results["kl_gaussian_per_token"] == pytest.approx(nats / tokens, rel=1e-4)
    assert results["elbo"] == pytest.approx(-results["cross_entropy_sampled"] - nats / tokens, rel=1e-4)
    assert not {"rate_published", "kl_gaussian_published_per_token"} & set(results)  # there are no pseudo-counts


@pytest.mark.parametrize("name", ALL)
def test_padding_is_invisible(name):
    model, batch = baseline(name), inputs((6, 4))
    targets = torch.randint(START + 1, VOCAB_SIZE, (2, 5))
    alone = {key: value[1:, :4] for key, value in batch.items()}
    with torch.no_grad():
        logits = model(**alone, decoder_input_ids=targets[1:]).logits
        torch.testing.assert_close(model(**batch, decoder_input_ids=targets).logits[1:], logits)
        on_the_left = hidden_states(model, batch)[1:].roll(2, dims=1), batch["attention_mask"][1:].roll(2, dims=1) == 0
        torch.testing.assert_close(model.nvib(*on_the_left).compact().z, model.encode(**alone).compact().z)


@pytest.mark.parametrize("name", VAES)
def test_training_draws_from_the_posterior(name):
    model, batch = baseline(name), inputs((7,))
    with torch.no_grad():
        draws = model.encode(**{key: value.expand(2000, -1) for key, value in batch.items()}, sample=True).z
        mean = model.encode(**batch)
    seen = mean.log_pi[0] > float("-inf")
    source = hidden_states(model, batch)
    source = source.mean(1) if name == "pooled" else source[0, :: 3 if name == "strided" else 1]
    deviation = (0.5 * model.nvib.mu_logvar(source).chunk(2, -1)[1]).exp()
    torch.testing.assert_close(draws.mean(0)[seen], mean.z[0, seen], atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(0)[seen], deviation, atol=0, rtol=0.1)


@pytest.mark.parametrize("name", VAES)
def test_training_reaches_the_encoder(name):
    model, batch = baseline(name).train(), inputs()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    assert not any(p.requires_grad for key, p in model.named_parameters() if "alpha" in key)


@pytest.mark.parametrize(("name", "counts"), [("variable", [9, 4]), ("strided", [9, 4]), ("pooled", [1, 1])])
def test_samples_have_as_many_vectors_as_are_asked_for(name, counts):
    model = baseline(name)
    latents = model.sample_latents(2, [9, 4], generator=torch.Generator().manual_seed(0))
    assert (latents.log_pi > float("-inf")).sum(-1).tolist() == counts
    texts = model.generate(encoder_outputs=latents, max_new_tokens=5)
    again = model.sample_latents(2, [9, 4], generator=torch.Generator().manual_seed(0))
    assert torch.equal(texts, model.generate(encoder_outputs=again, max_new_tokens=5))
    z = torch.cat([model.sample_latents(500, 4).compact().z for _ in range(4)])
    assert z.mean().abs() < 0.02 and abs(z.std() - 1) < 0.02


@pytest.mark.parametrize("name", ALL)
def test_interpolation_ends_at_the_texts(name):
    model = baseline(name)
    first, second = (model.encode(**inputs((length,), seed=length)) for length in (7, 5))
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    ends = [model.generate(encoder_outputs=latents, **options).logits for latents in (first, second)]
    for weight, end in ((0.0, ends[0]), (1.0, ends[1]), (1e-6, ends[0]), (1 - 1e-6, ends[1])):
        between = model.generate(encoder_outputs=model.interpolate_latents(first, second, weight), **options)
        tolerance = {} if weight in (0, 1) else {"rtol": 1e-3, "atol": 1e-3}  # a vector in parts is the vector
        torch.testing.assert_close(torch.stack(between.logits), torch.stack(end), **tolerance)
    middle = model.interpolate_latents(first, second, 0.25).compact()
    if name == "pooled":
        torch.testing.assert_close(middle.z[0, 0], 0.75 * first.z[0, 1] + 0.25 * second.z[0, 1])
    else:
        assert middle.z.shape[1] == first.num_vectors + second.num_vectors - 1
    side_by_side = model.interpolate_latents(first, second, 0.25, method="mixture").compact()
    assert side_by_side.z.shape[1] == first.num_vectors + second.num_vectors


def test_strided_nvib_is_nvib_over_the_vectors_it_keeps():
    """The same layer over every third vector alone: the same latent, and the same cost of the vectors."""
    batch, lengths = inputs((7, 4)), torch.tensor([7, 4])
    options = {"tau_alpha": 0.0, "tau_sigma": 0.3, "delta": 0.3}
    plain = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), **options)
    strided = with_stride(copy.deepcopy(plain), 3)
    states = hidden_states(plain.eval(), batch)
    shorter = {"encoder_last_hidden_state": states[:, ::3], "attention_mask": batch["attention_mask"][:, ::3]}
    with torch.no_grad():
        expected = plain.encode(**shorter, sample=False)
        latents = strided.encode(
            encoder_last_hidden_state=states, attention_mask=batch["attention_mask"], sample=False
        )
        targets = torch.randint(START + 1, VOCAB_SIZE, (2, 5))
        logits = [
            model.eval()(encoder_outputs=x, decoder_input_ids=targets).logits
            for model, x in ((plain, expected), (strided, latents))
        ]
    torch.testing.assert_close(logits[1], logits[0])
    costs = latents.kl_gaussian * (lengths + 1), expected.kl_gaussian * (expected.num_vectors + 1)
    torch.testing.assert_close(*costs)  # each is a mean over components, the prior's and what is dropped included
    assert torch.equal(latents.num_vectors, expected.num_vectors) and latents.num_vectors.tolist() == [3, 2]
    torch.testing.assert_close(latents.prop_vectors, latents.num_vectors / lengths)
    drawn = strided.train().encode(**batch)
    assert (drawn.log_pi > float("-inf")).tolist()[1] == [True, True, False, False, True, False, False, False]
