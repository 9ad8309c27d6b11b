"""Bad input is refused: the message names the argument, its value and the remedy, and nothing has been changed."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from tiny_models import BART_LIKE, BERT_LIKE, DECODER, GPT2_LIKE, tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import cross_attention, tensors, tiny_nvib
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForSequenceClassification,
    BartModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
)

from nvib_hf import NvibConfig, NvibForConditionalGeneration, NvibLatents, concatenate_latents

wrap = NvibForConditionalGeneration.from_base_pretrained
join = NvibForConditionalGeneration.from_encoder_decoder_pretrained


def says(*parts):
    """A pattern of a message with these parts, in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


# ----------------------------------------------------------------------------------------------------------- settings
SETTINGS = [
    ({"prior_var": [1.0] * 512}, "prior_var has 512 values but this model's width is 32. Pass one number or 32"),
    ({"prior_mu": torch.zeros(31)}, "prior_mu has 31 values but this model's width is 32. Pass one number or 32"),
    ({"prior_var": -0.5}, "prior_var must be positive, but its smallest value is -0.5"),
    ({"prior_var": 0.0}, "prior_var must be positive, but its smallest value is 0.0"),
    ({"prior_var": [1.0] * 31 + [-2.0]}, "prior_var must be positive, but its smallest value is -2.0"),
    ({"prior_mu": float("nan")}, "prior_mu must be finite, but got nan"),
    ({"prior_alpha": 0}, "prior_alpha must be a positive number, but got 0"),
    ({"prior_alpha": -1.0}, "prior_alpha must be a positive number, but got -1.0"),
    ({"kappa": 0}, "kappa must be a whole number of at least 1, but got 0"),
    (
        {"alpha_activation": "relu", "tau_alpha": 0},
        "tau_alpha must be above 0 with alpha_activation='relu', but got 0.0",
    ),
    ({"kappa": 1.5}, "kappa must be a whole number of at least 1, but got 1.5"),
    ({"delta": 1.1}, "delta must be in [0, 1], but got 1.1"),
    ({"delta": -0.1}, "delta must be in [0, 1], but got -0.1"),
    ({"alpha_threshold": -0.1}, "alpha_threshold must be 0 (drop nothing) or positive, but got -0.1"),
    ({"alpha_activation": "softplus"}, "alpha_activation must be one of 'exp', 'relu', but got 'softplus'"),
    ({"tau_sigma": -1.0}, "tau_sigma must be 0 or positive, but got -1.0"),
    ({"tau_mu": 1.5}, "tau_mu must be in [0, 1], but got 1.5"),
    ({"tau_alpha": float("inf")}, "tau_alpha must be finite, but got inf"),
    ({"lambda_gaussian": -0.1}, "lambda_gaussian must be 0 or positive, but got -0.1"),
    ({"lambda_dirichlet": float("nan")}, "lambda_dirichlet must be 0 or positive, but got nan"),
    ({"label_smoothing": 1.0}, "label_smoothing must be in [0, 1), but got 1.0"),
    ({"delta": None}, "delta must be a number, but got None"),
    ({"prior_alpha": "much"}, "prior_alpha must be a number, but got 'much'"),
    ({"lamda_gaussian": 0.1}, "'lamda_gaussian' is not a setting of NvibConfig. Did you mean 'lambda_gaussian'?"),
    ({"prior_variance": 0.1}, "'prior_variance' is not a setting of NvibConfig. Did you mean 'prior_var'?"),
    ({"label_smoothing_factor": 0.1}, "is not a setting of NvibConfig. Did you mean 'label_smoothing'?"),
    ({"attn_implementation": "eager"}, "A loaded model takes no argument 'attn_implementation'. Leave it out."),
]


@pytest.mark.parametrize("settings, message", SETTINGS, ids=[next(iter(settings)) for settings, _ in SETTINGS])
def test_settings_outside_their_range(settings, message):
    base = tiny_base("bart")
    config, weights = copy.deepcopy(base.config.to_dict()), {k: v.clone() for k, v in tensors(base).items()}
    classes = [type(module) for module in base.modules()]
    with pytest.raises((ValueError, TypeError), match=says(message)):
        wrap(base, **settings)
    assert [type(module) for module in base.modules()] == classes
    assert base.config.to_dict() == config and base.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, weights[name]) for name, value in tensors(base).items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert wrap(base).config.kappa == 1  # and it can still be wrapped


