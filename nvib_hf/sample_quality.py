"""Texts from the prior and between texts: how fluent, how varied, how new, and how smooth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .text_batches import (
    MAX_LENGTH,
    check_texts,
    encode_texts,
    encoder_inputs,
    evaluating,
    generate_texts,
    length_batches,
    token_lengths,
)
from .text_metrics import copied, distinct_n, fluency, reverse_perplexity, self_bleu, word_edits

# Ways to write a text of a latent, and generate()'s arguments for them: fluency alone can be bought with sameness.
DECODINGS = {
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
    """Latent vectors of each text that its decoder sees, the prior's component included, in the given order."""
    texts = check_texts(texts)
    lengths = [0] * len(texts)
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size):
            latents = encode_texts(model, tokenizer, [texts[i] for i in batch], max_length, sample=False)
            for i, length in zip(batch, (latents.log_pi > -math.inf).sum(-1).tolist(), strict=True):
                lengths[i] = length
    return lengths


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    lengths: Sequence[int],
    seed: int = 0,
    *,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
    **generate_kwargs,
) -> list[str]:
    """Texts decoded from draws of the prior.

    Args:
        lengths: numbers of latent vectors, of which each sample takes one at random: those of real texts
            (:func:`latent_lengths`), or simply their lengths in tokens.
        seed: of the lengths, the latents and what ``generate()`` draws; the global random state stays as it is.
        generate_kwargs: further arguments of ``generate()``, for instance one of ``DECODINGS``; by default greedy.
    """
    if not len(lengths):
        raise ValueError("lengths is empty: pass at least one number of latent vectors.")
    counts = random.Random(seed).choices(list(lengths), k=num_samples)
    generator = torch.Generator(model.device).manual_seed(seed)
    texts: list[str] = []
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for i in range(0, num_samples, batch_size):
            some = counts[i : i + batch_size]
            latents = model.sample_latents(len(some), some, generator=generator)
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
    """For each pair of texts what lies between them: ``steps`` texts at even weights, the first 0, the last 1.

    ``method`` is that of ``model.interpolate_latents``.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, the two ends, but got {steps}.")
    firsts, seconds = (check_texts(side, "pairs") for side in zip(*pairs, strict=True))
    with evaluating(model):
        first, second = (encode_texts(model, tokenizer, side, max_length, sample=False) for side in (firsts, seconds))
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
    """A function from texts to the means of the model's encoder outputs, ``(N, H)``."""

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
    reverse_steps: int = 150,
    seed: int = 0,
) -> dict:
    """Samples by every measure of :mod:`nvib_hf.text_metrics`, and held-out texts by the same, as a yardstick.

    Args:
        samples: each kind of samples by its name, for instance a kind for each of ``DECODINGS``.
        reverse_steps: of training for each reverse perplexity, 0 for none.

    Returns:
        By kind, and of as many held-out texts under ``real``: ``fluency`` and ``fluency_ratio``, to that of the
        held-out texts (with a language model), ``self_bleu``, ``distinct_1``, ``distinct_2``, ``copied`` (with
        training texts), ``reverse_perplexity`` (under ``real``: of as many training texts). By kind also
        ``num_samples`` and some ``examples``.
    """

    def measured(texts: list[str]) -> dict:
        scores = {} if language_model is None else {"fluency": fluency(language_model, lm_tokenizer, texts)}
        if len(texts) > 1:
            scores["self_bleu"] = self_bleu(texts, seed=seed)
        scores.update({f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)})
        if training_texts is not None:
            scores["copied"] = copied(texts, training_texts)
        return scores

    def as_many(texts: Sequence[str]) -> list[str]:
        return random.Random(seed).sample(list(texts), min(largest, len(texts)))

    samples = {kind: check_texts(texts, f"samples[{kind!r}]") for kind, texts in samples.items()}
    real_texts, largest = check_texts(real_texts, "real_texts"), max(map(len, samples.values()))
    real = measured(as_many(real_texts))
    if training_texts is not None and reverse_steps:
        real["reverse_perplexity"] = reverse_perplexity(as_many(training_texts), real_texts, seed, steps=reverse_steps)
    results: dict[str, dict] = {}
    for kind, texts in samples.items():
        results[kind] = {"num_samples": len(texts), **measured(texts)}
        if language_model is not None:
            results[kind]["fluency_ratio"] = results[kind]["fluency"] / real["fluency"]
        if reverse_steps:
            results[kind]["reverse_perplexity"] = reverse_perplexity(texts, real_texts, seed, steps=reverse_steps)
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
    * ``largest_step``: share of a path's edits that its largest step takes, mean over the paths that change: 1 is a
      jump from one end to the other, ``1 / (steps - 1)`` is even;
    * ``embedding_distance``, ``largest_embedding_distance``: 1 - cosine between neighbours, mean, and mean of each
      path's largest (with ``embed``);
    * ``fluency``: perplexity at each weight, first to last (with a language model).

    Args:
        embed: texts to embeddings ``(N, H)``, for instance :func:`mean_encoder_embedding` of the model.
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
