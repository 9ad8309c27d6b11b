"""Perplexity of real texts under a small language model that has read nothing but samples."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nvib_hf.evaluation.samples import fluency

IGNORED = -100  # a label that counts for nothing


def reverse_perplexity(
    samples: Sequence[str],
    real_texts: Sequence[str],
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps: int = 150,
    batch_size: int = 32,
    max_length: int = 128,
) -> float:
    """Perplexity of real texts under a small language model (GPT-2, 2 layers of width 64) trained on the samples.

    It is high if the samples are no language, and also if they are all alike. It depends on the number of samples, on
    ``steps`` and on the tokenizer: compare values of the same, for instance with that of as many real texts.

    Args:
        tokenizer: of the small model; by default a byte-level BPE learnt from ``real_texts``.
        steps: of training with batches of ``batch_size`` samples.
    """
    tokenizer = tokenizer or byte_level_bpe(real_texts)
    end = tokenizer.eos_token_id
    tokens = tokenizer(list(samples), add_special_tokens=False, truncation=True, max_length=max_length - 2).input_ids
    rows = [torch.tensor([end, *ids, end]) for ids in tokens]
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=max_length,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language_model = GPT2LMHeadModel(config).train()
        optimizer = torch.optim.AdamW(language_model.parameters(), lr=2e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            some = [rows[i] for i in torch.randint(len(rows), (batch_size,)).tolist()]
            labels = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=IGNORED)  # (B, N)
            mask = (labels != IGNORED).long()
            loss = language_model(input_ids=labels.clamp(min=0), attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(language_model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return fluency(language_model, tokenizer, real_texts, max_length=max_length - 1)


def byte_level_bpe(texts: Sequence[str], vocab_size: int = 1024) -> PreTrainedTokenizerBase:
    """A tokenizer that any text passes through, with one special token, ``</s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
