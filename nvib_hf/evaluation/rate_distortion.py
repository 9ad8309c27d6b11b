"""What latents cost (the rate) and what is lost (the distortion)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..latents.latents import NvibLatents
from ..layers.cross_entropy import IGNORED
from ..layers.distributions import gaussian_sample, log_gamma_sample
from ..layers.kl import kl_gaussian
from ..layers.nvib import NvibLayer
from ..training.collapse import ChannelMoments
from .texts import (
    MAX_LENGTH,
    check_targets,
    check_texts,
    encode_texts,
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
    targets: Sequence[str] | None = None,
    *,
    importance_samples: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
) -> dict[str, float]:
    r"""What latents cost (the rate) and what is lost (the distortion), in evaluation mode.

    The rate counts what is drawn, whatever ``kl_weights`` the model was trained with. For a text with :math:`n'`
    components and :math:`P` channels it is :math:`n' P \, KL_G + n' KL_D` nats. Here :math:`n' P \, KL_G` is the
    divergence of the kept vectors from the prior.

    * ``cross_entropy``: nats per target token, from the posterior itself; ``cross_entropy_sampled``: from one draw;
    * ``rate``: nats per text, with one vector per component; ``rate_published``: the same with the published KL_G,
      which weighs by pseudo-counts;
    * ``rate_learned``: the same with the model's learned prior in place of independent vectors (``model.rate``), and
      with what their number costs; not a number if a text has more vectors than that prior knows;
    * ``kl_gaussian_per_token``, ``kl_gaussian_published_per_token``, ``kl_dirichlet_per_token``: the terms of the
      rates, nats per target token; ``kl_gaussian``, ``kl_dirichlet``: as the model reports them and the loss weighs
      them, means over target tokens;
    * ``elbo``: minus the sampled cross-entropy and the terms of ``rate``, nats per token; a bound if ``kappa`` is 1;
    * ``iw_log_likelihood``: nats per token, with ``importance_samples`` draws (:func:`log_importance_weights`);
      ``iw_elbo``: what a single draw gives on average. It is another bound than ``elbo``: the draws use each
      component's own pseudo-count, but ``KL_D`` is for symmetric ones;
    * ``prop_vectors``, ``num_vectors``, ``effective_vectors``: means over texts;
    * ``active_units``: share of the ``P`` channels whose mean varies by more than 0.01 of the prior's variance, over
      the kept vectors of all texts;
    * ``mutual_information``: a lower bound in nats per text (:func:`mutual_information`).

    What a bottleneck does not report is left out. A model without ``encode`` has ``cross_entropy`` only. Latents of
    another bottleneck have no ``log_alpha``. Their ``kl_gaussian`` is a mean over the channels of all vectors that the
    decoder sees, and :math:`n'` is the number of these vectors.

    Args:
        targets: what the decoder writes for each text; by default the text itself.
        importance_samples: draws for the likelihood, 0 for none.
        seed: for all draws.
        max_length: tokens; longer texts are cut.
    """
    texts = check_texts(texts)
    right = texts if targets is None else check_targets(targets, texts)
    sums = Sums()
    has_latents = hasattr(model, "encode")
    generator = torch.Generator(model.device).manual_seed(seed)
    importance_generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size):
            some = [texts[i] for i in batch]
            inputs = encoder_inputs(model, tokenizer, some, max_length)
            labels = labels_of(model, tokenizer, [right[i] for i in batch], max_length)
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
        results["mutual_information"] = mutual_information(
            model, tokenizer, texts, targets, seed=seed, max_length=max_length
        )
    return results


class Sums:
    """Sums over texts, and the moments of the latents' means."""

    OF_LATENTS = ("prop_vectors", "num_vectors", "effective_vectors")
    PER_TEXT = ("rate_learned", *OF_LATENTS)

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.texts, self.moments = 0, ChannelMoments()

    def add(self, name: str, values: Tensor) -> None:
        """Add a value for each text of a batch, ``(B,)``."""
        self.sums[name] += values.double().sum().item()
        self.texts += len(values) * (name == "tokens")

    def add_latents(self, model: PreTrainedModel, latents: NvibLatents, tokens: Tensor) -> None:
        """Add what posteriors report. The target tokens ``(B,)`` weigh the KLs of the loss."""
        for name in ("kl_gaussian", "kl_dirichlet"):
            if (kl := getattr(latents, name)) is not None:
                self.add(name, tokens * kl)
        terms = divergences(model.nvib, latents)
        for name, nats in terms.items():
            self.add(f"{name}_per_token", nats)
        if (learned := learned_rate(model, latents)) is not None:
            self.add("rate_learned", learned + terms.get("kl_dirichlet", 0))
        for name in self.OF_LATENTS:
            if (value := getattr(latents, name)) is not None:
                self.add(name, value)
        keep = latents.log_pi > -math.inf
        if latents.log_alpha is not None:
            keep[:, 0] = False  # the prior's component
        self.moments.add(latents.z, keep)

    def results(self) -> dict[str, float]:
        """Means per text or per target token, and the numbers computed from them."""
        sums = dict(self.sums)
        tokens = sums.pop("tokens")
        results = {name: value / (self.texts if name in self.PER_TEXT else tokens) for name, value in sums.items()}
        for rate, gaussian in (("rate", "kl_gaussian"), ("rate_published", "kl_gaussian_published")):
            terms = [f"{name}_per_token" for name in (gaussian, "kl_dirichlet")]
            if all(name in sums for name in terms):
                results[rate] = sum(sums[name] for name in terms) / self.texts
        if "rate" in results:
            results["elbo"] = -results["cross_entropy_sampled"] - results["rate"] * self.texts / tokens
        return results


