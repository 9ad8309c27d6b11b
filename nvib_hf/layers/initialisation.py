"""The prior of the NVIB layer: its component, its total pseudo-count, and draws from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .denoising_attention import attended_mixture
from .distributions import gaussian_sample, log_dirichlet_sample
from .kl import prior_log_total
from .settings import checked


def prior_buffers(
    prior_mu: float | Tensor,
    prior_var: float | Tensor,
    prior_log_alpha: float | Tensor,
    prior_log_alpha_std: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    """A prior as the buffers of :class:`PriorMixin`, by name. Values can be broadcast to the buffers."""
    return {
        "prior_mu": torch.as_tensor(prior_mu),
        "prior_logvar": torch.as_tensor(prior_var, dtype=torch.float32).log(),
        "prior_log_alpha": torch.as_tensor(prior_log_alpha),
        "prior_log_alpha_std": torch.as_tensor(prior_log_alpha_std),
    }


class PriorMixin(nn.Module):
    """The prior of a module, in buffers: ``prior_mu``, ``prior_logvar`` ``(P,)``, ``prior_log_alpha`` ``(1,)``.

    ``prior_log_alpha_std`` ``(1,)`` is the deviation of log pseudo-counts, from an :func:`empirical_prior`. The
    module's ``delta`` is the share of the source length that the prior expects to keep.
    """

    delta: float
    prior_mu: Tensor
    prior_logvar: Tensor
    prior_log_alpha: Tensor
    prior_log_alpha_std: Tensor

    def make_prior(self, width: int) -> None:
        """Register the buffers, without values."""
        for name, size in (("mu", width), ("logvar", width), ("log_alpha", 1), ("log_alpha_std", 1)):
            self.register_buffer(f"prior_{name}", torch.empty(size))

    @torch.no_grad()
    def set_prior(
        self,
        prior_mu: float | Tensor,
        prior_var: float | Tensor,
        prior_log_alpha: float | Tensor,
        prior_log_alpha_std: float | Tensor = 1.0,
    ) -> None:
        """Set the prior, for instance to an :func:`~nvib_hf.layers.initialisation.empirical_prior`."""
        for name, value in prior_buffers(prior_mu, prior_var, prior_log_alpha, prior_log_alpha_std).items():
            self.get_buffer(name).copy_(value)

    def prior_log_total(self, source_length: Tensor) -> Tensor:
        """:func:`prior_log_total` of this prior."""
        return prior_log_total(self.prior_log_alpha, self.delta, source_length)

    def sample_prior(self, padding_mask: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        r"""Vectors and weights from the prior, for a mask ``(B, n)``, True = padding.

        .. math::
            z \sim \mathcal N(\mathrm{prior\_mu}, \mathrm{prior\_var}), \qquad
            \pi \sim \mathrm{Dirichlet}\bigl((\mathrm{prior\_alpha} + \delta (n - 1)) / n, \dots\bigr)

        Returns:
            ``z`` ``(B, n, P)`` and ``log_pi`` ``(B, n)``.
        """
        mask = ~padding_mask.bool()
        shape = (*mask.shape, self.prior_mu.shape[0])
        z = gaussian_sample(self.prior_mu.expand(shape), self.prior_logvar.expand(shape), mask, generator)
        count = mask.sum(-1, keepdim=True).to(torch.float32)
        log_alpha = (self.prior_log_total((count - 1).clamp(min=0)) - count.log()).expand(mask.shape)
        return z, log_dirichlet_sample(log_alpha, mask, generator)


# log(tau_sigma ** 2) for tau_sigma = 0: it has no effect in fp32, and training can still reduce its KL.
LOG_TAU_SIGMA_FLOOR = -46.0


def identity_parameters(
    prior_mu: Tensor,
    prior_logvar: Tensor,
    prior_log_alpha: Tensor,
    prior_log_alpha_std: Tensor,
    scale: float,
    tau_alpha: float = 10.0,
    tau_sigma: float = 0.0,
    tau_mu: float = 1.0,
) -> dict[str, Tensor]:
    r"""The parameters of :class:`~nvib_hf.Nvib`, by name, that pass a pretrained encoder's output on unchanged.

    .. math::
        W_\mu = \tau_\mu I, \quad b_\mu = (1 - \tau_\mu) \mu_0, \quad
        W_\sigma = 0, \quad b_\sigma = \log(\sigma_0^2 \tau_\sigma^2), \quad
        w_1 = 0, \quad w_2 = s / 2, \quad b = \tau_\alpha \max(\mathrm{std}, 1) + \max(c_0, 0)

    The prior's own score at a query of 0 is
    :math:`c_0 = \log \alpha_0 - \tfrac{s}{2} \sum (1 - r_0) \mu_0^2 - \tfrac12 \sum \log(1 + s \sigma_0^2)`. It is
    above 0 only for empirical priors. ``tau_alpha = 10, tau_sigma = 0, tau_mu = 1`` compute the pretrained model's
    function. Smaller ``tau_alpha`` and larger ``tau_sigma`` regularise it without any training.

    Args:
        prior_mu, prior_logvar: ``(P,)``; prior_log_alpha, prior_log_alpha_std: ``(1,)``.
        scale: the attention's scale ``s``.

    Raises:
        ValueError: ``tau_sigma`` below 0, ``tau_mu`` outside [0, 1].
    """
    for name, tau in (("tau_alpha", tau_alpha), ("tau_sigma", tau_sigma), ("tau_mu", tau_mu)):
        checked(name, tau)
    width = prior_mu.shape[0]
    prior_mu, prior_logvar = prior_mu.float(), prior_logvar.float()
    # What attention adds to the score of the prior's component. At a query of 0 this is the whole score.
    prior_score = attended_mixture(
        prior_mu[None, None], prior_logvar[None, None], prior_log_alpha.float()[None], scale
    ).bias[0]
    log_tau_sigma = 2 * math.log(tau_sigma) if tau_sigma > 0 else LOG_TAU_SIGMA_FLOOR
    weight = prior_mu.new_zeros(2 * width, width)
    weight[:width].fill_diagonal_(tau_mu)
    return {
        "mu_logvar.weight": weight,
        "mu_logvar.bias": torch.cat([(1 - tau_mu) * prior_mu, prior_logvar + log_tau_sigma]),
        "alpha_weight": torch.zeros_like(prior_mu),
        "alpha_quadratic": torch.full_like(prior_mu, 0.5 * scale),
        "alpha_bias": tau_alpha * prior_log_alpha_std.float().clamp(min=1) + prior_score.clamp(min=0),
    }


class EmpiricalPrior(NamedTuple):
    """Statistics of an encoder's output: arguments of :meth:`nvib_hf.Nvib.set_prior`."""

    prior_mu: Tensor
    prior_var: Tensor
    prior_log_alpha: Tensor
    prior_log_alpha_std: Tensor


