"""All the NVIB layers of a model: between its halves and in its self-attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .configuration_nvib import TAUS
from .initialisation import EmpiricalPrior, PriorStatistics
from .nvib_layer import NvibLayer
from .self_attention import DenoisingSelfAttention
from .stacked_attention import StackedSelfAttention


class NvibLayersMixin:
    """Before ``PreTrainedModel``.

    ``_self_attention_names``: the modules' names in the model by those of their layers. ``_read(batch)`` runs what
    reads the inputs of a batch, through all NVIB layers.
    """

    _self_attention_names: dict[str, str]

    def nvib_layers(self) -> dict[str, NvibLayer]:
        """The NVIB layers: ``"cross"`` between encoder and decoder, ``"encoder.0"``, ..., ``"decoder.0"``, ..."""
        cross = {"cross": self.nvib} if hasattr(self, "nvib") else {}
        return cross | {name: module.nvib for name, module in self._self_attentions().items()}

    def _self_attentions(self) -> dict[str, DenoisingSelfAttention]:
        return {layer: self.get_submodule(name) for layer, name in self._self_attention_names.items()}

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs
    ) -> None:
        """As in ``PreTrainedModel``, but for the kind that hides from the loss what the layers inside cost."""
        reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)
        if enable and reentrant and self._self_attention_names:
            raise ValueError(
                "use_reentrant=True runs the layers without gradients first, when the KLs of their NVIB layers are "
                "taken. Pass {'use_reentrant': False}, which is the default."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _check_generator(self, generator: torch.Generator | None) -> None:
        """Raise ValueError for a generator whose draws checkpointing would not repeat in the backward pass."""
        if generator is None or not self.training or not self._self_attention_names:
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "A generator was given under gradient checkpointing, which restores the state of the global one alone "
                "when it runs the layers again. Leave it out and call torch.manual_seed."
            )

    def _stacked(self) -> list[StackedSelfAttention]:
        """Those of the encoder, from below to above, where they hand on what they dropped or weighed."""
        return [module for module in self._self_attentions().values() if isinstance(module, StackedSelfAttention)]

    @torch.no_grad()
    def set_taus(self, **taus: float | dict[str, float]) -> None:
        """Regularise a live model: its layers are initialised anew, each for its prior, and the configuration says so.

        Args:
            taus: of ``tau_alpha``, ``tau_sigma`` and ``tau_mu`` those to change, as :class:`~nvib_hf.NvibConfig` takes
                them. What training made of the layers is lost; the priors stay.

        Raises:
            ValueError: a value outside its range. TypeError: another name. Nothing has been changed then.

        Source: Fehr & Henderson (COLM 2024), post-training regularisation.
        """
        if unknown := sorted(taus.keys() - TAUS.keys()):
            raise TypeError(f"set_taus takes no argument {unknown[0]!r}, but {', '.join(TAUS)}.")
        config, names = self.config, ("alpha_activation", *TAUS)
        checked = type(config)(**{name: getattr(config, name) for name in names} | taus)
        for name in TAUS:
            setattr(config, name, getattr(checked, name))
        for name, layer in self.nvib_layers().items():
            layer.identity_init(**self.config.taus(name.partition(".")[0]))

    def fit_prior(self, batches: Iterable[dict[str, Tensor]]) -> EmpiricalPrior | dict[str, EmpiricalPrior]:
        r"""Give every NVIB layer the prior of what it reads over a corpus, in one pass, and initialise it for that.

        Args:
            batches: the model's inputs, for instance a ``DataLoader``; with the decoder's inputs or ``labels`` if the
                decoder's self-attention has NVIB.

        Returns:
            The prior of the layer between the halves; where self-attentions have NVIB, those of all, by their names.

        Raises:
            ValueError: fewer than two vectors, or a channel that never varies; nothing has been changed then.

        Source: Fehr & Henderson (COLM 2024), empirical priors.
        """
        layers = self.nvib_layers()
        statistics = {name: PriorStatistics(layer.scale) for name, layer in layers.items()}
        with torch.no_grad(), self._watched(statistics):
            for batch in batches:
                self._read(batch)
        priors = {name: seen.prior(name) for name, seen in statistics.items()}
        with torch.no_grad():
            for name, layer in layers.items():
                layer.set_prior(*priors[name])
                layer.identity_init(**self.config.taus(name.partition(".")[0]))
        return priors if self._self_attention_names else priors["cross"]

    @contextmanager
    def _watched(self, statistics: dict[str, PriorStatistics]) -> Iterator[None]:
        """The model in ``eval()``, ``statistics`` seeing what their layers are given."""
        training = self.training
        self.eval()
        hooks = [
            module.register_forward_pre_hook(_watch_attention(statistics[name]), with_kwargs=True)
            for name, module in self._self_attentions().items()
        ]
        if "cross" in statistics:
            hooks.append(self.nvib.register_forward_pre_hook(_watch_source(statistics["cross"])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.train(training)


def _watch_attention(seen: PriorStatistics) -> Callable:
    def see(module: DenoisingSelfAttention, args: tuple, kwargs: dict) -> None:
        hidden_states, mask = module.states_and_mask(args, kwargs)
        seen.add(hidden_states, module.unseen(mask, hidden_states))

    return see


def _watch_source(seen: PriorStatistics) -> Callable:
    def see(layer: NvibLayer, args: tuple) -> None:
        hidden_states, padding_mask, *_ = args
        seen.add(hidden_states, padding_mask)

    return see
