r"""The NVIB layer: a set of vectors in, a posterior over mixture distributions out.

Source: Henderson & Fehr (ICLR 2023), section 3; Fehr & Henderson (COLM 2024) for the quadratic pseudo-counts and
the identity initialisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .denoising_attention import at_least_float32
from .distributions import gaussian_sample, log_dirichlet_sample
from .dropping import (
    KEEP_BIAS,
    LOG_ZERO,
    kept,
    learned_keep_logit,
    relaxed_share,
    relu_log_alpha,
)
from .initialisation import identity_parameters, prior_buffers
from .kl import kl_dirichlet, kl_gaussian
from .memory import NvibMemory
from .posterior import LOG_ALPHA_REPORTED_MAX, Posterior, dropping_sample
from .precision import SinglePrecisionMixin
from .validation import KL_WEIGHTS, check_choice, check_prior, check_settings


class Nvib(SinglePrecisionMixin, nn.Module):
    r"""Nonparametric variational information bottleneck.

    For every source vector :math:`x`

    .. math::
        \mu = W_\mu x + b_\mu, \qquad \log \sigma^2 = W_\sigma x + b_\sigma, \qquad
        \log \alpha = w_1^\top x + w_2^\top x^2 + b

    and the prior's component ``(prior_mu, prior_var, prior_alpha)`` is put in front. Training draws ``kappa``
    vectors a component, :math:`\pi \sim \mathrm{Dirichlet}(\alpha_i / \kappa)`,
    :math:`z \sim \mathcal N(\mu, \sigma^2)`; evaluation returns the posterior: one vector a component.

    Cast to half precision, the layer keeps the pseudo-counts' parameters and the prior in fp32.

    Args:
        size_in: width ``H`` of the encoder's output.
        size_out: width ``P`` of the latent vectors.
        prior_mu, prior_var: mean and variance of the prior's Gaussian, a number or a tensor of ``size_out``.
        prior_alpha: pseudo-count of the prior's component.
        delta: conditional prior, in [0, 1]: the share of the source length the prior expects to keep.
        kappa: vectors drawn for each component in training.
        alpha_activation: ``"exp"`` (with the quadratic term) or ``"relu"`` (``relu(w x + b)``, first paper; its
            gradient leaks below 0, so that a dead vector can come back).
        dropping: what decides which components are dropped (``pi = 0``), never the prior's. ``"threshold"``: an
            ``alpha_threshold`` under the pseudo-counts, if any. ``"relaxed"``, ``"hard"``: a keep logit
            ``w . layernorm(x) + b`` that is learned, above 0 for what evaluation keeps, in one of two ways of training
            it: :func:`~nvib_hf.dropping.relaxed_log_gate` for a decoder that is frozen,
            :func:`~nvib_hf.dropping.hard_draw` for one that is trained. All is kept at the start.
        alpha_threshold: components with a pseudo-count at or below it are dropped, in training as in evaluation. 0
            drops none under ``"exp"``.
        threshold_share: share of the training examples in which vectors are dropped, so that a dropped vector can
            come back through the others; 0 turns dropping off, in evaluation too. Kept in a buffer, for a schedule to
            set.
        kl_weights: how :meth:`kl_gaussian` weighs the components: ``"pseudo_counts"`` as published, or ``"drawn"``
            (see :func:`~nvib_hf.kl.kl_gaussian`).
        scale: the scale ``s`` of the attention that reads the latent, for the identity initialisation; ``None`` is
            that of one head as wide as the latent, ``size_out ** -0.5``.
        batch_first: ``(B, Ns, H)`` instead of ``(Ns, B, H)``, inputs and outputs.

    Raises:
        ValueError: for an argument outside its range.

    Example:
        >>> layer = Nvib(16, 16, prior_mu=0, prior_var=1, prior_alpha=1, delta=1, kappa=1)
        >>> latent = layer(torch.randn(5, 2, 16), torch.zeros(2, 5, dtype=torch.bool))
        >>> latent["z"].z.shape
        torch.Size([6, 2, 16])
        >>> layer.kl_gaussian(**latent).shape
        torch.Size([2])

    Source: Henderson & Fehr (ICLR 2023), section 3.1; the quadratic term: Fehr & Henderson (COLM 2024).
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        prior_mu: float | Tensor = 0.0,
        prior_var: float | Tensor = 1.0,
        prior_alpha: float = 1.0,
        delta: float = 1.0,
        kappa: int = 1,
        *,
        alpha_activation: str = "exp",
        dropping: str = "threshold",
        alpha_threshold: float = 0.0,
        threshold_share: float = 1.0,
        kl_weights: str = "pseudo_counts",
        scale: float | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        check_prior(prior_mu, prior_var, prior_alpha, size_out)
        check_settings(delta, kappa, alpha_activation, dropping, alpha_threshold, threshold_share, scale)
        self.size_in, self.size_out = size_in, size_out
        self.delta, self.kappa = delta, int(kappa)
        self.alpha_activation, self.dropping, self.alpha_threshold = alpha_activation, dropping, alpha_threshold
        check_choice("kl_weights", kl_weights, KL_WEIGHTS)
        self.kl_weights = kl_weights
        self.scale = size_out**-0.5 if scale is None else scale
        self.batch_first = batch_first
        self._log_zero = LOG_ZERO if alpha_activation == "relu" else -math.inf

        self.mu_logvar = nn.Linear(size_in, 2 * size_out)
        self.alpha_weight = nn.Parameter(torch.empty(size_in))
        self.alpha_quadratic = nn.Parameter(torch.empty(size_in)) if alpha_activation == "exp" else None
        self.alpha_bias = nn.Parameter(torch.empty(1))
        learned = dropping != "threshold"
        self.keep_weight = nn.Parameter(torch.empty(size_in)) if learned else None
        self.keep_bias = nn.Parameter(torch.empty(1)) if learned else None
        self.register_buffer("prior_mu", torch.empty(size_out))
        self.register_buffer("prior_logvar", torch.empty(size_out))
        self.register_buffer("prior_log_alpha", torch.empty(1))
        self.register_buffer("prior_log_alpha_std", torch.empty(1))
        self.register_buffer("threshold_share", torch.tensor(float(threshold_share)))
        self.set_prior(prior_mu, prior_var, math.log(prior_alpha))
        self.reset_parameters()

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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise for training from scratch: a random projection, variances of 1, pseudo-counts near 1."""
        self.mu_logvar.reset_parameters()
        self.mu_logvar.weight[self.size_out :].zero_()
        self.mu_logvar.bias[self.size_out :].zero_()
        nn.init.normal_(self.alpha_weight, std=0.1 * self.size_in**-0.5)
        if self.alpha_quadratic is not None:
            nn.init.zeros_(self.alpha_quadratic)
            nn.init.zeros_(self.alpha_bias)
        else:
            nn.init.ones_(self.alpha_bias)  # relu: positive, so that a gradient flows
        for name, value in self._everything_kept().items():
            self.get_parameter(name).copy_(value)

    def _everything_kept(self) -> dict[str, Tensor]:
        """Where a learned decision starts, by name."""
        if self.keep_weight is None:
            return {}
        return {
            "keep_weight": torch.zeros_like(self.keep_weight),
            "keep_bias": torch.full_like(self.keep_bias, KEEP_BIAS),
        }

    def identity_parameters(
        self, tau_alpha: float = 10.0, tau_sigma: float = 0.0, tau_mu: float = 1.0
    ) -> dict[str, Tensor]:
        """:func:`~nvib_hf.initialisation.identity_parameters` of this layer's prior and scale, by name.

        Without the quadratic term of ``alpha_activation="exp"`` every pseudo-count starts at ``tau_alpha``.

        Raises:
            ValueError: where the layer changes the width.
        """
        if self.size_in != self.size_out:
            raise ValueError(
                f"The identity initialisation needs size_in == size_out, but they are {self.size_in} and "
                f"{self.size_out}. Use reset_parameters() for a layer that changes the width."
            )
        prior = (self.prior_mu, self.prior_logvar, self.prior_log_alpha, self.prior_log_alpha_std)
        values = identity_parameters(*prior, self.scale, tau_alpha, tau_sigma, tau_mu)
        if self.alpha_quadratic is None:
            del values["alpha_quadratic"]
            values["alpha_bias"] = torch.full_like(values["alpha_bias"], tau_alpha)
        return values | self._everything_kept()

    @torch.no_grad()
    def identity_init(self, tau_alpha: float = 10.0, tau_sigma: float = 0.0, tau_mu: float = 1.0) -> None:
        """Hand the input on unchanged: set the parameters to :meth:`identity_parameters`."""
        for name, value in self.identity_parameters(tau_alpha, tau_sigma, tau_mu).items():
            self.get_parameter(name).copy_(value)

    def posterior(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Posterior:
        """Parameters of the posterior for ``(B, Ns, H)`` and an optional mask ``(B, Ns)``, True = padding."""
        batch, length, width = hidden_states.shape
        if width != self.size_in:
            raise ValueError(f"The input is {width} wide, but this layer was made with size_in={self.size_in}.")
        if padding_mask is not None and padding_mask.shape != (batch, length):
            raise ValueError(
                f"The padding mask has shape {tuple(padding_mask.shape)}, but the input needs {(batch, length)}: "
                "one entry a source vector, batch first."
            )
        mask = hidden_states.new_ones((batch, length), dtype=torch.bool)
        if padding_mask is not None:
            mask = ~padding_mask.bool()
            # Whatever stands in a padded position must not survive as 0 * inf, in a gradient either.
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        mu_logvar, log_alpha = self.mu_logvar(hidden_states), self._log_alpha(hidden_states)
        if padding_mask is not None:
            mu_logvar = mu_logvar.masked_fill(~mask[..., None], 0)
            log_alpha = log_alpha.masked_fill(~mask, 0)
        keep_logit = self._keep_logit(hidden_states, log_alpha)
        keep = mask & self._is_kept(log_alpha, keep_logit)
        if keep_logit is not None:
            keep_logit = torch.cat([keep_logit.new_full((batch, 1), math.inf), keep_logit], dim=1)
        first = mask.new_ones(batch, 1)
        prior = torch.cat([self.prior_mu, self.prior_logvar]).to(mu_logvar.dtype).expand(batch, 1, -1)
        mu, logvar = torch.cat([prior, mu_logvar], dim=1).chunk(2, dim=-1)
        return Posterior(
            mu=mu,
            logvar=logvar,
            log_alpha=torch.cat([self.prior_log_alpha.to(log_alpha.dtype).expand(batch, 1), log_alpha], dim=1),
            mask=torch.cat([first, mask], dim=1),
            keep=torch.cat([first, keep], dim=1),
            keep_logit=keep_logit,
        )

    def is_kept(self, hidden_states: Tensor) -> Tensor:
        """What evaluation keeps of ``(B, Ns, H)``, padding included: ``(B, Ns)``."""
        log_alpha = self._log_alpha(hidden_states)
        return self._is_kept(log_alpha, self._keep_logit(hidden_states, log_alpha))

    def _is_kept(self, log_alpha: Tensor, keep_logit: Tensor | None) -> Tensor:
        weighty = log_alpha > self._log_zero
        return weighty if keep_logit is None else weighty & kept(keep_logit, self.threshold_share)

    def _keep_logit(self, hidden_states: Tensor, log_alpha: Tensor) -> Tensor | None:
        """Above 0 for what is kept, ``(B, Ns)``, in fp32; ``None`` where nothing decides."""
        if self.keep_weight is not None:
            x = at_least_float32(hidden_states)
            return learned_keep_logit(x, self.keep_weight.to(x.dtype), self.keep_bias.to(x.dtype))
        return log_alpha - math.log(self.alpha_threshold) if self.alpha_threshold > 0 else None

    def relaxed_share(self, posterior: Posterior) -> Tensor | None:
        """:func:`~nvib_hf.dropping.relaxed_share` ``(B,)`` of the source vectors; ``None`` where nothing decides.

        While dropping is off it is 1 for a learned decision: nothing else would hold its logits up.
        """
        if posterior.keep_logit is None:
            return None
        share = relaxed_share(posterior.keep_logit[:, 1:], posterior.mask[:, 1:])
        return share if self.keep_weight is None else torch.where(self.threshold_share > 0, share, 1.0)

    def _log_alpha(self, hidden_states: Tensor) -> Tensor:
        """Log pseudo-counts ``(B, Ns)``: not part of the fused projection, whose dtype may be half.

        In fp32, as s/2 * ||x||^2 must cancel against the attention's bias.
        """
        x = at_least_float32(hidden_states)
        weight, bias = self.alpha_weight.to(x.dtype), self.alpha_bias.to(x.dtype)
        if self.alpha_quadratic is not None:
            return (x * (weight + self.alpha_quadratic.to(x.dtype) * x)).sum(-1) + bias
        activation = (x * weight).sum(-1) + bias
        return relu_log_alpha(activation)

    def sample_posterior(
        self, posterior: Posterior, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Posterior]:
        """Draw ``kappa`` vectors a component: ``z`` ``(B, Nl, P)``, ``log_pi`` ``(B, Nl)`` and their parameters.

        The parameters are those of the ``Nl = kappa * (Ns + 1)`` vectors, each with ``alpha_i / kappa``; the
        vectors of a component stand side by side.
        """
        if posterior.keep_logit is None or not self.training:
            repeated = posterior.repeated(self.kappa)
            log_pi = log_dirichlet_sample(repeated.log_alpha, repeated.keep, generator)
        else:
            weighty = posterior.mask & (posterior.log_alpha > self._log_zero)
            log_pi, repeated = dropping_sample(
                posterior, self.dropping, self.threshold_share, weighty, self.kappa, generator
            )
        z = gaussian_sample(posterior.mu, posterior.logvar, posterior.mask, generator, repeats=self.kappa)
        return z, log_pi, repeated

    def draw(
        self, posterior: Posterior, sample: bool, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Posterior]:
        """What a decoder attends to: a sample (:meth:`sample_posterior`), or the means and the expected weights."""
        if sample:
            return self.sample_posterior(posterior, generator)
        return posterior.mu, posterior.log_mean_pi(), posterior

    def forward(
        self,
        encoder_output: Tensor,
        src_key_padding_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, object]:
        """Encoder output to latent.

        Args:
            encoder_output: ``(Ns, B, H)``; ``(B, Ns, H)`` if ``batch_first``.
            src_key_padding_mask: ``(B, Ns)``, True = padding.
            generator: for the draws of training.

        Returns:
            A dict with ``z``: the :class:`~nvib_hf.memory.NvibMemory` a decoder takes as memory; ``pi``,
            ``alpha``, ``log_alpha`` ``(Nl, B, 1)``; ``mu``, ``logvar`` ``(Nl, B, P)`` (``(B, Nl, ...)`` if
            ``batch_first``); ``memory_key_padding_mask`` ``(B, Nl)``, True = padding; ``keep`` ``(B, Nl)``, True =
            neither padding nor dropped; ``batch_first``; and, over the batch, ``avg_num_vec`` (kept vectors, the
            prior's excluded), ``avg_prop_vec`` (their share of the source length), ``avg_effective_num_vec``
            (``exp(entropy(pi))``) and ``avg_alpha0``. In training ``Nl = kappa * (Ns + 1)`` and ``alpha`` is each
            vector's ``alpha_i / kappa``, else ``Nl = Ns + 1``.
        """
        hidden_states = encoder_output if self.batch_first else encoder_output.transpose(0, 1)
        posterior = self.posterior(hidden_states, src_key_padding_mask)
        statistics = posterior.statistics()
        z, log_pi, posterior = self.draw(posterior, self.training, generator)
        return {
            **self._latent(z, log_pi, posterior),
            **{f"avg_{name}": value.mean() for name, value in statistics.items()},
        }

    def _latent(self, z: Tensor, log_pi: Tensor, posterior: Posterior) -> dict[str, object]:
        """The latent's entries, in the layer's layout."""
        order = (lambda x: x) if self.batch_first else (lambda x: x.transpose(0, 1))
        mu, logvar, log_alpha = (order(x) for x in (posterior.mu, posterior.logvar, posterior.log_alpha))
        memory = NvibMemory(order(z), order(log_pi.exp()), mu, logvar, log_pi=order(log_pi))
        if posterior.dropped is not None:
            memory.dropped, memory.full_log_pi = order(posterior.dropped), order(posterior.full_log_pi)
        log_alpha, padding = log_alpha[..., None], order(~posterior.mask)[..., None]
        alpha = log_alpha.clamp(max=LOG_ALPHA_REPORTED_MAX).exp()
        return {
            "z": memory,
            "pi": memory.pi,
            "mu": mu,
            "logvar": logvar,
            "alpha": alpha.masked_fill(padding | (log_alpha <= self._log_zero), 0),
            "log_alpha": log_alpha.masked_fill(padding, float("-inf")),
            "memory_key_padding_mask": ~posterior.mask,
            "keep": posterior.keep,
            "batch_first": self.batch_first,
        }

    def sample_prior(self, padding_mask: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        r"""Vectors and weights from the prior, for a mask ``(B, n)``, True = padding.

        .. math::
            z \sim \mathcal N(\mathrm{prior\_mu}, \mathrm{prior\_var}), \qquad
            \pi \sim \mathrm{Dirichlet}\bigl((\mathrm{prior\_alpha} + \delta (n - 1)) / n, \dots\bigr)

        Returns:
            ``z`` ``(B, n, P)`` and ``log_pi`` ``(B, n)``.
        """
        mask = ~padding_mask.bool()
        shape = (*mask.shape, self.size_out)
        z = gaussian_sample(self.prior_mu.expand(shape), self.prior_logvar.expand(shape), mask, generator)
        count = mask.sum(-1, keepdim=True).to(torch.float32)
        log_total = self.prior_log_total(count - 1)
        log_alpha = (log_total - count.log()).expand(mask.shape)
        return z, log_dirichlet_sample(log_alpha, mask, generator)

    def prior_log_total(self, source_length: Tensor) -> Tensor:
        """``log(prior_alpha + delta * Ns)``, elementwise."""
        expected = (self.delta * source_length.clamp(min=0)).log()
        return torch.logaddexp(self.prior_log_alpha.to(expected), expected)

    def sample(
        self,
        number_samples: int,
        memory_key_padding_mask: Tensor,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> NvibMemory:
        """A memory drawn from the prior, weights included; the same to a decoder in ``train()`` and ``eval()``.

        Args:
            number_samples: batch size ``B``.
            memory_key_padding_mask: ``(B, Ns)``, True = padding: exactly its ``Ns`` vectors are drawn, at least
                one a row must not be padding.
            device: where to; the layer's own by default.
            generator: for the draws, on the layer's device.

        Returns:
            ``z``, ``mu`` ``(Ns, B, P)``, the same tensor, ``logvar`` of ``-inf``, ``pi`` ``(Ns, B, 1)``;
            ``(B, Ns, ...)`` if ``batch_first``.

        Raises:
            ValueError: a mask that has not ``number_samples`` rows, or a row without any vector.
        """
        if memory_key_padding_mask.shape[0] != number_samples:
            raise ValueError(
                f"memory_key_padding_mask has {memory_key_padding_mask.shape[0]} rows, but number_samples is "
                f"{number_samples}. Give one row a sample."
            )
        if memory_key_padding_mask.bool().all(-1).any():
            raise ValueError("memory_key_padding_mask has a row that is all padding. Leave it at least one vector.")
        z, log_pi = self.sample_prior(memory_key_padding_mask.to(self.prior_mu.device), generator)
        z, log_pi = (x.to(device or x.device) for x in (z, log_pi))
        if not self.batch_first:
            z, log_pi = z.transpose(0, 1), log_pi.transpose(0, 1)
        logvar = torch.full_like(z, float("-inf"))
        return NvibMemory(z, log_pi.exp(), z, logvar, log_pi=log_pi, points=True)

    def kl(self, posterior: Posterior, drawn: Posterior, kappa: int) -> tuple[Tensor, Tensor]:
        """Both divergences ``(B,)`` of a posterior, ``drawn`` being that of its ``kappa`` vectors a component.

        The Gaussians' is computed once a component: its vectors share one Gaussian, and its pseudo-count.
        """

        def counts(of: Posterior) -> dict[str, object]:
            return {"log_alpha": of.log_alpha, "memory_key_padding_mask": ~of.mask, "batch_first": True}

        keep = drawn.keep[:, ::kappa]  # in training the threshold may have spared some
        gaussian = self.kl_gaussian(
            kappa=kappa, mu=posterior.mu, logvar=posterior.logvar, keep=keep, **counts(posterior)
        )
        return gaussian, self.kl_dirichlet(kappa=kappa, **counts(drawn))

    def kl_gaussian(self, kappa: int | None = None, **latent: object) -> Tensor:
        """:func:`~nvib_hf.kl.kl_gaussian` ``(B,)`` with the layer's prior and weights.

        ``kappa``, the vectors of a component, is by default the layer's in training and 1 in evaluation.
        """
        kappa = self._repeats() if kappa is None else kappa
        prior = {"prior_mu": self.prior_mu, "prior_var": self.prior_logvar.exp()}
        return kl_gaussian(**{"weights": self.kl_weights, **latent}, **prior, kappa=kappa)

    def kl_dirichlet(self, kappa: int | None = None, **latent: object) -> Tensor:
        """:func:`~nvib_hf.kl.kl_dirichlet` ``(B,)`` with the layer's prior; ``kappa`` as in :meth:`kl_gaussian`."""
        kappa = self._repeats() if kappa is None else kappa
        return kl_dirichlet(**latent, prior_log_alpha=self.prior_log_alpha, delta=self.delta, kappa=kappa)

    def _repeats(self) -> int:
        return self.kappa if self.training else 1

    def extra_repr(self) -> str:
        return (
            f"size_in={self.size_in}, size_out={self.size_out}, delta={self.delta}, kappa={self.kappa}, "
            f"alpha_activation={self.alpha_activation!r}, dropping={self.dropping!r}, "
            f"alpha_threshold={self.alpha_threshold}, batch_first={self.batch_first}"
        )