# The log-density of a Dirichlet is a difference of terms alpha * log(alpha). Up to here float64 is exact to 1e-3.
LOG_ALPHA_MAX = 25.0


def divergences(layer: NvibLayer, latents: NvibLatents) -> dict[str, Tensor]:
    r"""Nats of each latent, ``(B,)``, with one vector per component.

    * ``kl_gaussian``: :math:`n' P \, KL_G` of what is drawn, the kept vectors, however the loss weighs them;
    * ``kl_gaussian_published``: the same, weighed by pseudo-counts as published;
    * ``kl_dirichlet``: :math:`n' KL_D`.

    For latents of another bottleneck, without pseudo-counts, it is what they report times the vectors that the decoder
    sees.

    Args:
        layer: holds the prior.
        latents: posteriors, as ``encode(sample=False)`` returns them.
    """
    keep, channels = latents.log_pi > -math.inf, latents.z.shape[-1]
    gaussian, components = {"kl_gaussian": latents.kl_gaussian}, keep.sum(-1)
    if latents.log_alpha is not None and latents.logvar is not None:
        posterior: dict[str, Any] = {
            "mu": latents.z,
            "logvar": latents.logvar,
            "log_alpha": latents.log_alpha,
            "batch_first": True,
        }
        masks: dict[str, Any] = {"memory_key_padding_mask": ~latents.attention_mask, "keep": keep}
        weights = {"kl_gaussian": "drawn", "kl_gaussian_published": "pseudo_counts"}
        prior: dict[str, Any] = {"prior_mu": layer.prior_mu, "prior_var": layer.prior_logvar.exp()}
        gaussian = {k: kl_gaussian(weights=w, **posterior, **masks, **prior) for k, w in weights.items()}
        components = latents.attention_mask.sum(-1)
    nats = {name: components * channels * kl for name, kl in gaussian.items() if kl is not None}
    return nats if latents.kl_dirichlet is None else {**nats, "kl_dirichlet": components * latents.kl_dirichlet}