@pytest.mark.parametrize(
    "settings, message", [pair for pair in SETTINGS if "width" not in pair[1] and "loaded model" not in pair[1]]
)
def test_the_configuration_refuses_them_too(settings, message):
    with pytest.raises((ValueError, TypeError), match=says(message)):
        NvibConfig(base_config=BartConfig(), **settings)


def test_width_of_a_prior_is_checked_where_the_base_is_fresh():
    config = NvibConfig(base_config=tiny_base("bart").config, prior_var=[1.0] * 16)
    with pytest.raises(ValueError, match=says("prior_var has 16 values but this model's width is 32")):
        NvibForConditionalGeneration(config)


def test_cross_attention_scales_that_differ():
    base = tiny_base("bert2gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=says("different scales", "scale_attn_by_inverse_layer_idx=False")):
        wrap(base)
    assert not cross_attention(base)


# -------------------------------------------------------------------------------------------------------------- bases
NO_BASE = {
    "encoder": lambda: BertModel(BertConfig(**BERT_LIKE)),
    "half_of_an_encoder_decoder": lambda: T5EncoderModel(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1)),
    "decoder": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_LIKE)),
    "decoder_that_could_cross_attend": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_LIKE, add_cross_attention=True)),
    "decoder_of_bart": lambda: BartForCausalLM(BartConfig(**BART_LIKE)),
    "decoder_of_bert": lambda: BertLMHeadModel(BertConfig(**BERT_LIKE, **DECODER)),
    "no_head": lambda: BartModel(BartConfig(**BART_LIKE)),
    "classifier": lambda: BartForSequenceClassification(BartConfig(**BART_LIKE)),
}


@pytest.mark.parametrize("name", NO_BASE)
def test_models_that_are_no_base(name, tmp_path):
    model = NO_BASE[name]()
    classes = [type(module) for module in model.modules()]
    pattern = says(type(model).__name__, "no ", "from_encoder_decoder_pretrained")
    with pytest.raises(ValueError, match=pattern):
        wrap(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_checkpoints_that_are_no_base(name, tmp_path):
    model = NO_BASE[name]()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says(repr(model.config.model_type), "from_encoder_decoder_pretrained")):
        wrap(str(tmp_path))


def test_an_nvib_model_is_no_base(tmp_path):
    model = tiny_nvib()
    for again in (model, model.base):
        with pytest.raises(ValueError, match=says("NVIB model already", "unwrap()")):
            wrap(again)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says("NVIB model already", "NvibForConditionalGeneration.from_pretrained")):
        wrap(str(tmp_path))


def test_a_decoder_that_cannot_cross_attend():
    encoder = BertModel(BertConfig(**BERT_LIKE))
    with pytest.raises(ValueError, match=says("OPTForCausalLM cannot cross-attend", "GPT-2")):
        from transformers import OPTConfig

        sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        join(encoder, OPTConfig(**sizes, vocab_size=99, word_embed_proj_dim=16))


def test_a_base_spread_over_devices():
    base = tiny_base("bart")
    base.hf_device_map = {"model.encoder": 0, "model.decoder": 1}
    with pytest.raises(ValueError, match=says("several devices", "from_pretrained(..., device_map=...)")):
        wrap(base)
    assert not cross_attention(base)


# ----------------------------------------------------------------------------------------------------- forward, encode
@pytest.mark.parametrize("family", ["bart", "bert2gpt2"])
def test_labels_longer_than_the_decoder_s_positions(family):
    model, labels = tiny_nvib(family), torch.ones(3, 65, dtype=torch.long)
    message = says("labels are 65 tokens long, but the decoder has 64 positions", "max_length=64, truncation=True")
    with pytest.raises(ValueError, match=message):
        model(**tiny_inputs(family), labels=labels)
    with pytest.raises(ValueError, match=says("decoder_input_ids are 65 tokens long")):
        model(**tiny_inputs(family), decoder_input_ids=labels)
    assert model(**tiny_inputs(family), labels=labels[:, :64]).loss.isfinite()


def test_relative_positions_have_no_end():
    model = tiny_nvib("t5")
    assert model(**tiny_inputs("t5"), labels=torch.ones(3, 100, dtype=torch.long)).loss.isfinite()


@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2"])
def test_nothing_for_the_decoder_to_read(family):
    inputs = tiny_inputs(family)
    if family == "bart":  # it repeats the source, where there is one
        inputs = {"inputs_embeds": torch.zeros(3, 9, 32)}
    with pytest.raises(ValueError, match=says("Pass labels, decoder_input_ids", "generate()")):
        tiny_nvib(family)(**inputs)


