"""What a model writes of texts that it read, and how far that is from them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .text_batches import (
    MAX_LENGTH,
    check_texts,
    encoder_inputs,
    evaluating,
    generate_texts,
    length_batches,
    token_lengths,
)
from .text_metrics import sacrebleu, word_edits


def reconstruct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
    **generate_kwargs,
) -> list[str]:
    """What the model writes of each text, in the given order: greedily, in evaluation mode.

    Compare with :func:`as_read` of the texts. Any encoder-decoder with ``generate()`` will do.

    Args:
        max_length: tokens, of what is read and of what is written.
        generate_kwargs: further arguments of ``generate()``, for instance ``num_beams``.
    """
    texts = check_texts(texts)
    written = [""] * len(texts)
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size):
            inputs = encoder_inputs(model, tokenizer, [texts[i] for i in batch], max_length)
            for i, text in zip(
                batch, generate_texts(model, tokenizer, max_length, **inputs, **generate_kwargs), strict=True
            ):
                written[i] = text
    return written


def reconstruction_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``exact_match`` (share, 0 to 1), ``bleu`` (of the corpus, 0 to 100) and ``token_error``.

    ``token_error``: words inserted, deleted and replaced, by words of the references.

    Raises:
        ValueError: another number of predictions than of references.
        ImportError: without sacrebleu.
    """
    predictions, references = check_texts(predictions, "predictions"), check_texts(references, "references")
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions, but {len(references)} references. Pass one each.")
    pairs = list(zip(predictions, references, strict=True))
    return {
        "exact_match": sum(a == b for a, b in pairs) / len(pairs),
        "bleu": sacrebleu().corpus_bleu(predictions, [references]).score,
        "token_error": sum(word_edits(a, b) for a, b in pairs) / max(sum(len(b.split()) for b in references), 1),
    }
