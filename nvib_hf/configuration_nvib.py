"""Configuration of an NVIB model: the base model's configuration and the bottleneck's settings."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from .layers.latent_prior import checked_sizes
from .layers.settings import (
    CHOICES,
    KINDS,
    RANGES,
    SWITCHES,
    attentions_by_kind,
    check_dropping,
    check_prior,
    checked,
    checked_tau,
)
from .versions import CACHE, UPDATE, ConfigOfABase
from .wrapping.adapters import READ_BY_PEFT, SIZES, default_targets
from .wrapping.hub import auto_map_entry, name_until_finished, save_code

CONFIG_VERSION = 1

TAUS = {"tau_alpha": 10.0, "tau_sigma": 0.0, "tau_mu": 1.0}  # which compute the base model's function


def _of_base(name: str, *default: object) -> property:
    """A setting of the base configuration, read and written there. Values set before it exists are applied later."""

    def read(config: NvibConfig):
        return getattr(vars(config).get("base_config"), name, *default)

    def write(config: NvibConfig, value) -> None:
        base = vars(config).get("base_config")
        if isinstance(base, PreTrainedConfig):
            setattr(base, name, value)
        else:
            vars(config).setdefault("_waiting", {})[name] = value

    return property(read, write, doc=f"``{name}`` of the base configuration.")


def _attention_implementations(config: PreTrainedConfig) -> dict:
    """The attention implementations of a configuration and its parts, as the setter takes them."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {"": config._attn_implementation} | {
        key: _attention_implementations(part) for key, part in parts.items() if part is not None
    }