def test_a_source_that_the_decoder_cannot_repeat():
    source = torch.full((3, 70), 5)
    model = tiny_nvib("led")
    with pytest.raises(ValueError, match="decoder_input_ids are 70 tokens long, but the decoder has 64 positions"):
        model(input_ids=source)


@pytest.mark.parametrize("rows", [1, 2], ids=["broadcast", "mismatch"])
def test_latents_and_targets_of_different_number(rows):
    """One latent would be broadcast over the batch without a word."""
    model = tiny_nvib()
    latents = model.encode(**tiny_inputs("bart"))[:rows]
    message = says(f"There are {rows} latents but 3 decoder inputs", "one latent for each example")
    with pytest.raises(ValueError, match=message):
        model(encoder_outputs=latents, labels=tiny_labels("bart"))
    with pytest.raises(ValueError, match=message):
        model(encoder_outputs=latents, decoder_input_ids=torch.full((3, 1), 2))
    with pytest.raises(ValueError, match=message):
        model(**{k: v[:rows] for k, v in tiny_inputs("bart").items()}, labels=tiny_labels("bart"))
    with pytest.raises(ValueError, match=message):
        model.generate(encoder_outputs=latents, decoder_input_ids=torch.full((3, 1), 2), max_new_tokens=2)
    assert latents.batch_size == rows


def test_latents_of_a_model_of_another_width():
    model, narrow = tiny_nvib(), tiny_nvib(base={"d_model": 16})
    latents = narrow.encode(**tiny_inputs("bart"))
    message = says("The latents are 16 wide, but this model's are 32", "another model")
    with pytest.raises(ValueError, match=message):
        model(encoder_outputs=latents, labels=tiny_labels("bart"))
    with pytest.raises(ValueError, match=message):
        model.generate(encoder_outputs=latents, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        model.interpolate_latents(model.encode(**tiny_inputs("bart")), latents, 0.5)


def test_latents_whose_fields_do_not_belong_together():
    model = tiny_nvib()
    latents = model.encode(**tiny_inputs("bart"))
    broken = NvibLatents(z=latents.z, log_pi=latents.log_pi[:, :-1], attention_mask=latents.attention_mask)
    with pytest.raises(ValueError, match=says("do not fit together", "'log_pi': (3, 9)", "(B, Nl)")):
        model.generate(encoder_outputs=broken, max_new_tokens=2)
    broken = dataclasses.replace(latents, logvar=latents.logvar[:1])
    with pytest.raises(ValueError, match=says("do not fit together", "'logvar': (1, 10, 32)")):
        model(encoder_outputs=broken, labels=tiny_labels("bart"))


def test_the_encoder_s_own_states_are_no_latent():
    model = tiny_nvib()
    states = model.get_encoder()(**tiny_inputs("bart"))
    message = says("32 wide where a latent of this model is 40 or 72", "encode()")
    with pytest.raises(ValueError, match=message):
        model.generate(encoder_outputs=states, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        model(encoder_outputs=states, labels=tiny_labels("bart"))


@pytest.mark.parametrize("wrong", [torch.zeros(3, 9, 32), [1, 2], "text"], ids=["tensor", "list", "string"])
def test_something_else_as_encoder_outputs(wrong):
    with pytest.raises(TypeError, match=says("encoder_outputs must be latents", type(wrong).__name__, "encode()")):
        tiny_nvib().generate(encoder_outputs=wrong, max_new_tokens=2)


@pytest.mark.parametrize("call", ["__call__", "encode"])
def test_misspelt_inputs(call):
    """A mask under another name would be left out."""
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    inputs["atention_mask"] = inputs.pop("attention_mask")
    if call == "__call__":
        inputs["labels"] = tiny_labels("bart")
    with pytest.raises(TypeError, match=says("takes no argument 'atention_mask'. Did you mean 'attention_mask'?")):
        getattr(model, call)(**inputs)


# ---------------------------------------------------------------------------------------------- samples, interpolation
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2, 0), "num_vectors must be whole numbers of at least 1, but got 0"),
        ((2, [3, 0]), "num_vectors must be whole numbers of at least 1, but got [3, 0]"),
        ((2, -1), "num_vectors must be whole numbers of at least 1, but got -1"),
        ((2, 2.5), "num_vectors must be whole numbers of at least 1, but got 2.5"),
        ((2, [3]), "num_vectors must be one number or one for each of num_samples=2, but got [3]"),
        ((2, [[1, 2]]), "num_vectors must be one number or one for each of num_samples=2, but got [[1, 2]]"),
        ((0, 3), "num_samples must be a whole number of at least 1, but got 0"),
        ((1.5, 3), "num_samples must be a whole number of at least 1, but got 1.5"),
    ],
)
def test_lengths_of_samples(arguments, message):
    model = tiny_nvib()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=says(message)):
        model.sample_latents(*arguments)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "weight, message",
    [
        (-0.1, "weight must be in [0, 1], but got -0.1"),
        (1.01, "weight must be in [0, 1], but got 1.01"),
        (float("nan"), "weight must be in [0, 1], but got nan"),
        (torch.tensor([0.5, 2.0, 0.0]), "weight must be in [0, 1], but got tensor([0.5000, 2.0000, 0.0000])"),
        (torch.tensor([0.5, 0.5]), "one value for each of the 3 latents, but has shape (2,)"),
        (torch.full((3, 1), 0.5), "one value for each of the 3 latents, but has shape (3, 1)"),
    ],
    ids=str,
)
def test_weights_of_an_interpolation(weight, message):
    model = tiny_nvib()
    latents = model.encode(**tiny_inputs("bart"))
    with pytest.raises(ValueError, match=says(message)):
        model.interpolate_latents(latents, latents, weight)


