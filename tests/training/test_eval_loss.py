"""What an evaluation's loss is, whatever the multipliers of training: and what a search over settings minimises."""

import pytest
import torch
from tiny_text import tiny_collator, tiny_examples
from tiny_training import tiny_model, trainer_of
from transformers import BertConfig, BertForSequenceClassification, Trainer

from nvib_hf import ConstraintCallback, KLAnnealingCallback, NvibForSequenceClassification, NvibTrainer


def set_multipliers(model, value: float) -> None:
    with torch.no_grad():
        model.kl_beta.fill_(value)


@pytest.mark.parametrize("trainer_class", [Trainer, NvibTrainer])
def test_is_the_same_for_all_multipliers(trainer_class, tmp_path):
    """Cross-entropy and terms by their weights; in training the multipliers count."""
    model = tiny_model(tau_sigma=0.5, tau_alpha=1.0, alpha_threshold=0.1, lambda_vectors=2.0)
    trainer = trainer_of(trainer_class, model, tmp_path, per_device_eval_batch_size=5)
    inputs = tiny_collator()(tiny_examples(5, seed=1))
    losses, training = [], []
    for value in (0.03, 1.0, 30.0):
        set_multipliers(model, value)
        losses.append(trainer.evaluate()["eval_loss"])
        assert model.kl_beta.tolist() == pytest.approx([value] * 3)  # as they were
        generator = torch.Generator().manual_seed(0)
        training.append(model.train()(**inputs, generator=generator).loss.item())
    assert losses[0] == losses[1] == losses[2] and training[0] < training[1] < training[2]
    with torch.no_grad():
        output = model.eval()(**inputs)
    tokens = (inputs["labels"] != -100).sum(-1)
    terms = 0.2 * output.kl_gaussian + 0.3 * output.kl_dirichlet + 2.0 * output.latents.relaxed_prop_vectors
    expected = output.cross_entropy + (tokens * terms).sum() / tokens.sum()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_of_a_classifier():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))
    model = NvibForSequenceClassification.from_base_pretrained(base, lambda_gaussian=0.1, tau_sigma=0.5).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 1]]), "labels": torch.tensor([0, 2])}
    set_multipliers(model, 30.0)
    output = model(**inputs)
    assert output.loss.item() == pytest.approx((output.cross_entropy + 0.1 * output.kl_gaussian.mean()).item())


@pytest.mark.parametrize(
    "callback", [lambda: KLAnnealingCallback(warmup_ratio=1.0), lambda: ConstraintCallback(1e3, rate=0.5, interval=1)]
)
def test_does_not_rise_with_the_weights_of_a_training(callback, tmp_path):
    """Of weights that stand still while the multipliers rise: so the best checkpoint is none for its multipliers."""
    model = tiny_model(tau_sigma=0.5, tau_alpha=1.0)
    arguments = {"max_steps": 6, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(NvibTrainer, model, tmp_path, callbacks=[callback()], **arguments)
    trainer.train()
    losses = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert model.kl_beta[0] > 0.5


# ------------------------------------------------------------------------------------------------------ searches
def search(trainer, **arguments):
    pytest.importorskip("optuna")
    return trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=1,
        backend="optuna",
        **arguments,
    )


@pytest.fixture
def trainer(tmp_path):
    trainer = trainer_of(NvibTrainer, tiny_model(), tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.model_init = lambda trial: tiny_model()
    return trainer


def test_a_search_minimises_the_loss(trainer):
    """Not the sum of cross-entropy, KLs and numbers of vectors, that Transformers makes of what is logged."""
    evaluated = []
    trainer.callback_handler.callbacks[0].on_evaluate = lambda *args, metrics, **kwargs: evaluated.append(metrics)
    best = search(trainer)
    assert best.objective == evaluated[-1]["eval_loss"]
    assert sum(value for name, value in evaluated[-1].items() if "vectors" in name) > 5


def test_a_search_takes_what_compute_metrics_returns(trainer):
    trainer.compute_metrics = lambda prediction: {"bleu": 7.0, "chrf": 3.0}
    assert search(trainer, direction="maximize").objective == 10.0
    assert search(trainer, compute_objective=lambda metrics: metrics["eval_bleu"]).objective == 7.0
