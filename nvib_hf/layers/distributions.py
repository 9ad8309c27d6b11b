"""The posterior over mixtures, and draws from it: log-Gamma, log-Dirichlet and Gaussian samples with gradients.

Everything that concerns weights stays in log space, so a component whose pseudo-count is ``exp(-1e6)``
gets a log-weight of that order instead of the floor that Gamma samplers return when they underflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# In this range of log(alpha) the noise of a Gamma draw is exact. Below it exp(-log_alpha), the derivative of
# log(u) / alpha, is close to the end of fp32's range. Above it the relative deviation of a draw is below
# exp(-15 / 2) = 6e-4, and fp32 begins to round it away. Only the noise is clamped, never the log-weight itself.
# (The bound is -61, so that the draw is exact at -60: from PyTorch 2.14 on a clamp has no gradient at its bounds.)
MIN_LOG_ALPHA = -61.0

MAX_LOG_ALPHA = 15.0

# exp of more overflows fp32. Only reported numbers are clamped; all computations use log_alpha.
LOG_ALPHA_REPORTED_MAX = 85.0


def noise(kind: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``torch.rand`` or ``torch.randn`` with the shape, dtype and device of a tensor.

    Without a generator the argument is left out. If it were passed, even as None, varying lengths would not compile.
    """
    given = {} if generator is None else {"generator": generator}
    return kind(like.shape, dtype=like.dtype, device=like.device, **given)


def log_of_positive(x: Tensor) -> Tensor:
    """``log(x)``. Where ``x`` is not above 0, the value is ``-inf`` and the gradient is 0."""
    none = x <= 0
    return x.masked_fill(none, 1).log().masked_fill(none, -math.inf)


