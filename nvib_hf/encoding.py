"""Latents of a model: encoded, drawn from the prior, interpolated; and the prior fitted to a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from .base_model import run_encoder
from .initialisation import EmpiricalPrior, empirical_prior
from .latent import NvibLatents, interpolate, pack


class NvibEncodingMixin:
    """The half of :class:`~nvib_hf.NvibForConditionalGeneration` that makes latents."""

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        **inputs,
    ) -> NvibLatents:
        """Inputs to latents.

        Args:
            input_ids, attention_mask, inputs: what the base's encoder takes.
            sample: draw from the posterior (``kappa`` vectors a component), or take the posterior itself; by
                default as in training or evaluation, whichever mode the model is in.
            generator: for the draws.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        return self._encode(inputs, sample, generator)[0]

    def _encode(
        self, inputs: dict, sample: bool | None = None, generator: torch.Generator | None = None
    ) -> tuple[NvibLatents, BaseModelOutput]:
        """Latents, and the encoder's own output."""
        outputs, padding = run_encoder(self.base, self._encoder_arguments(inputs))
        sample = self.training if sample is None else sample
        posterior = self.nvib.posterior(outputs.last_hidden_state, padding)
        statistics = self.nvib.statistics(posterior)
        if sample:
            z, log_pi, posterior = self.nvib.sample_posterior(posterior, generator)
        else:
            z, log_pi = posterior.mu, self.nvib.mean_log_pi(posterior)
        kl_gaussian, kl_dirichlet = self.nvib.kl(posterior, self.nvib.kappa if sample else 1)
        latents = NvibLatents(
            z=z,
            log_pi=log_pi,
            logvar=None if sample else posterior.logvar,
            attention_mask=posterior.mask,
            log_alpha=posterior.log_alpha.masked_fill(~posterior.mask, float("-inf")),
            kl_gaussian=kl_gaussian,
            kl_dirichlet=kl_dirichlet,
            num_vectors=statistics["num_vec"],
            prop_vectors=statistics["prop_vec"],
            effective_num_vectors=statistics["effective_num_vec"],
        )
        return latents, outputs

    @torch.no_grad()
    def sample_latents(
        self,
        num_samples: int,
        num_vectors: int | Sequence[int] | Tensor,
        generator: torch.Generator | None = None,
    ) -> NvibLatents:
        """Latents from the prior: new text from nothing.

        Args:
            num_samples: how many.
            num_vectors: vectors of each, one number or one a sample, at least 1.

        Raises:
            ValueError: counts below 1, or not one a sample.

        Source: Henderson & Fehr (ICLR 2023), with weights drawn from the prior's Dirichlet.
        """
        counts = torch.as_tensor(num_vectors, device=self.device)
        if num_samples < 1 or counts.dim() > 1 or (counts.dim() == 1 and len(counts) != num_samples):
            raise ValueError(
                f"num_vectors must be one number or one for each of num_samples={num_samples} (at least 1), but "
                f"got {num_vectors}."
            )
        if (counts < 1).any() or counts.is_floating_point():
            raise ValueError(f"num_vectors must be whole numbers of at least 1, but got {num_vectors}.")
        counts = counts.expand(num_samples)
        padding = torch.arange(int(counts.max()), device=self.device) >= counts[:, None]
        z, log_pi = self.nvib.sample_prior(padding, generator)
        return NvibLatents(z=z.to(self.dtype), log_pi=log_pi, attention_mask=~padding)

    def interpolate_latents(self, first: NvibLatents, second: NvibLatents, weight: float | Tensor) -> NvibLatents:
        """Between two batches of latents: ``weight`` 0 is ``first``, 1 is ``second``; a number or ``(B,)``."""
        for latents in (first, second):
            self._check_latents(latents)
        return interpolate(first, second, weight)

    def _check_latents(self, latents: NvibLatents) -> None:
        if latents.z.shape[-1] != self.nvib.size_out:
            raise ValueError(
                f"The latents are {latents.z.shape[-1]} wide, but this model's are {self.nvib.size_out}: they come "
                "from another model."
            )

    def _pack(self, latents: NvibLatents) -> Tensor:
        self._check_latents(latents)
        return pack(latents.memory(self.scale))

    @torch.no_grad()
    def fit_prior(self, batches: Iterable[dict[str, Tensor]]) -> EmpiricalPrior:
        """Take the prior from the encoder's output over a corpus, and initialise the layer for it again.

        Args:
            batches: the model's inputs, for instance a ``DataLoader``.

        Source: Fehr & Henderson (COLM 2024), empirical priors.
        """
        training = self.training
        self.eval()

        def encoded():
            for batch in batches:
                inputs = {k: v.to(self.device) for k, v in self._encoder_arguments(batch).items()}
                outputs, padding = run_encoder(self.base, inputs)
                yield outputs.last_hidden_state, padding

        prior = empirical_prior(encoded(), self.scale)
        self.train(training)
        self.nvib.set_prior(*prior)
        self.nvib.identity_init(self.config.tau_alpha, self.config.tau_sigma, self.config.tau_mu)
        return prior
