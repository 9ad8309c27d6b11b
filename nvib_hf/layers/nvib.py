"""The NVIB layer, and what stays in single precision when a model is cast to half."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .denoising_attention import AttendedLatent, at_least_float32, attended_means, attended_mixture, attended_points
from .distributions import NvibOutput, Posterior, gaussian_sample, log_dirichlet_sample
from .dropping import (
    LOG_ZERO,
    draw_dropping,
    everything_kept,
    kept,
    kept_first,
    learned_keep_logit,
    relaxed_share,
    relu_log_alpha,
)
from .initialisation import PriorMixin, identity_parameters
from .kl import component_weights, dirichlet_divergence, gaussian_divergence
from .settings import RENAMED, check_dropping, check_prior, checked

HALF = 2  # bytes: less than single precision


class SinglePrecisionMixin(nn.Module):
    """Keeps a module's own tensors (not its children's) in at least fp32. Put it before ``nn.Module``.

    ``half()``, ``bfloat16()`` and ``to(dtype)`` leave these tensors in fp32. ``double()`` and ``float()`` cast them,
    and moves between devices move them, as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:
            for module in self.children():
                module._apply(fn)
        super()._apply(lambda value: _at_least_single(value, fn(value)), recurse=False)
        return self


def _at_least_single(value: Tensor, applied: Tensor) -> Tensor:
    """``applied``, the cast or moved ``value``; if the cast lost bits, ``value`` itself in fp32, moved."""
    if applied.is_floating_point() and applied.element_size() <= HALF:
        return value.to(applied.device, torch.float32)
    return applied


def _read_renamed(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
    """Rename old names in a state dict before it is loaded."""
    for old, new in RENAMED.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)


