"""Models saved by the code as it was before the package had sub-packages: they load and compute what they did then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from nvib_hf import NvibForConditionalGeneration, NvibForSequenceClassification

SAVED = Path(__file__).parents[1] / "saved"
CLASSES = {
    "bart_threshold": (NvibForConditionalGeneration, AutoModelForSeq2SeqLM),
    "t5_every_attention": (NvibForConditionalGeneration, AutoModelForSeq2SeqLM),
    "bert_classifier": (NvibForSequenceClassification, AutoModelForSequenceClassification),
}
INPUTS = ("input_ids", "attention_mask")


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, atol=1e-6, rtol=1e-6)


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
