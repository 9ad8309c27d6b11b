"""``NvibConfig``: the base's configuration inside, the bottleneck's settings beside it, and JSON."""

import copy
import json

import pytest
import torch
from tiny_models import BERT_LIKE, DECODER, EOS, GPT2_LIKE, PAD, START, VOCAB_SIZE, tiny_base, tiny_inputs
from tiny_nvib import tiny_nvib
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BertConfig,
    EncoderDecoderConfig,
    GPT2Config,
    SpeechEncoderDecoderConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    ViTConfig,
    Wav2Vec2Config,
)

from nvib_hf import NvibConfig, NvibForConditionalGeneration

SETTINGS = {
    "prior_mu": [0.5, -0.5],
    "prior_var": [1.0, 2.0],
    "prior_alpha": 3.0,
    "delta": 0.25,
    "kappa": 2,
    "alpha_activation": "relu",
    "alpha_threshold": 0.1,
    "tau_alpha": 1.5,
    "tau_sigma": 0.5,
    "tau_mu": 0.75,
    "lambda_gaussian": 0.01,
    "lambda_dirichlet": 0.02,
    "label_smoothing": 0.1,
    "evaluation": "mixture",
    "kl_weights": "pseudo_counts",
    "exact_attention": True,
}
GPT2_DECODER = GPT2Config(**GPT2_LIKE, **DECODER)
JOINED = {
    "bert2gpt2": EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**BERT_LIKE), GPT2_DECODER),
    "vit2gpt2": VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), GPT2_DECODER),
    "vit2trocr": VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), TrOCRConfig()),
    "wav2vec2gpt2": SpeechEncoderDecoderConfig.from_encoder_decoder_configs(Wav2Vec2Config(), GPT2_DECODER),
}


def every_base_config():
    """Each type of configuration that Transformers has an encoder-decoder for, with its defaults."""
    types = {kind for auto in (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq) for kind in auto._model_mapping}
    types -= {NvibConfig, EncoderDecoderConfig, SpeechEncoderDecoderConfig}
    named = {kind.model_type: kind for kind in types}
    return [pytest.param(named[name], id=name) for name in sorted(named)]


def settings_of(config):
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def assert_round_trip(base_config, folder):
    config = NvibConfig(base_config=base_config, **SETTINGS)
    assert config.base_config is not base_config and config.base_config.to_dict() == base_config.to_dict()
    config.save_pretrained(folder)
    for loaded in (
        NvibConfig.from_pretrained(folder),
        AutoConfig.from_pretrained(folder),
        NvibConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        copy.deepcopy(config),
    ):
        assert type(loaded) is NvibConfig and type(loaded.base_config) is type(base_config)
        assert {name: getattr(loaded, name) for name in SETTINGS} == SETTINGS
        assert settings_of(loaded) == settings_of(config)
        # Not only as dicts: parts of a composite configuration come back as what they were.
        for part in base_config.sub_configs:
            assert type(getattr(loaded.base_config, part)) is type(getattr(base_config, part))


@pytest.mark.parametrize("kind", every_base_config())
def test_every_base_configuration_goes_through_json(kind, tmp_path):
    assert_round_trip(kind(), tmp_path)


@pytest.mark.parametrize("name", JOINED)
def test_joined_configurations_go_through_json(name, tmp_path):
    assert_round_trip(JOINED[name], tmp_path)
    loaded = NvibConfig.from_pretrained(tmp_path).base_config.decoder
    assert loaded.is_decoder and loaded.add_cross_attention


def test_changed_settings_of_the_base_go_through_json(tmp_path):
    base = BartConfig(d_model=48, encoder_layers=3, dropout=0.25, scale_embedding=True)
    NvibConfig(base_config=base).save_pretrained(tmp_path)
    loaded = NvibConfig.from_pretrained(tmp_path).base_config
    assert (loaded.d_model, loaded.encoder_layers, loaded.dropout, loaded.scale_embedding) == (48, 3, 0.25, True)


def test_a_base_configuration_may_be_a_dict():
    config = NvibConfig(base_config={"model_type": "t5", "d_model": 24})
    assert (config.base_config.model_type, config.base_config.d_model) == ("t5", 24)


def test_a_configuration_without_arguments():
    """Transformers makes one to find what differs from the defaults."""
    assert NvibConfig().base_config.model_type == "bart"
    changed = NvibConfig(base_config=BartConfig(), kappa=3).to_diff_dict()
    assert changed["kappa"] == 3 and changed["model_type"] == "nvib"


@pytest.mark.parametrize("of", [torch.clone, torch.nn.Parameter, torch.Tensor.numpy], ids=["torch", "grad", "numpy"])
def test_priors_may_be_tensors(of, tmp_path):
    mu, var = of(torch.full((32,), 0.5)), of(torch.linspace(1, 2, 32))
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), prior_mu=mu, prior_var=var)
    assert model.config.prior_mu == [0.5] * 32
    model.save_pretrained(tmp_path)
    loaded = NvibConfig.from_pretrained(tmp_path)
    torch.testing.assert_close(torch.tensor(loaded.prior_var), torch.linspace(1, 2, 32))
    torch.testing.assert_close(model.nvib.prior_logvar.exp(), torch.linspace(1, 2, 32))


