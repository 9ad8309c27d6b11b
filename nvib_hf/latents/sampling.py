"""Latents from the prior, around others, between them, and in fewer vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..layers.distributions import gaussian_sample, log_dirichlet_sample
from ..layers.merging import Limit
from ..layers.settings import check_choice
from .checks import check_count, check_latents, check_number
from .latents import NvibLatents, interpolate
from .learned import HasLatentPrior, LearnedPriorMixin, sample_from_learned_prior
from .merging import merged
from .refining import check_refine, refined, refined_path
from .transport import interpolate_by_transport

if TYPE_CHECKING:
    from ..configuration_nvib import NvibConfig
    from ..layers.nvib import NvibLayer


class HasNvib(Protocol):
    """What latents need of a model: its NVIB layer, and where and in which dtype its tensors are."""

    nvib: NvibLayer

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


class HasAttention(HasNvib, Protocol):
    """What merging needs beside: how the decoder's attention reads latents."""

    scale: float
    config: NvibConfig


def sample_from_prior(
    model: HasNvib,
    num_samples: int,
    num_vectors: int | Sequence[int] | Tensor,
    generator: torch.Generator | None = None,
) -> NvibLatents:
    """Latents of an NVIB model from its prior, with weights from the prior's Dirichlet.

    Args:
        num_samples: how many.
        num_vectors: vectors of each, one number or one per sample, at least 1.

    Raises:
        ValueError: counts below 1, or not one per sample.

    Source: Henderson & Fehr (ICLR 2023).
    """
    check_count("num_samples", num_samples)
    counts = check_counts(num_samples, num_vectors).to(model.device).expand(num_samples)
    padding = torch.arange(int(counts.max()), device=model.device) >= counts[:, None]
    z, log_pi = model.nvib.sample_prior(padding, generator)
    scale = torch.full_like(log_pi[:, 0], model.nvib.scale)
    return NvibLatents(z=z.to(model.dtype), log_pi=log_pi, attention_mask=~padding, scale=scale)


def vary(
    latents: NvibLatents,
    temperature: float = 1.0,
    redraw_weights: bool = False,
    generator: torch.Generator | None = None,
) -> NvibLatents:
    r"""A draw around each latent: the posterior's own noise, weaker or stronger.

    .. math:: z_i = \mu_i + \tau \sigma_i \epsilon, \qquad \epsilon \sim \mathrm{Normal}(0, I)

    Args:
        latents: mixtures, not samples: of ``encode(sample=False)``, or between such. ``latents[[0] * 10]`` for ten
            draws around one.
        temperature: :math:`\tau \ge 0`; 1 draws what training with ``kappa=1`` draws, 0 leaves the means.
        redraw_weights: draw them too, from the posterior's Dirichlet, in place of the expected ones.
        generator: for the draws, on the latents' device.

    Raises:
        ValueError: a temperature below 0 or infinite; latents without variances, or without pseudo-counts where the
            weights shall be drawn.
    """
    temperature = check_number("temperature", temperature)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or positive, but got {temperature}.")
    if latents.logvar is None:
        raise ValueError("Latents without logvar are points and have no noise to draw. Use encode(..., sample=False).")
    if redraw_weights and latents.log_alpha is None:
        raise ValueError(
            "redraw_weights needs log_alpha, which only latents of texts have. Use encode(..., sample=False), or "
            "leave the weights as they are."
        )
    latents = latents.compact()
    keep = latents.log_pi > -math.inf
    log_tau = math.log(temperature) if temperature > 0 else -math.inf
    z = gaussian_sample(latents.z, latents["logvar"] + 2 * log_tau, keep, generator)
    log_pi = log_dirichlet_sample(latents["log_alpha"], keep, generator) if redraw_weights else latents.log_pi
    return NvibLatents(z=z, log_pi=log_pi, attention_mask=keep, scale=latents.scale)


