"""Where nothing is to be predicted the loss is 0 and moves nothing, in every model, and no callback stumbles."""

import math

import pytest
import torch
from tiny_training import tiny_model, trainer_of
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, Trainer

from nvib_hf import (
    CollapseCallback,
    ConstraintCallback,
    NvibForSequenceClassification,
    NvibForTokenClassification,
    NvibTrainer,
)

IDS = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
NONE = torch.full((2, 3), -100)


def gradients(model) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("count", [None, 0, 7, torch.tensor(0), torch.tensor(7)])
def test_a_batch_without_targets_costs_nothing(family, count):
    model = tiny_model(family, alpha_threshold=0.1, lambda_vectors=1.0).train()
    output = model(input_ids=IDS, labels=NONE, num_items_in_batch=count)
    output.loss.backward()
    assert output.loss.item() == output.cross_entropy.item() == 0
    assert gradients(model) and all(gradient.eq(0).all() for gradient in gradients(model))


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_a_step_that_counts_none_stays_finite(count):
    """Even where the count is wrong: the labels have targets, and count as one."""
    model = tiny_model().train()
    labels = torch.tensor([[5, 6, 1], [8, -100, -100]])
    model(input_ids=IDS, labels=labels, num_items_in_batch=count).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model))


@pytest.mark.parametrize("count", [-1, torch.tensor(-3), math.nan])
def test_a_negative_count_is_refused(count):
    with pytest.raises(ValueError, match=f"num_items_in_batch must be the number of target tokens .* got .*{count}"):
        tiny_model().train()(input_ids=IDS, labels=IDS, num_items_in_batch=count)


@pytest.mark.parametrize("model_class", [NvibForSequenceClassification, NvibForTokenClassification])
def test_classifiers(model_class):
    """The base's own loss, a mean over no label, is not a number."""
    heads = {
        NvibForSequenceClassification: BertForSequenceClassification,
        NvibForTokenClassification: BertForTokenClassification,
    }
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = heads[model_class](BertConfig(vocab_size=50, num_labels=3, hidden_dropout_prob=0.0, **sizes)).eval()
    labels = NONE[:, 0] if model_class is NvibForSequenceClassification else torch.full((2, 4), -100)
    assert base(input_ids=IDS, labels=labels).loss.isnan()
    model = model_class.from_base_pretrained(base, lambda_gaussian=0.1, lambda_dirichlet=0.1).train()
    output = model(input_ids=IDS, labels=labels)
    output.loss.backward()
    assert output.loss.item() == output.cross_entropy.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients(model))
    labels.flatten()[0] = 1  # and one label more is what the base makes of it
    output = model.eval()(input_ids=IDS, labels=labels)
    logits, right = output.logits.reshape(-1, output.logits.shape[-1]), labels.flatten()
    assert output.cross_entropy.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, right).item())
    assert output.loss > output.cross_entropy


def without_targets(batch: dict) -> dict:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
def test_a_training_survives_steps_without_targets(trainer_class, tmp_path):
    """The weights stay, the callbacks wait, and an evaluation has no loss to report."""
    model = tiny_model(alpha_threshold=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    callbacks = [ConstraintCallback(1.0, interval=1, held_out_interval=1), CollapseCallback(interval=1)]
    trainer = trainer_of(trainer_class, model, tmp_path, max_steps=3, callbacks=callbacks, weight_decay=0.0)
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: without_targets(collate(examples))
    trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    constraint = next(x for x in trainer.callback_handler.callbacks if isinstance(x, ConstraintCallback))
    assert constraint.average_cross_entropy is None and not constraint.started
    if trainer_class is NvibTrainer:
        assert "eval_loss" not in trainer.evaluate()
    trainer.data_collator = collate
    assert trainer.evaluate()["eval_loss"] > 1
