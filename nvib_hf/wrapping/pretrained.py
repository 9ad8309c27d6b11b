"""What every model around a base has: its NVIB layers, and how it comes to be, from a base or from files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
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
from .adapters import check_is_bare
from .architecture import warn_if_not_found
from .auto_classes import IN_SAVED_CODE
from .base import check_known, damage_explained
from .cross_attention import restore_cross_attention
from .halves import OfTheBaseMixin
from .hub import auto_map_entry, put_in_place, save_code, written_last
from .model_card import model_card
from .self_attention import DenoisingSelfAttention, restore_self_attention
from .stacked_encoder import unstack
from .wrap import hand_back, split_settings, wrap


class NvibPreTrainedModel(SinglePrecisionMixin, OfTheBaseMixin, PreTrainedModel):
    """A model of Transformers around a ``base``, with NVIB layers in it.

    Subclasses set ``base``, ``config`` and ``_self_attention_names`` (the modules' names in the model by those of
    their layers), load a base by its name in ``_load_base``, run what reads the inputs of a batch in ``_read``, and
    name the Auto class that loads them in ``_auto_name``; with ``_has_card`` a model card is saved, too.
    """

    config_class = NvibConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _tied_weights_keys: dict[str, str] = {}  # of its own; PEFT looks for those of the base if it finds a dict here
    _supports_sdpa = True
    # s / 2 * ||x||^2 in the pseudo-counts must cancel to the last bit against the attention's bias. When loading;
    # afterwards see SinglePrecisionMixin.
    _keep_in_fp32_modules_strict = [r"nvib\.(alpha|keep|prior)_\w+", "nvib.threshold_share", "kl_beta"]

    base: PreTrainedModel
    config: NvibConfig
    kl_beta: Tensor
    _self_attention_names: dict[str, str]
    _load_base: Callable[..., PreTrainedModel]
    _auto_name: str
    _has_card = False

    # --------------------------------------------------------------------------------------- wrapping and loading
    @classmethod
    def from_base_pretrained(cls, base: str | PreTrainedModel, **kwargs) -> Self:
        """Wrap a pretrained model.

        In ``eval()`` a fresh wrap computes what the base computes (for the default ``tau_*``).

        Args:
            base: name or path of a checkpoint, or a loaded model, which is changed in place.
            kwargs: settings of :class:`NvibConfig`; the others go to the base's ``from_pretrained``
                (``dtype``, ``attn_implementation``, ``revision``, ...).

        Raises:
            ValueError: the base has no attention that is known; a setting outside its range.
            TypeError: an argument that neither takes.
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
                "what from_pretrained of its class returned."
            )
        return wrap(cls, base, settings)

    def unwrap(self) -> PreTrainedModel:
        """The base model with its trained weights and its own cross-attention. This model is spent afterwards.

        It generates as this model is set to, and has its tags.
        """
        restore_cross_attention(self.base)
        unstack(self.base)
        restore_self_attention(self.base)
        hand_back(self, self.base)
        return self.base

    def freeze_base(self) -> Self:
        """Train the NVIB layers alone."""
        self.base.requires_grad_(False)
        for layer in self.nvib_layers().values():
            layer.requires_grad_(True)
        return self

    def initialize_weights(self) -> None:
        """What was not loaded: the base's by its own rules, which would pass it over in a model from elsewhere."""
        for name, layer in self.nvib_layers().items():  # first: the base has rules for linear maps of any kind
            if not getattr(layer, "_is_hf_initialized", False):
                self._initialize_nvib(layer, self.config.taus(name.partition(".")[0]))
        self.base.initialize_weights()
        super().initialize_weights()
        if (prior := getattr(self, "latent_prior", None)) is not None:
            prior.requires_grad_(False)  # it is trained by a call of its own

    @torch.no_grad()
    def _initialize_nvib(self, layer: NvibLayer, taus: dict[str, float]) -> None:
        """Prior and identity of an NVIB layer, tensor by tensor, but for those that were loaded."""
        config = self.config
        buffers = prior_buffers(config.prior_mu, config.prior_var, math.log(config.prior_alpha))
        for name, value in (buffers | {"threshold_share": config.threshold_share}).items():
            init.copy_(layer.get_buffer(name), torch.as_tensor(value))
        parameters = layer.identity_parameters(**taus)
        for name, value in parameters.items():
            init.copy_(layer.get_parameter(name), value)
        for module in layer.modules():
            module._is_hf_initialized = True

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
        """As in ``PreTrainedModel``, of a saved NVIB model: one whose files are damaged or incomplete is refused.

        Raises:
            OSError: files that are missing or cut short, or weights that are missing, unless they are given
                (``state_dict``), looked at (``output_loading_info``) or not expected (``ignore_mismatched_sizes``).
            ValueError: another kind of model, or one saved by a newer version; no name at all.
        """
        state_dict = kwargs.get("state_dict")
        check_name_to_load(pretrained_model_name_or_path, state_dict)
        with damage_explained(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        if output_loading_info:
            return model, info
        if state_dict is None and not kwargs.get("ignore_mismatched_sizes"):
            check_weights_fit(pretrained_model_name_or_path, info["missing_keys"], info["unexpected_keys"])
        return model

    # -------------------------------------------------------------------------------------------------- saving
    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoModel") -> None:
        """Nothing to do: a saved model brings its code, which Transformers would save from one folder alone."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs
    ) -> None:
        """As in ``PreTrainedModel``. The folder gets the model's code and, if it has none yet, a model card.

        The configuration is written last, and an older one removed first: a folder in which saving was interrupted has
        none, and does not load.

        ``model.name_or_path`` is from then on where it was saved or pushed to: what an adapter takes for its base.
        """
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
        """The last step of each push. A repository without a card gets this model's, not an empty form."""
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
        """Whether Transformers would save an adapter in place of the model."""
        return getattr(self, "_hf_peft_config_loaded", False)

    def _save_card(self, folder: Path, name: str, **metadata) -> None:
        if self._has_card and not self._holds_an_adapter():
            write_whole(folder / "README.md", str(model_card(self, name, **metadata)))

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    # ------------------------------------------------------------------------------------------- NVIB layers
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

    def _check_generator(self, generator: torch.Generator) -> None:
        """Raise ValueError for a generator whose draws checkpointing would not repeat in the backward pass."""
        if not self.training or not self._self_attention_names:
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "A generator was given under gradient checkpointing, which restores the state of the global one alone "
                "when it runs the layers again. Leave it out and call torch.manual_seed."
            )

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
                decoder's self-attention has NVIB. Columns that are no tensors are passed over.

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
                self._read({name: value for name, value in batch.items() if isinstance(value, Tensor)})
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
        visible = module.visible(mask, hidden_states, module.handed_on_below())
        seen.add(hidden_states, None if visible is None else ~visible)

    return see


