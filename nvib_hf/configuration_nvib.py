"""Configuration of an NVIB model: the base model's configuration and the bottleneck's settings."""

from __future__ import annotations

import copy

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .validation import check_prior, check_settings, check_taus

CONFIG_VERSION = 1


def _of_base(name: str) -> property:
    """A setting that is the base configuration's, read and written there."""

    def read(config: NvibConfig):
        return getattr(config.base_config, name, None)

    def write(config: NvibConfig, value) -> None:
        setattr(config.base_config, name, value)

    return property(read, write, doc=f"``{name}`` of the base configuration.")


def _attention_implementations(config: PreTrainedConfig) -> dict:
    """The attention implementations of a configuration and its parts, as the setter takes them."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {"": config._attn_implementation} | {
        key: _attention_implementations(part) for key, part in parts.items() if part is not None
    }


class NvibConfig(PreTrainedConfig):
    r"""Configuration of :class:`~nvib_hf.NvibForConditionalGeneration`.

    Args:
        base_config: configuration of the encoder-decoder model that is wrapped (an object or a dict). Copied: the
            model it came from is not touched.
        base_architecture: class of the base model in Transformers, ``"BartForConditionalGeneration"``; by default
            the first of ``base_config.architectures``, or what ``AutoModelForSeq2SeqLM`` makes of it.
        prior_mu, prior_var: the prior's mean and variance, one number or one value a channel.
        prior_alpha: pseudo-count of the prior's component, above 0.
        delta: conditional prior, in [0, 1]: the share of the source length that the prior expects to keep.
        kappa: vectors drawn a component in training, at least 1.
        alpha_activation: ``"exp"`` (quadratic pseudo-counts) or ``"relu"``.
        alpha_threshold: components with a pseudo-count at or below it are dropped, in training and evaluation.
        tau_alpha, tau_sigma, tau_mu: identity initialisation. The defaults compute the base model's function;
            smaller ``tau_alpha`` and larger ``tau_sigma`` regularise it.
        lambda_gaussian, lambda_dirichlet: weights of the two KL terms in the loss, per target token.
        label_smoothing: smoothing of the cross-entropy's targets, in [0, 1).
        exact_attention: keep the query-norm term of the evaluation score, as exact Bayes has it. The published
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
    sub_configs_defaults = {"base_config": SubConfigSpec(config_class=AutoConfig, model_type="bart")}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "cross_entropy",
        "kl_gaussian",
        "kl_dirichlet",
        "latents",
    ]

    base_config: PreTrainedConfig | dict | None = None
    base_architecture: str | None = None
    prior_mu: float | list[float] = 0.0
    prior_var: float | list[float] = 1.0
    prior_alpha: float = 1.0
    delta: float = 1.0
    kappa: int = 1
    alpha_activation: str = "exp"
    alpha_threshold: float = 0.0
    tau_alpha: float = 10.0
    tau_sigma: float = 0.0
    tau_mu: float = 1.0
    lambda_gaussian: float = 0.0
    lambda_dirichlet: float = 0.0
    label_smoothing: float = 0.0
    exact_attention: bool = False
    is_encoder_decoder: bool = True
    config_version: int = CONFIG_VERSION

    vocab_size = _of_base("vocab_size")
    hidden_size = _of_base("hidden_size")
    pad_token_id = _of_base("pad_token_id")
    bos_token_id = _of_base("bos_token_id")
    eos_token_id = _of_base("eos_token_id")
    decoder_start_token_id = _of_base("decoder_start_token_id")
    tie_word_embeddings = _of_base("tie_word_embeddings")

    def __post_init__(self, **kwargs) -> None:
        if self.config_version > CONFIG_VERSION:
            raise ValueError(
                f"This configuration was written by a newer nvib_hf (config_version {self.config_version}; this "
                f"one reads up to {CONFIG_VERSION}). Update with `pip install -U nvib-hf`."
            )
        if isinstance(self.base_config, PreTrainedConfig):
            # super().__post_init__ resets the attention implementation of its parts; on a live model's own
            # configuration its causal mask would vanish without a word.
            implementations = {"base_config": _attention_implementations(self.base_config)}
            kwargs.setdefault("attn_implementation", implementations)
            self.base_config = copy.deepcopy(self.base_config)
        super().__post_init__(**kwargs)
        check_prior(self.prior_mu, self.prior_var, self.prior_alpha)
        check_settings(self.delta, self.kappa, self.alpha_activation, self.alpha_threshold)
        check_taus(self.tau_alpha, self.tau_sigma, self.tau_mu)
        for name in ("lambda_gaussian", "lambda_dirichlet"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or positive, but got {getattr(self, name)}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), but got {self.label_smoothing}.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base configuration's text part: caches, masks and embeddings are made after it."""
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)
