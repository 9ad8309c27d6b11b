"""The empirical priors of all NVIB layers, from one pass."""

import copy

import pytest
import torch
from tiny_models import tiny_base, tiny_inputs, tiny_labels

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.wrapping.specs import find_self_attention

FAMILIES = ["bart", "t5", "whisper", "bert2gpt2"]
ALL = ["cross", "encoder", "decoder"]


def batches(family):
    return [{**tiny_inputs(family, seed=seed), "labels": tiny_labels(family, seed=seed)} for seed in (0, 1)]


def decoder_tokens(model, labels):
    """The decoder's inputs by the model's rule, and which of them are no padding: the start, what follows labels."""
    real = torch.cat([torch.ones_like(labels[:, :1], dtype=torch.bool), labels[:, :-1] != -100], dim=1)
    return model.prepare_decoder_input_ids_from_labels(labels), real


def vectors_of_the_base(family, model):
    """What every self-attention of the unmodified base is given over the batches, without padding, by layer."""
    base, given = tiny_base(family), {}
    for kind, half in (("encoder", base.get_encoder()), ("decoder", base.get_decoder())):
        for number, (module, spec) in enumerate(find_self_attention(half, kind)):

            def see(module, args, kwargs, name=f"{kind}.{number}", spec=spec):
                states = kwargs.get(spec.hidden_states, args[0] if args else None)
                given.setdefault(name, []).append(states)

            module.register_forward_pre_hook(see, with_kwargs=True)
    masks = {"encoder": [], "decoder": []}
    for batch in batches(family):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        tokens, real = decoder_tokens(model, batch["labels"])
        with torch.no_grad():
            base(**inputs, decoder_input_ids=tokens, decoder_attention_mask=real.long())
        masks["decoder"].append(real)
        masks["encoder"].append(inputs["attention_mask"].bool() if "attention_mask" in inputs else None)
    if family == "whisper":  # its encoder's attention knows of no padding
        masks["encoder"] = [None] * len(masks["encoder"])
    return {
        name: torch.cat(
            [x.flatten(0, 1) if m is None else x[m] for x, m in zip(xs, masks[name.partition(".")[0]], strict=True)]
        )
        for name, xs in given.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_s_prior_is_of_what_it_reads(family):
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family), attentions=ALL)
    priors = model.fit_prior(batches(family))
    expected = vectors_of_the_base(family, model)
    assert set(priors) == {"cross", *expected}
    for name, vectors in expected.items():
        layer = model.nvib_layers()[name]
        torch.testing.assert_close(layer.prior_mu, vectors.mean(0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(layer.prior_logvar.exp(), vectors.var(0), atol=1e-3, rtol=1e-3)
        energy = 0.5 * layer.scale * vectors.square().sum(-1)
        torch.testing.assert_close(layer.prior_log_alpha, energy.mean()[None], atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(layer.prior_log_alpha_std, energy.std()[None], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("evaluation", ["means", "mixture"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_fitted_priors_it_still_computes_the_base(family, evaluation):
    base = tiny_base(family)
    settings = {"attentions": ALL, "evaluation": evaluation}
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), **settings)
    model.fit_prior(batches(family))
    inputs, labels = tiny_inputs(family), tiny_labels(family)
    tokens, _ = decoder_tokens(model, labels)
    with torch.no_grad():
        expected = base(**inputs, decoder_input_ids=tokens).logits
        torch.testing.assert_close(model(**inputs, decoder_input_ids=tokens).logits, expected, atol=1e-3, rtol=0)


def test_the_mode_comes_back_and_nothing_is_left_behind():
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), attentions=ALL).train()
    model.fit_prior(batches("bart"))
    assert model.training and model.base.training
    hooks = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert hooks == []


def test_without_decoder_layers_inputs_are_enough():
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), attentions=["cross", "encoder"])
    assert set(model.fit_prior([tiny_inputs("bart")])) == {"cross", "encoder.0", "encoder.1"}


def test_what_layers_below_drop_is_not_counted():
    model = NvibForConditionalGeneration.from_base_pretrained(
        tiny_base("bart"), attentions=["cross", "encoder"], alpha_threshold=1.0, tau_alpha=0.0
    )
    layer, inputs, seen = model.nvib_layers()["encoder.0"], tiny_inputs("bart"), []
    with torch.no_grad():
        layer.alpha_quadratic.zero_()
        layer.alpha_weight.normal_(generator=torch.Generator().manual_seed(1))
        module = model.nvib_layers()["encoder.1"]
        hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model.encode(**inputs)
        states = model.get_encoder()(**inputs, output_hidden_states=True).hidden_states[0]
        left = inputs["attention_mask"].bool() & (layer._log_alpha(states) > 0)
        hook.remove()
        assert 1 < left.sum() < inputs["attention_mask"].sum() - 1
        priors = model.fit_prior([inputs])
    torch.testing.assert_close(priors["encoder.1"].prior_mu, seen[0][left].mean(0), atol=1e-5, rtol=1e-5)


def test_what_fails_changes_nothing():
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), attentions=ALL).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="at least two"):
        model.fit_prior([])
    with pytest.raises(ValueError, match="decoder"):
        model.fit_prior([{"input_ids": torch.full((2, 4), 5), "labels": torch.full((2, 1), 5)}])  # one token, no mean
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("attentions", [None, ALL])
def test_columns_that_are_no_tensors_are_passed_over(attentions):
    """As a data set has them beside the inputs: texts, numbers, nothing."""
    models = [NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), attentions=attentions)] * 2
    others = {"text": ["one", "two", "three"], "number": 3, "nothing": None}
    priors = [
        model.fit_prior([{**batch, **extra} for batch in batches("bart")])
        for model, extra in zip(models, ({}, others), strict=True)
    ]
    one, other = (p if attentions is None else p["cross"] for p in priors)
    for name in one._fields:
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
