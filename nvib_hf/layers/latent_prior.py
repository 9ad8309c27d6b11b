"""A learned prior: where the latents of texts lie, as a density of sequences of vectors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .causal_transformer import Cache, CausalTransformer, sharpened
from .code_search import best_codes, gaussian_fit
from .codebook import k_means, moved_to_means, nearest, shrunk_variances, sums_by_code
from .denoising_attention import without_autocast
from .moving_codes import MovingCodes
from .nvib import _at_least_single

ROUNDS = 3  # of fitting places and centres in turn
SIZES = {"num_codes": 2048, "d_model": 192, "num_layers": 4, "num_heads": 4, "max_length": 64}


def checked_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a prior by name, those of :data:`SIZES` where none is given.

    Raises:
        TypeError: sizes that are no mapping, or a name that is no size. ValueError: a value that none can have.
    """
    if not isinstance(sizes, Mapping):
        raise TypeError(f"latent_prior must be a dict of sizes, such as {SIZES}, but got {sizes!r}.")
    if unknown := sorted(sizes.keys() - SIZES.keys()):
        raise TypeError(f"latent_prior has no size {unknown[0]!r}, but {', '.join(SIZES)}.")
    sizes = SIZES | dict(sizes)
    for name, value in sizes.items():
        if isinstance(value, bool) or value != int(value) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, but got {value}.")
    if sizes["d_model"] % sizes["num_heads"]:
        raise ValueError(
            f"d_model must be a multiple of num_heads, but got {sizes['d_model']} and {sizes['num_heads']}."
        )
    return {name: int(value) for name, value in sizes.items()}