class NvibLayer(SinglePrecisionMixin, PriorMixin, nn.Module):
    r"""Nonparametric variational information bottleneck, batch-first: the layer of a model.

    For every source vector :math:`x`

    .. math::
        \mu = W_\mu x + b_\mu, \qquad \log \sigma^2 = W_\sigma x + b_\sigma, \qquad
        \log \alpha = w_1^\top x + w_2^\top x^2 + b

    The prior's component ``(prior_mu, prior_var, prior_alpha)`` comes first. Training draws ``kappa`` vectors per
    component, :math:`\pi \sim \mathrm{Dirichlet}(\alpha_i / \kappa)`, :math:`z \sim \mathcal N(\mu, \sigma^2)`.
    Evaluation returns the posterior, with one vector per component.

    If you cast the layer to half precision, the pseudo-counts' parameters and the prior stay in fp32.

    Args:
        size_in: width ``H`` of the encoder's output.
        size_out: width ``P`` of the latent vectors.
        prior_mu, prior_var: mean and variance of the prior's Gaussian, a number or a tensor of ``size_out``.
        prior_alpha: pseudo-count of the prior's component.
        delta: the share of the source length that the (conditional) prior expects to keep, in [0, 1].
        kappa: vectors drawn per component in training.
        alpha_activation: ``"exp"`` (with the quadratic term) or ``"relu"`` (``relu(w x + b)``, first paper; its
            gradient leaks below 0, so that a dead vector can come back).
        dropping: what decides which components are dropped (``pi = 0``). The prior's never is. ``"threshold"``: the
            ``alpha_threshold``, if it is not 0. ``"relaxed"``: a learned keep logit ``w . layernorm(x) + b``.
            Evaluation keeps vectors whose logit is above 0. Training relaxes the decision
            (:func:`~nvib_hf.layers.dropping.relaxed_log_gate`), so the decoder must be frozen. At the start all
            vectors are kept.
        alpha_threshold: components with a pseudo-count at or below it are dropped, in training and evaluation. 0
            drops none with ``"exp"``.
        dropping_share: share of the training examples in which vectors are dropped. The other examples let a dropped
            vector come back. 0 turns dropping off, in evaluation too. It is a buffer, which a schedule can set.
        kl_weights: how KL_G weighs the components: ``"pseudo_counts"`` as published, or ``"drawn"`` (see
            :func:`~nvib_hf.layers.kl.kl_gaussian`).
        scale: the scale ``s`` of the attention that reads the latent, for the identity initialisation. ``None`` means
            the scale of one head as wide as the latent, ``size_out ** -0.5``.

    Raises:
        ValueError: an argument is outside its range.

    Source: Henderson & Fehr (ICLR 2023), section 3.1; the quadratic term: Fehr & Henderson (COLM 2024).
    """

    dropping_share: Tensor
    kappa: int
    scale: float

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
        dropping_share: float = 1.0,
        kl_weights: str = "pseudo_counts",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        size_in, size_out = checked("size_in", size_in), checked("size_out", size_out)
        self.size_in, self.size_out = size_in, size_out
        check_prior(prior_mu, prior_var, prior_alpha, size_out)
        self.delta, self.kappa = checked("delta", delta), checked("kappa", kappa)
        for name, value in (
            ("alpha_activation", alpha_activation),
            ("dropping", dropping),
            ("alpha_threshold", alpha_threshold),
            ("dropping_share", dropping_share),
            ("kl_weights", kl_weights),
        ):
            checked(name, value)
        check_dropping(dropping, alpha_threshold)
        self.alpha_activation, self.dropping, self.alpha_threshold = alpha_activation, dropping, alpha_threshold
        self.kl_weights = kl_weights
        self.scale = size_out**-0.5 if scale is None else checked("scale", scale)
        self._log_zero = LOG_ZERO if alpha_activation == "relu" else -math.inf

        self.mu_logvar = nn.Linear(size_in, 2 * size_out)
        self.alpha_weight = nn.Parameter(torch.empty(size_in))
        self.alpha_quadratic = nn.Parameter(torch.empty(size_in)) if alpha_activation == "exp" else None
        self.alpha_bias = nn.Parameter(torch.empty(1))
        learned = dropping != "threshold"
        self.keep_weight = nn.Parameter(torch.empty(size_in)) if learned else None
        self.keep_bias = nn.Parameter(torch.empty(1)) if learned else None
        self.make_prior(size_out)
        self.register_buffer("dropping_share", torch.tensor(float(dropping_share)))
        self.register_load_state_dict_pre_hook(_read_renamed)
        self.set_prior(prior_mu, prior_var, math.log(prior_alpha))
        self.reset_parameters()

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
        if self.keep_weight is not None:
            for name, value in everything_kept(self.size_in).items():
                self.get_parameter(name).copy_(value)

    def identity_parameters(
        self, tau_alpha: float = 10.0, tau_sigma: float = 0.0, tau_mu: float = 1.0
    ) -> dict[str, Tensor]:
        """:func:`~nvib_hf.layers.initialisation.identity_parameters` for this layer's prior and scale, by name.

        If the layer has no quadratic term (``alpha_activation="relu"``), every pseudo-count starts at ``tau_alpha``.

        Raises:
            ValueError: the layer changes the width.
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
        return values if self.keep_weight is None else values | everything_kept(self.size_in)

    @torch.no_grad()
    def identity_init(self, tau_alpha: float = 10.0, tau_sigma: float = 0.0, tau_mu: float = 1.0) -> None:
        """Set the parameters to :meth:`identity_parameters`, with which the layer passes its input on unchanged."""
        for name, value in self.identity_parameters(tau_alpha, tau_sigma, tau_mu).items():
            self.get_parameter(name).copy_(value)

    def forward(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        decode_only: bool = False,
        with_kl: bool = True,
        log_mass: Tensor | None = None,
    ) -> NvibOutput:
        """Vectors to a latent.

        Args:
            hidden_states: ``(B, Ns, H)``.
            padding_mask: ``(B, Ns)``, True = padding.
            sample: True draws from the posterior; False takes its means and expected weights. By default the layer's
                mode decides.
            generator: for the draws.
            decode_only: compute only what decoding reads. There are no divergences, and without a sample dropped
                vectors are neither projected nor returned. This reads a length from the device.
            with_kl: compute the divergences.
            log_mass: ``(B, Ns)``, added to the log pseudo-counts of vectors that stand for many.
        """
        sample = self.training if sample is None else sample
        posterior = self.posterior(hidden_states, padding_mask, decode_only and not sample, log_mass)
        if sample:
            z, log_pi, drawn = self.sample_posterior(posterior, generator)
        else:
            z, log_pi, drawn = posterior.mu, posterior.log_mean_pi(), posterior
        output = NvibOutput(z, log_pi, posterior, drawn, self.kappa if sample else None)
        if decode_only or not with_kl:
            return output
        gaussian, dirichlet = self.kl(posterior, drawn, self.kappa if sample else 1)
        share = None if posterior.keep_logit is None else self.relaxed_share(posterior)
        return output._replace(kl_gaussian=gaussian, kl_dirichlet=dirichlet, relaxed_share=share)

    def posterior(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        kept_only: bool = False,
        log_alpha_below: Tensor | None = None,
    ) -> Posterior:
        """Parameters of the posterior for ``(B, Ns, H)`` and an optional mask ``(B, Ns)``, True = padding.

        Args:
            kept_only: return only vectors that evaluation keeps, padded to the most that any example keeps.
            log_alpha_below: log pseudo-counts ``(B, Ns)`` of the layer below, added to those of this layer.
        """
        batch, length, width = hidden_states.shape
        if width != self.size_in:
            raise ValueError(f"The input is {width} wide, but this layer was made with size_in={self.size_in}.")
        if padding_mask is not None and padding_mask.shape != (batch, length):
            raise ValueError(
                f"The padding mask has shape {tuple(padding_mask.shape)}, but the input needs {(batch, length)}. "
                "Pass one value per source vector, batch first."
            )
        mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        if padding_mask is not None:
            mask = ~padding_mask.bool()
            # The value of a padded position must not become 0 * inf, in a gradient either.
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        x = at_least_float32(hidden_states)
        log_alpha = self._log_alpha(x)
        if log_alpha_below is not None:  # a pseudo-count of 0 stays 0
            log_alpha = torch.where(log_alpha > self._log_zero, log_alpha + log_alpha_below, log_alpha)
        drops = self.keep_weight is not None or self.alpha_threshold > 0
        keep_logit = self._keep_logit(x, log_alpha) if drops else None
        keep = mask & ~(log_alpha <= self._log_zero)  # NaN is kept, and so seen
        if keep_logit is not None:
            keep = keep & kept(keep_logit, self.dropping_share)
        if kept_only and (order := kept_first(keep)) is not None:
            hidden_states = hidden_states.take_along_dim(order[..., None], dim=1)
            log_alpha, keep = (x.take_along_dim(order, dim=1) for x in (log_alpha, keep))
            mask, keep_logit, padding_mask = keep, None, ~keep
        mu_logvar = self.mu_logvar(hidden_states)
        if padding_mask is not None:
            mu_logvar = mu_logvar.masked_fill(~mask[..., None], 0)
            log_alpha = log_alpha.masked_fill(~mask, 0)
        mu, logvar = mu_logvar.chunk(2, dim=-1)
        return Posterior(  # the prior's component first
            mu=torch.cat([self.prior_mu.to(mu.dtype).expand(mu.shape[0], 1, -1), mu], dim=1),
            logvar=torch.cat([self.prior_logvar.to(mu.dtype).expand(mu.shape[0], 1, -1), logvar], dim=1),
            log_alpha=torch.cat([self.prior_log_alpha.to(log_alpha.dtype).expand(mu.shape[0], 1), log_alpha], dim=1),
            mask=F.pad(mask, (1, 0), value=True),
            keep=F.pad(keep, (1, 0), value=True),
            keep_logit=None if keep_logit is None else F.pad(keep_logit, (1, 0), value=math.inf),
        )

    def _log_alpha(self, x: Tensor) -> Tensor:
        """Log pseudo-counts ``(B, Ns)`` in fp32, because s/2 * ||x||^2 must cancel against attention's bias.

        So they are not part of the fused projection, whose dtype may be half.
        """
        weight, bias = self.alpha_weight.to(x.dtype), self.alpha_bias.to(x.dtype)
        if self.alpha_quadratic is not None:
            return (x * torch.addcmul(weight, self.alpha_quadratic.to(x.dtype), x)).sum(-1) + bias
        return relu_log_alpha((x * weight).sum(-1) + bias)

    def _keep_logit(self, x: Tensor, log_alpha: Tensor) -> Tensor:
        """Keep logits ``(B, Ns)`` in fp32, above 0 for vectors to keep."""
        if self.keep_weight is None or self.keep_bias is None:
            return log_alpha - math.log(self.alpha_threshold)
        return learned_keep_logit(x, self.keep_weight.to(x.dtype), self.keep_bias.to(x.dtype))

    def sample_posterior(
        self, posterior: Posterior, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Posterior]:
        """Draw ``kappa`` vectors per component: ``z`` ``(B, Nl, P)``, ``log_pi`` ``(B, Nl)`` and their parameters.

        There are ``Nl = kappa * (Ns + 1)`` vectors, each with ``alpha_i / kappa``. The vectors of a component are next
        to each other.
        """
        if posterior.keep_logit is None or not self.training:
            drawn = posterior if self.kappa == 1 else posterior.repeated(self.kappa)
            log_pi = log_dirichlet_sample(drawn.log_alpha, drawn.keep, generator)
        else:
            positive = posterior.mask & (posterior.log_alpha > self._log_zero)
            log_pi, drawn = draw_dropping(
                posterior, self.dropping, self.dropping_share, positive, self.kappa, generator
            )
        z = gaussian_sample(posterior.mu, posterior.logvar, posterior.mask, generator, repeats=self.kappa)
        return z, log_pi, drawn

    def kl(self, posterior: Posterior, drawn: Posterior, kappa: int) -> tuple[Tensor, Tensor]:
        """Both divergences ``(B,)`` of a posterior. ``drawn`` has its ``kappa`` vectors per component.

        KL_G is computed once per component, because its vectors share one Gaussian and one pseudo-count.
        """
        keep = drawn.keep[:, ::kappa]  # training drops nothing in some of the examples
        log_alpha = posterior.log_alpha.masked_fill(~posterior.mask, -math.inf)
        weights = component_weights(self.kl_weights, log_alpha, posterior.mask, keep)
        divergence = gaussian_divergence(posterior.mu, posterior.logvar, self.prior_mu, self.prior_logvar.exp())
        return (
            kappa * (weights * divergence).sum(-1),
            dirichlet_divergence(drawn.log_alpha, drawn.mask, self.prior_log_alpha, self.delta, kappa),
        )

    def relaxed_share(self, posterior: Posterior) -> Tensor | None:
        """:func:`~nvib_hf.layers.dropping.relaxed_share` ``(B,)`` of source vectors; ``None`` without dropping.

        While dropping is off it is 1 for a learned decision. Otherwise the penalty would push the logits down before
        dropping starts.
        """
        if posterior.keep_logit is None:
            return None
        share = relaxed_share(posterior.keep_logit[:, 1:], posterior.mask[:, 1:])
        return share if self.keep_weight is None else torch.where(self.dropping_share > 0, share, 1.0)

    def extra_repr(self) -> str:
        return (
            f"size_in={self.size_in}, size_out={self.size_out}, delta={self.delta}, kappa={self.kappa}, "
            f"alpha_activation={self.alpha_activation!r}, dropping={self.dropping!r}, "
            f"alpha_threshold={self.alpha_threshold}"
        )


class SelfAttentionNvibLayer(NvibLayer):
    r"""NVIB between the vectors of a self-attention and its keys and values.

    The weights are not normalised: they are :math:`\log g_i` of a Gamma draw in training and :math:`\log \alpha_i` in
    evaluation. The softmax normalises them over the positions that a causal mask or a window lets a query see.

    Arguments are those of :class:`~nvib_hf.layers.nvib.NvibLayer`; ``kappa`` is 1.

    Source: Behjati, Fehr & Henderson (Findings of EMNLP 2023), section 3; Fehr & Henderson (COLM 2024).
    """

    def forward(  # type: ignore[override]  # an attention passes no padding, and needs another result
        self,
        hidden_states: Tensor,
        evaluation: str = "means",
        generator: torch.Generator | None = None,
        log_alpha_below: Tensor | None = None,
    ) -> tuple[AttendedLatent, Posterior]:
        """What attention reads of ``(B, N, H)``: ``N + 1`` vectors, the prior's first. Also returns their posterior.

        The layer does not know about padding: the attention's mask hides it.

        Args:
            evaluation: ``"means"`` or ``"mixture"``; training reads a sample.
            generator: for the draws.
            log_alpha_below: log pseudo-counts ``(B, N)`` of the layer below, added to those of this layer.
        """
        posterior = self.posterior(hidden_states, log_alpha_below=log_alpha_below)
        if not self.training:
            log_alpha = posterior.log_alpha.masked_fill(~posterior.keep, -math.inf)
            of_posterior = attended_means if evaluation == "means" else attended_mixture
            return of_posterior(posterior.mu, posterior.logvar, log_alpha, self.scale), posterior
        if posterior.keep_logit is None:
            z = gaussian_sample(posterior.mu, posterior.logvar, posterior.mask, generator)
            log_g = posterior.draw_log_g(generator)
            return attended_points(z, log_g, self.scale), posterior
        z, log_pi, drawn = self.sample_posterior(posterior, generator)
        return attended_points(z, log_pi, self.scale), drawn
