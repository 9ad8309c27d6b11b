"""Measures of any texts: how different, fluent, varied and new they are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..layers.cross_entropy import IGNORED
from .texts import (
    MAX_LENGTH,
    check_texts,
    encode_texts,
    encoder_inputs,
    evaluating,
    generate_texts,
    length_batches,
    sacrebleu,
    token_lengths,
    word_edits,
)


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

    Each text starts with the language model's beginning token, or its end-of-text token if it has none, so that the
    text's first token counts. With neither it does not count. Texts without tokens are skipped.

    Returns:
        ``nan`` if no text has a token that counts.
    """
    start = lm_tokenizer.bos_token_id if lm_tokenizer.bos_token_id is not None else lm_tokenizer.eos_token_id
    tokens = lm_tokenizer(check_texts(texts), add_special_tokens=False, truncation=True, max_length=max_length)
    started = [ids if start is None else [start, *ids] for ids in tokens.input_ids]
    rows = [torch.tensor(ids) for ids in started if len(ids) > 1]
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
    """Logits ``(N, V)`` and targets ``(N,)`` of lists of token ids, padded on the right, where no token sees it."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(language_model.device)
    mask = ids != IGNORED
    logits = language_model(input_ids=ids.clamp(min=0), attention_mask=mask.long()).logits
    return logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


# -------------------------------------------------------------------------------------------- variety, novelty
def self_bleu(texts: Sequence[str], *, num_texts: int = 100, seed: int = 0) -> float:
    """Mean BLEU (0 to 100) of each text against all others. It is high if they are alike.

    Args:
        num_texts: how many texts are compared, drawn at random. The value grows with their number.

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
    """Distinct word n-grams, divided by all word n-grams of the texts, 0 to 1; 0 if no text is long enough."""
    words = [text.split() for text in check_texts(texts)]
    ngrams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def copied(texts: Sequence[str], training_texts: Sequence[str]) -> float:
    """Share of the texts that equal a training text word for word, 0 to 1."""
    known = {" ".join(text.split()) for text in training_texts}
    texts = check_texts(texts)
    return sum(" ".join(text.split()) in known for text in texts) / len(texts)


# Ways to decode a latent, with generate()'s arguments. Compare several: texts can be fluent because all are alike.
DECODINGS: dict[str, dict] = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "nucleus": {"do_sample": True, "top_p": 0.9, "top_k": 0},
}


# ----------------------------------------------------------------------------------------------- making them
def latent_lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
) -> list[int]:
    """For each text in order, how many latent vectors the decoder sees, including the prior's component."""
    texts = check_texts(texts)
    lengths = [0] * len(texts)
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size):
            latents = encode_texts(model, tokenizer, [texts[i] for i in batch], max_length=max_length)
            for i, length in zip(batch, (latents.log_pi > -math.inf).sum(-1).tolist(), strict=True):
                lengths[i] = length
    return lengths


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    lengths: Sequence[int] | None,
    seed: int = 0,
    *,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
    **generate_kwargs,
) -> list[str]:
    """Texts decoded from draws of the prior.

    Args:
        lengths: numbers of latent vectors. Each sample takes one of them at random. Pass those of real texts
            (:func:`latent_lengths`), or simply their lengths in tokens. ``None`` lets a learned prior draw them.
        seed: for the lengths, the latents and the draws of ``generate()``. The global random state does not change.
        generate_kwargs: further arguments of ``generate()``, for instance one of ``DECODINGS``; by default greedy.
    """
    if lengths is not None and not len(lengths):
        raise ValueError("lengths is empty. Pass at least one number of latent vectors.")
    counts = None if lengths is None else random.Random(seed).choices(list(lengths), k=num_samples)
    generator = torch.Generator(model.device).manual_seed(seed)
    texts: list[str] = []
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for i in range(0, num_samples, batch_size):
            some = None if counts is None else counts[i : i + batch_size]
            latents = model.sample_latents(min(batch_size, num_samples - i), some, generator=generator)
            texts += generate_texts(model, tokenizer, max_length, encoder_outputs=latents, **generate_kwargs)
    return texts


