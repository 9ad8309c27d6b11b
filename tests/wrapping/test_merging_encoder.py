"""Encoders that merge their vectors between layers: the masses go on, as pseudo-counts of the layers above."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, REFUSED, tiny_base, tiny_inputs, tiny_labels
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from nvib_hf import (
    NvibConfig,
    NvibForConditionalGeneration,
    NvibForSequenceClassification,
    NvibForTokenClassification,
)
from nvib_hf.layers.merging import merge_in_place, naive_merge

# An adapter above the layers makes fewer vectors of what they leave: refused by name.
ABLE = [family for family in FAMILIES if family not in {*REFUSED["encoder"], "wav2vec2_to_mbart"}]
BOTH = ["cross", "encoder"]


def merging(family="bart", shares=None, attentions=BOTH, **settings):
    shares = {0: 0.5} if shares is None else shares
    model = NvibForConditionalGeneration.from_base_pretrained(
        tiny_base(family), attentions=attentions, encoder_merge_share=shares, **settings
    )
    return model.eval()


def decoder_inputs(family):
    return tiny_labels(family).clamp(min=0)


# -------------------------------------------------------------------------------------------------- what is computed
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("family", "share"), [("bart", 0.85), ("whisper", 0.98)])
@torch.no_grad()
def test_it_is_the_base_whose_layers_above_see_fewer_vectors_and_a_bias(family, share, layer, monkeypatch):
    """The base's own layers, called one after the other, with the logarithm of the masses added to their scores."""
    monkeypatch.setattr("nvib_hf.layers.mutual_neighbours.STEP", 1e-4)  # else costs that are nearly equal count as so
    base, inputs = tiny_base(family).eval(), tiny_inputs(family)
    model = merging(family, {layer: share})
    encoder = base.get_encoder()
    mask = inputs.get("attention_mask")
    read = {name: x for name, x in inputs.items() if name != "attention_mask" or family == "bart"}
    whole = encoder(**read, output_hidden_states=True).hidden_states[layer + 1]
    for row in range(len(whole)):
        x = whole[row] if mask is None or family == "whisper" else whole[row, mask[row].bool()]
        if layer == 1 and family == "whisper":  # the last of its states has gone through the norm
            hidden = encoder(**read, output_hidden_states=True).hidden_states[1]
            x = _output(encoder.layers[1](hidden, None))[row]
        # So few pairs are merged, in Whisper one, that rounds and one pair after the other merge the same.
        made = naive_merge(x, torch.zeros(len(x)), round(share * len(x)))
        states, bias = made.z.float()[None], made.log_mass.float()[None, None, None]
        for above in encoder.layers[layer + 1 :]:
            states = _output(above(states, bias.expand(-1, -1, states.shape[1], -1)))
        expected = encoder.layer_norm(states) if family == "whisper" else states
        source = {name: x[row : row + 1] for name, x in inputs.items()}
        output = model(**source, decoder_input_ids=decoder_inputs(family)[row : row + 1])
        actual = output.encoder_last_hidden_state
        if "attention_mask" in source and family == "bart":
            actual = actual[:, : expected.shape[1]]
        assert_close(actual, expected, atol=2e-4, rtol=2e-4)
        # The decoder reads the masses, too.
        s = model.scale
        weights = made.log_mass.float() + s / 2 * expected[0].square().sum(-1)
        log_pi = output.latents.log_pi[0, 1 : len(weights) + 1]
        assert_close(log_pi - log_pi.logsumexp(-1), weights - weights.logsumexp(-1), atol=1e-3, rtol=1e-3)


def _output(output):
    return output if isinstance(output, torch.Tensor) else output[0]


SETTINGS = [{"accumulate_alpha": True}, {"evaluation": "mixture", "tau_sigma": 0.2}]
SOME = ["bart", "t5", "whisper", "nllb_moe"]
CASES = [(family, {}) for family in ABLE] + [(family, settings) for family in SOME for settings in SETTINGS]


