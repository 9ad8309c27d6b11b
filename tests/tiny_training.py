"""Tiny models under the Trainers of Transformers, with and without the logs of NVIB."""

from __future__ import annotations

import pytest
from tiny_models import tiny_base
from tiny_text import tiny_collator, tiny_examples, tiny_tokenizer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from nvib_hf import NvibForConditionalGeneration, NvibTrainer, NvibTrainerMixin


class PlainNvibTrainer(NvibTrainerMixin, Trainer):
    """The mixin before another Trainer."""


# What PEFT and torch.compile do with deprecated functions of their own.
WITH_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WITH_COMPILE = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

TRAINERS = [Trainer, Seq2SeqTrainer, NvibTrainer, PlainNvibTrainer]


def tiny_model(family="bart", seed=0, dropout=0.0, **settings) -> NvibForConditionalGeneration:
    """With a weight on every term of the loss; ``settings`` are those of ``NvibConfig``."""
    names = {"bart": ["dropout"], "t5": ["dropout_rate"]}[family]
    base = tiny_base(family, seed=seed, **dict.fromkeys(names, dropout))
    settings = {"lambda_gaussian": 0.2, "lambda_dirichlet": 0.3, "delta": 0.25, **settings}
    return NvibForConditionalGeneration.from_base_pretrained(base, **settings)


def trainer_of(trainer_class, model, folder, examples=8, callbacks=(), **arguments) -> Trainer:
    """Logs every step of a constant learning rate, and has 5 examples of its own for evaluation."""
    arguments_class = Seq2SeqTrainingArguments if issubclass(trainer_class, Seq2SeqTrainer) else TrainingArguments
    defaults = {
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
    }
    return trainer_class(
        model=model,
        args=arguments_class(str(folder), **{**defaults, **arguments}),
        data_collator=tiny_collator(model),
        train_dataset=tiny_examples(examples),
        eval_dataset=tiny_examples(5, seed=1),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )
