"""What a model is comes back from its folder, or the folder is refused: never another model, and never half of one."""

import json
import math
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_base, tiny_inputs
from tiny_nvib import tiny_nvib
from transformers import (
    AutoModelForSeq2SeqLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    modeling_utils,
)

from nvib_hf import NvibConfig, NvibForConditionalGeneration, NvibForSequenceClassification
from nvib_hf.wrapping.architecture import architecture_class, architecture_name

wrap, load = NvibForConditionalGeneration.from_base_pretrained, NvibForConditionalGeneration.from_pretrained
IDS = ("decoder_start_token_id", "pad_token_id", "eos_token_id")


# --------------------------------------------------------------------------------------------- generation, both ways
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_both_ways(family, tmp_path):
    base = tiny_base(family)
    base.generation_config.update(num_beams=3, max_new_tokens=4)
    expected = base.generation_config.to_dict()
    model = wrap(base)
    model.save_pretrained(tmp_path)
    again, model = load(tmp_path).unwrap(), model.unwrap()
    assert again.generation_config.to_dict() == expected == model.generation_config.to_dict()
    if family in ("bart", "whisper", "bert2gpt2"):
        assert torch.equal(again.generate(**tiny_inputs(family)), model.generate(**tiny_inputs(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_need_no_generation_config(family, tmp_path):
    base = tiny_base(family)
    expected = {name: getattr(base.generation_config, name) for name in IDS}
    model = wrap(base)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = load(tmp_path)
    assert {name: getattr(loaded.generation_config, name) for name in IDS} == expected
    if family in ("bart", "whisper", "bert2gpt2"):
        tokens = [of.generate(**tiny_inputs(family), max_new_tokens=4) for of in (loaded, model)]
        assert torch.equal(*tokens)


def test_what_was_changed_on_the_wrap_is_the_base_s():
    base = tiny_base("bart")
    base.model_tags = ["theirs"]
    model = wrap(base)
    assert model.model_tags == ["theirs", "nvib"]
    model.generation_config.num_beams, model.config.eos_token_id = 5, 7
    model.add_model_tags("mine")
    again = model.unwrap()
    assert (again.generation_config.num_beams, again.config.eos_token_id) == (5, 7)
    assert again.model_tags == ["theirs", "mine"]


# ------------------------------------------------------------------------------------------------------- mixtures
def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("saved", "changed", "key"),
    [
        ({}, {"alpha_activation": "relu"}, "nvib.alpha_quadratic"),
        ({"dropping": "relaxed"}, {"dropping": "threshold"}, "nvib.keep_bias, nvib.keep_weight"),
        ({"attentions": ["cross", "decoder"]}, {"attentions": ["cross"]}, "nvib"),
    ],
)
def test_weights_of_another_configuration_are_refused(saved, changed, key, tmp_path):
    wrap(tiny_base("bart"), **saved).save_pretrained(tmp_path)
    change(tmp_path, **changed)
    for loader in (load, AutoModelForSeq2SeqLM.from_pretrained):
        with pytest.raises(OSError, match=f"that do not fit its configuration .*{key}.*Fetch both"):
            loader(tmp_path)
    load(tmp_path, ignore_mismatched_sizes=True)
    _, info = load(tmp_path, output_loading_info=True)
    assert any("nvib" in name for name in info["unexpected_keys"])


@pytest.mark.parametrize(
    ("name", "value", "buffer", "expected"),
    [
        ("dropping_share", 0.0, "dropping_share", 0.0),
        ("prior_alpha", 5.0, "prior_log_alpha", math.log(5)),
        ("prior_var", 4.0, "prior_logvar", math.log(4)),
        ("prior_mu", [0.5] * 32, "prior_mu", 0.5),
    ],
)
def test_settings_in_buffers_are_heeded_when_loading(name, value, buffer, expected, tmp_path):
    """Of every layer; the others stay as they were saved, trained or fitted."""
    model = tiny_nvib(alpha_threshold=0.5, attentions=["cross", "encoder"])
    for layer in model.nvib_layers().values():
        layer.prior_logvar.fill_(1.5)
    model.save_pretrained(tmp_path)
    for layer in load(tmp_path, **{name: value}).nvib_layers().values():
        torch.testing.assert_close(layer.get_buffer(buffer), torch.full_like(layer.get_buffer(buffer), expected))
        assert name == "prior_var" or (layer.prior_logvar == 1.5).all()
    for layer in load(tmp_path).nvib_layers().values():
        assert layer.dropping_share == 1 and (layer.prior_logvar == 1.5).all()


def test_other_weights_may_be_there(tmp_path):
    wrap(tiny_base("bart")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"base.model.of_another_version": torch.ones(1)}, file, metadata={"format": "pt"})
    load(tmp_path)


def test_a_classifier_refuses_them_too(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    NvibForSequenceClassification.from_base_pretrained(base).save_pretrained(tmp_path)
    change(tmp_path, attentions={"encoder": [1]})
    with pytest.raises(OSError, match="weights of NVIB that do not fit its configuration"):
        NvibForSequenceClassification.from_pretrained(tmp_path)


class Interrupted(BaseException):
    """As the end of a process is no Exception."""


@contextmanager
def interrupted(at):
    """The end comes when a file whose name has ``at`` in it is opened, renamed or, by safetensors, written."""
    active = [True]

    def end(name):
        if active[0] and at in Path(str(name)).name:
            active[0] = False
            raise Interrupted

    def look(event, arguments):
        if event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wx":
            end(arguments[0])
        elif event == "os.rename":
            end(arguments[1])

    AUDITORS.append(look)
    save = modeling_utils.safe_save_file
    modeling_utils.safe_save_file = lambda weights, file, **others: (end(file), save(weights, file, **others))
    try:
        yield
    finally:
        modeling_utils.safe_save_file = save
        AUDITORS.remove(look)


AUDITORS = []
sys.addaudithook(lambda event, arguments: [look(event, arguments) for look in AUDITORS] and None)


FILES = ["config.json.unfinished", "generation_config.json", "model-00001", "model-00002", ".index", "modeling_nvib"]


@pytest.mark.parametrize("at", FILES)
def test_an_interrupted_save_is_no_mixture(at, tmp_path):
    """Whichever file of it is the last that is begun, over an older model's."""
    tiny_nvib(seed=1, alpha_threshold=0.1).save_pretrained(tmp_path, max_shard_size="60KB")
    model = tiny_nvib(seed=2, kappa=2)
    with interrupted(at), pytest.raises(Interrupted):
        model.save_pretrained(tmp_path, max_shard_size="60KB")
    with pytest.raises(OSError, match=r"has no config.json"):
        load(tmp_path)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.kappa == 2 and not list(tmp_path.glob("*.unfinished"))


def test_an_older_model_stays_until_the_next_is_saved(tmp_path):
    """What is refused before anything is written leaves the folder alone."""
    tiny_nvib(seed=1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "file").write_text("")
    tiny_nvib(seed=2).save_pretrained(tmp_path / "file")  # an error in the log, as of any model
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "file"} == before


# ------------------------------------------------------------------------------------------- classes of the user's own
@pytest.fixture
def own_module():
    """A module of the user's own, with subclasses of an encoder-decoder and of a classifier."""
    module = types.ModuleType("my_models")
    exec(OWN, vars(module))
    sys.modules["my_models"] = module
    yield module
    sys.modules.pop("my_models", None)


OWN = """
from transformers import BartForConditionalGeneration, BertForSequenceClassification

class My(BartForConditionalGeneration):
    def prepare_decoder_input_ids_from_labels(self, labels):
        return labels.clamp(min=3)

class MyClassifier(BertForSequenceClassification):
    pass
"""


def test_a_subclass_comes_back_as_it_was(own_module, tmp_path):
    stock = tiny_base("bart")
    base = own_module.My(stock.config)
    base.load_state_dict(stock.state_dict())
    model = wrap(base)
    assert model.config.base_architecture == "my_models:My"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.base) is own_module.My
    labels = torch.tensor([[4, 5, -100]])
    assert loaded.prepare_decoder_input_ids_from_labels(labels).tolist() == [[4, 5, 3]]
    del sys.modules["my_models"]
    with pytest.raises(ValueError, match=r"a class of 'my_models', which has not been imported\. Import"):
        load(tmp_path)
    assert type(load(tmp_path, base_architecture="BartForConditionalGeneration").base) is BartForConditionalGeneration


