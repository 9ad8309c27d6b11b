"""Latents that come from no text, and new ones from old, as methods of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_latents
from .latent import NvibLatents, interpolate
from .latent_prior import sample_from_prior
from .latent_transport import interpolate_by_transport
from .latent_variation import blend, vary
from .validation import check_choice

INTERPOLATIONS = {"transport": interpolate_by_transport, "mixture": interpolate}


class NvibLatentsMixin:
    """For a model whose NVIB layer is ``nvib``."""

    @torch.no_grad()
    def sample_latents(
        self,
        num_samples: int,
        num_vectors: int | Sequence[int] | Tensor,
        generator: torch.Generator | None = None,
    ) -> NvibLatents:
        """Latents from the prior: new text from nothing; see :func:`~nvib_hf.latent_prior.sample_from_prior`."""
        return sample_from_prior(self, num_samples, num_vectors, generator)

    def interpolate_latents(
        self, first: NvibLatents, second: NvibLatents, weight: float | Tensor, method: str = "transport"
    ) -> NvibLatents:
        """Between two batches of latents: ``weight`` 0 is ``first``, 1 is ``second``; a number or ``(B,)``.

        A batch of one is repeated: ``weight=torch.linspace(0, 1, 5)`` between two latents is a walk of five steps.

        Args:
            method: ``"transport"`` moves the components of the one to those of the other
                (:func:`~nvib_hf.latent_transport.interpolate_by_transport`); ``"mixture"`` puts both side by side, as
                published (:func:`~nvib_hf.latent.interpolate`).

        Raises:
            ImportError: ``"transport"`` without the package POT.
            ValueError: another method; weights outside [0, 1]; batch sizes that do not fit; latents of another model.
        """
        check_choice("method", method, tuple(INTERPOLATIONS))
        for latents in (first, second):
            check_latents(latents, self.nvib)
        return INTERPOLATIONS[method](first, second, weight)

    @torch.no_grad()
    def vary_latents(
        self,
        latents: NvibLatents,
        temperature: float = 1.0,
        redraw_weights: bool = False,
        generator: torch.Generator | None = None,
    ) -> NvibLatents:
        """New text close to old one: a draw around each latent; see :func:`~nvib_hf.latent_variation.vary`."""
        check_latents(latents, self.nvib)
        return vary(latents, temperature, redraw_weights, generator)

    @torch.no_grad()
    def blend_latents(
        self,
        latents: NvibLatents,
        num_samples: int,
        num_parents: int = 2,
        generator: torch.Generator | None = None,
    ) -> NvibLatents:
        """New text between old ones: random latents on the way; see :func:`~nvib_hf.latent_variation.blend`."""
        check_latents(latents, self.nvib)
        return blend(latents, num_samples, num_parents, generator)
