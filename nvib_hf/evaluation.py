"""What a model reconstructs, what its latents cost and which tokens they keep, and all of it by one call."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .collapse import ACTIVE_VARIANCE
from .latent import NvibLatents
from .likelihood import divergences, log_importance_weights, mutual_information
from .loss import IGNORED
from .sample_quality import (
    DECODINGS,
    interpolation_scores,
    interpolations,
    latent_lengths,
    mean_encoder_embedding,
    sample_scores,
    sample_texts,
)
from .text_batches import (
    MAX_LENGTH,
    as_read,
    check_texts,
    evaluating,
    labels_of,
    length_batches,
    negative_log_likelihood,
    read,
    token_lengths,
    write,
)
from .text_metrics import sacrebleu, word_edits
from .transport import pot


# ----------------------------------------------------------------------------------------- reconstruction
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
            inputs = read(model, tokenizer, [texts[i] for i in batch], max_length)
            for i, text in zip(batch, write(model, tokenizer, max_length, **inputs, **generate_kwargs), strict=True):
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


# ------------------------------------------------------------------------------------- rate and distortion
def rate_distortion(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    importance_samples: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
) -> dict[str, float]:
    r"""What latents cost (the rate) and what is lost (the distortion), in evaluation mode.

    The rate is that of what is drawn, whatever the model was trained with (``kl_weights``): with :math:`n'`
    components of a text and :math:`P` channels, :math:`n' P \, KL_G + n' KL_D` nats, where
    :math:`n' P \, KL_G` is the divergence of the vectors that are kept from the prior.

    * ``cross_entropy``: nats per target token, of the posterior itself; ``cross_entropy_sampled``: of one draw;
    * ``rate``: nats a text, with one vector a component; ``rate_published``: the same with the published KL_G, where
      pseudo-counts weigh;
    * ``kl_gaussian_per_token``, ``kl_gaussian_published_per_token``, ``kl_dirichlet_per_token``: their terms, nats
      per target token; ``kl_gaussian``, ``kl_dirichlet``: as the model reports them and the loss weighs them, means
      over target tokens;
    * ``elbo``: minus the sampled cross-entropy and the terms of ``rate``, nats per token; a bound if ``kappa`` is 1;
    * ``iw_log_likelihood``: nats per token, with ``importance_samples`` draws
      (:func:`~nvib_hf.likelihood.log_importance_weights`), and ``iw_elbo``, what a single draw gives on average.
      The draws' weights have each component's own pseudo-count, where ``KL_D`` is that of symmetric ones:
      ``iw_elbo`` and ``elbo`` are different bounds;
    * ``prop_vectors``, ``num_vectors``, ``effective_vectors``: means over texts;
    * ``active_units``: share of the ``P`` channels whose mean varies, over the kept vectors of all texts, by more
      than 0.01 of the prior's variance;
    * ``mutual_information``: a lower bound in nats a text (:func:`~nvib_hf.likelihood.mutual_information`).

    What a bottleneck does not report is left out; of a model without ``encode`` only ``cross_entropy`` is there.
    The latents of another bottleneck, without ``log_alpha``, have as ``kl_gaussian`` the mean over the channels of
    the vectors that the decoder sees, all of them drawn, and :math:`n'` is the number of these.

    Args:
        importance_samples: draws for the likelihood, 0 for none.
        seed: of all draws.
        max_length: tokens; longer texts are cut.
    """
    texts = check_texts(texts)
    sums = Sums()
    if not hasattr(model, "encode"):
        return _cross_entropy(model, tokenizer, texts, batch_size, max_length)
    generator = torch.Generator(model.device).manual_seed(seed)
    importance_generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size):
            some = [texts[i] for i in batch]
            inputs, labels = read(model, tokenizer, some, max_length), labels_of(model, tokenizer, some, max_length)
            tokens = (labels != IGNORED).sum(-1)
            latents = model.encode(**inputs, sample=False)
            sampled = model.encode(**inputs, sample=True, generator=generator)
            sums.add("tokens", tokens)
            sums.add("cross_entropy", negative_log_likelihood(model, labels, encoder_outputs=latents))
            sums.add("cross_entropy_sampled", negative_log_likelihood(model, labels, encoder_outputs=sampled))
            for name in ("kl_gaussian", "kl_dirichlet"):
                if (kl := getattr(latents, name)) is not None:
                    sums.add(name, tokens * kl)
            for name, nats in divergences(model.nvib, latents).items():
                sums.add(f"{name}_per_token", nats)
            for name in Sums.PER_TEXT:
                if (value := getattr(latents, name)) is not None:
                    sums.add(name, value)
            sums.add_means(latents)
            if importance_samples:
                weights = log_importance_weights(model, latents, labels, importance_samples, importance_generator)
                if weights is not None:
                    sums.add("iw_log_likelihood", weights.logsumexp(0) - math.log(importance_samples))
                    sums.add("iw_elbo", weights.mean(0))
    results = sums.results(prior_var=model.nvib.prior_logvar.double().exp().cpu())
    results["mutual_information"] = mutual_information(model, tokenizer, texts, seed=seed, max_length=max_length)
    return results


class Sums:
    """Sums over texts, and first and second moments of the latents' means."""

    PER_TEXT = ("prop_vectors", "num_vectors", "effective_vectors")

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.texts = self.vectors = 0
        self.mean = self.square = 0.0

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] += values.double().sum().item()
        self.texts += len(values) * (name == "tokens")

    def add_means(self, latents: NvibLatents) -> None:
        """Of the vectors that the decoder sees, the prior's component excluded."""
        keep = latents.log_pi > -math.inf
        if latents.log_alpha is not None:
            keep[:, 0] = False
        means = latents.z[keep].double().cpu()
        self.vectors += len(means)
        self.mean, self.square = self.mean + means.sum(0), self.square + means.square().sum(0)

    def results(self, prior_var: Tensor) -> dict[str, float]:
        sums = dict(self.sums)
        tokens = sums.pop("tokens")
        results = {name: value / (self.texts if name in self.PER_TEXT else tokens) for name, value in sums.items()}
        for rate, gaussian in (("rate", "kl_gaussian"), ("rate_published", "kl_gaussian_published")):
            terms = [sums.get(f"{name}_per_token") for name in (gaussian, "kl_dirichlet")]
            if None not in terms:
                results[rate] = sum(terms) / self.texts
        if "rate" in results:
            results["elbo"] = -results["cross_entropy_sampled"] - results["rate"] * self.texts / tokens
        count = max(self.vectors, 1)
        variance = self.square / count - (self.mean / count).square()
        results["active_units"] = (variance > ACTIVE_VARIANCE * prior_var).double().mean().item()
        return results