def in_single_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a prior that autocast does not reach: densities of tight codes need all the precision there is."""

    @functools.wraps(method)
    def run(self: LatentPrior, *args: Any, **kwargs: Any) -> Any:
        with without_autocast(self.centres.device):
            return method(self, *args, **kwargs)

    return run


class LatentPrior(nn.Module):
    r"""A density of the means of a text's latent vectors, in their order, and of how many there are.

    .. math::
        p(z_1 \dots z_n) = p(n) \prod_{i=1}^n \sum_{k=1}^K p(k \mid z_{<i}, n)\;
        \mathcal N\bigl(z_i \mid m_i + c_k, \operatorname{diag} s_k^2\bigr)

    A vector is one of K codes, as a sub-word is one of a vocabulary, and a Gaussian around it. What its place alone
    explains, :math:`m_i`, is taken away first, so that the codes are free for what is said. A causal transformer reads
    the code nearest to each vector before and how many vectors are still to come, and says how probable each code is.

    :meth:`fit_codebook` first, then training (:func:`~nvib_hf.training.latent_prior_training.fit_latent_prior`).

    Args:
        width: P, of the vectors.
        num_codes: K.
        d_model, num_layers, num_heads, dropout: of the transformer.
        max_length: the largest number of vectors.
    """

    places: Tensor
    centres: Tensor
    logvar: Tensor
    draws_logvar: Tensor
    log_lengths: Tensor
    log_weight: Tensor
    is_fitted: Tensor

    def __init__(
        self,
        width: int,
        num_codes: int = 2048,
        d_model: int = 192,
        num_layers: int = 4,
        num_heads: int = 4,
        max_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"num_codes": num_codes, "d_model": d_model, "num_layers": num_layers, "num_heads": num_heads}
        checked_sizes({**sizes, "max_length": max_length})
        if width < 1:
            raise ValueError(f"width must be a whole number of at least 1, but got {width}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), but got {dropout}.")
        self.width, self.num_codes, self.max_length, self.dropout = width, num_codes, max_length, dropout
        self.register_buffer("places", torch.zeros(max_length, width))  # m
        self.register_buffer("centres", torch.randn(num_codes, width))  # c
        self.register_buffer("logvar", torch.zeros(num_codes, width))  # log s^2
        self.register_buffer("draws_logvar", torch.zeros(num_codes, width))  # log t^2
        self.register_buffer("log_lengths", torch.full((max_length,), -math.log(max_length)))  # log p(n), n from 1
        self.register_buffer("log_weight", torch.zeros(()))  # of each vector in a latent, that of its prior being 0
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool))
        self.code_embedding = nn.Embedding(num_codes + 1, d_model)  # the last one starts a sequence
        self.centre_embedding = nn.Linear(width, d_model, bias=False)
        self.place_embedding = nn.Embedding(max_length, d_model)
        self.remaining_embedding = nn.Embedding(max_length + 1, d_model)
        self.transformer = CausalTransformer(d_model, num_layers, num_heads, dropout)
        self.code_bias = nn.Parameter(torch.zeros(num_codes))
        self.moving: MovingCodes | None = None  # while the prior is trained with the model
        for embedding in (self.code_embedding, self.place_embedding, self.remaining_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.centre_embedding.weight, std=0.02 / width**0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Never narrower than fp32, whatever the model is cast to."""
        super()._apply(lambda value: _at_least_single(value, fn(value)), recurse)
        return self

    # ------------------------------------------------------------------------------------------- codes
    @torch.no_grad()
    @in_single_precision
    def fit_codebook(self, z: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> None:
        """Set places, codes and the distribution of lengths to those of vectors ``(B, n, P)`` with ``mask (B, n)``.

        Centres by k-means on what the places leave, then places and centres in turn. The variances of a code are
        those of its vectors, drawn to those of all codes where it has few. A length that was never seen has a chance
        as if it had been seen 0.01 times.

        Raises:
            ValueError: fewer vectors than codes, or tensors that do not fit.
        """
        z, mask, lengths = self._checked(z, mask)
        place = torch.arange(z.shape[1], device=z.device).expand_as(mask)[mask]
        vectors = z[mask]
        self._fit_places(vectors, place)
        residuals = vectors - self.places[place]
        self.centres.copy_(k_means(residuals, self.num_codes, generator=generator))
        for _ in range(ROUNDS):
            self._fit_places(vectors - self.centres[nearest(residuals, self.centres)], place)
            residuals = vectors - self.places[place]
            self.centres.copy_(moved_to_means(self.centres, residuals, nearest(residuals, self.centres)))
        codes = nearest(residuals, self.centres)
        squares = (residuals - self.centres[codes]).square()
        self.logvar.copy_(shrunk_variances(*sums_by_code(squares, codes, self.num_codes)).log())
        seen = torch.bincount(lengths - 1, minlength=self.max_length).to(self.log_lengths) + 0.01
        self.log_lengths.copy_((seen / seen.sum()).log())
        self.is_fitted.fill_(True)

    @torch.no_grad()
    @in_single_precision
    def fit_draws(self, z: Tensor, logvar: Tensor, mask: Tensor | None = None) -> None:
        r"""For :meth:`rate`: set the variances :math:`t_k^2` of draws from posteriors, around the mean of their code.

        Means ``z`` and ``logvar`` are ``(B, n, P)``.
        """
        z, mask, _ = self._checked(z, mask)
        logvar = logvar.to(z)
        codes, residuals = self.codes(z)[mask], (z - self.places[: z.shape[1]])[mask]
        second = (residuals - self.centres[codes]).square() + logvar[mask].exp()
        self.draws_logvar.copy_(shrunk_variances(*sums_by_code(second, codes, self.num_codes)).log())

    def _fit_places(self, vectors: Tensor, place: Tensor) -> None:
        """The mean of the vectors of each place; of those never seen that of the last that was."""
        sums, counts = sums_by_code(vectors, place, self.max_length)
        last = int(counts.nonzero().max())
        self.places.copy_(sums / counts.clamp(min=1)[:, None])
        self.places[last + 1 :] = self.places[last]

    def codes(self, z: Tensor) -> Tensor:
        """The code nearest to each vector of ``z`` ``(B, n, P)``, its place taken away: ``(B, n)``."""
        return self._codes(z - self.places[: z.shape[1]])

    def _codes(self, residuals: Tensor) -> Tensor:
        return nearest(residuals.flatten(0, -2), self.centres).view(residuals.shape[:-1])

    # ---------------------------------------------------------------------------------- the transformer
    def _embed(self, codes: Tensor, place: Tensor, lengths: Tensor) -> Tensor:
        """What the transformer reads: the code before each place, the place, and how many vectors are to come."""
        remaining = (lengths[:, None] - place).clamp(min=0)
        x = F.embedding(codes, self._code_table())
        x = x + self.place_embedding(place) + self.remaining_embedding(remaining)
        return F.dropout(x, self.dropout, self.training)

    def _code_table(self) -> Tensor:
        """Embeddings of all codes and of the start, ``(K + 1, d_model)``: learnt, and of where their centres lie."""
        centres = self.centres if self.moving is None else self.centres.clone()  # they move before a graph's end
        return self.code_embedding.weight + F.pad(self.centre_embedding(centres), (0, 0, 0, 1))

    def _states(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """The states ``(B, n, d_model)`` before each of the vectors with these codes ``(B, n)``."""
        before = F.pad(codes[:, :-1], (1, 0), value=self.num_codes)
        place = torch.arange(codes.shape[1], device=codes.device)
        states: Tensor = self.transformer(self._embed(before, place, lengths))
        return states

    def _log_chances(self, states: Tensor) -> Tensor:
        """Log-probabilities of the next code, ``(..., K)``."""
        return (states @ self._code_table()[:-1].T + self.code_bias).log_softmax(-1)

    def next_log_chances(self, before: Tensor, i: int, lengths: Tensor, cache: Cache) -> Tensor:
        """Log-probabilities ``(B, K)`` of the code at place ``i``, after the code ``before`` ``(B,)``, K at a start.

        What stood before that is in the cache, to which this step is added.
        """
        place = torch.tensor([i], device=lengths.device)
        return self._log_chances(self.transformer(self._embed(before[:, None], place, lengths), cache)[:, 0])

    # ----------------------------------------------------------------------------------------- densities
    @in_single_precision
    def log_prob(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-density of each sequence, its length included, in nats: ``(B,)``.

        Args:
            z: vectors ``(B, n, P)``, in their order.
            mask: ``(B, n)``, True = a vector, False = padding, which stands at the end; ``None``: all are vectors.
        """
        z, mask, lengths = self._checked(z, mask)
        states = self._states(self.codes(z), lengths)
        residuals = z - self.places[: z.shape[1]]
        log_density = (self._log_chances(states) + self._log_gaussians(residuals)).logsumexp(-1)
        return self.log_lengths[lengths - 1] + log_density.masked_fill(~mask, 0).sum(-1)

    def _log_gaussians(self, residuals: Tensor) -> Tensor:
        """Log-density of each vector ``(..., P)`` under the Gaussian of each code, ``(..., K)``."""
        precision = (-self.logvar).exp()
        scaled = self.centres * precision
        constant = (self.centres * scaled + self.logvar).sum(-1) + self.width * math.log(2 * math.pi)
        return -0.5 * (residuals.square() @ precision.T - 2 * residuals @ scaled.T + constant)

    @in_single_precision
    def rate(self, z: Tensor, logvar: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""What posteriors :math:`\mathcal N(z_i, \sigma_i^2)` of texts cost under this prior, in nats: ``(B,)``.

        .. math::
            -\log p(n) - \sum_i \log p(k_i^* \mid z_{<i}, n) + \sum_i \mathrm{KL}\bigl(
            \mathcal N(z_i, \sigma_i^2) \,\|\, \mathcal N(m_i + c_{k_i^*}, t_{k_i^*}^2)\bigr)

        The divergence of the draws and their codes from a prior that draws codes and then vectors, so never less than
        that of the draws alone: with the cross-entropy of the text, a bound on its likelihood. Needs
        :meth:`fit_draws`.
        """
        z, mask, _ = self._checked(z, mask)
        return self.nats(z, logvar.to(z), mask)

    def nats(self, z: Tensor, logvar: Tensor, mask: Tensor) -> Tensor:
        """:meth:`rate` without its checks, which wait for the device."""
        lengths = mask.sum(-1).clamp(min=1)
        codes = self.codes(z)
        of_codes = self._code_nats(codes, lengths)
        errors = z - self.places[: z.shape[1]] - self.centres[codes]
        wide = self.draws_logvar[codes]
        of_vectors = 0.5 * ((errors.square() + logvar.exp()) * (-wide).exp() - 1 + wide - logvar).sum(-1)
        return (of_codes + of_vectors).masked_fill(~mask, 0).sum(-1) - self.log_lengths[lengths - 1]

    @in_single_precision
    def loss(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""What training minimises, in nats, of each sequence: ``(B,)``.

        .. math:: -\sum_i \log p(k_i^* \mid z_{<i}, n)

        with the code :math:`k_i^*` nearest to each vector. With the Gaussians of these codes and
        :math:`-\log p(n)`, which training leaves as they are, it is never less than ``-log_prob``. In the mixture's
        own likelihood, details within a cluster drown the codes.
        """
        z, mask, lengths = self._checked(z, mask)
        return self._code_nats(self.codes(z), lengths).masked_fill(~mask, 0).sum(-1)

    def _code_nats(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """What each code costs after those before it, ``(B, n)``."""
        log_chances = self._log_chances(self._states(codes, lengths))
        return -log_chances.gather(-1, codes[..., None])[..., 0]

    # ------------------------------------------------------------------------------------------- samples
    @torch.no_grad()
    @in_single_precision
    def sample(
        self,
        num_samples: int,
        num_vectors: int | Sequence[int] | Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        noise: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Sequences of vectors, and the mask of what is not padding.

        Args:
            num_samples: how many, B.
            num_vectors: of each, one number or one per sample; drawn from :math:`p(n)` by default.
            temperature: of the codes' chances; 0 takes the most probable.
            top_p: draw among the most probable codes that have this share of the chances together.
            noise: by what the deviations within a code are multiplied; 0 takes its mean. With 1 everywhere the
                samples are those of :meth:`log_prob`'s density.

        Returns:
            ``z`` ``(B, n, P)``, 0 where padding, and ``mask`` ``(B, n)``.
        """
        if num_samples < 1 or num_samples != int(num_samples):
            raise ValueError(f"num_samples must be a whole number of at least 1, but got {num_samples}.")
        for name, value in (("temperature", temperature), ("noise", noise)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or positive, but got {value}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], but got {top_p}: 1 draws among all codes.")
        training = self.training
        self.eval()  # no dropout
        try:
            lengths = self._sampled_lengths(num_samples, num_vectors, generator)
            z = self._sample(lengths, temperature, top_p, noise, generator)
        finally:
            self.train(training)
        mask = torch.arange(z.shape[1], device=z.device) < lengths[:, None]
        return z.masked_fill(~mask[..., None], 0), mask

    def _sampled_lengths(
        self, num_samples: int, num_vectors: int | Sequence[int] | Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        device = self.centres.device
        if num_vectors is None:
            return 1 + torch.multinomial(self.log_lengths.exp(), num_samples, replacement=True, generator=generator)
        lengths = torch.as_tensor(num_vectors, device=device)
        if lengths.dim() > 1 or lengths.numel() not in (1, num_samples) or lengths.is_floating_point():
            raise ValueError(f"num_vectors must be a whole number or {num_samples} of them, but got {num_vectors!r}.")
        if not ((lengths >= 1) & (lengths <= self.max_length)).all():
            raise ValueError(f"num_vectors must be from 1 to {self.max_length}, but got {num_vectors!r}.")
        return lengths.expand(num_samples)

    def _sample(
        self, lengths: Tensor, temperature: float, top_p: float, noise: float, generator: torch.Generator | None
    ) -> Tensor:
        cache, drawn = self.transformer.empty_cache(), []
        before = torch.full_like(lengths, self.num_codes)
        for i in range(int(lengths.max())):
            chances = sharpened(self.next_log_chances(before, i, lengths, cache), temperature, top_p)
            code = torch.multinomial(chances, 1, generator=generator)[:, 0]
            spread = noise * (0.5 * self.logvar[code]).exp()
            residual = self.centres[code] + spread * torch.randn(
                spread.shape, generator=generator, device=spread.device
            )
            drawn.append(self.places[i] + residual)
            before = self._codes(residual)  # as log_prob reads it: not always the code it was drawn from
        return torch.stack(drawn, dim=1)

    @torch.no_grad()
    @in_single_precision
    def plausible(self, z: Tensor, mask: Tensor | None, strength: float) -> Tensor:
        r"""Plausible vectors near given ones ``(B, n, P)``: those of the codes that maximise

        .. math:: \sum_{i=1}^n \gamma \log p(k_i \mid k_{<i}, n) - \tfrac12 \lVert z_i - m_i - c_{k_i} \rVert_t^2

        as far as a beam search finds them. Distances are in units of the variances :math:`t^2` that draws from
        posteriors have around their codes, on average over the codes: with :math:`\gamma = 1` these are the most
        probable codes of draws. Needs :meth:`fit_draws`.

        Args:
            z, mask: as for :meth:`log_prob`.
            strength: :math:`\gamma`; 0 takes the nearest codes.

        Returns:
            :math:`m_i + c_{k_i}`, 0 where padding.
        """
        residuals, mask, lengths = self.without_places(z, mask)
        fit = gaussian_fit(residuals, self.centres, self.draws_logvar.exp().mean(0))
        codes = best_codes(self, fit, lengths, strength)
        return (self.places[: z.shape[1]] + self.centres[codes]).masked_fill(~mask[..., None], 0)

    # -------------------------------------------------------------------------------------------- checks
    def without_places(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What places do not explain of vectors, ``z - m``; their mask, and how many they are."""
        z, mask, lengths = self._checked(z, mask)
        return z - self.places[: z.shape[1]], mask, lengths

    def _checked(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors and mask as the prior has its own, and the numbers of vectors ``(B,)``.

        Raises:
            ValueError: the tensors do not fit the prior or each other.
        """
        if z.dim() != 3 or z.shape[-1] != self.width:
            raise ValueError(f"z must be (B, n, {self.width}), but has shape {tuple(z.shape)}.")
        if z.shape[1] > self.max_length:
            raise ValueError(
                f"z has {z.shape[1]} vectors a row, padding included, but this prior's max_length is "
                f"{self.max_length}. Cut the rows, or make a prior with a larger one."
            )
        mask = torch.ones_like(z[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != z.shape[:2]:
            raise ValueError(f"mask must be {tuple(z.shape[:2])} as z has it, but has shape {tuple(mask.shape)}.")
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("mask has padding before a vector. Put the vectors of each row first.")
        lengths = mask.sum(-1)
        if (lengths < 1).any():
            raise ValueError("mask has a row without any vector. Leave such rows out: a text has at least one.")
        return z.to(self.centres), mask.to(self.centres.device), lengths.to(self.centres.device)
