"""What the Trainers of this package take beside encoder-decoders of texts: encoders alone, and columns of the base."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny_models import BERT_LIKE, tiny_base
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from nvib_hf import (
    CollapseCallback,
    ConstraintCallback,
    NvibForConditionalGeneration,
    NvibForSequenceClassification,
    NvibTrainer,
    ThresholdCallback,
)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_encoder_alone_under_the_same_trainer(steps, tmp_path):
    """As under ``Trainer``: it has no latents to log."""
    base = BertForSequenceClassification(BertConfig(**BERT_LIKE, num_labels=3))
    data = [{"input_ids": [5, 6, 7, 2], "label": i % 3} for i in range(8)]
    losses = []
    for trainer_class in (Trainer, NvibTrainer):
        arguments = Seq2SeqTrainingArguments if trainer_class is NvibTrainer else TrainingArguments
        model = NvibForSequenceClassification.from_base_pretrained(copy.deepcopy(base), lambda_gaussian=0.1)
        settings = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = arguments(
            str(tmp_path),
            **settings,
            save_strategy="no",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=steps,
        )
        torch.manual_seed(0)
        trainer = trainer_class(
            model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=default_data_collator
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1]) and len(losses[0]) == 4


@pytest.mark.parametrize("callback", [ConstraintCallback, ThresholdCallback, CollapseCallback])
def test_callbacks_of_latents_refuse_an_encoder_alone(callback, tmp_path):
    base = BertForSequenceClassification(BertConfig(**BERT_LIKE))
    model = NvibForSequenceClassification.from_base_pretrained(base)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    data = [{"input_ids": [5, 6, 7, 2], "label": 1}]
    with pytest.raises(ValueError, match=f"{callback.__name__} is for encoder-decoders.*KLAnnealingCallback steers"):
        Trainer(model=model, args=args, train_dataset=data, callbacks=[callback()]).train()


def test_columns_that_the_base_takes_are_kept(tmp_path):
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("led"))
    args = Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    columns = ("input_ids", "global_attention_mask", "labels", "a_text_of_nobody")
    data = Dataset.from_dict({name: [[1]] for name in columns})
    kept = NvibTrainer(model=model, args=args, train_dataset=data)._remove_unused_columns(data, "training")
    assert sorted(kept.column_names) == ["global_attention_mask", "input_ids", "labels"]