def log_gamma_sample(log_alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Logarithm of a Gamma draw, with gradients with respect to ``log_alpha``.

    .. math::
        \log g = \log\alpha + (\log\tilde g - \log\alpha_c), \qquad
        \log\tilde g = \begin{cases}
            \log g', & g' \sim \mathrm{Gamma}(\alpha_c, 1) & \text{if } \alpha_c \ge 1 \\
            \log g' + \log(u) / \alpha_c, & g' \sim \mathrm{Gamma}(\alpha_c + 1, 1),\;
                u \sim \mathrm{Uniform}(0, 1) & \text{if } \alpha_c < 1
        \end{cases}

    :math:`\log\alpha_c` is :math:`\log\alpha` clamped to ``[MIN_LOG_ALPHA, MAX_LOG_ALPHA]``; in that range
    ``exp`` of the result is distributed as Gamma(alpha, 1). Outside of it the noise is that of the nearer
    bound and differences of log-weights stay exact. The gradient through ``g'`` is the implicit
    reparameterisation gradient. In float32 values and gradients are finite for every ``log_alpha`` in
    ``[-60, 60]`` and far beyond.

    Args:
        log_alpha: logarithm of the pseudo-counts, any shape; ``-inf`` gives ``-inf``.
        generator: source of randomness, on ``log_alpha``'s device; None for PyTorch's global one.

    Returns:
        The shape of ``log_alpha``; float64 if that is float64, else float32.

    Source: implicit gradients, Figurnov, Mohamed & Mnih (NeurIPS 2018); the form below 1, Marsaglia & Tsang
    (ACM TOMS 2000).
    """
    dtype = torch.promote_types(log_alpha.dtype, torch.float32)
    log_alpha = log_alpha.to(dtype)
    log_alpha_c = log_alpha.clamp(MIN_LOG_ALPHA, MAX_LOG_ALPHA)
    alpha_c = log_alpha_c.exp()
    below_one = alpha_c < 1

    # rand is 0 once in 2**24 draws of float32. Then log(u) / alpha would be 0 for any alpha, and a component without
    # weight would get some. Half a step of rand's grid keeps u below 1.
    log_u = torch.log1p(-noise(torch.rand, log_alpha, generator))
    log_u = log_u.clamp(max=-torch.finfo(dtype).eps / 4)
    # Private, but torch.distributions uses it too, and no other sampler has implicit gradients and takes a generator.
    g = torch._standard_gamma(torch.where(below_one, alpha_c + 1, alpha_c), generator=generator)
    log_g = g.log() + torch.where(below_one, log_u * torch.exp(-log_alpha_c), 0.0)
    return log_alpha + (log_g - log_alpha_c)


def log_dirichlet_sample(
    log_alpha: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    r"""Logarithm of a Dirichlet draw over the last dimension, as normalised Gammas.

    .. math:: \log\pi_i = \log g_i - \log \sum_j g_j, \qquad g_i \sim \mathrm{Gamma}(\alpha_i, 1)

    Args:
        log_alpha: logarithm of the pseudo-counts, ``(..., N)``.
        mask: True where a component is kept, ``(..., N)``; None keeps all. Every example must keep at least
            one component with finite ``log_alpha`` (the prior's is never masked).
        generator: source of randomness, on ``log_alpha``'s device; None for PyTorch's global one.

    Returns:
        ``(..., N)``, normalised over the kept components; exactly ``-inf``, with a gradient of 0, where
        masked, whatever ``log_alpha`` is there. float64 if ``log_alpha`` is float64, else float32.

    Source: Henderson & Fehr (ICLR 2023), sampling from the posterior.
    """
    if mask is None:
        return log_gamma_sample(log_alpha, generator).log_softmax(-1)
    log_g = log_gamma_sample(log_alpha.masked_fill(~mask, 0.0), generator).masked_fill(~mask, -math.inf)
    # Masked again for the gradient: the gradient of a masked component must not reach the others.
    return log_g.log_softmax(-1).masked_fill(~mask, -math.inf)


def gaussian_sample(
    mu: Tensor,
    logvar: Tensor,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    repeats: int = 1,
) -> Tensor:
    r"""Gaussian draws with diagonal covariance.

    .. math:: z = \mu + \sigma \epsilon, \qquad \epsilon \sim \mathrm{Normal}(0, I)

    Args:
        mu: means, ``(..., N, P)``.
        logvar: log variances, ``(..., N, P)``; ``-inf`` is a variance of 0 and gives ``mu`` itself.
        mask: True where a vector is kept, ``(..., N)``; None keeps all.
        generator: source of randomness, on ``mu``'s device; None for PyTorch's global one.
        repeats: how many draws of each vector, side by side.

    Returns:
        ``(..., N * repeats, P)`` in ``mu``'s dtype; exactly 0, with a gradient of 0, where masked, whatever ``mu``
        and ``logvar`` are there.

    Source: Kingma & Welling (ICLR 2014).
    """
    if mask is not None:
        masked = ~mask.unsqueeze(-1)  # (..., N, 1)
        mu, logvar = mu.masked_fill(masked, 0.0), logvar.masked_fill(masked, -math.inf)
    mu, sigma = mu.unsqueeze(-2), torch.exp(0.5 * logvar).unsqueeze(-2)  # (..., N, 1, P)
    epsilon = noise(torch.randn, mu.expand(*mu.shape[:-2], repeats, -1), generator)
    return (mu + sigma * epsilon).to(mu.dtype).flatten(-3, -2)


# ------------------------------------------------------------------------------------------------ the posterior
class Posterior(NamedTuple):
    """Parameters of the posterior, batch-first. Component 0 is the prior's, which is never masked.

    ``mu``, ``logvar`` ``(B, Ns + 1, P)``; ``log_alpha`` ``(B, Ns + 1)`` in fp32 or better; ``mask``
    ``(B, Ns + 1)``, True where a component is no padding; ``keep``, True where it is neither padding nor dropped;
    ``keep_logit`` ``(B, Ns + 1)``, above 0 to keep, ``+inf`` for the prior's, ``None`` if nothing can be dropped.
    """

    mu: Tensor
    logvar: Tensor
    log_alpha: Tensor
    mask: Tensor
    keep: Tensor
    keep_logit: Tensor | None = None

    def repeated(self, kappa: int) -> Posterior:
        """Parameters for ``kappa`` vectors per component, next to each other, with ``alpha_i / kappa`` each."""
        repeats = {name: x.repeat_interleave(kappa, dim=1) for name, x in self._asdict().items() if x is not None}
        repeated = Posterior(**repeats)
        return repeated._replace(log_alpha=repeated.log_alpha - math.log(kappa))

    def log_mean_pi(self) -> Tensor:
        """Log of the expected weights ``alpha / sum(alpha)`` over the kept components, ``(B, Nl)``."""
        return self.log_alpha.masked_fill(~self.keep, float("-inf")).log_softmax(-1)

    def draw_log_g(self, generator: torch.Generator | None = None) -> Tensor:
        """Log weights ``(B, Ns + 1)`` that are not normalised, because the softmax of an attention does that.

        So the weight of a position does not depend on later positions.
        """
        log_g = log_gamma_sample(self.log_alpha.masked_fill(~self.keep, 0), generator)
        return log_g.masked_fill(~self.keep, -math.inf)

    def statistics(self) -> dict[str, Tensor]:
        """For each example ``(B,)``: ``num_vec``, ``prop_vec``, ``effective_num_vec``, ``alpha0`` (see the layer)."""
        num_vec = self.keep[:, 1:].sum(-1).float()
        length = self.mask[:, 1:].sum(-1).clamp(min=1)
        log_alpha = self.log_alpha.detach().masked_fill(~self.mask, float("-inf"))
        mean_pi = self.log_alpha.detach().masked_fill(~self.keep, float("-inf")).log_softmax(-1).exp()
        entropy = torch.special.entr(mean_pi).sum(-1)
        return {
            "num_vec": num_vec,
            "prop_vec": num_vec / length,
            "effective_num_vec": entropy.exp(),
            "alpha0": log_alpha.logsumexp(-1).clamp(max=LOG_ALPHA_REPORTED_MAX).exp(),
        }


class NvibOutput(NamedTuple):
    """The layer's output for a batch.

    Args:
        z: vectors ``(B, Nl, P)``: a sample, or the means.
        log_pi: log weights ``(B, Nl)`` of the vectors: a sample, or the expected weights.
        posterior: parameters of the ``Ns + 1`` components.
        drawn: parameters of the ``Nl`` vectors; for means, the posterior itself.
        kappa: vectors drawn per component, ``Nl = kappa * (Ns + 1)``; ``None`` for means, one per component.
        kl_gaussian, kl_dirichlet: ``(B,)``, as the layer weighs them; ``None`` if you did not ask for them.
        relaxed_share: ``(B,)``, :func:`~nvib_hf.layers.dropping.relaxed_share`; ``None`` if you did not ask for KLs,
            or if nothing can be dropped.
    """

    z: Tensor
    log_pi: Tensor
    posterior: Posterior
    drawn: Posterior
    kappa: int | None = None
    kl_gaussian: Tensor | None = None
    kl_dirichlet: Tensor | None = None
    relaxed_share: Tensor | None = None