def test_numbers_of_other_kinds_are_plain_in_json():
    config = NvibConfig(prior_alpha=torch.tensor(2.0), delta=1, kappa=torch.tensor(3), lambda_gaussian="0.5")
    values = json.loads(config.to_json_string(use_diff=False))
    assert [values[name] for name in ("prior_alpha", "delta", "kappa", "lambda_gaussian")] == [2.0, 1.0, 3, 0.5]
    assert type(values["kappa"]) is int


def test_settings_can_be_changed_when_loading(tmp_path):
    tiny_nvib(kappa=1, lambda_gaussian=0.1).save_pretrained(tmp_path)
    model = NvibForConditionalGeneration.from_pretrained(tmp_path, kappa=3, lambda_gaussian=0.2)
    assert (model.config.kappa, model.nvib.kappa, model.config.lambda_gaussian) == (3, 3, 0.2)
    assert model.encode(**tiny_inputs("bart"), sample=True).z.shape[1] == 30


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"])
@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2"])
def test_token_ids_are_the_base_s(family, name):
    base = tiny_base(family)
    model = NvibForConditionalGeneration.from_base_pretrained(base)
    assert getattr(model.config, name) == getattr(base.config, name, None)
    setattr(model.config, name, 7)
    assert getattr(base.config, name) == 7
    assert model.config.to_dict()["base_config"][name] == 7 and name not in model.config.to_diff_dict()
    setattr(base.config, name, 8)
    assert getattr(model.config, name) == 8


def test_shared_settings_survive_saving(tmp_path):
    config = NvibConfig(base_config=BartConfig(pad_token_id=5, vocab_size=77, tie_word_embeddings=False))
    config.eos_token_id = 9
    config.save_pretrained(tmp_path)
    loaded = NvibConfig.from_pretrained(tmp_path)
    for which in (loaded, loaded.base_config):
        assert (which.pad_token_id, which.vocab_size, which.eos_token_id) == (5, 77, 9)
        assert which.tie_word_embeddings is False
    assert loaded.is_encoder_decoder and loaded.hidden_size == 1024


def test_labels_are_shifted_with_the_start_token_that_is_set():
    model = tiny_nvib("bert2gpt2")
    model.config.decoder_start_token_id = 11
    shifted = model.prepare_decoder_input_ids_from_labels(torch.tensor([[4, 5, -100]]))
    assert shifted.tolist() == [[11, 4, 5]]


@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2"])
def test_generation_configuration_is_carried_over(family, tmp_path):
    base = tiny_base(family)
    base.generation_config.update(max_new_tokens=7, num_beams=3, length_penalty=0.5)
    base.save_pretrained(tmp_path / "base")
    for source in (base, str(tmp_path / "base")):
        model = NvibForConditionalGeneration.from_base_pretrained(source)
        assert model.generation_config.to_dict() == base.generation_config.to_dict()
    assert model.generation_config is not base.generation_config
    model.save_pretrained(tmp_path / "nvib")
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path / "nvib")
    assert loaded.generation_config.to_dict() == base.generation_config.to_dict()
    tokens = loaded.generate(**tiny_inputs(family), min_new_tokens=7)
    assert tokens.shape == (3, 8)
    ids = (loaded.generation_config.pad_token_id, loaded.generation_config.eos_token_id, loaded.config.vocab_size)
    assert ids == (PAD, EOS, VOCAB_SIZE if family != "bert2gpt2" else None) and tokens[0, 0] == START


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert", "bert2gpt2"])
def test_attention_implementation_is_passed_on(family, implementation, tmp_path):
    def implementations(model):
        configs = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
        return {config._attn_implementation for config in configs}

    tiny_base(family).save_pretrained(tmp_path / "base")
    model = NvibForConditionalGeneration.from_base_pretrained(
        str(tmp_path / "base"), attn_implementation=implementation
    )
    assert implementations(model) == {implementation}
    model.save_pretrained(tmp_path / "nvib")
    for source in (NvibForConditionalGeneration, AutoModelForSeq2SeqLM):
        loaded = source.from_pretrained(tmp_path / "nvib", attn_implementation=implementation)
        assert implementations(loaded) == {implementation}
    other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
    loaded.set_attn_implementation(other)
    assert implementations(loaded) == {other}


def test_implementations_of_parts_are_kept_apart():
    base = tiny_base("bert2gpt2")
    base.encoder.set_attn_implementation("eager")
    config = NvibConfig(base_config=base.config)
    assert config.base_config.encoder._attn_implementation == "eager"
    assert config.base_config.decoder._attn_implementation == "sdpa"


def test_auto_classes_know_the_model(tmp_path):
    tiny_nvib("t5").save_pretrained(tmp_path)
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is NvibForConditionalGeneration
    assert type(AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(tmp_path))).__name__ == (
        "NvibForConditionalGeneration"
    )
