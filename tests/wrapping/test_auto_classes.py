"""A wrap is found where its base is: in Auto classes, by pipelines, and by its public attributes."""

import copy

import numpy as np
import pytest
import torch
import transformers
from tiny_models import FAMILIES, tiny_base, tiny_inputs
from tiny_text import tiny_tokenizer
from transformers import (
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    pipeline,
)
from transformers.models.auto import modeling_auto

from nvib_hf import NvibForConditionalGeneration, NvibForSequenceClassification, NvibForTokenClassification
from nvib_hf.wrapping.auto_classes import AUTO_CLASSES

wrap = NvibForConditionalGeneration.from_base_pretrained


def autos_of(base):
    """The Auto classes that have a base's own class."""
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoM") else None
        if mapping is not None and type(base.config) in mapping:
            found = mapping[type(base.config)]
            if type(base) in (found if isinstance(found, (tuple, list)) else [found]):
                yield name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_auto_class_of_the_base_knows_the_wrap(family):
    base = tiny_base(family)
    names = set(autos_of(base))
    assert names and names <= set(AUTO_CLASSES)
    config = wrap(base).config
    for name in {"AutoModel", *names}:
        assert type(getattr(transformers, name).from_config(config)) is NvibForConditionalGeneration


@pytest.mark.parametrize("family", ["bart", "whisper", "vit2gpt2"])
def test_saved_models_are_loaded_by_them(family, tmp_path):
    model = wrap(tiny_base(family))
    model.save_pretrained(tmp_path)
    for name in {"AutoModel", "AutoModelForSeq2SeqLM", *autos_of(tiny_base(family))}:
        assert type(getattr(transformers, name).from_pretrained(tmp_path)) is NvibForConditionalGeneration


# ------------------------------------------------------------------------------------------------------ attributes
def attributes(model):
    """Public names, but for the parts of the model."""
    parts = {*dict(model.named_children()), *model._parameters, *model._buffers}
    return {name for name in dir(model) if not name.startswith("_") and hasattr(model, name)} - parts


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by hasattr
@pytest.mark.parametrize("family", FAMILIES)
def test_every_public_attribute_of_the_base_is_there(family):
    base = tiny_base(family)
    expected = attributes(base)
    model = wrap(copy.deepcopy(base))
    assert expected <= attributes(model)
    own = {"base_model_prefix", "name_or_path", "loss_type", "main_input_name"}
    for name in expected - own:
        value = getattr(base, name)
        if isinstance(value, (bool, int, float, str)):
            assert getattr(model, name) == value, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("base_class", "wrap_class"),
    [
        (BertForSequenceClassification, NvibForSequenceClassification),
        (BertForTokenClassification, NvibForTokenClassification),
    ],
)
def test_every_public_attribute_of_a_classifier_is_there(base_class, wrap_class):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = base_class(BertConfig(vocab_size=50, num_labels=3, **sizes))
    expected = attributes(base)
    model = wrap_class.from_base_pretrained(base)
    assert expected <= attributes(model) and model.num_labels == 3


def test_a_wrap_has_no_more_of_them_than_its_base():
    model = wrap(tiny_base("bart"))
    for name in ("freeze_feature_encoder", "detect_language", "num_labels", "resize_decoder_token_embeddings"):
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"NvibForConditionalGeneration.*{name}"):
            getattr(model, name)


def test_halves_are_frozen():
    model = wrap(tiny_base("whisper"))
    model.freeze_encoder()
    assert not any(parameter.requires_grad for parameter in model.get_encoder().parameters())
    model = wrap(tiny_base("wav2vec2_to_bert"))
    model.freeze_feature_encoder()
    assert not any(parameter.requires_grad for parameter in model.base.encoder.feature_extractor.parameters())


def test_the_decoder_s_embeddings_are_resized(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    own = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 40}
    base = MarianMTModel(MarianConfig(vocab_size=50, **sizes, **tokens, **heads, **own))
    model = wrap(base).eval()
    model.resize_decoder_token_embeddings(44)
    assert model.config.base_config.decoder_vocab_size == 44
    source = {"input_ids": torch.tensor([[45, 6, 1]]), "decoder_input_ids": torch.tensor([[2, 43]])}
    logits = model(**source).logits
    assert logits.shape == (1, 2, 44)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(NvibForConditionalGeneration.from_pretrained(tmp_path)(**source).logits, logits)
    with pytest.raises(ValueError, match="share_encoder_decoder_embeddings"):
        wrap(tiny_base("marian")).resize_decoder_token_embeddings(44)


LANGUAGES = {"<|en|>": 7, "<|de|>": 8}


def multilingual():
    base = tiny_base("whisper")
    base.generation_config.lang_to_id, base.generation_config.is_multilingual = LANGUAGES, True
    return base


def test_the_language_is_that_of_the_base():
    base, inputs = multilingual(), tiny_inputs("whisper")
    expected = base.detect_language(**inputs)
    assert torch.equal(wrap(copy.deepcopy(base)).eval().detect_language(**inputs), expected)
    assert set(expected.tolist()) <= {7, 8}


# ------------------------------------------------------------------------------------------------------- pipelines
SOUND = np.random.default_rng(0).standard_normal(12_000).astype(np.float32)
LISTENING = {
    "wav2vec2_to_bert": (Wav2Vec2FeatureExtractor, {}),
    "whisper": (lambda: WhisperFeatureExtractor(feature_size=8, chunk_length=1), {"max_source_positions": 50}),
}


@pytest.mark.parametrize("family", LISTENING)
def test_speech_is_recognised(family, tmp_path):
    """By the wrap as by the base, loaded from a folder and given as a model."""
    listen, overrides = LISTENING[family]
    base, extractor, tokenizer = tiny_base(family, **overrides), listen(), tiny_tokenizer()
    base.generation_config.max_new_tokens = 6
    heard = extractor(SOUND, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    heard = {name: value for name, value in heard.items() if family != "whisper" or name == "input_features"}
    expected = tokenizer.decode(base.generate(**heard, num_beams=5)[0], skip_special_tokens=True)
    model = wrap(copy.deepcopy(base)).eval()
    model.save_pretrained(tmp_path)
    for given in (model, AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path), str(tmp_path)):
        tools = {"tokenizer": tokenizer, "feature_extractor": extractor}
        recognise = pipeline("automatic-speech-recognition", model=given, **tools)
        assert recognise.type == "seq2seq"
        assert recognise({"raw": SOUND, "sampling_rate": 16_000})["text"] == expected != ""


def test_features_are_extracted():
    base, tokenizer = tiny_base("bart"), tiny_tokenizer()
    texts = ["w3 w5", "w7"]
    expected = pipeline("feature-extraction", model=base, tokenizer=tokenizer)(texts)
    found = pipeline("feature-extraction", model=wrap(copy.deepcopy(base)).eval(), tokenizer=tokenizer)(texts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-3, rtol=0)


def test_every_pipeline_of_a_base_takes_the_wrap_s_name():
    """Those that tell models apart by the names of their classes."""
    for table in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT"):
        assert "NvibForConditionalGeneration" in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
    assert issubclass(NvibForConditionalGeneration, PreTrainedModel)
