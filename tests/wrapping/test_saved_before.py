"""Models saved by the code as it was before the package had sub-packages: they load and compute what they did then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_base
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from nvib_hf import NvibConfig, NvibForConditionalGeneration, NvibForSequenceClassification
from nvib_hf.layers.nvib import NvibLayer

SAVED = Path(__file__).parents[1] / "saved"
CLASSES = {
    "bart_threshold": (NvibForConditionalGeneration, AutoModelForSeq2SeqLM),
    "t5_every_attention": (NvibForConditionalGeneration, AutoModelForSeq2SeqLM),
    "bert_classifier": (NvibForSequenceClassification, AutoModelForSequenceClassification),
}
INPUTS = ("input_ids", "attention_mask")


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, atol=5e-6, rtol=5e-6)  # processors round in ways of their own


@pytest.mark.parametrize("again", [False, True], ids=["as it was", "saved again"])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_a_saved_model_computes_what_it_did(name, again, tmp_path):
    own_class, auto_class = CLASSES[name]
    expected = load_file(SAVED / name / "expected.safetensors")
    model, loading = own_class.from_pretrained(SAVED / name, output_loading_info=True)
    assert not any(loading.values()), loading
    if again:
        model.save_pretrained(tmp_path)
        model = auto_class.from_pretrained(tmp_path)
        assert type(model) is own_class
    inputs = {key: expected.pop(key) for key in INPUTS}
    output = model.eval()(**inputs, labels=expected.pop("labels"))
    for key in ("logits", "loss", "kl_gaussian", "kl_dirichlet"):
        same(output[key], expected.pop(key))
    if own_class is NvibForConditionalGeneration:
        same(model.encode(**inputs).log_pi.exp(), expected.pop("pi"))
        generated = model.generate(**inputs, num_beams=2, max_new_tokens=6)
        assert torch.equal(generated, expected.pop("generated"))
    assert not expected


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_folder_loads_by_an_auto_class(name):
    own_class, auto_class = CLASSES[name]
    assert type(auto_class.from_pretrained(SAVED / name)) is own_class


def test_what_the_saved_models_have_is_at_work():
    """Otherwise the tests above would show little."""
    bart = load_file(SAVED / "bart_threshold" / "expected.safetensors")
    weights = bart["pi"][:, 1:][bart["attention_mask"].bool()]  # the threshold drops some, and no vector has it all
    assert (weights == 0).any() and (weights > 0).any() and (weights < 0.6).all()
    t5 = NvibForConditionalGeneration.from_pretrained(SAVED / "t5_every_attention")
    assert {name.partition(".")[0] for name in t5.nvib_layers()} == {"cross", "encoder", "decoder"}
    bert = NvibForSequenceClassification.from_pretrained(SAVED / "bert_classifier")
    assert bert.config.accumulate_alpha and len(bert.nvib_layers()) == 2


def test_what_had_another_name_is_read_and_saved_by_its_new_one(tmp_path):
    weights = load_file(SAVED / "bart_threshold" / "model.safetensors")
    weights["nvib.threshold_share"] = torch.tensor(0.25)
    config = NvibConfig.from_dict(
        json.loads((SAVED / "bart_threshold" / "config.json").read_text()) | {"threshold_share": 0.5}
    )
    assert config.dropping_share == 0.5 and "threshold_share" not in config.to_dict()
    model = NvibForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights)
    assert model.nvib.dropping_share == 0.25 and weights["nvib.threshold_share"] == 0.25
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["nvib.dropping_share"] == 0.25 and "nvib.threshold_share" not in saved
    assert NvibForConditionalGeneration.from_pretrained(tmp_path).nvib.dropping_share == 0.25
    state = model.state_dict()
    del state["nvib.dropping_share"]
    model.load_state_dict(state | {"nvib.threshold_share": torch.tensor(0.125)})
    assert model.nvib.dropping_share == 0.125


def test_an_old_name_is_no_longer_an_argument():
    with pytest.raises(TypeError, match="'threshold_share' is now called 'dropping_share'"):
        NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), threshold_share=0.5)
    with pytest.raises(TypeError, match="dropping_share is given twice, also by its old name 'threshold_share'"):
        NvibConfig(threshold_share=0.7, dropping_share=0.3)
    with pytest.raises(TypeError, match="threshold_share"):
        NvibLayer(4, 4, threshold_share=0.5)