def _cross_entropy(model, tokenizer, texts: list[str], batch_size: int, max_length: int) -> dict[str, float]:
    """Of an encoder-decoder without latents."""
    nll = tokens = 0.0
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size):
            some = [texts[i] for i in batch]
            labels = labels_of(model, tokenizer, some, max_length)
            inputs = read(model, tokenizer, some, max_length)
            nll += negative_log_likelihood(model, labels, **inputs).sum().item()
            tokens += (labels != IGNORED).sum().item()
    return {"cross_entropy": nll / tokens}


# ------------------------------------------------------------------------------------------- tokens kept
def kept_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
) -> list[dict]:
    """One record for each source token, in the texts' order.

    ``text`` (its index), ``length`` (source tokens of the text), ``position``, ``relative_position`` (0 to 1),
    ``token``, ``special`` (an end-of-text mark or the like), ``frequency`` (how often the token stands in the
    given texts), ``log_alpha`` and ``kept``. Empty where latents have no pseudo-counts, or not one for each token.
    """
    texts = check_texts(texts)
    encodings = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    frequency = Counter(id for ids in encodings for id in ids)
    special, records = set(tokenizer.all_special_ids), [[] for _ in texts]
    with evaluating(model):
        for batch in length_batches([len(ids) for ids in encodings], batch_size):
            latents = model.encode(**read(model, tokenizer, [texts[i] for i in batch], max_length), sample=False)
            if latents.log_alpha is None or latents.log_alpha.shape[1] != 1 + max(len(encodings[i]) for i in batch):
                return []
            # by the mask, not by place: the tokenizer may pad on the left
            mask, kept = latents.attention_mask[:, 1:], latents.log_pi[:, 1:] > -math.inf
            for row, i in enumerate(batch):
                ids, log_alpha = encodings[i], latents.log_alpha[row, 1:][mask[row]].tolist()
                for position, (id, value, is_kept) in enumerate(
                    zip(ids, log_alpha, kept[row][mask[row]].tolist(), strict=True)
                ):
                    records[i].append(
                        {
                            "text": i,
                            "length": len(ids),
                            "position": position,
                            "relative_position": position / max(len(ids) - 1, 1),
                            "token": tokenizer.convert_ids_to_tokens(id),
                            "special": id in special,
                            "frequency": frequency[id],
                            "log_alpha": value,
                            "kept": is_kept,
                        }
                    )
    return [record for of_text in records for record in of_text]


