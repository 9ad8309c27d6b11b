"""All measurements of a model on held-out texts, in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..latents.transport import pot
from .rate_distortion import rate_distortion
from .samples import (
    DECODINGS,
    interpolation_scores,
    interpolations,
    latent_lengths,
    mean_encoder_embedding,
    sample_scores,
    sample_texts,
)
from .texts import (
    as_read,
    check_targets,
    check_texts,
    kept_by_frequency,
    kept_by_length,
    kept_by_position,
    kept_tokens,
    length_limit,
    num_cut,
    reconstruct,
    reconstruction_scores,
)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    training_texts: Sequence[str] | None = None,
    language_model: PreTrainedModel | None = None,
    lm_tokenizer: PreTrainedTokenizerBase | None = None,
    num_samples: int = 200,
    decodings: Mapping[str, dict] = DECODINGS,
    num_pairs: int = 20,
    methods: Sequence[str] = ("transport", "mixture"),
    importance_samples: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    max_length: int | None = None,
) -> dict:
    """Reconstruction, rate and distortion, tokens kept, samples and interpolations, for ``json.dump``.

    Samples have as many latent vectors as the texts, or as a learned prior draws. Interpolations are between
    neighbours in the list. The same seed gives the same results. A measure that the model lacks is left out; a measure
    that is not finite is ``None``.

    Args:
        texts: held-out texts, as you would give them to the model.
        targets: what the model should write for each text, such as a translation; by default the text itself. Samples
            and interpolations are then texts like the targets.
        training_texts: to count samples that copy them. Pass the training targets if you pass ``targets``.
        language_model, lm_tokenizer: a causal language model that judges how fluent texts are.
        num_samples: latents drawn from the prior, 0 for none.
        decodings: ways to decode each sample, by name: arguments of ``generate()``. The default has greedy decoding, 4
            beams and nucleus sampling.
        num_pairs: pairs of texts to interpolate, 0 for none.
        methods: methods of ``model.interpolate_latents`` to measure.
        importance_samples: draws for the importance-weighted likelihood, 0 for none.
        max_length: tokens. Longer texts and targets are cut before they are measured; ``settings`` counts them. By
            default as many as the tokenizer and the model take, as in :func:`~nvib_hf.encode_texts`.

    Returns:
        A nested dict: ``settings``, ``reconstruction``, ``rate_distortion``, ``kept`` (``by_length``,
        ``by_position``, ``by_frequency``), ``samples`` (by decoding, and ``real``), ``interpolation`` (by method).

    Raises:
        ImportError: sacrebleu is not installed; or POT is not, ``num_pairs`` is above 0 and ``methods`` has
            ``"transport"``.
    """
    texts = check_texts(texts)
    right = texts if targets is None else check_targets(targets, texts)
    max_length = length_limit(model, tokenizer, max_length)
    if num_pairs and "transport" in methods and hasattr(model, "encode"):
        pot()  # a missing package is reported before the long work
    sizes = {"batch_size": batch_size, "max_length": max_length}
    judge = {"language_model": language_model, "lm_tokenizer": lm_tokenizer}
    is_target = targets is not None
    references = as_read(tokenizer, right, max_length, is_target)
    written = reconstruct(model, tokenizer, texts, **sizes)
    results: dict[str, Any] = {
        "settings": {
            "texts": len(texts),
            "texts_cut": num_cut(tokenizer, texts, max_length),
            **({"targets_cut": num_cut(tokenizer, right, max_length, is_target)} if is_target else {}),
            "importance_samples": importance_samples,
            "seed": seed,
            **sizes,
        },
        "reconstruction": reconstruction_scores(written, references),
        "rate_distortion": rate_distortion(
            model, tokenizer, texts, targets, importance_samples=importance_samples, seed=seed, **sizes
        ),
    }
    if hasattr(model, "encode"):
        records = kept_tokens(model, tokenizer, texts, **sizes)
        results["kept"] = {
            "by_length": kept_by_length(records),
            "by_position": kept_by_position(records),
            "by_frequency": kept_by_frequency(records),
        }
        if num_samples:
            learned = getattr(model, "latent_prior", None) is not None
            lengths = None if learned else latent_lengths(model, tokenizer, texts, **sizes)
            samples = {
                name: sample_texts(model, tokenizer, num_samples, lengths, seed, **sizes, **options)
                for name, options in decodings.items()
            }
            known = None if training_texts is None else as_read(tokenizer, training_texts, max_length, is_target)
            results["samples"] = sample_scores(samples, references, known, seed=seed, **judge)
        pairs = list(zip(texts[::2], texts[1::2], strict=False))[:num_pairs]
        if pairs:
            # The encoder knows only sources, not targets.
            embed = None if is_target else mean_encoder_embedding(model, tokenizer, max_length)
            results["interpolation"] = {}
            for method in methods:
                paths = interpolations(model, tokenizer, pairs, method=method, max_length=max_length)
                scores = interpolation_scores(paths, embed=embed, **judge)
                results["interpolation"][method] = {**scores, "example": paths[0]}
    return _finite(results)


def _finite(results):
    """The results with ``None`` for each number that JSON cannot hold."""
    if isinstance(results, dict):
        return {name: _finite(value) for name, value in results.items()}
    if isinstance(results, list):
        return [_finite(value) for value in results]
    return None if isinstance(results, float) and not math.isfinite(results) else results