def test_a_classifier_s_subclass_comes_back_too(own_module, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = own_module.MyClassifier(BertConfig(vocab_size=50, **sizes))
    NvibForSequenceClassification.from_base_pretrained(base).save_pretrained(tmp_path)
    assert type(NvibForSequenceClassification.from_pretrained(tmp_path).base) is own_module.MyClassifier


def test_a_class_that_nobody_will_find_is_warned_of(tmp_path):
    class Local(BartForConditionalGeneration):
        pass

    model = wrap(Local(tiny_base("bart").config))
    with pytest.warns(UserWarning, match=r"Local is defined in a function.*Put it into a module"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Local.*has no model class of that name"):
        load(tmp_path)


def test_no_module_is_imported_for_a_file(tmp_path):
    wrap(tiny_base("bart")).save_pretrained(tmp_path)
    change(tmp_path, base_architecture="antigravity:Model")
    with pytest.raises(ValueError, match="has not been imported"):
        load(tmp_path)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["Foo", "pipeline", "BartConfig", "transformers.models.bart:Foo", "sys:path", ""])
@pytest.mark.parametrize("model_class", [NvibForConditionalGeneration, NvibForSequenceClassification])
def test_nonsense_is_refused_by_name(name, model_class):
    config = NvibConfig(base_config=tiny_base("bart").config, base_architecture=name)
    if model_class is NvibForSequenceClassification:
        config = NvibConfig(base_config=BertConfig(), base_architecture=name)
    with pytest.raises(ValueError, match=f"base_architecture is {name!r}.*has no model class of that name"):
        model_class(config)


def test_a_configuration_of_no_encoder_decoder_is_refused(tmp_path):
    wrap(tiny_base("bart")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_encoder_decoder is False"):
        load(tmp_path, is_encoder_decoder=False)
    change(tmp_path, is_encoder_decoder=False)
    with pytest.raises(ValueError, match=r"is_encoder_decoder is False.*NvibForSequenceClassification"):
        load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_are_found_by_their_names(family):
    base = tiny_base(family)
    name = architecture_name(type(base))
    assert ":" not in name and architecture_class(name) is type(base)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = tiny_nvib()
    model.config.lambda_gausian = 1.0
    with pytest.raises(TypeError, match="'lambda_gausian' is not a setting of NvibConfig"):
        model.save_pretrained(tmp_path / "misspelt")
    del model.config.lambda_gausian
    model.config.encoder_merge_share = {0: 0.5}
    with pytest.raises(ValueError, match=r"needs NVIB in the encoder.*attentions=\['cross', 'encoder'\]"):
        model.save_pretrained(tmp_path / "no encoder")
    assert not list(tmp_path.iterdir())
    model.config.encoder_merge_share = None
    model.save_pretrained(tmp_path)
    again = NvibForConditionalGeneration.from_pretrained(tmp_path, attentions=["cross"])  # a list, as when wrapping
    assert again.config.attentions == {"cross": "all"}
