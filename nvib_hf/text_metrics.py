"""Measures of texts, whoever wrote them: how far apart, how fluent, how varied, how new."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from .loss import IGNORED
from .text_batches import check_texts, evaluating, length_batches


def sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError(
            "BLEU needs the package sacrebleu, which is not installed. Install it with "
            "`pip install 'nvib-hf[evaluation]'` or `pip install sacrebleu`."
        ) from error
    return sacrebleu


def word_edits(first: str, second: str) -> int:
    """Levenshtein's distance in words: the fewest that are inserted, deleted or replaced."""
    a, b = first.split(), second.split()
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


# ------------------------------------------------------------------------------------------- language models
def fluency(
    language_model: PreTrainedModel,
    lm_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int = 256,
) -> float:
    """Perplexity of texts under a causal language model: ``exp`` of the mean nats per token of all texts.

    Each text starts with the language model's token for a beginning (its end-of-text token if it has none), so that
    its first token counts; with neither it does not. Texts without tokens are passed over.

    Returns:
        ``nan`` if no text has a token that counts.
    """
    start = lm_tokenizer.bos_token_id if lm_tokenizer.bos_token_id is not None else lm_tokenizer.eos_token_id
    tokens = lm_tokenizer(check_texts(texts), add_special_tokens=False, truncation=True, max_length=max_length)
    rows = [ids if start is None else [start, *ids] for ids in tokens.input_ids]
    rows = [torch.tensor(ids) for ids in rows if len(ids) > 1]
    if not rows:
        return math.nan
    nll = count = 0.0
    with evaluating(language_model):
        for batch in length_batches([len(ids) for ids in rows], batch_size):
            logits, targets = _next_token_logits(language_model, [rows[i] for i in batch])
            nll += F.cross_entropy(logits.double(), targets, reduction="sum").item()
            count += (targets != IGNORED).sum().item()
    return math.exp(nll / count)


def _next_token_logits(language_model: PreTrainedModel, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits ``(N, V)`` and targets ``(N,)`` of rows of token ids, padded on the right, where nothing sees it."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(language_model.device)
    mask = ids != IGNORED
    logits = language_model(input_ids=ids.clamp(min=0), attention_mask=mask.long()).logits
    return logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


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

    High if the samples are no language, and also if they are all alike. It depends on the number of samples, on
    ``steps`` and on the tokenizer: compare values of the same, for instance with that of as many real texts.

    Args:
        tokenizer: of the small model; by default a byte-level BPE learnt from ``real_texts``.
        steps: of training with batches of ``batch_size`` samples.
    """
    samples, real_texts = check_texts(samples, "samples"), check_texts(real_texts, "real_texts")
    tokenizer = tokenizer or byte_level_bpe(real_texts)
    end = tokenizer.eos_token_id
    rows = [
        torch.tensor([end, *ids, end])
        for ids in tokenizer(samples, add_special_tokens=False, truncation=True, max_length=max_length - 2).input_ids
    ]
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
            batch = torch.randint(len(rows), (batch_size,)).tolist()
            logits, targets = _next_token_logits(language_model, [rows[i] for i in batch])
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(language_model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return fluency(language_model, tokenizer, real_texts, max_length=max_length - 1)


def byte_level_bpe(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerBase:
    """A tokenizer that any text passes through, with one special token, ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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


# -------------------------------------------------------------------------------------------- variety, novelty
def self_bleu(texts: Sequence[str], *, num_texts: int = 100, seed: int = 0) -> float:
    """Mean BLEU (0 to 100) of each text against all others: high where they are alike.

    Args:
        num_texts: how many are compared, drawn at random; the value grows with their number.

    Source: Zhu et al. (SIGIR 2018).
    """
    texts = check_texts(texts)
    if len(texts) < 2:
        raise ValueError("texts must be at least two: each is compared with the others.")
    chosen = random.Random(seed).sample(texts, min(num_texts, len(texts)))
    sentence_bleu = sacrebleu().sentence_bleu
    scores = [sentence_bleu(text, chosen[:i] + chosen[i + 1 :]).score for i, text in enumerate(chosen)]
    return sum(scores) / len(scores)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different word n-grams by all word n-grams of the texts, 0 to 1; 0 if none is long enough."""
    words = [text.split() for text in check_texts(texts)]
    ngrams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def copied(texts: Sequence[str], training_texts: Sequence[str]) -> float:
    """Share of the texts that are one of the training texts word for word, 0 to 1."""
    known = {" ".join(text.split()) for text in training_texts}
    texts = check_texts(texts)
    return sum(" ".join(text.split()) in known for text in texts) / len(texts)