def learned_rate(model: PreTrainedModel, latents: NvibLatents) -> Tensor | None:
    """Nats of the vectors of each posterior under the model's learned prior, ``(B,)``; ``None`` without one.

    Not a number for a latent of more vectors than that prior knows, or of none but the first.
    """
    prior = getattr(model, "latent_prior", None)
    if prior is None or not bool(prior.is_fitted) or latents.logvar is None:
        return None
    counts = (latents.log_pi > -math.inf).sum(-1) - 1
    known = (counts >= 1) & (counts <= prior.max_length)
    nats = torch.full(counts.shape, math.nan, device=counts.device)
    if known.any():
        nats[known] = model.rate(latents[known.nonzero()[:, 0]])
    return nats


def dirichlet_log_density(log_pi: Tensor, log_alpha: Tensor, mask: Tensor) -> Tensor:
    r"""Log-density of Dirichlet(alpha) at ``pi`` over the unmasked components, ``(..., N)`` to ``(...)``.

    .. math:: \log\Gamma(\alpha_0) - \sum_i \log\Gamma(\alpha_i) + \sum_i (\alpha_i - 1) \log\pi_i
    """
    alpha = log_alpha.exp()
    # lgamma(a) = lgamma(1 + a) - log(a) works even if a underflows
    terms = (alpha - 1) * log_pi - torch.lgamma(1 + alpha) + log_alpha
    total = log_alpha.masked_fill(~mask, -math.inf).logsumexp(-1).exp()
    return torch.lgamma(total) + terms.masked_fill(~mask, 0).sum(-1)


def draw_and_log_ratio(
    layer: NvibLayer, latents: NvibLatents, generator: torch.Generator
) -> tuple[NvibLatents, Tensor]:
    r"""A draw :math:`w = (\pi, z)` from posteriors, and :math:`\log p(w) - \log q(w)`, ``(B,)`` in float64.

    .. math::
        q &= \mathrm{Dirichlet}(\pi; \alpha_1, \dots, \alpha_n)
             \prod_{i=1}^n \mathcal N(z_i; \mu_i, \sigma_i^2) \\
        p &= \mathrm{Dirichlet}(\pi; \beta, \dots, \beta) \prod_{i=1}^n \mathcal N(z_i; \mu_p, \sigma_p^2),
             \qquad \beta = (\alpha^p + \delta (n - 1)) / n

    over the ``n`` components that the decoder sees: the prior's, and all that are neither padding nor dropped by the
    threshold. Latents without ``log_alpha`` have fixed weights, which cost nothing.

    Args:
        layer: holds the prior.
        latents: posteriors, as ``encode(sample=False)`` returns them.
        generator: on the CPU: the draw is made there, in float64.
    """
    mu, logvar, log_pi = (latents[name].detach().double().cpu() for name in ("z", "logvar", "log_pi"))
    keep = log_pi > -math.inf
    prior_mu, prior_logvar = layer.prior_mu.double().cpu(), layer.prior_logvar.double().cpu()

    z = gaussian_sample(mu, logvar, keep, generator)
    gaussian = _gaussian_log_density(z, prior_mu, prior_logvar) - _gaussian_log_density(z, mu, logvar)
    log_ratio = gaussian.masked_fill(~keep, 0).sum(-1)
    if latents.log_alpha is not None:
        log_alpha = latents.log_alpha.detach().double().cpu().masked_fill(~keep, 0)
        # log_gamma_sample widens the noise of large pseudo-counts, but this density is exact
        large = log_alpha > 0
        log_g = torch.where(
            large,
            torch._standard_gamma(log_alpha.clamp(min=0).exp(), generator=generator).log(),
            log_gamma_sample(log_alpha.clamp(max=0), generator),
        )
        log_pi = log_g.masked_fill(~keep, -math.inf).log_softmax(-1)
        n = keep.sum(-1, keepdim=True).double()
        prior = (layer.prior_log_total(n - 1) - n.log()).expand_as(log_pi)
        finite = log_pi.masked_fill(~keep, 0)
        log_ratio = log_ratio + dirichlet_log_density(finite, prior, keep)
        log_ratio = log_ratio - dirichlet_log_density(finite, log_alpha, keep)

    device, dtype = latents.z.device, latents.z.dtype
    draw = NvibLatents(
        z=z.to(device, dtype),
        log_pi=log_pi.to(device, latents.log_pi.dtype),
        attention_mask=latents.attention_mask,
    )
    return draw, log_ratio


