"""The layer of the published interface: sequence-first, a dict out, a memory for ``nn.TransformerDecoder`` in it."""

from __future__ import annotations

import torch
from torch import Tensor

from .kl import kl_dirichlet, kl_gaussian
from .memory import NvibMemory
from .nvib_layer import NvibLayer
from .posterior import LOG_ALPHA_REPORTED_MAX
from .validation import check_rows_of_prior


class Nvib(NvibLayer):
    r"""Nonparametric variational information bottleneck: :class:`~nvib_hf.nvib_layer.NvibLayer`, for plain PyTorch.

    Args:
        size_in, size_out, prior_mu, prior_var, prior_alpha, delta, kappa: see :class:`~nvib_hf.nvib_layer.NvibLayer`.
        batch_first: ``(B, Ns, H)`` instead of ``(Ns, B, H)``, inputs and outputs.
        settings: its others: ``alpha_activation``, ``dropping``, ``alpha_threshold``, ``threshold_share``,
            ``kl_weights``, ``scale``.

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
        batch_first: bool = False,
        **settings,
    ) -> None:
        super().__init__(size_in, size_out, prior_mu, prior_var, prior_alpha, delta, kappa, **settings)
        self.batch_first = batch_first

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
        hidden_states = self._order(encoder_output)
        output = super().forward(hidden_states, src_key_padding_mask, generator=generator, with_kl=False)
        drawn, order = output.drawn, self._order
        mu, logvar, log_alpha = order(drawn.mu), order(drawn.logvar), order(drawn.log_alpha)[..., None]
        memory = NvibMemory(order(output.z), order(output.log_pi.exp()), mu, logvar, log_pi=order(output.log_pi))
        if drawn.dropped is not None:
            memory.dropped, memory.full_log_pi = order(drawn.dropped), order(drawn.full_log_pi)
        padding = order(~drawn.mask)[..., None]
        alpha = log_alpha.clamp(max=LOG_ALPHA_REPORTED_MAX).exp()
        return {
            "z": memory,
            "pi": memory.pi,
            "mu": mu,
            "logvar": logvar,
            "alpha": alpha.masked_fill(padding | (log_alpha <= self._log_zero), 0),
            "log_alpha": log_alpha.masked_fill(padding, float("-inf")),
            "memory_key_padding_mask": ~drawn.mask,
            "keep": drawn.keep,
            "batch_first": self.batch_first,
            **{f"avg_{name}": value.mean() for name, value in output.posterior.statistics().items()},
        }

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
                one per row must not be padding.
            device: where to; the layer's own by default.
            generator: for the draws, on the layer's device.

        Returns:
            ``z``, ``mu`` ``(Ns, B, P)``, the same tensor, ``logvar`` of ``-inf``, ``pi`` ``(Ns, B, 1)``;
            ``(B, Ns, ...)`` if ``batch_first``.

        Raises:
            ValueError: a mask that has not ``number_samples`` rows, or a row without any vector.
        """
        check_rows_of_prior(memory_key_padding_mask, number_samples)
        z, log_pi = self.sample_prior(memory_key_padding_mask.to(self.prior_mu.device), generator)
        z, log_pi = (self._order(x.to(device or x.device)) for x in (z, log_pi))
        logvar = torch.full_like(z, float("-inf"))
        return NvibMemory(z, log_pi.exp(), z, logvar, log_pi=log_pi, points=True)

    def kl_gaussian(self, kappa: int | None = None, **latent: object) -> Tensor:
        """:func:`~nvib_hf.kl.kl_gaussian` ``(B,)`` with the layer's prior and weights.

        ``kappa``, the vectors of a component, is by default the layer's in training and 1 in evaluation.
        """
        prior = {"prior_mu": self.prior_mu, "prior_var": self.prior_logvar.exp()}
        return kl_gaussian(**{"weights": self.kl_weights, **latent}, **prior, kappa=self._repeats(kappa))

    def kl_dirichlet(self, kappa: int | None = None, **latent: object) -> Tensor:
        """:func:`~nvib_hf.kl.kl_dirichlet` ``(B,)`` with the layer's prior; ``kappa`` as in :meth:`kl_gaussian`."""
        prior = {"prior_log_alpha": self.prior_log_alpha, "delta": self.delta}
        return kl_dirichlet(**latent, **prior, kappa=self._repeats(kappa))

    def _repeats(self, kappa: int | None) -> int:
        return (self.kappa if self.training else 1) if kappa is None else kappa

    def _order(self, x: Tensor) -> Tensor:
        """Between the layout of the interface and batch-first, which is the layer's."""
        return x if self.batch_first else x.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, batch_first={self.batch_first}"