def _watch_source(seen: PriorStatistics) -> Callable:
    def see(layer: NvibLayer, args: tuple) -> None:
        hidden_states, padding_mask, *_ = args
        seen.add(hidden_states, padding_mask)

    return see


def check_name_to_load(name: object, state_dict: dict | None) -> None:
    """Raise ValueError where there is nothing to load from."""
    if name is None and state_dict is None:
        raise ValueError(
            "There is no name to load an NVIB model by. If this is for an adapter, the model had not been saved "
            "when that was put on it: wrap the base again and call PeftModel.from_pretrained(model, adapter)."
        )


def check_weights_fit(name: object, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise OSError for a checkpoint that lacks weights, or has weights of NVIB that the model has no place for."""
    if missing := sorted(missing):
        raise OSError(
            f"The checkpoint {name} lacks {len(missing)} of the model's weights ({_some(missing)}). Fetch it again, "
            "or pass ignore_mismatched_sizes=True to start those weights afresh."
        )
    if unexpected := sorted(key for key in unexpected if "nvib" in key.split(".")):
        raise OSError(
            f"The checkpoint {name} has {len(unexpected)} weights of NVIB that its configuration has no place for "
            f"({_some(unexpected)}), so the two are not of one model. Fetch both again, or pass "
            "ignore_mismatched_sizes=True to leave those weights out."
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