def _gaussian_log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu).square() * torch.exp(-logvar)).sum(-1)


def log_importance_weights(
    model: PreTrainedModel, latents: NvibLatents, labels: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor | None:
    r"""Logarithms of ``num_samples`` importance weights of each text, ``(num_samples, B)`` in float64.

    .. math:: \log v_k = \log p(x \mid w_k) + \log p(w_k) - \log q(w_k \mid x), \qquad w_k \sim q

    In expectation :math:`\log \frac1K \sum_k v_k` is a lower bound of :math:`\log p(x \mid n)`: the likelihood of a
    text under latents from the prior that have as many vectors ``n`` as the text's own latent. It tightens with ``K``;
    with ``K = 1`` it is the evidence lower bound of the draws. Both densities order the components, which the decoder
    cannot do. So the bound is at most :math:`\log n!` below a bound for sets.

    Returns:
        ``None`` if posteriors have no density: they lack variances, or have pseudo-counts over ``exp(25)``.

    Source: Burda, Grosse & Salakhutdinov (ICLR 2016).
    """
    if latents.logvar is None:
        return None
    if latents.log_alpha is not None and latents.log_alpha.max() > LOG_ALPHA_MAX:
        return None
    weights = []
    for _ in range(num_samples):
        draw, log_ratio = draw_and_log_ratio(model.nvib, latents, generator)
        weights.append(log_ratio - negative_log_likelihood(model, labels, encoder_outputs=draw).double().cpu())
    return torch.stack(weights)


def mutual_information(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    num_texts: int = 128,
    group_size: int = 32,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
) -> float:
    r"""InfoNCE: a lower bound, in nats, of the mutual information of texts and samples of their latents.

    .. math::
        \frac1N \sum_{i=1}^N \log \frac{p(x_i \mid w_i)}{\frac1N \sum_j p(x_i \mid w_j)}, \qquad w_j \sim q(w \mid x_j)

    over random groups of ``N`` texts, with the decoder's likelihood as the critic. It is at most :math:`\log N`. A
    value near that says that the latents tell the texts of a group apart. A value near 0 says that the decoder ignores
    the latents.

    Args:
        targets: what the decoder writes as :math:`x_i`, one for each text; by default the text.
        num_texts: how many texts are used, drawn from ``texts``.
        group_size: ``N``; each text is scored against this many latents.

    Source: van den Oord, Li & Vinyals (2018); Poole et al. (ICML 2019).
    """
    texts = check_texts(texts)
    right = texts if targets is None else check_targets(targets, texts)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()[:num_texts]
    size = min(group_size, len(order))
    generator = torch.Generator(model.device).manual_seed(seed)
    bounds = []
    with evaluating(model):
        for first in range(0, len(order) - size + 1, size):
            members = order[first : first + size]
            group = [texts[i] for i in members]
            labels = labels_of(model, tokenizer, [right[i] for i in members], max_length)
            latents = encode_texts(
                model, tokenizer, group, max_length=max_length, batch_size=size, sample=True, generator=generator
            )
            own = torch.arange(size)
            critic = torch.stack(  # (N, N): first each text's own latent, then the others'
                [
                    -negative_log_likelihood(model, labels, encoder_outputs=latents[(own + shift) % size])
                    for shift in range(size)
                ]
            )
            bounds.append((critic[0] - critic.logsumexp(0) + math.log(size)).mean())
    return torch.stack(bounds).mean().item()
