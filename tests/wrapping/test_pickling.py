"""Models are pickled, copied and sent to other processes as any other model of Transformers is."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import BERT_LIKE, FAMILIES, tiny_base, tiny_inputs, tiny_labels
from tiny_text import tiny_collator, tiny_examples
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from nvib_hf import NvibForConditionalGeneration, NvibForSequenceClassification, NvibForTokenClassification

AT_WORK = {"tau_alpha": 1.0, "tau_sigma": 0.5}
# NVIB in self-attention, where its own classes are in use: plain and stacked.
INSIDE = {
    "everywhere": {"attentions": ["cross", "encoder", "decoder"]},
    "dropping": {"attentions": ["cross", "encoder"], "alpha_threshold": 0.1},
    "adding_up": {"attentions": ["cross", "encoder"], "accumulate_alpha": True},
}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CLASSIFIERS = {
    "bert": (NvibForSequenceClassification, lambda: BertForSequenceClassification(BertConfig(**BERT_LIKE))),
    "roberta": (NvibForSequenceClassification, lambda: RobertaForSequenceClassification(RobertaConfig(**BERT_LIKE))),
    "tokens": (NvibForTokenClassification, lambda: BertForTokenClassification(BertConfig(**BERT_LIKE))),
    "vit": (
        NvibForSequenceClassification,
        lambda: ViTForImageClassification(ViTConfig(**ENCODER, image_size=8, patch_size=4)),
    ),
}


def again(model) -> list:
    """What a model comes back as by each of the ways."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), copy.deepcopy(model)]


def assert_the_same_model(model, inputs):
    expected = model(**inputs)
    classes = [type(module) for module in model.modules()]  # BigBird takes other ones for short inputs
    for copied in again(model):
        assert [type(module) for module in copied.modules()] == classes
        assert copied is not model and copied.base is not model.base
        outputs = copied(**inputs)
        assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_architecture(family):
    base = tiny_base(family)
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), **AT_WORK)
    if family.startswith("wav2vec2"):  # PyTorch refuses weights that are computed, in the base too
        for either in (base, model):
            with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
                pickle.dumps(either)
        return
    assert_the_same_model(model, {**tiny_inputs(family), "labels": tiny_labels(family)})


@pytest.mark.parametrize("settings", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2", "whisper", "vit2gpt2"])
@torch.no_grad()
def test_nvib_in_self_attention(family, settings):
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family), **AT_WORK, **settings)
    assert_the_same_model(model, {**tiny_inputs(family), "labels": tiny_labels(family)})


@pytest.mark.parametrize("kind", CLASSIFIERS)
@torch.no_grad()
def test_classifiers(kind):
    wrapping, make = CLASSIFIERS[kind]
    model = wrapping.from_base_pretrained(make().eval(), **AT_WORK)
    ids = torch.randint(3, 99, (3, 7))
    inputs = {"pixel_values": torch.randn(3, 3, 8, 8)} if kind == "vit" else {"input_ids": ids}
    labels = torch.randint(0, 2, (3, 7)) if kind == "tokens" else torch.tensor([0, 1, 1])
    assert_the_same_model(model, {**inputs, "labels": labels})


READ = """
import sys
import torch

model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
print(type(model).__name__)
"""


def in_a_fresh_process(script: str, *arguments) -> str:
    package = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, cwd=package, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@torch.no_grad()
def test_a_fresh_process_finds_the_classes(tmp_path):
    """One that has not wrapped anything."""
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("t5"), **AT_WORK, **INSIDE["dropping"])
    inputs = {**tiny_inputs("t5"), "labels": tiny_labels("t5")}
    torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    assert in_a_fresh_process(READ, tmp_path / "model.pt") == "NvibForConditionalGeneration"


def test_workers_that_are_spawned():
    """As on macOS and Windows: what collates a batch, and the model in it, is pickled for them."""
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"))
    collator, examples = tiny_collator(model), tiny_examples(4)
    assert isinstance(collator, DataCollatorForSeq2Seq) and collator.model is model
    loader = DataLoader(
        examples, batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn", timeout=300
    )
    for batch, start in zip(loader, (0, 2), strict=True):
        expected = collator(examples[start : start + 2])
        assert batch.keys() == expected.keys() and "decoder_input_ids" in batch
        for name, value in expected.items():
            assert torch.equal(batch[name], value)


FROM_ITS_OWN_CODE = """
import pickle
import sys
from transformers import AutoModelForSeq2SeqLM

model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
again = pickle.loads(pickle.dumps(model))
assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
assert "nvib_hf" not in sys.modules
print("the same classes")
"""


def test_a_model_that_was_loaded_with_its_own_code(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), **INSIDE["everywhere"])
    model.save_pretrained(tmp_path / "model")
    assert in_a_fresh_process(FROM_ITS_OWN_CODE, tmp_path / "model") == "the same classes"
