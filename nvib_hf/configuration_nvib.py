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
    RENAMED,
    SWITCHES,
    attentions_by_kind,
    check_dropping,
    check_mass_is_read,
    check_one_limit,
    check_prior,
    checked,
    checked_tau,
    shares_by_layer,
)
from .versions import CACHE, UPDATE, ConfigOfABase
from .wrapping.adapters import READ_BY_PEFT, SIZES, default_targets
from .wrapping.hub import auto_map_entry, name_until_finished, save_code

CONFIG_VERSION = 1

TAUS = {"tau_alpha": 10.0, "tau_sigma": 0.0, "tau_mu": 1.0}  # these values compute the base model's function


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
    """Whether a name can be a repository's. The name of a folder means nothing on another machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not os.path.isdir(name)


def _number(value: object) -> object:
    """The number in a string, as a command line or a file gives it. Other values go to their check unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class NvibConfig(ConfigOfABase):
    r"""Configuration of :class:`~nvib_hf.NvibForConditionalGeneration`.

    The model reads ``lambda_*``, ``free_bits_*``, ``word_dropout*`` and ``label_smoothing`` at every step. It takes
    the other settings when its layers are made: changing them later has no effect, but for ``merge_share``,
    ``merge_cost`` and ``training_merge_share``. If ``encoder_merge_share`` was changed, the model refuses to run. Pass
    a setting to ``from_pretrained`` to load a model with another value.

    Args:
        base_config: configuration of the encoder-decoder model that you wrap (an object or a dict). The configuration
            is copied. (Wrapping a model changes the model: pass ``copy.deepcopy(model)`` to keep it.)
        base_architecture: the base model's class. Name a class of Transformers (``"BartForConditionalGeneration"``),
            or a class of your own in a module that you import (``"my_models:MyBart"``). By default Transformers' Auto
            classes choose it from ``base_config``.
        attentions: which attentions have NVIB, each with a layer of its own. ``None`` means the cross-attention of an
            encoder-decoder, and all attentions of an encoder alone. A list such as ``["cross", "encoder"]``, out of
            ``"cross"``, ``"encoder"`` and ``"decoder"``, means all layers of each. A dict chooses layers, counted
            from 0: ``{"cross": "all", "encoder": [3, 4, 5]}``.
        accumulate_alpha: add the pseudo-counts of each encoder layer to those of the layer above. A vector without
            weight in one layer then has none in later layers. A fresh wrap does not compute the base's function.
        prior_mu, prior_var: the prior's mean and variance, one number or one value per channel.
        prior_alpha: pseudo-count of the prior's component, above 0.
        delta: the share of the source length that the (conditional) prior expects to keep, in [0, 1].
        kappa: vectors drawn per component in training, at least 1. Self-attention always draws 1.
        alpha_activation: ``"exp"`` (quadratic pseudo-counts) or ``"relu"``.
        dropping: what decides which vectors are dropped before the decoder. ``"threshold"``: vectors whose
            pseudo-count is at or below ``alpha_threshold``, if that is not 0. ``"relaxed"``: a learned decision, one
            linear unit on the encoder's vectors, which keeps them all at the start. Use it where the decoder is frozen
            (:meth:`~nvib_hf.NvibForConditionalGeneration.freeze_base`). If an encoder layer drops a vector, the layers
            above it lack the vector too. A decoder's layers drop nothing.
        alpha_threshold: components with a pseudo-count at or below it are dropped, in training and evaluation.
        dropping_share: the share of the training examples in which vectors are dropped. The other examples let a
            vector come back. 0 turns dropping off, in evaluation too. Training starts with this value; a callback may
            move it.
        merge_share: each latent is merged to this share of its vectors, in (0, 1], in training and evaluation.
            Merging replaces the neighbours that cost least by their mean, with the mass of all
            (:meth:`~nvib_hf.NvibForConditionalGeneration.merge_latents`). 1 merges nothing. Read at every step.
        merge_cost: in place of a share, the highest cost of a pair that is merged. Inputs then keep as many vectors as
            they need: a long sound more than a short one. The costs of a model have a scale of their own, so try some:
            ``model.merge_latents(latents, cost=...)``. 0 merges nothing. Read at every step.
        training_merge_share: in training, each example draws its share, uniformly between this and 1, in place of
            ``merge_share`` or ``merge_cost``: the model learns to need fewer vectors. 1 draws none.
        encoder_merge_share: merging inside the encoder. It says after which layers, counted from 0, the vectors are
            merged, and to which share of those that are left: ``{1: 0.5, 3: 0.5}``. The layers above run on fewer
            vectors and read their mass as pseudo-counts, so they need NVIB in their self-attention
            (``attentions=["cross", "encoder"]``). An encoder alone keeps its length: each merged vector stands in the
            place of all that it replaces.
        encode_sound_only: for Whisper. If ``attention_mask`` gives the length of the sound, the encoder runs over the
            sound and half a second more. Stored vectors of silence replace the rest of the window, with its mass
            (:meth:`~nvib_hf.NvibForConditionalGeneration.store_silence`). They are not merged.
        tau_alpha, tau_sigma, tau_mu: identity initialisation. The defaults compute the base model's function.
            A smaller ``tau_alpha`` or a larger ``tau_sigma`` regularises it. Pass a number, or one for each kind of
            attention: ``{"encoder": 5.0}`` leaves the others at the default.
        lambda_gaussian, lambda_dirichlet: weights of the two KL terms in the loss, per target token.
        lambda_vectors: weight of the (relaxed) share of vectors kept in the loss, per target token
            (:func:`~nvib_hf.layers.dropping.relaxed_share`). Something must drop vectors.
        free_bits_gaussian, free_bits_dirichlet: nats of an example's KL that cost nothing.
        word_dropout: share of the decoder's input tokens that training replaces, in [0, 1). The decoder must then find
            those words in the latent.
        word_dropout_token_id: the token that replaces them; the base's padding token by default.
        label_smoothing: smoothing of the cross-entropy's targets, in [0, 1).
        evaluation: what evaluation decodes. ``"means"``: the posterior's means, with the scores that their samples
            have on average. This fits training with ``kappa = 1``. ``"mixture"``: the posterior itself, as published.
            You need it for ``tau_sigma > 0`` without training, where the variance is the regulariser.
        kl_weights: how KL_G weighs the components. ``"drawn"``: every component counts as one, because training draws
            ``kappa`` vectors of each. What a threshold drops costs nothing. ``"pseudo_counts"``: components count by
            their pseudo-counts, as published. Vectors of small pseudo-count then carry information for free.
        latent_prior: sizes of a learned prior. Give the ones that differ from
            :data:`~nvib_hf.layers.latent_prior.SIZES`; ``{}`` keeps them all.
            :meth:`~nvib_hf.NvibForConditionalGeneration.fit_latent_prior` trains the prior and sets this.
        latent_prior_frozen: False while the learned prior is trained with the model: the loss then charges what the
            vectors cost under it, in place of independent Gaussians.
            :meth:`~nvib_hf.NvibForConditionalGeneration.unfreeze_latent_prior` and ``freeze_latent_prior`` set this.
        exact_attention: keep the query-norm term of the mixture's score, as exact Bayes does. The published score
            leaves it out.

    Raises:
        ValueError: a value outside its range. The message names it and says what to do.

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
    dropping_share: float = 1.0
    merge_share: float = 1.0
    merge_cost: float = 0.0
    training_merge_share: float = 1.0
    encoder_merge_share: dict[int, float] | None = None
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
    latent_prior_frozen: bool = True
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
        for old in RENAMED.keys() & kwargs.keys():
            new, value = RENAMED[old], kwargs.pop(old)
            if getattr(self, new) not in (value, getattr(type(self), new)):
                raise TypeError(f"{new} is given twice, also by its old name {old!r}. Leave out {old!r}.")
            setattr(self, new, value)
        refuse_misspelt_settings(kwargs)
        self._check_settings()
        if isinstance(self.base_config, PreTrainedConfig):
            # super().__post_init__ resets the attention implementation of the parts. If it did so on the configuration
            # of a live model, the model would silently lose its causal mask.
            implementations = _attention_implementations(self.base_config)
            kwargs.setdefault(
                "attn_implementation", {"": self.base_config._attn_implementation, "base_config": implementations}
            )
            self.base_config = copy.deepcopy(self.base_config)
        waiting = vars(self).pop("_waiting", {})
        super().__post_init__(**kwargs)
        for name, value in waiting.items():
            if value is not None and not self.is_encoder_decoder:  # an encoder-decoder uses no labels of its base
                setattr(self, name, value)
        self._check_together()

    def check(self) -> None:
        """Check the settings again, as they are now: what passes can be saved and loaded.

        Raises:
            TypeError: an attribute whose name is nearly that of a setting; a value of another type.
            ValueError: a value outside its range, or settings that contradict each other.
        """
        known = {field.name for field in fields(type(self))}
        refuse_misspelt_settings(name for name in vars(self).keys() - known if not name.startswith("_"))
        self._check_settings()
        self._check_together()

    def _check_settings(self) -> None:
        """Check each setting by itself, and turn it into plain Python, which JSON can hold."""
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
        self.encoder_merge_share = shares_by_layer(self.encoder_merge_share)
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
        """Refuse settings that contradict each other."""
        check_dropping(self.dropping, self.alpha_threshold)
        check_one_limit(self.merge_share, self.merge_cost)
        if self.latent_prior is None and not self.latent_prior_frozen:
            raise ValueError(
                "latent_prior_frozen=False needs a learned prior, but latent_prior is None. Call "
                "model.fit_latent_prior(...) and model.unfreeze_latent_prior(...), which set both."
            )
        if self.attentions is not None:
            check_mass_is_read(self.encoder_merge_share, self.attentions)
        if self.exact_attention and self.evaluation != "mixture":
            raise ValueError(
                f"exact_attention=True adds a term to the mixture's score, but evaluation is {self.evaluation!r}. Set "
                "evaluation='mixture' too."
            )
        if self.accumulate_alpha and self.alpha_activation == "relu":
            raise ValueError(
                "accumulate_alpha=True adds log pseudo-counts, but with alpha_activation='relu' a pseudo-count can be "
                "0, which has no logarithm. Set alpha_activation='exp'."
            )
        if self.alpha_activation == "relu" and min(self.taus(kind)["tau_alpha"] for kind in KINDS) <= 0:
            raise ValueError(
                f"tau_alpha must be above 0 with alpha_activation='relu', but got {self.tau_alpha}. It is the "
                "pseudo-counts' first value, and a pseudo-count of 0 has no gradient."
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
        """As in the base class, but refuses the configuration of another kind of model."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        name = str(pretrained_model_name_or_path)
        if not config:
            raise OSError(f"{name} has no config.json, so it is not a saved model.")
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
        """As in the base class, and writes the code of this class beside it (see ``wrapping/hub.py``)."""
        self.check()
        self.auto_map = {**(getattr(self, "auto_map", None) or {}), "AutoConfig": auto_map_entry(type(self))}
        super().save_pretrained(save_directory, *args, **kwargs)
        save_code(type(self), save_directory)

    def to_json_file(self, json_file_path: str | os.PathLike, *args, **kwargs) -> None:
        """As in the base class, but uses another name for the file until its model is saved completely."""
        super().to_json_file(name_until_finished(Path(json_file_path)), *args, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        """The last step of each push. A push by ``save_pretrained`` comes here before the code is written."""
        save_code(type(self), working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """As in the base class. The base's settings appear in the base's part only."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in READ_BY_PEFT}

    def to_dict(self) -> dict:
        """As in the base class, without the names of the folders that the model or its parts were loaded from."""
        config = super().to_dict()
        base = config["base_config"]
        config |= {name: base[name] for name in READ_BY_PEFT if name in base}  # PEFT reads them here
        default_targets(self.model_type, base.get("model_type", ""))
        parts = [config]
        for part in parts:
            parts += [value for value in part.values() if isinstance(value, dict)]
            if not is_hub_id(part.get("_name_or_path")):
                part.pop("_name_or_path", None)
        return config

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base configuration's text part, which Transformers uses to make caches, masks and embeddings."""
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


for _name in SIZES:
    setattr(NvibConfig, _name, _of_base(_name))


def setting_names() -> set[str]:
    """The bottleneck's settings: the fields that :class:`NvibConfig` adds, except the base and the version."""
    names = {field.name for field in fields(NvibConfig)} - {field.name for field in fields(PreTrainedConfig)}
    return names - {"base_config", "base_architecture", "config_version"}


def refuse_misspelt_settings(names: Iterable[str]) -> None:
    """Raise TypeError if a name is a setting's old name, or nearly a setting's name."""
    for name in names:
        if name in RENAMED:
            raise TypeError(f"{name!r} is now called {RENAMED[name]!r}. Pass that.")
        if close := difflib.get_close_matches(name, setting_names(), n=1, cutoff=0.75):
            raise TypeError(f"{name!r} is not a setting of NvibConfig. Did you mean {close[0]!r}?")
