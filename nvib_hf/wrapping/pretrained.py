"""What every model around a base has: its NVIB layers, wrapping, loading and saving."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import ModelCard, file_exists
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init

from ..configuration_nvib import TAUS, NvibConfig
from ..files import write_whole
from ..layers.initialisation import EmpiricalPrior, PriorStatistics, prior_buffers
from ..layers.latent_prior import LatentPrior
from ..layers.nvib import NvibLayer, SinglePrecisionMixin
from ..layers.settings import RENAMED
from .adapters import check_is_bare
from .architecture import warn_if_not_found
from .auto_classes import IN_SAVED_CODE
from .base import check_known, damage_explained
from .cross_attention import restore_cross_attention
from .halves import OfTheBaseMixin
from .hub import auto_map_entry, put_in_place, save_code, written_last
from .model_card import model_card
from .self_attention import DenoisingSelfAttention, restore_self_attention
from .sound import check_silence_is_stored
from .stacked_encoder import unstack
from .wrap import hand_back, is_stacked, put_into_self_attention, split_settings, wrap

# Settings of a configuration that a layer has in a buffer, and the buffer.
IN_BUFFERS = {
    "dropping_share": "dropping_share",
    "prior_mu": "prior_mu",
    "prior_var": "prior_logvar",
    "prior_alpha": "prior_log_alpha",
}


class NvibPreTrainedModel(SinglePrecisionMixin, OfTheBaseMixin, PreTrainedModel):
    """A model of Transformers around a ``base``, with NVIB layers in it.

    A subclass sets ``base`` and ``config``, and calls ``_put_into_self_attention``. Its ``_load_base`` loads a base by
    name, its ``_read`` runs the modules that read a batch's inputs, and its ``_auto_name`` is the Auto class that
    loads it. With ``_has_card`` it saves a model card too.
    """

    config_class = NvibConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _tied_weights_keys: dict[str, str] = {}  # none of its own; if this is a dict, PEFT looks for the base's
    _supports_sdpa = True
    # s / 2 * ||x||^2 in the pseudo-counts must cancel to the last bit against the attention's bias. This list is for
    # loading; SinglePrecisionMixin does the same later.
    _keep_in_fp32_modules_strict = [r"nvib\.(alpha|keep|prior)_\w+", "nvib.dropping_share", "kl_beta"]

    base: PreTrainedModel
    config: NvibConfig
    kl_beta: Tensor
    _self_attention_names: dict[str, str]  # of the modules in the model, by the names of their layers
    _has_stacked_encoder: bool
    _made_to_merge: dict[int, float]  # the encoder_merge_share that the encoder's layers were made with
    _load_base: Callable[..., PreTrainedModel]
    _auto_name: str
    _has_card = False

    # --------------------------------------------------------------------------------------- wrapping and loading
    @classmethod
    def from_base_pretrained(cls, base: str | PreTrainedModel, **kwargs) -> Self:
        """Wrap a pretrained model.

        With the default ``tau_*``, a fresh wrap in ``eval()`` computes what the base computes.

        Args:
            base: name or path of a checkpoint, or a loaded model, which is changed in place.
            kwargs: settings of :class:`NvibConfig`. Others go to the base's ``from_pretrained`` (``dtype``,
                ``attn_implementation``, ``revision``, ...).

        Raises:
            ValueError: the base has no known attention; a setting is outside its range.
            TypeError: neither :class:`NvibConfig` nor the base takes an argument.
        """
        settings, others = split_settings(kwargs)
        if isinstance(base, nn.Module):
            check_is_bare(base)
        if isinstance(base, PreTrainedModel):
            check_known(others, "A loaded model")
        elif isinstance(base, (str, os.PathLike)):
            base = cls._load_base(base, **others)
        else:
            raise TypeError(
                f"The base must be a model of Transformers, or its name or path, but got {type(base).__name__}. Pass "
                "a model that from_pretrained of its class returned."
            )
        return wrap(cls, base, settings)

    def unwrap(self) -> PreTrainedModel:
        """Return the base model with its trained weights and its own attention. Do not use this model afterwards.

        The base takes over this model's generation settings and tags.
        """
        restore_cross_attention(self.base)
        unstack(self.base)
        restore_self_attention(self.base)
        hand_back(self, self.base)
        return self.base

    def freeze_base(self) -> Self:
        """Train only the NVIB layers."""
        self.base.requires_grad_(False)
        for layer in self.nvib_layers().values():
            layer.requires_grad_(True)
        return self

    def initialize_weights(self) -> None:
        """Initialise weights that were not loaded, the base's by its own rules. Transformers would skip the base."""
        for name, layer in self.nvib_layers().items():  # first, because the base has rules for all linear maps
            if not getattr(layer, "_is_hf_initialized", False):
                self._initialize_nvib(layer, self.config.taus(name.partition(".")[0]))
        self.base.initialize_weights()
        super().initialize_weights()
        if (prior := getattr(self, "latent_prior", None)) is not None:
            prior.requires_grad_(not self.config.latent_prior_frozen)  # else fit_latent_prior trains it

    @torch.no_grad()
    def _initialize_nvib(self, layer: NvibLayer, taus: dict[str, float]) -> None:
        """Set an NVIB layer to its prior and the identity, except for tensors that were loaded."""
        for name, value in self._buffers_of_the_config().items():
            init.copy_(layer.get_buffer(name), value)
        parameters = layer.identity_parameters(**taus)
        for name, value in parameters.items():
            init.copy_(layer.get_parameter(name), value)
        for module in layer.modules():
            module._is_hf_initialized = True

    @torch.no_grad()
    def _heed_settings_in_buffers(self, names: Collection[str]) -> None:
        """Set again what these settings say. Loading has set the buffers to what they were."""
        buffers = self._buffers_of_the_config()
        for name in IN_BUFFERS.keys() & set(names):
            for layer in self.nvib_layers().values():
                layer.get_buffer(IN_BUFFERS[name]).copy_(buffers[IN_BUFFERS[name]])

    def _buffers_of_the_config(self) -> dict[str, Tensor]:
        """Of each NVIB layer, by name. Values can be broadcast to the buffers."""
        config = self.config
        of_prior = prior_buffers(config.prior_mu, config.prior_var, math.log(config.prior_alpha))
        return {**of_prior, "dropping_share": torch.as_tensor(config.dropping_share)}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.ones_(self.kl_beta)
            if hasattr(self, "silence"):
                init.zeros_(self.silence)
        elif isinstance(module, LatentPrior):
            init.zeros_(module.is_fitted)
            init.zeros_(module.code_bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in ``PreTrainedModel``, for a saved NVIB model, but refuses damaged or incomplete files.

        Raises:
            OSError: files are missing or cut short; or weights are missing, without ``state_dict``,
                ``output_loading_info`` or ``ignore_mismatched_sizes``.
            ValueError: it is another kind of model, or a newer version saved it; there is no name.
        """
        state_dict = kwargs.get("state_dict")
        check_name_to_load(pretrained_model_name_or_path, state_dict)
        with damage_explained(pretrained_model_name_or_path):
            key_mapping = RENAMED | (kwargs.pop("key_mapping", None) or {})
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, key_mapping=key_mapping, **kwargs
            )
        model._heed_settings_in_buffers(kwargs.keys())
        # If the model is saved again, renamed tensors get their new names.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [rule for rule in conversions if not RENAMED.keys() & set(rule.source_patterns)]
        if output_loading_info:
            return model, info
        if state_dict is None and not kwargs.get("ignore_mismatched_sizes"):
            check_weights_fit(pretrained_model_name_or_path, info["missing_keys"], info["unexpected_keys"])
        return model

    # -------------------------------------------------------------------------------------------------- saving
    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoModel") -> None:
        """Does nothing: a saved model brings its code anyway. Transformers could save code from one folder only."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs
    ) -> None:
        """As in ``PreTrainedModel``. The folder gets the model's code and, if it has none yet, a model card.

        An older configuration is removed first, and the new one is written last. If saving is interrupted, the folder
        has no configuration, and does not load.

        Afterwards ``model.name_or_path`` is the place it was saved or pushed to. Adapters use it as the base's name.
        """
        self.config.check()  # before anything is written
        if self.config.is_encoder_decoder:
            check_silence_is_stored(self)
        known = getattr(self.config, "auto_map", None) or {}
        autos = [self._auto_name]
        if self.config.is_encoder_decoder:
            autos += ["AutoModel", IN_SAVED_CODE.get(self.base.main_input_name, self._auto_name)]
        self.config.auto_map = {**known, **dict.fromkeys(autos, auto_map_entry(type(self)))}
        folder = Path(save_directory)
        if self._holds_an_adapter():
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            return
        warn_if_not_found(self.config.base_architecture)
        saves = self.should_save_on_this_rank(is_main_process) and not folder.is_file()
        with written_last(folder / "config.json") if saves else nullcontext():
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            if saves:
                save_code(type(self), folder)
        self.name_or_path = str(save_directory)
        if saves and not (folder / "README.md").exists():
            self._save_card(folder, folder.resolve().name)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        """The last step of each push. A repository without a card gets this model's card, not an empty form."""
        path = Path(working_dir) / "README.md"
        if not self._holds_an_adapter():  # save_pretrained(..., push_to_hub=True) does both after the push
            save_code(type(self), working_dir)
            put_in_place(path.with_name("config.json"))
        if "README.md" not in files_timestamps and not file_exists(repo_id, "README.md", token=kwargs.get("token")):
            tags = ModelCard.load(path).data.tags if path.exists() else None
            self._save_card(path.parent, repo_id, tags=tags)
        commit = super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)
        if not self._holds_an_adapter():
            self.name_or_path = repo_id  # in place of a temporary folder
        return commit

    def _holds_an_adapter(self) -> bool:
        """Whether Transformers would save an adapter instead of the model."""
        return getattr(self, "_hf_peft_config_loaded", False)

    def _save_card(self, folder: Path, name: str, **metadata) -> None:
        if self._has_card and not self._holds_an_adapter():
            write_whole(folder / "README.md", str(model_card(self, name, **metadata)))

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    # ------------------------------------------------------------------------------------------- NVIB layers
    def _put_into_self_attention(self, halves: dict[str, nn.Module]) -> None:
        """Turn the self-attentions of the base that ``config.attentions`` names into denoising attention."""
        names = put_into_self_attention(self.base, halves, self.config)
        self._self_attention_names = {layer: f"base.{name}" for layer, name in names.items()}
        self._has_stacked_encoder = is_stacked(self.config)
        self._made_to_merge = dict(self.config.encoder_merge_share or {})

    def nvib_layers(self) -> dict[str, NvibLayer]:
        """The NVIB layers: ``"cross"`` between encoder and decoder, ``"encoder.0"``, ..., ``"decoder.0"``, ..."""
        cross = {"cross": self.nvib} if hasattr(self, "nvib") else {}
        return cross | {name: module.nvib for name, module in self._self_attentions().items()}

    def _self_attentions(self) -> dict[str, DenoisingSelfAttention]:
        return {layer: self.get_submodule(name) for layer, name in self._self_attention_names.items()}

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs
    ) -> None:
        """As in ``PreTrainedModel``, but refuses reentrant checkpointing, which hides layers' KLs from the loss."""
        reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)
        if enable and reentrant and self._self_attention_names:
            raise ValueError(
                "use_reentrant=True first runs the layers without gradients, and the KLs of their NVIB layers come "
                "from that run. Pass {'use_reentrant': False}, which is the default."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _check_generator(self, generator: torch.Generator) -> None:
        """Raise ValueError if checkpointing would not repeat a generator's draws in the backward pass."""
        if not self.training or not self._self_attention_names:
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "A generator was given under gradient checkpointing, which restores only the state of the global "
                "generator when it runs the layers again. Leave generator out and call torch.manual_seed."
            )

    @torch.no_grad()
    def set_taus(self, **taus: float | dict[str, float]) -> None:
        """Regularise a live model: initialise its layers anew, each for its own prior, and update the configuration.

        The layers lose what they learnt in training; the priors stay.

        Args:
            taus: those of ``tau_alpha``, ``tau_sigma`` and ``tau_mu`` to change, as in :class:`~nvib_hf.NvibConfig`.

        Raises:
            ValueError: a value is outside its range. TypeError: another name. Then nothing has changed.

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
        r"""Give every NVIB layer an empirical prior, from its inputs over a corpus, and initialise the layer for it.

        Args:
            batches: the model's inputs, for instance a ``DataLoader``. If the decoder's self-attention has NVIB, they
                need the decoder's inputs or ``labels`` too. Columns that are not tensors are skipped.

        Returns:
            The prior of the layer between the halves. If self-attentions have NVIB, the priors of all layers by name.

        Raises:
            ValueError: there are fewer than two vectors, or a channel never varies. Then nothing has changed.

        Source: Fehr & Henderson (COLM 2024), empirical priors.
        """
        layers = self.nvib_layers()
        statistics = {name: PriorStatistics(layer.scale) for name, layer in layers.items()}
        with torch.no_grad(), self._watched(statistics):
            for batch in batches:
                self._read({name: value for name, value in batch.items() if isinstance(value, Tensor)})
        priors = {name: seen.prior(name) for name, seen in statistics.items()}
        with torch.no_grad():
            for name, layer in layers.items():
                layer.set_prior(*priors[name])
                layer.identity_init(**self.config.taus(name.partition(".")[0]))
        return priors if self._self_attention_names else priors["cross"]

    @contextmanager
    def _watched(self, statistics: dict[str, PriorStatistics]) -> Iterator[None]:
        """Put the model in ``eval()``, and let ``statistics`` see the inputs of their layers."""
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
        source_mask = module.source_mask(mask, hidden_states, module.handed_on_below())
        seen.add(hidden_states, None if source_mask is None else ~source_mask)

    return see


def _watch_source(seen: PriorStatistics) -> Callable:
    def see(layer: NvibLayer, args: tuple) -> None:
        hidden_states, padding_mask, *_ = args
        seen.add(hidden_states, padding_mask)

    return see


def check_name_to_load(name: object, state_dict: dict | None) -> None:
    """Raise ValueError if there is nothing to load from."""
    if name is None and state_dict is None:
        raise ValueError(
            "There is no name to load an NVIB model by. If you load an adapter, its model had not been saved when the "
            "adapter was made: wrap the base again and call PeftModel.from_pretrained(model, adapter)."
        )


def check_weights_fit(name: object, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise OSError if a checkpoint lacks weights, or has weights of NVIB that the model lacks."""
    if missing := sorted(missing):
        raise OSError(
            f"The checkpoint {name} lacks {len(missing)} of the model's weights ({_some(missing)}). Fetch it again, "
            "or pass ignore_mismatched_sizes=True to start those weights afresh."
        )
    if unexpected := sorted(key for key in unexpected if "nvib" in key.split(".")):
        raise OSError(
            f"The checkpoint {name} has {len(unexpected)} weights of NVIB that do not fit its configuration "
            f"({_some(unexpected)}), so the two come from different models. Fetch both again, or pass "
            "ignore_mismatched_sizes=True to leave those weights out."
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