@pytest.mark.parametrize(("family", "settings"), CASES, ids=str)
@torch.no_grad()
def test_taken_out_of_the_sequence_or_hidden_is_the_same(family, settings, monkeypatch):
    model, inputs = merging(family, {0: 0.6, 1: 0.5}, **settings), tiny_inputs(family)
    decoder = {"decoder_input_ids": decoder_inputs(family)}
    short = model(**inputs, **decoder)
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    for module in model._self_attentions().values():
        monkeypatch.setattr(module, "nvib_spec", replace(module.nvib_spec, shortens=False))
    long = model(**inputs, **decoder)
    if family != "nllb_moe":  # whose router reads the mask, so that nothing leaves its sequence
        assert short.latents.z.shape[1] < long.latents.z.shape[1]
    assert_close(short.logits, long.logits, atol=2e-4, rtol=2e-4)
    assert_close(short.prop_vectors, long.prop_vectors)
    assert short.prop_vectors.max() < 0.6
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("family", ["bart", "t5", "whisper", "bert2gpt2"])
@torch.no_grad()
def test_rows_are_merged_by_themselves(family):
    model, inputs = merging(family), tiny_inputs(family)
    together = model.encode(**inputs)
    assert_close(together.log_pi.exp().sum(-1), torch.ones(len(together)))
    for row in range(len(together)):
        alone = model.encode(**{name: x[row : row + 1] for name, x in inputs.items()}).compact()
        of_row = together[row].compact()
        assert_close(of_row.z[:, : alone.z.shape[1]], alone.z, atol=1e-4, rtol=1e-4)
        assert_close(of_row.log_pi[:, : alone.z.shape[1]].exp(), alone.log_pi.exp(), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_share_of_1_and_none_are_the_base():
    base, inputs = tiny_base("bart").eval(), tiny_inputs("bart")
    inputs["decoder_input_ids"] = decoder_inputs("bart")
    for shares in ({}, {0: 1.0, 1: 1.0}):
        assert_close(merging("bart", shares)(**inputs).logits, base(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_what_is_dropped_is_not_merged():
    """A layer that drops and merges: half of what it keeps is left."""
    model = merging("bart", {0: 0.5}, alpha_threshold=1.0, tau_sigma=0.3)
    with torch.no_grad():
        layer = model.nvib_layers()["encoder.0"]
        layer.alpha_quadratic.zero_()
        layer.alpha_weight.copy_(torch.randn(layer.size_in, generator=torch.Generator().manual_seed(1)) / 5)
        layer.alpha_bias.fill_(0.4)
        output = model(**tiny_inputs("bart"), labels=tiny_labels("bart"))
    mask = tiny_inputs("bart")["attention_mask"].sum(-1)
    kept = output.layer_prop_vectors["encoder.0"] * mask
    assert (kept < mask).any()
    expected = (kept.round() * 0.5).round().clamp(min=1) / mask
    assert_close(output.layer_prop_vectors["encoder.1"], expected)


def test_in_place_by_hand():
    z = torch.tensor([[[0.0], [1.0], [10.0], [99.0], [12.0]]])
    log_mass = torch.tensor([[0.0, 1.0, 0.0, -torch.inf, 0.0]])
    made = merge_in_place(z, log_mass, 0.5)
    first, second = 1 / (1 + torch.e), torch.e / (1 + torch.e)
    assert made.group.tolist() == [[0, 0, 1, -1, 1]] and made.keep.tolist() == [[True, False, True, False, False]]
    assert_close(made.z[0, :, 0], torch.tensor([second, second, 11.0, 99.0, 11.0]))
    assert_close(made.log_mass[0, [0, 2]].exp(), torch.tensor([1 + torch.e, 2.0]))
    assert_close(made.total(log_mass)[0, [0, 2]], made.log_mass[0, [0, 2]])
    assert first < second


# --------------------------------------------------------------------------------------------- training and saving
@pytest.mark.parametrize("settings", [{}, {"accumulate_alpha": True}, {"alpha_activation": "relu"}], ids=str)
@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
def test_training_reaches_everything(family, settings):
    model = merging(family, lambda_gaussian=0.1, lambda_dirichlet=0.1, tau_sigma=0.3, **settings).train()
    output = model(**tiny_inputs(family), labels=tiny_labels(family))
    output.loss.backward()
    assert output.latents.z.shape[1] < model.eval().encode(**tiny_inputs(family)).z.shape[1] + 1
    for name, layer in model.nvib_layers().items():
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (name, parameter_name)
            assert parameter.grad.abs().sum() > 0, (name, parameter_name)


@torch.no_grad()
def test_saved_is_loaded(tmp_path):
    model, inputs = merging("bart", {0: 0.5, 1: 0.25}), tiny_inputs("bart")
    expected = model(**inputs, labels=tiny_labels("bart"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["encoder_merge_share"] == {"0": 0.5, "1": 0.25}
    again = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.encoder_merge_share == {0: 0.5, 1: 0.25}
    assert_close(again(**inputs, labels=tiny_labels("bart")).logits, expected.logits)
    base = again.unwrap()
    decoder = {"decoder_input_ids": decoder_inputs("bart")}
    assert_close(base(**inputs, **decoder).logits, tiny_base("bart").eval()(**inputs, **decoder).logits)


# ------------------------------------------------------------------------------------------------- encoders alone
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}
CLASSIFIERS = [
    (NvibForSequenceClassification, BertForSequenceClassification),
    (NvibForTokenClassification, BertForTokenClassification),
]


@pytest.mark.parametrize("own_class, base_class", CLASSIFIERS)
def test_an_encoder_alone_keeps_its_length(own_class, base_class):
    torch.manual_seed(0)
    base = base_class(BertConfig(**SIZES, num_labels=3)).eval()
    ids, mask = torch.randint(4, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = base(input_ids=ids, attention_mask=mask).logits
        model = own_class.from_base_pretrained(base, encoder_merge_share={0: 0.5}).eval()
        output = model(input_ids=ids, attention_mask=mask)
        alone = model(input_ids=ids[1:, :6]).logits
    assert output.logits.shape == expected.shape and not torch.allclose(output.logits, expected, atol=1e-4)
    assert output.layer_prop_vectors["encoder.0"].tolist() == [1.0, 1.0]
    assert_close(output.layer_prop_vectors["encoder.1"], torch.tensor([4 / 9, 3 / 6]))
    of_row = output.logits[1:, :6] if output.logits.dim() == 3 else output.logits[1:]
    assert_close(of_row, alone, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "settings, error, says",
    [
        ({"encoder_merge_share": 0.5}, TypeError, "shares by the numbers of layers, but got 0.5"),
        ({"encoder_merge_share": {"x": 0.5}}, ValueError, "layers by their numbers, counted from 0, but got 'x'"),
        ({"encoder_merge_share": {-1: 0.5}}, ValueError, "but got -1"),
        ({"encoder_merge_share": {0: 1.5}}, ValueError, r"in \(0, 1\], but got 1.5"),
        ({"encoder_merge_share": {0: 0.5}, "attentions": None}, ValueError, r"attentions=\['cross', 'encoder'\]"),
        ({"encoder_merge_share": {7: 0.5}}, ValueError, "merges after layer 7, but"),
        (
            {"encoder_merge_share": {0: 0.5}, "attentions": {"cross": "all", "encoder": [1]}},
            ValueError,
            "layer 0 too",
        ),
    ],
    ids=str,
)
def test_what_is_refused_is_named(settings, error, says):
    base = tiny_base("bart")
    with pytest.raises(error, match=says):
        NvibForConditionalGeneration.from_base_pretrained(base, **{"attentions": BOTH, **settings})
    assert type(base).__name__ == "BartForConditionalGeneration"
    assert not any("Denoising" in type(module).__name__ for module in base.modules())


@pytest.mark.parametrize("made_with, then", [(None, {0: 0.5}), ({0: 0.5}, {0: 0.25}), ({0: 0.5}, None)], ids=str)
@torch.no_grad()
def test_a_share_that_was_set_later_is_not_ignored(made_with, then, tmp_path):
    model, inputs = merging("bart", made_with or {}), tiny_inputs("bart")
    model.config.encoder_merge_share = then
    says = "encoder_merge_share was set to .* Save the model and load it again"
    for call in (
        lambda: model.encode(**inputs),
        lambda: model(**inputs, labels=tiny_labels("bart")),
        lambda: model.generate(**inputs, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    model.save_pretrained(tmp_path)
    expected = merging("bart", then or {}).encode(**inputs)
    assert_close(NvibForConditionalGeneration.from_pretrained(tmp_path).encode(**inputs).z, expected.z)
    model.config.encoder_merge_share = made_with
    assert_close(model.encode(**inputs).z, merging("bart", made_with or {}).encode(**inputs).z)
    if made_with:  # a change of the configuration's own dict, too
        model.config.encoder_merge_share[0] = 0.9
        with pytest.raises(ValueError, match=says):
            model.encode(**inputs)


@torch.no_grad()
def test_a_share_that_an_encoder_alone_got_later_is_not_ignored():
    model = NvibForSequenceClassification.from_base_pretrained(BertForSequenceClassification(BertConfig(**SIZES)))
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids)
    model.config.encoder_merge_share = {0: 0.5}
    with pytest.raises(ValueError, match=r"encoder_merge_share was set to \{0: 0.5\}, .* made with None"):
        model(input_ids=ids)


def test_nothing_merged_is_no_setting():
    assert NvibConfig(attentions=BOTH, encoder_merge_share={}).encoder_merge_share is None