def test_interpolation_of_batches_of_different_size():
    model = tiny_nvib()
    latents = model.encode(**tiny_inputs("bart"))
    with pytest.raises(ValueError, match=says("(3, 10, 32) and (2, 10, 32)", "batch size")):
        model.interpolate_latents(latents, latents[:2], 0.5)


def test_concatenation():
    with pytest.raises(ValueError, match=r"latents is empty\. Pass at least one"):
        concatenate_latents([])
    with pytest.raises(ValueError, match=says("widths", "[16, 32]")):
        concatenate_latents([tiny_nvib(base={"d_model": d}).sample_latents(1, 3) for d in (32, 16)])


# --------------------------------------------------------------------------------------------------------- checkpoints
def test_a_configuration_of_a_newer_version(tmp_path):
    tiny_nvib().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["config_version"] += 1
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says("newer nvib_hf", "config_version 2", "pip install -U")):
        NvibForConditionalGeneration.from_pretrained(tmp_path)


def test_a_setting_changed_to_a_bad_value_when_loading(tmp_path):
    tiny_nvib().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says("kappa must be a whole number of at least 1, but got 0")):
        NvibForConditionalGeneration.from_pretrained(tmp_path, kappa=0)


def test_samples_of_a_model_with_another_kappa_are_refused():
    one, three = tiny_nvib(kappa=1), tiny_nvib(kappa=3)
    inputs = tiny_inputs("bart")
    drawn = three.encode(**inputs, sample=True)
    message = says("drawn with kappa=[3], but this model has kappa=1", "Encode the texts with this one")
    with pytest.raises(ValueError, match=message):
        one.generate(encoder_outputs=drawn, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        one(encoder_outputs=drawn, labels=tiny_labels("bart"))
    three.generate(encoder_outputs=drawn[1:], max_new_tokens=2)
    one.generate(encoder_outputs=three.encode(**inputs), max_new_tokens=2)  # a posterior has no kappa


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_decoder_inputs_of_another_batch_are_refused_while_decoding(family):
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    start = torch.full((4, 1), model.config.decoder_start_token_id)
    with pytest.raises(ValueError, match=says("There are 3 latents but 4 decoder inputs")):
        model.generate(**inputs, decoder_input_ids=start)
    packed = model._packed_encoder_outputs(model.encode(**inputs))
    with pytest.raises(ValueError, match=says("There are 3 latents but 6 decoder inputs")):
        model(encoder_outputs=packed, labels=torch.cat([tiny_labels(family)] * 2))
    with pytest.raises(ValueError, match=says("There are 3 latents but 4 decoder inputs")):
        model(encoder_outputs=packed, decoder_input_ids=start)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_mask_of_another_shape_than_its_tokens_is_refused(family):
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for wrong in (mask[:, :5], mask[:2], mask[0]):
        message = says(f"attention_mask has shape {tuple(wrong.shape)}", f"tokens have {tuple(ids.shape)}")
        with pytest.raises(ValueError, match=message):
            model.encode(input_ids=ids, attention_mask=wrong)
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, attention_mask=wrong, labels=tiny_labels(family))