def blend(
    latents: NvibLatents, num_samples: int, num_parents: int = 2, generator: torch.Generator | None = None
) -> NvibLatents:
    r"""New latents somewhere between ``num_parents`` different ones of a corpus, by transport.

    The parents are drawn at random, their weights uniformly from the simplex (for two: :math:`t` from [0, 1]). From
    the first parent the path goes towards the second, from there towards the third, and so on, each time as far as
    makes the weights come true.

    Args:
        latents: of at least ``num_parents`` texts (:func:`~nvib_hf.concatenate_latents` joins batches).
        num_samples: how many new ones.
        num_parents: at least 2. Components add up: a blend has as many as its parents together, less one for each
            step.
        generator: for the draws, on the latents' device.

    Raises:
        ImportError: without the package POT.
        ValueError: counts that are too small, or more parents than latents.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("num_parents", num_parents, 2)):
        check_count(name, value, least)
    if num_parents > latents.batch_size:
        raise ValueError(
            f"num_parents is {num_parents}, but there are only {latents.batch_size} latents to choose from."
        )
    size, device = latents.batch_size, latents.device
    orders = [torch.randperm(size, generator=generator, device=device) for _ in range(num_samples)]
    parents = torch.stack([order[:num_parents] for order in orders])
    shares = torch.empty(num_samples, num_parents, device=latents.device).exponential_(generator=generator)
    steps = shares / shares.cumsum(-1)  # exponentials, once normalised, are uniform on the simplex
    blended = latents[parents[:, 0]]
    for parent, weight in zip(parents.T[1:], steps.T[1:], strict=True):
        blended = interpolate_by_transport(blended, latents[parent], weight)
    return blended


INTERPOLATIONS = {"transport": interpolate_by_transport, "mixture": interpolate}


class NvibLatentsMixin(LearnedPriorMixin):
    """For a model whose NVIB layer is ``nvib``."""

    @torch.no_grad()
    def sample_latents(
        self: HasLatentPrior,
        num_samples: int,
        num_vectors: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        noise: float = 0.0,
    ) -> NvibLatents:
        """Latents from the prior: new text from nothing.

        From the learned prior where :meth:`fit_latent_prior` has made one. Otherwise from the one that the bottleneck
        was trained with: independent vectors, see :func:`~nvib_hf.latents.sampling.sample_from_prior`.

        Args:
            num_samples: how many.
            num_vectors: vectors of each, the prior's component included, one number or one per sample. A learned prior
                draws them by itself; without one they are required.
            temperature, top_p, noise: of the learned prior alone, see
                :meth:`LatentPrior.sample <nvib_hf.layers.latent_prior.LatentPrior.sample>`. Lower temperatures and
                shares write more usual texts; with ``noise=0`` each vector is the mean of its code, with 1 a draw.
            generator: for the draws, on the model's device.

        Raises:
            ValueError: counts that cannot be; no ``num_vectors``, or settings of a learned prior, without one.
        """
        if self.latent_prior is not None:
            check_count("num_samples", num_samples)
            counts = None if num_vectors is None else check_counts(num_samples, num_vectors)
            return sample_from_learned_prior(self, num_samples, counts, temperature, top_p, noise, generator)
        if num_vectors is None or (temperature, top_p, noise) != (1.0, 1.0, 0.0):
            what = "draw num_vectors" if num_vectors is None else "heed temperature, top_p or noise"
            raise ValueError(
                f"Only a learned prior can {what}, and this model has none. Call model.fit_latent_prior(...) first, "
                f"or say how many vectors and no more: sample_latents({num_samples}, num_vectors=20)."
            )
        return sample_from_prior(self, num_samples, num_vectors, generator)

    def interpolate_latents(
        self: HasLatentPrior,
        first: NvibLatents,
        second: NvibLatents,
        weight: float | Tensor,
        method: str = "transport",
        *,
        refine: float = 0.0,
    ) -> NvibLatents:
        """Between two batches of latents: ``weight`` 0 is ``first``, 1 is ``second``; a number or ``(B,)``.

        A batch of one is repeated: ``weight=torch.linspace(0, 1, 5)`` between two latents is a walk of five steps.

        Args:
            method: ``"transport"`` moves the components of the one to those of the other
                (:func:`~nvib_hf.latents.transport.interpolate_by_transport`); ``"mixture"`` puts both side by side, as
                published (:func:`~nvib_hf.latents.latents.interpolate`).
            refine: how much a learned prior counts against closeness; 0 asks none. Otherwise the way goes through the
                texts from their beginnings on, every latent on it is brought to where texts are, and ``method`` does
                not count (:func:`~nvib_hf.latents.refining.refined_path`). Such latents are points. 3 was measured
                (``examples/experiments/results/latent_walks.md``).

        Raises:
            ImportError: ``"transport"`` without the package POT.
            ValueError: another method; weights outside [0, 1]; batch sizes that do not fit; latents of another model;
                ``refine`` below 0, without a learned prior, or for latents longer than it knows.
        """
        check_choice("method", method, tuple(INTERPOLATIONS))
        for latents in (first, second):
            check_latents(latents, self.nvib)
        if refine := check_refine(refine):
            return refined_path(self, first, second, weight, refine)
        return INTERPOLATIONS[method](first, second, weight)

    @torch.no_grad()
    def vary_latents(
        self: HasLatentPrior,
        latents: NvibLatents,
        temperature: float = 1.0,
        redraw_weights: bool = False,
        generator: torch.Generator | None = None,
        *,
        refine: float = 0.0,
    ) -> NvibLatents:
        """New text close to old one: a draw around each latent; see :func:`~nvib_hf.latents.sampling.vary`.

        Args:
            refine: above 0, a learned prior brings the draw back to where texts are
                (:meth:`LatentPrior.plausible <nvib_hf.layers.latent_prior.LatentPrior.plausible>`), the more the
                higher; the result is points of one weight all. ``latents`` must stand in the order of their texts.
        """
        check_latents(latents, self.nvib)
        refine = check_refine(refine)
        varied = vary(latents, temperature, redraw_weights, generator)
        return refined(self, varied, refine) if refine else varied

    def merge_latents(
        self: HasAttention,
        latents: NvibLatents,
        *,
        num_vectors: int | Sequence[int] | Tensor | None = None,
        share: Limit | None = None,
        cost: Limit | None = None,
        order: str = "neighbours",
    ) -> NvibLatents:
        """The same latents in fewer vectors: what is close is replaced by its mean, with the mass of all.

        Dropping a vector loses its mass, merging it does not. Exact for equal vectors, else to first order of
        attention; differentiable in the vectors. Works for posteriors and samples, of any model, without training. Of
        samples, the draws themselves decide what is merged, and their noise hides what is close. In training, use
        ``encode(..., merge_share=)``: there the posterior decides.

        Args:
            num_vectors: how many to leave in each row; more than there are leave all.
            share: of each row's vectors to leave, in (0, 1].
            cost: merge as long as a pair costs at most this; 0 merges equal vectors alone. Exactly one of the three is
                given, as a number or one per row. Padding, dropped vectors and the prior's component do not count, and
                stay out; in latents that come from no text all may be merged.
            order: ``"neighbours"`` merges what is at most four places apart, ``"any"`` any two, which takes longer.

        Returns:
            Latents of which ``num_vectors`` counts merged vectors and ``prop_vectors`` their share of the source
            length. The KLs are those that were charged.

        Raises:
            ValueError: none or several of the three; values outside their range; latents of another model.

        Source: :func:`nvib_hf.layers.merging.merge`.
        """
        check_latents(latents, self.nvib)
        limits = {"num_vectors": num_vectors, "share": share, "cost": cost}
        fewer: NvibLatents = merged(latents, self.scale, self.config.evaluation, **limits, order=order)
        return fewer

    @torch.no_grad()
    def blend_latents(
        self: HasNvib,
        latents: NvibLatents,
        num_samples: int,
        num_parents: int = 2,
        generator: torch.Generator | None = None,
    ) -> NvibLatents:
        """New text between old ones: random latents on the way; see :func:`~nvib_hf.latents.sampling.blend`."""
        check_latents(latents, self.nvib)
        return blend(latents, num_samples, num_parents, generator)


def check_counts(num_samples: int, num_vectors: int | Sequence[int] | Tensor) -> Tensor:
    """Numbers of vectors as a tensor, of one for all latents or one for each; ValueError for what they cannot be."""
    try:
        counts = torch.as_tensor(num_vectors)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        counts = torch.zeros(1)
    whole = not counts.is_floating_point() and counts.dtype != torch.bool
    if not whole or (counts < 1).any() or (counts >= 2**31).any():
        raise ValueError(f"num_vectors must be whole numbers of at least 1, but got {num_vectors!r}.")
    if counts.dim() > 1 or (counts.dim() == 1 and len(counts) != num_samples):
        raise ValueError(
            f"num_vectors must be one number or one for each of num_samples={num_samples}, but got {num_vectors}."
        )
    return counts