def is_hub_id(name: str | None) -> bool:
    """Whether a name may be that of a repository, rather than a folder's, which means nothing elsewhere."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not os.path.isdir(name)


def _number(value: object) -> object:
    """A number as a command line or a file brings it; anything else as it is, for its check."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class NvibConfig(ConfigOfABase):
    r"""Configuration of :class:`~nvib_hf.NvibForConditionalGeneration`.

    ``lambda_*``, ``free_bits_*``, ``word_dropout*`` and ``label_smoothing`` are read at every step; the other settings
    are those of a model's layer when it is made.

    Args:
        base_config: configuration of the encoder-decoder model that is wrapped (an object or a dict). Copied: the
            model it came from is not touched.
        base_architecture: class of the base model in Transformers, ``"BartForConditionalGeneration"``, or of your own
            in a module that is imported, ``"my_models:MyBart"``; by default what Transformers' Auto classes make of
            ``base_config``.
        attentions: which attentions have NVIB, each with a layer of its own. ``None``: the cross-attention of an
            encoder-decoder, all of an encoder alone. Or those of ``("cross", "encoder", "decoder")`` as a list, which
            means all layers, or as ``{"cross": "all", "encoder": [3, 4, 5]}``, counted from 0.
        accumulate_alpha: pseudo-counts of an encoder's layers are added to those of the layer above, so that what has
            no weight in one keeps none; a fresh wrap does not compute the base's function with it.
        prior_mu, prior_var: the prior's mean and variance, one number or one value per channel.
        prior_alpha: pseudo-count of the prior's component, above 0.
        delta: conditional prior, in [0, 1]: the share of the source length that the prior expects to keep.
        kappa: vectors drawn per component in training, at least 1; in self-attention it is 1.
        alpha_activation: ``"exp"`` (quadratic pseudo-counts) or ``"relu"``.
        dropping: what decides which vectors the decoder does not get. ``"threshold"``: ``alpha_threshold``, under the
            pseudo-counts, if it is not 0. ``"relaxed"``: a decision that is learned, one linear unit on the encoder's
            vectors, which keeps them all at the start; for a decoder that is frozen
            (:meth:`~nvib_hf.NvibForConditionalGeneration.freeze_base`). What a layer of the encoder drops is gone
            from the layers above it too; a decoder's layers drop nothing.
        alpha_threshold: components with a pseudo-count at or below it are dropped, in training and evaluation.
        threshold_share: the share of the training examples in which vectors are dropped, so that one can come back
            through the others; 0 turns dropping off, in evaluation too. Where training starts: a callback may move
            it.
        merge_share: the share of its vectors that a latent is merged to, in (0, 1], in training and evaluation: those
            next to each other that cost least are replaced by their mean, with the mass of all
            (:meth:`~nvib_hf.NvibForConditionalGeneration.merge_latents`). 1 merges nothing. Read at every step.
        encode_sound_only: for Whisper: where ``attention_mask`` says how long the sound is, the encoder runs over it
            and half a second more, and stored vectors of silence stand for the rest of the window, with its mass
            (:meth:`~nvib_hf.NvibForConditionalGeneration.store_silence`). They are not merged.
        tau_alpha, tau_sigma, tau_mu: identity initialisation. The defaults compute the base model's function;
            smaller ``tau_alpha`` and larger ``tau_sigma`` regularise it. A number, or one for each kind of attention:
            ``{"encoder": 5.0}`` leaves the others at the default.
        lambda_gaussian, lambda_dirichlet: weights of the two KL terms in the loss, per target token.
        lambda_vectors: weight of the share of vectors kept in the loss, as relaxed by
            :func:`~nvib_hf.layers.dropping.relaxed_share`, per target token; needs something that drops.
        free_bits_gaussian, free_bits_dirichlet: nats of an example's KL that cost nothing.
        word_dropout: share of the decoder's input tokens replaced in training, in [0, 1): it has to ask the latent
            for what it cannot read.
        word_dropout_token_id: by what; the base's padding token by default.
        label_smoothing: smoothing of the cross-entropy's targets, in [0, 1).
        evaluation: what is decoded in evaluation. ``"means"``: the posterior's means, scored as their samples are on
            average, which is what training with ``kappa = 1`` fits. ``"mixture"``: the posterior itself, as published;
            it is what ``tau_sigma > 0`` without training needs, where the variance is the regulariser.
        kl_weights: how KL_G weighs the components. ``"drawn"``: each as one, since training draws ``kappa`` vectors
            of every component; what a threshold drops costs nothing. ``"pseudo_counts"``: by their pseudo-counts, as
            published, which lets vectors of small pseudo-count carry information that is not paid for.
        latent_prior: sizes of a learned prior, of :data:`~nvib_hf.layers.latent_prior.SIZES` those that differ, ``{}``
            for none. :meth:`~nvib_hf.NvibForConditionalGeneration.fit_latent_prior` trains it, and sets this.
        exact_attention: keep the query-norm term of the mixture's score, as exact Bayes has it. The published
            score leaves it out.

    Raises:
        ValueError: a value outside its range, named with what to do.

    Example:
        >>> from transformers import BartConfig
        >>> config = NvibConfig(base_config=BartConfig(), lambda_gaussian=0.01)
        >>> config.base_config.model_type
        'bart'
    """

    model_type = "nvib"
    keys_to_ignore_at_inference = [
        CACHE,
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "cross_entropy",
        "kl_gaussian",
        "kl_dirichlet",
        "num_vectors",
        "prop_vectors",
        "effective_vectors",
        "layer_kl_gaussian",
        "layer_kl_dirichlet",
        "layer_prop_vectors",
        "latents",
    ]

    base_architecture: str | None = None
    attentions: dict[str, str | list[int]] | list[str] | None = None
    accumulate_alpha: bool = False
    prior_mu: float | list[float] = 0.0
    prior_var: float | list[float] = 1.0
    prior_alpha: float = 1.0
    delta: float = 1.0
    kappa: int = 1
    alpha_activation: str = "exp"
    dropping: str = "threshold"
    alpha_threshold: float = 0.0
    threshold_share: float = 1.0
    merge_share: float = 1.0
    encode_sound_only: bool = False
    tau_alpha: float | dict[str, float] = TAUS["tau_alpha"]
    tau_sigma: float | dict[str, float] = TAUS["tau_sigma"]
    tau_mu: float | dict[str, float] = TAUS["tau_mu"]
    lambda_gaussian: float = 0.0
    lambda_dirichlet: float = 0.0
    lambda_vectors: float = 0.0
    free_bits_gaussian: float = 0.0
    free_bits_dirichlet: float = 0.0
    word_dropout: float = 0.0
    word_dropout_token_id: int | None = None
    label_smoothing: float = 0.0
    evaluation: str = "means"
    kl_weights: str = "drawn"
    exact_attention: bool = False
    latent_prior: dict[str, int] | None = None
    is_encoder_decoder: bool = True
    config_version: int = CONFIG_VERSION

    vocab_size = _of_base("vocab_size", None)
    hidden_size = _of_base("hidden_size", None)
    pad_token_id = _of_base("pad_token_id", None)
    bos_token_id = _of_base("bos_token_id", None)
    eos_token_id = _of_base("eos_token_id", None)
    decoder_start_token_id = _of_base("decoder_start_token_id", None)
    tie_word_embeddings = _of_base("tie_word_embeddings", None)
    id2label = _of_base("id2label", None)
    label2id = _of_base("label2id", None)
    problem_type = _of_base("problem_type", None)

    def __post_init__(self, **kwargs) -> None:
        self.config_version = checked("config_version", self.config_version)
        if self.config_version > CONFIG_VERSION:
            raise ValueError(
                f"This configuration was written by a newer nvib_hf (config_version {self.config_version}; this "
                f"one reads up to {CONFIG_VERSION}). {UPDATE}"
            )
        refuse_misspelt_settings(kwargs)
        self._check_settings()
        if isinstance(self.base_config, PreTrainedConfig):
            # super().__post_init__ resets the attention implementation of its parts; on a live model's own
            # configuration its causal mask would vanish without a word.
            implementations = _attention_implementations(self.base_config)
            kwargs.setdefault(
                "attn_implementation", {"": self.base_config._attn_implementation, "base_config": implementations}
            )
            self.base_config = copy.deepcopy(self.base_config)
        waiting = vars(self).pop("_waiting", {})
        super().__post_init__(**kwargs)
        for name, value in waiting.items():
            if value is not None and not self.is_encoder_decoder:  # whose base may have labels, but uses none
                setattr(self, name, value)
        self._check_together()

    def _check_settings(self) -> None:
        """Every setting by itself, made plain Python, which JSON can hold, whatever it came as."""
        for name in ("prior_mu", "prior_var"):
            value = getattr(self, name)
            setattr(self, name, value.tolist() if hasattr(value, "tolist") else value)
        check_prior(self.prior_mu, self.prior_var, _number(self.prior_alpha))
        own = setting_names()
        for name in sorted(own & {*RANGES, *CHOICES, *SWITCHES} - {"word_dropout_token_id", *TAUS}):
            value = getattr(self, name)
            value = checked(name, _number(value) if name in RANGES else value)
            setattr(self, name, value if name not in RANGES or RANGES[name].whole else float(value))
        if self.word_dropout_token_id is not None:
            self.word_dropout_token_id = checked("word_dropout_token_id", self.word_dropout_token_id)
        for name in TAUS:
            value = getattr(self, name)
            by_kind = isinstance(value, dict)
            value = {kind: _number(tau) for kind, tau in value.items()} if by_kind else _number(value)
            value = checked_tau(name, value)
            setattr(self, name, {kind: float(tau) for kind, tau in value.items()} if by_kind else float(value))
        self.is_encoder_decoder = checked("is_encoder_decoder", self.is_encoder_decoder)
        self.attentions = attentions_by_kind(self.attentions)
        if self.latent_prior is not None:
            self.latent_prior = checked_sizes(self.latent_prior)
        if not isinstance(self.base_config, (PreTrainedConfig, dict, type(None))):
            raise TypeError(
                f"base_config must be a configuration or a dict, but got {self.base_config!r}. Pass model.config, or "
                "AutoConfig.from_pretrained(name)."
            )
        if not isinstance(self.base_architecture, (str, type(None))):
            raise TypeError(
                f"base_architecture must be the name of a class, but got {self.base_architecture!r}. Pass "
                "type(base).__name__, or leave it out."
            )

    def _check_together(self) -> None:
        """Settings that do not go with each other."""
        check_dropping(self.dropping, self.alpha_threshold)
        if self.exact_attention and self.evaluation != "mixture":
            raise ValueError(
                f"exact_attention is a term of the mixture's score, but evaluation is {self.evaluation!r}. Set "
                "evaluation='mixture' too."
            )
        if self.accumulate_alpha and self.alpha_activation == "relu":
            raise ValueError(
                "accumulate_alpha adds log pseudo-counts, which alpha_activation='relu' has none of where it is 0. "
                "Set alpha_activation='exp'."
            )
        if self.alpha_activation == "relu" and min(self.taus(kind)["tau_alpha"] for kind in KINDS) <= 0:
            raise ValueError(
                f"tau_alpha must be above 0 with alpha_activation='relu', but got {self.tau_alpha}: pseudo-counts "
                "start at it, and one that starts at 0 has no gradient."
            )
        if self.lambda_vectors > 0 and not self.drops:
            raise ValueError(
                f"lambda_vectors={self.lambda_vectors} weighs the share of vectors kept, but alpha_threshold is 0 and "
                "drops none. Set alpha_threshold, for instance to 0.1, or dropping to 'relaxed'."
            )

    def taus(self, kind: str) -> dict[str, float]:
        """``tau_alpha``, ``tau_sigma`` and ``tau_mu`` of a kind of attention."""
        given = {name: getattr(self, name) for name in TAUS}
        return {name: tau.get(kind, TAUS[name]) if isinstance(tau, dict) else tau for name, tau in given.items()}

    @property
    def drops(self) -> bool:
        """Whether there is anything that drops vectors."""
        return self.dropping != "threshold" or self.alpha_threshold > 0

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """As in the base class, but the configuration of another kind of model is refused."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        name = str(pretrained_model_name_or_path)
        if not config:
            raise OSError(f"{name} has no config.json, so it is no saved model.")
        if config.get("model_type") != cls.model_type:
            raise ValueError(
                f"{name} is a model of type {config.get('model_type')!r}, not an NVIB model. To put NVIB into it, "
                f"call NvibForConditionalGeneration.from_base_pretrained({name!r})."
            )
        return config, kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoConfig") -> None:
        """Does nothing: a saved configuration brings its code anyway."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in the base class; the code of this class is written beside it (see ``wrapping/hub.py``)."""
        self.auto_map = {**(getattr(self, "auto_map", None) or {}), "AutoConfig": auto_map_entry(type(self))}
        super().save_pretrained(save_directory, *args, **kwargs)
        save_code(type(self), save_directory)

    def to_json_file(self, json_file_path: str | os.PathLike, *args, **kwargs) -> None:
        """As in the base class; under another name while the model that it belongs to is being saved."""
        super().to_json_file(name_until_finished(Path(json_file_path)), *args, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        """The last step of each push, also of one by ``save_pretrained``, which has not written the code by then."""
        save_code(type(self), working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """As in the base class. What is the base's is in its part alone."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in READ_BY_PEFT}

    def to_dict(self) -> dict:
        """As in the base class. Folders from which the model or parts of it were loaded are not named."""
        config = super().to_dict()
        base = config["base_config"]
        config |= {name: base[name] for name in READ_BY_PEFT if name in base}  # which PEFT reads
        default_targets(self.model_type, base.get("model_type", ""))
        parts = [config]
        for part in parts:
            parts += [value for value in part.values() if isinstance(value, dict)]
            if not is_hub_id(part.get("_name_or_path")):
                part.pop("_name_or_path", None)
        return config

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base configuration's text part: caches, masks and embeddings are made after it."""
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


for _name in SIZES:
    setattr(NvibConfig, _name, _of_base(_name))


def setting_names() -> set[str]:
    """The bottleneck's settings: what :class:`NvibConfig` has beside any configuration's fields and the base."""
    names = {field.name for field in fields(NvibConfig)} - {field.name for field in fields(PreTrainedConfig)}
    return names - {"base_config", "base_architecture", "config_version"}


def refuse_misspelt_settings(names: Iterable[str]) -> None:
    """Raise TypeError for a name that is nearly that of a setting."""
    for name in names:
        if close := difflib.get_close_matches(name, setting_names(), n=1, cutoff=0.75):
            raise TypeError(f"{name!r} is no setting of NvibConfig. Did you mean {close[0]!r}?")
