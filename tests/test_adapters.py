"""PEFT from a fresh wrap to a served adapter: saved, checkpointed, resumed and loaded, never over the bare base."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import add_adapter_or_skip
from tiny_text import tiny_collator, tiny_examples
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from nvib_hf import NvibForConditionalGeneration, NvibTrainer

peft = pytest.importorskip("peft")
# PEFT asks transformers for a name that is to go: nothing of this package's.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TASKS = ["SEQ_2_SEQ_LM", None]


@pytest.fixture(autouse=True)
def plain(tmp_path, monkeypatch):
    """The plain model in the folder ``plain``, beside which everything happens."""
    monkeypatch.chdir(tmp_path)
    tiny_base("bart").save_pretrained("plain")


def wrap():
    return NvibForConditionalGeneration.from_base_pretrained(
        "plain", tau_alpha=1.0, tau_sigma=0.3, lambda_gaussian=0.1, lambda_dirichlet=0.1
    )


def adapt(model, task):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], modules_to_save=["nvib"])
    config.task_type = task
    return peft.get_peft_model(model, config)


def auto(task):
    """What loads an adapter and the model it names. Without a task PEFT imports the class, if that is allowed."""
    if task is not None:
        return peft.AutoPeftModelForSeq2SeqLM.from_pretrained
    return lambda folder: peft.AutoPeftModel.from_pretrained(folder, import_allowlist=["nvib_hf"])


def base_of(folder):
    """What the adapter in a folder says it belongs to."""
    return json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"]


def evaluated(model):
    with torch.no_grad():
        return model.eval()(**tiny_inputs("bart"), labels=tiny_labels("bart"))


def assert_same(model, expected):
    outputs = evaluated(model)
    for name in ("logits", "loss", "kl_gaussian", "kl_dirichlet"):
        assert torch.equal(outputs[name], expected[name]), name


def train(model, steps, trainer=NvibTrainer, resume=None):
    arguments = Seq2SeqTrainingArguments(
        "out",
        max_steps=steps,
        save_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        data_seed=1,
    )
    run = trainer(model=model, args=arguments, train_dataset=tiny_examples(32), data_collator=tiny_collator())
    run.train(resume_from_checkpoint=resume)
    return run


@pytest.mark.parametrize("trainer", [NvibTrainer, Seq2SeqTrainer])
@pytest.mark.parametrize("task", TASKS)
def test_the_flow_of_the_readme(task, trainer):
    model = wrap()
    model.save_pretrained("my-nvib")
    adapter = adapt(model, task)
    start = evaluated(adapter).logits
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never been saved")
        train(adapter, 2, trainer)
    expected = evaluated(adapter)
    assert (expected.logits - start).abs().max() > 0.1
    adapter.save_pretrained("adapter")
    for folder in ("adapter", "out/checkpoint-2"):
        assert base_of(folder) == "my-nvib"
        loaded = auto(task)(folder)
        assert type(loaded.get_base_model()) is NvibForConditionalGeneration
        assert_same(loaded, expected)
        saved = NvibForConditionalGeneration.from_pretrained("my-nvib")
        assert_same(peft.PeftModel.from_pretrained(saved, folder), expected)


@pytest.mark.parametrize("task", TASKS)
def test_a_fresh_wrap_loses_nothing(task):
    """It trains, checkpoints and saves; the adapter fits the wrap made again, and names nothing else for its base."""
    adapter = adapt(wrap(), task)
    with pytest.warns(UserWarning, match="never been saved"):
        train(adapter, 2)
    expected = evaluated(adapter)
    adapter.save_pretrained("adapter")
    for folder in ("adapter", "out/checkpoint-2"):
        assert base_of(folder) is None
        assert_same(peft.PeftModel.from_pretrained(wrap(), folder), expected)
        with pytest.raises(OSError if task else ValueError) as refused:
            auto(task)(folder)
        assert task or "There is no name to load" in str(refused.value)


@pytest.mark.parametrize("task", TASKS)
def test_resumed_is_trained_through(task):
    def start():
        torch.manual_seed(0)
        return adapt(wrap(), task)

    whole, half = start(), start()
    with pytest.warns(UserWarning, match="never been saved"):
        train(whole, 4)
        train(half, 4, resume="out/checkpoint-2")
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    for name, value in half.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_larger_vocabulary_is_saved_with_the_adapter():
    model = wrap()
    model.save_pretrained("my-nvib")
    model.resize_token_embeddings(103)
    adapter = adapt(model, TASKS[0])
    with pytest.warns(UserWarning, match="resized during finetuning"):
        adapter.save_pretrained("adapter")
    again = NvibForConditionalGeneration.from_pretrained("my-nvib")
    again.resize_token_embeddings(103)
    assert_same(peft.PeftModel.from_pretrained(again, "adapter"), evaluated(adapter))


def test_name_is_where_the_model_itself_was_saved():
    model = wrap()
    assert model.name_or_path == model.config.name_or_path == ""
    model.save_pretrained("first")
    model.save_pretrained("second")
    assert model.name_or_path == "second"
    assert AutoModelForSeq2SeqLM.from_pretrained("second").name_or_path == "second"


def test_name_is_not_where_an_adapter_alone_was_saved():
    model = wrap()
    model.save_pretrained("my-nvib")
    add_adapter_or_skip(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained("adapter")
    assert model.name_or_path == "my-nvib"
    assert base_of("adapter") == "my-nvib"
