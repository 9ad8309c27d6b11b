"""The Trainer of the examples and experiments."""

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Seq2SeqTrainingArguments,
)

from nvib_hf import NvibTrainer


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples,
    quiet: bool = False,
    trainer: dict | None = None,
    **arguments,
) -> NvibTrainer:
    """A Trainer that saves and reports nothing by itself; of models with NVIB and of plain ones.

    Args:
        examples: with ``input_ids`` and ``labels``.
        quiet: print nothing.
        trainer: further arguments of the Trainer.
        arguments: further ones of ``Seq2SeqTrainingArguments``, or other values of those below.
    """
    defaults = {
        "per_device_train_batch_size": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": quiet,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    made = NvibTrainer(
        model,
        Seq2SeqTrainingArguments(**{**defaults, **arguments}),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        **(trainer or {}),
    )
    if quiet:
        made.remove_callback(PrinterCallback)
    return made
