"""The prior of the NVIB layer: its component, its total pseudo-count, and draws from it."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributions import gaussian_sample, log_dirichlet_sample


def prior_log_total(prior_log_alpha: Tensor, delta: float, length: Tensor) -> Tensor:
    r"""Log of the prior's total pseudo-count for ``length`` source vectors, elementwise, in the dtype of ``length``.

    .. math:: \log \alpha_0^p = \log(\alpha^p + \delta N_s)

    Source: ``delta``, Behjati, Fehr & Henderson (Findings of EMNLP 2023).
    """
    return torch.logaddexp(prior_log_alpha.to(length), torch.log(delta * length))


def prior_buffers(
    prior_mu: float | Tensor,
    prior_var: float | Tensor,
    prior_log_alpha: float | Tensor,
    prior_log_alpha_std: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    """A prior as :class:`PriorMixin` keeps it: its buffers, by name, or what is broadcast to them."""
    return {
        "prior_mu": torch.as_tensor(prior_mu),
        "prior_logvar": torch.as_tensor(prior_var, dtype=torch.float32).log(),
        "prior_log_alpha": torch.as_tensor(prior_log_alpha),
        "prior_log_alpha_std": torch.as_tensor(prior_log_alpha_std),
    }


class PriorMixin:
    """The prior of a module, in buffers: ``prior_mu``, ``prior_logvar`` ``(P,)``, ``prior_log_alpha`` ``(1,)``.

    ``prior_log_alpha_std`` ``(1,)`` is what an :func:`~nvib_hf.initialisation.empirical_prior` says of the deviation
    of log pseudo-counts. The module's ``delta`` is the share of the source length that the prior expects to keep.
    """

    delta: float

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
        """Replace the prior, for instance by an :func:`~nvib_hf.initialisation.empirical_prior`."""
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
