"""What the NVIB layers of a model cost in a forward pass, which those in self-attention leave in their modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .latent import NvibLatents
from .loss import Charged
from .self_attention import DenoisingSelfAttention


class LayerTerms(NamedTuple):
    """Per example ``(B,)``, by the names of the NVIB layers: what the loss charges, and the share of vectors kept.

    ``relaxed_prop_vectors`` is of the layers that can drop vectors.
    """

    kl_gaussian: dict[str, Tensor]
    kl_dirichlet: dict[str, Tensor]
    prop_vectors: dict[str, Tensor]
    relaxed_prop_vectors: dict[str, Tensor]

    def add_latents(self, latents: NvibLatents | None) -> None:
        """Those of the layer between the halves, ``"cross"``, if they were made of a source."""
        if latents is None or latents.kl_gaussian is None or latents.kl_dirichlet is None:
            return
        for name in self._fields:
            value = getattr(latents, name)
            if value is not None:
                getattr(self, name)["cross"] = value

    def charged(self) -> Charged:
        """Means over the layers; of ``None`` where there are none."""
        return Charged(*(_mean(getattr(self, name)) for name in Charged._fields))


def _mean(values: dict[str, Tensor]) -> Tensor | None:
    return torch.stack(list(values.values())).mean(0) if values else None


def begin_recording(modules: Iterable[DenoisingSelfAttention], generator: torch.Generator | None) -> None:
    """From here on a forward pass leaves its posteriors in the modules, drawn with ``generator`` in training."""
    for module in modules:
        module.nvib_recording, module.nvib_generator = True, generator
        module.nvib_posterior = module.nvib_visible = None


def end_recording(modules: dict[str, DenoisingSelfAttention], targets: Tensor | None = None) -> LayerTerms:
    """What the layers that ran since :func:`begin_recording` cost.

    Args:
        modules: by the names of their layers.
        targets: ``(B, Nt)``, True where a decoder's position has a target; by default all that its mask shows.
    """
    terms = LayerTerms({}, {}, {}, {})
    for name, module in modules.items():
        posterior, visible, layer = module.nvib_posterior, module.nvib_visible, module.nvib
        sources = module.nvib_sources
        module.nvib_recording, module.nvib_generator = False, None
        module.nvib_posterior = module.nvib_visible = module.nvib_sources = None
        if posterior is None:
            continue
        if targets is not None and name.startswith("decoder"):
            visible = targets
        if visible is not None:
            mask = F.pad(visible, (1, 0), value=True)
            posterior = posterior._replace(mask=mask, keep=posterior.keep & mask)
        terms.kl_gaussian[name], terms.kl_dirichlet[name] = layer.kl(posterior, posterior, kappa=1)
        statistics = posterior.statistics()
        share = statistics["prop_vec"] if sources is None else statistics["num_vec"] / sources.clamp(min=1)
        terms.prop_vectors[name] = share
        if (relaxed := layer.relaxed_share(posterior)) is not None:
            terms.relaxed_prop_vectors[name] = relaxed
    return terms
