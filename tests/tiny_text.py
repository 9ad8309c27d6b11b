"""A tokenizer for the vocabulary of the tiny models, examples of unequal lengths to train them on, and a judge."""

from __future__ import annotations

import torch
from tiny_models import EOS, PAD, START, VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SPECIAL = {PAD: "<pad>", EOS: "</s>", START: "<s>"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w3`` ... ``w98``; any other word is ``w3``."""
    vocabulary = {SPECIAL.get(token, f"w{token}"): token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        bos_token=SPECIAL[START],
        unk_token="w3",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_examples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Examples whose sources have 2 to 9 tokens and targets 1 to 12, each its own number."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return [*torch.randint(START + 1, VOCAB_SIZE, (length - 1,), generator=generator).tolist(), EOS]

    return [{"input_ids": tokens(2, 9), "labels": tokens(1, 12)} for _ in range(count)]


def tiny_collator(model=None) -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)


def tiny_language_model() -> GPT2LMHeadModel:
    """A causal language model that finds some texts likelier than others, in ``train()``."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5)
    return GPT2LMHeadModel(config).train()