class PriorStatistics:
    r"""Mean and variance of vectors, and of :math:`\tfrac{s}{2} \lVert x \rVert^2`, over batches.

    Args:
        scale: the attention's scale ``s``.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._count = 0
        self._mean: float | Tensor = 0.0
        self._deviation: float | Tensor = 0.0
        self._energies: list[Tensor] = []

    def add(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> None:
        """Add vectors ``(B, Ns, P)``, except where ``padding_mask`` ``(B, Ns)`` is True."""
        vectors = hidden_states.detach().flatten(0, 1).double()
        if padding_mask is not None:
            vectors = vectors[~padding_mask.flatten().bool()]
        if not len(vectors):
            return
        # Batches are combined by their means, because sums of squares would cancel.
        mean, count, total = vectors.mean(0), self._count, self._count + len(vectors)
        shift = mean - self._mean
        between = shift.square() * count * len(vectors) / total
        self._deviation = self._deviation + (vectors - mean).square().sum(0) + between
        self._mean = self._mean + shift * len(vectors) / total
        self._count = total
        self._energies.append(0.5 * self.scale * vectors.square().sum(-1))

    def prior(self, of: str = "the encoder's output") -> EmpiricalPrior:
        """The prior of the vectors added so far.

        Raises:
            ValueError: fewer than two vectors, or a channel that never varies.
        """
        if self._count < 2:
            raise ValueError(
                f"An empirical prior of {of} needs at least two source vectors, but the batches have {self._count}."
            )
        mean, energy = torch.as_tensor(self._mean), torch.cat(self._energies)
        variance = torch.as_tensor(self._deviation / (self._count - 1))
        if not (variance > 0).all():
            raise ValueError(
                f"{int((variance == 0).sum())} channels of {of} never vary over these batches, so the prior would "
                "have variance 0. Pass more text."
            )
        return EmpiricalPrior(mean.float(), variance.float(), energy.mean().float(), energy.std().float())


def empirical_prior(batches: Iterable[tuple[Tensor, Tensor | None]], scale: float) -> EmpiricalPrior:
    r"""Prior from the encoder's output over a corpus.

    It holds mean and unbiased variance of the vectors, and mean and deviation of
    :math:`\tfrac{s}{2} \lVert x \rVert^2`.

    Args:
        batches: pairs of encoder outputs ``(B, Ns, P)`` and masks ``(B, Ns)``, True = padding, or ``None``.
        scale: the attention's scale ``s``.

    Raises:
        ValueError: there are fewer than two vectors, or a channel never varies.
    """
    statistics = PriorStatistics(scale)
    for hidden_states, padding_mask in batches:
        statistics.add(hidden_states, padding_mask)
    return statistics.prior()
