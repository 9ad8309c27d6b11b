"""What latents cost (the rate) and what is lost (the distortion)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .collapse import ChannelMoments
from .latent import NvibLatents
from .likelihood import divergences, log_importance_weights, mutual_information
from .loss import IGNORED
from .text_batches import (
    MAX_LENGTH,
    check_texts,
    encoder_inputs,
    evaluating,
    labels_of,
    length_batches,
    negative_log_likelihood,
    token_lengths,
)


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
    * ``rate``: nats per text, with one vector per component; ``rate_published``: the same with the published KL_G,
      where pseudo-counts weigh;
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
    * ``mutual_information``: a lower bound in nats per text (:func:`~nvib_hf.likelihood.mutual_information`).

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
    has_latents = hasattr(model, "encode")
    generator = torch.Generator(model.device).manual_seed(seed)
    importance_generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size):
            some = [texts[i] for i in batch]
            inputs = encoder_inputs(model, tokenizer, some, max_length)
            labels = labels_of(model, tokenizer, some, max_length)
            tokens = (labels != IGNORED).sum(-1)
            sums.add("tokens", tokens)
            if not has_latents:
                sums.add("cross_entropy", negative_log_likelihood(model, labels, **inputs))
                continue
            latents = model.encode(**inputs, sample=False)
            sampled = model.encode(**inputs, sample=True, generator=generator)
            sums.add("cross_entropy", negative_log_likelihood(model, labels, encoder_outputs=latents))
            sums.add("cross_entropy_sampled", negative_log_likelihood(model, labels, encoder_outputs=sampled))
            sums.add_latents(model, latents, tokens)
            if importance_samples:
                weights = log_importance_weights(model, latents, labels, importance_samples, importance_generator)
                if weights is not None:
                    sums.add("iw_log_likelihood", weights.logsumexp(0) - math.log(importance_samples))
                    sums.add("iw_elbo", weights.mean(0))
    results = sums.results()
    if has_latents:
        results["active_units"] = sums.moments.active_units(model.nvib.prior_logvar.exp())
        results["mutual_information"] = mutual_information(model, tokenizer, texts, seed=seed, max_length=max_length)
    return results


class Sums:
    """Sums over texts, and the moments of the latents' means."""

    PER_TEXT = ("prop_vectors", "num_vectors", "effective_vectors")

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.texts, self.moments = 0, ChannelMoments()

    def add(self, name: str, values: Tensor) -> None:
        """A value of each text of a batch, ``(B,)``."""
        self.sums[name] += values.double().sum().item()
        self.texts += len(values) * (name == "tokens")

    def add_latents(self, model: PreTrainedModel, latents: NvibLatents, tokens: Tensor) -> None:
        """What posteriors report of themselves, with the target tokens ``(B,)`` that weigh the KLs of the loss."""
        for name in ("kl_gaussian", "kl_dirichlet"):
            if (kl := getattr(latents, name)) is not None:
                self.add(name, tokens * kl)
        for name, nats in divergences(model.nvib, latents).items():
            self.add(f"{name}_per_token", nats)
        for name in self.PER_TEXT:
            if (value := getattr(latents, name)) is not None:
                self.add(name, value)
        seen = latents.log_pi > -math.inf
        if latents.log_alpha is not None:
            seen[:, 0] = False  # the prior's component
        self.moments.add(latents.z, seen)

    def results(self) -> dict[str, float]:
        """Means per text or per target token, and what follows from them."""
        sums = dict(self.sums)
        tokens = sums.pop("tokens")
        results = {name: value / (self.texts if name in self.PER_TEXT else tokens) for name, value in sums.items()}
        for rate, gaussian in (("rate", "kl_gaussian"), ("rate_published", "kl_gaussian_published")):
            terms = [sums.get(f"{name}_per_token") for name in (gaussian, "kl_dirichlet")]
            if None not in terms:
                results[rate] = sum(terms) / self.texts
        if "rate" in results:
            results["elbo"] = -results["cross_entropy_sampled"] - results["rate"] * self.texts / tokens
        return results