def interpolations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    steps: int = 7,
    *,
    method: str = "transport",
    max_length: int = MAX_LENGTH,
    **generate_kwargs,
) -> list[list[str]]:
    """For each pair of texts, ``steps`` texts between them, at even weights from 0 to 1.

    ``method`` is as in ``model.interpolate_latents``.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, for the two ends, but got {steps}.")
    firsts, seconds = (check_texts(side, "pairs") for side in zip(*pairs, strict=True))
    with evaluating(model):
        first, second = (encode_texts(model, tokenizer, side, max_length=max_length) for side in (firsts, seconds))
        between = [
            generate_texts(
                model,
                tokenizer,
                max_length,
                encoder_outputs=model.interpolate_latents(first, second, weight, method),
                **generate_kwargs,
            )
            for weight in torch.linspace(0, 1, steps).tolist()
        ]
    return [list(path) for path in zip(*between, strict=True)]


def mean_encoder_embedding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH
) -> Callable[[list[str]], Tensor]:
    """A function that embeds texts as the means of the model's encoder outputs, ``(N, H)``."""

    def embed(texts: list[str]) -> Tensor:
        with evaluating(model):
            inputs = encoder_inputs(model, tokenizer, texts, max_length)
            states = model.get_encoder()(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            return (states * mask).sum(1) / mask.sum(1).clamp(min=1)

    return embed


# --------------------------------------------------------------------------------------------------- samples
def sample_scores(
    samples: Mapping[str, Sequence[str]],
    real_texts: Sequence[str],
    training_texts: Sequence[str] | None = None,
    *,
    language_model: PreTrainedModel | None = None,
    lm_tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> dict:
    """Measure samples by every measure of this module, and held-out texts too, for comparison.

    Args:
        samples: samples by kind, for instance one kind for each of ``DECODINGS``.

    Returns:
        Measures by kind, and under ``real`` those of as many held-out texts: ``fluency`` and ``fluency_ratio``, the
        fluency divided by that of the held-out texts (with a language model), ``self_bleu``, ``distinct_1``,
        ``distinct_2``, ``copied`` (with training texts). Each kind also has ``num_samples`` and some ``examples``.
    """

    def measured(texts: Sequence[str]) -> dict:
        scores = {} if language_model is None else {"fluency": fluency(language_model, lm_tokenizer, texts)}
        if len(texts) > 1:
            scores["self_bleu"] = self_bleu(texts, seed=seed)
        scores.update({f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)})
        if training_texts is not None:
            scores["copied"] = copied(texts, training_texts)
        return scores

    samples = {kind: check_texts(texts, f"samples[{kind!r}]") for kind, texts in samples.items()}
    real_texts, largest = check_texts(real_texts, "real_texts"), max(map(len, samples.values()))
    real = measured(random.Random(seed).sample(real_texts, min(largest, len(real_texts))))
    results: dict[str, dict] = {}
    for kind, texts in samples.items():
        results[kind] = {"num_samples": len(texts), **measured(texts)}
        if language_model is not None:
            results[kind]["fluency_ratio"] = results[kind]["fluency"] / real["fluency"]
        results[kind]["examples"] = texts[:8]
    return {**results, "real": real}


# ------------------------------------------------------------------------------------------------ smoothness
def interpolation_scores(
    paths: Sequence[Sequence[str]],
    *,
    embed: Callable[[list[str]], Tensor] | None = None,
    language_model: PreTrainedModel | None = None,
    lm_tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float | list[float]]:
    """How texts change between two ends (:func:`interpolations`).

    * ``word_edits``: between neighbours, mean;
    * ``largest_step``: share of a path's edits in its largest step, mean over the paths that change. 1 is a jump from
      one end to the other; ``1 / (steps - 1)`` is even;
    * ``embedding_distance``, ``largest_embedding_distance``: 1 - cosine between neighbours, as a mean over all steps,
      and as a mean over the largest step of each path (with ``embed``);
    * ``fluency``: perplexity at each weight, first to last (with a language model).

    Args:
        embed: embeds texts ``(N, H)``, for instance :func:`mean_encoder_embedding` of the model.
    """
    edits = [[word_edits(a, b) for a, b in pairwise(path)] for path in paths]
    steps = [edit for path in edits for edit in path]
    jumps = [max(path) / sum(path) for path in edits if sum(path)]
    scores: dict[str, float | list[float]] = {"word_edits": sum(steps) / len(steps)}
    if jumps:
        scores["largest_step"] = sum(jumps) / len(jumps)
    if embed is not None:
        vectors = [F.normalize(embed(list(path)).float(), dim=-1) for path in paths]
        distances = torch.stack([1 - (v[1:] * v[:-1]).sum(-1) for v in vectors])
        scores["embedding_distance"] = distances.mean().item()
        scores["largest_embedding_distance"] = distances.max(-1).values.mean().item()
    if language_model is not None:
        columns = [list(column) for column in zip(*paths, strict=True)]
        scores["fluency"] = [fluency(language_model, lm_tokenizer, column) for column in columns]
    return scores