def kept_by_length(records: list[dict], width: int = 4) -> list[dict]:
    """Share of vectors kept by source length, in groups of ``width`` lengths; special tokens count."""
    return _grouped(records, lambda r: (r["length"] - 1) // width, lambda g: f"{g * width + 1}-{(g + 1) * width}")


def kept_by_position(records: list[dict]) -> list[dict]:
    """Share of tokens kept in each third of a text; special tokens do not count."""
    names = ("first third", "middle third", "last third")
    words = [record for record in records if not record["special"]]
    return _grouped(words, lambda r: min(int(3 * r["relative_position"]), 2), lambda g: names[g])


def kept_by_frequency(records: list[dict]) -> list[dict]:
    """Share of tokens kept by how often they occur, in quarters of the running text; special tokens do not count.

    Occurrences of one token stay together, so the quarters are only about as large as each other.
    """
    words = [record for record in records if not record["special"]]
    if not words:
        return []
    ordered = sorted(record["frequency"] for record in words)
    limits = [ordered[(len(ordered) * quarter) // 4] for quarter in (1, 2, 3)]
    names = ("rarest quarter", "second quarter", "third quarter", "most frequent quarter")
    return _grouped(words, lambda r: sum(r["frequency"] > limit for limit in limits), lambda g: names[g])


def _grouped(records: list[dict], group_of: Callable[[dict], int], name_of: Callable[[int], str]) -> list[dict]:
    """For each group in order: its name, number of tokens, share kept, mean log pseudo-count."""
    groups: dict[int, list[dict]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    return [
        {
            "group": name_of(group),
            "tokens": len(members),
            "kept": sum(r["kept"] for r in members) / len(members),
            "log_alpha": sum(r["log_alpha"] for r in members) / len(members),
        }
        for group, members in sorted(groups.items())
    ]


# ----------------------------------------------------------------------------------------------- all of it
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    training_texts: Sequence[str] | None = None,
    language_model: PreTrainedModel | None = None,
    lm_tokenizer: PreTrainedTokenizerBase | None = None,
    num_samples: int = 200,
    decodings: Mapping[str, dict] = DECODINGS,
    reverse_steps: int = 150,
    num_pairs: int = 20,
    methods: Sequence[str] = ("transport", "mixture"),
    importance_samples: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
) -> dict:
    """Everything this module and :mod:`nvib_hf.sample_quality` measure, for ``json.dump``.

    Samples have as many latent vectors as the texts have; interpolations are between neighbours in the list. The same
    seed gives the same results. A measure that a model has not is left out, one that is not finite is ``None``.

    Args:
        texts: held-out texts, as the model would be given them.
        training_texts: to see what samples copy, and for values of real text beside those of samples.
        language_model, lm_tokenizer: a causal language model that judges how fluent texts are.
        num_samples: latents drawn from the prior, 0 for none.
        decodings: the ways in which each of them is written, by name: arguments of ``generate()``. By default
            greedily, by 4 beams and by nucleus sampling.
        reverse_steps: of training a small language model on each of these kinds, and on real texts, for the reverse
            perplexity; 0 for none.
        num_pairs: pairs of texts to interpolate, 0 for none.
        methods: how, of those that ``model.interpolate_latents`` has.
        importance_samples: draws for the importance-weighted likelihood, 0 for none.

    Returns:
        A nested dict: ``settings``, ``reconstruction``, ``rate_distortion``, ``kept`` (``by_length``,
        ``by_position``, ``by_frequency``), ``samples`` (by decoding, and ``real``), ``interpolation`` (by method).

    Raises:
        ImportError: without sacrebleu; without POT, unless ``num_pairs`` is 0 or ``methods`` have no ``"transport"``.
    """
    texts = check_texts(texts)
    if num_pairs and "transport" in methods and hasattr(model, "encode"):
        pot()  # is missed now rather than after everything else
    sizes = {"batch_size": batch_size, "max_length": max_length}
    judge = {"language_model": language_model, "lm_tokenizer": lm_tokenizer}
    references = as_read(tokenizer, texts, max_length)
    written = reconstruct(model, tokenizer, texts, **sizes)
    results = {
        "settings": {"texts": len(texts), "importance_samples": importance_samples, "seed": seed, **sizes},
        "reconstruction": reconstruction_scores(written, references),
        "rate_distortion": rate_distortion(
            model, tokenizer, texts, importance_samples=importance_samples, seed=seed, **sizes
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
            lengths = latent_lengths(model, tokenizer, texts, **sizes)
            samples = {
                name: sample_texts(model, tokenizer, num_samples, lengths, seed, **sizes, **options)
                for name, options in decodings.items()
            }
            known = None if training_texts is None else as_read(tokenizer, training_texts, max_length)
            results["samples"] = sample_scores(
                samples, references, known, reverse_steps=reverse_steps, seed=seed, **judge
            )
        pairs = list(zip(texts[::2], texts[1::2], strict=False))[:num_pairs]
        if pairs:
            embed = mean_encoder_embedding(model, tokenizer, max_length)
            results["interpolation"] = {}
            for method in methods:
                paths = interpolations(model, tokenizer, pairs, method=method, max_length=max_length)
                scores = interpolation_scores(paths, embed=embed, **judge)
                results["interpolation"][method] = {**scores, "example": paths[0]}
    return _finite(results)


def _finite(results):
    """``None`` in place of what JSON cannot say."""
    if isinstance(results, dict):
        return {name: _finite(value) for name, value in results.items()}
    if isinstance(results, list):
        return [_finite(value) for value in results]
    return None if isinstance(results, float) and not math.isfinite(results) else results
