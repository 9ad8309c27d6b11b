"""``NvibForConditionalGeneration``: a pretrained encoder-decoder with a bottleneck between its halves."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from .base_model import (
    argument_names,
    base_class,
    decoder_positions,
    encoder_width,
    freeze_unused,
    join_encoder_decoder,
    load_base,
    run_decoder,
    shift_right,
)
from .configuration_nvib import NvibConfig
from .cross_attention import (
    convert_cross_attention,
    cross_attention_scale,
    find_cross_attention,
    restore_cross_attention,
)
from .encoding import NvibEncodingMixin
from .generation import NvibGenerationMixin
from .latent import NvibLatents
from .loss import nvib_loss
from .nvib_layer import Nvib
from .validation import check_prior

RECORDED = {"output_attentions", "output_hidden_states"}


@dataclass
class NvibSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Output of :class:`NvibForConditionalGeneration`: that of a sequence-to-sequence model, and

    Args:
        cross_entropy: the reconstruction term of the loss, nats per target token, scalar.
        kl_gaussian, kl_dirichlet: the two KL terms, ``(B,)``, unweighted.
        latents: the :class:`~nvib_hf.NvibLatents` that were decoded; ``None`` at a step of generation.
    """

    cross_entropy: Tensor | None = None
    kl_gaussian: Tensor | None = None
    kl_dirichlet: Tensor | None = None
    latents: NvibLatents | None = None


class NvibForConditionalGeneration(PreTrainedModel, NvibEncodingMixin, NvibGenerationMixin):
    r"""An encoder-decoder model whose decoder reads a distribution instead of the encoder's vectors.

    The NVIB layer turns the encoder's output into a posterior over mixtures; training samples from it, evaluation
    attends to it; the decoder's cross-attention becomes denoising attention. The loss is

    .. math:: CE + \beta_G \lambda_G \, \overline{KL_G} + \beta_D \lambda_D \, \overline{KL_D}

    with the means over a batch weighted by target tokens, as in the cross-entropy; :math:`\beta` is the annealing
    (:class:`~nvib_hf.KLAnnealingCallback`), 1 without any.

    Args:
        config: the configuration.
        base: the model to wrap, changed in place; a fresh one of ``config.base_config`` if ``None``.

    Example:
        >>> from transformers import BartConfig, BartForConditionalGeneration
        >>> sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
        >>> bart = BartForConditionalGeneration(BartConfig(vocab_size=50, decoder_attention_heads=2, **sizes))
        >>> model = NvibForConditionalGeneration.from_base_pretrained(bart, lambda_gaussian=0.01)
        >>> latents = model.eval().encode(input_ids=torch.tensor([[5, 6, 7, 2]]))
        >>> tokens = model.generate(encoder_outputs=latents, max_new_tokens=5)

    Source: Henderson & Fehr (ICLR 2023); Fehr & Henderson (COLM 2024).
    """

    config_class = NvibConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch and leaves the scaling to the loss
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # s / 2 * ||x||^2 in the pseudo-counts must cancel to the last bit against the attention's bias
    _keep_in_fp32_modules_strict = ["nvib.alpha_", "nvib.prior_", "kl_beta"]

    def __init__(self, config: NvibConfig, base: PreTrainedModel | None = None) -> None:
        architecture = type(base) if base is not None else base_class(config.base_config, config.base_architecture)
        for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
            setattr(self, name, getattr(architecture, name))
        super().__init__(config)
        if base is None:
            base = architecture._from_config(config.base_config)
        # The live configuration, so that a change of attention implementation or vocabulary is seen on both sides.
        config.base_config, config.base_architecture = base.config, architecture.__name__
        self.main_input_name = base.main_input_name

        cross_attention = find_cross_attention(base)
        width = encoder_width(base)
        check_prior(config.prior_mu, config.prior_var, config.prior_alpha, width)
        scales = {cross_attention_scale(module) for module in cross_attention}
        if len(scales) > 1:
            raise ValueError(
                f"The cross-attention layers of {architecture.__name__} have different scales ({sorted(scales)}), "
                "but one latent with one norm term serves them all. For GPT-2 set "
                "scale_attn_by_inverse_layer_idx=False."
            )
        self.scale = scales.pop()
        self.nvib = Nvib(
            width,
            width,
            delta=config.delta,
            kappa=config.kappa,
            alpha_activation=config.alpha_activation,
            alpha_threshold=config.alpha_threshold,
            scale=self.scale,
            batch_first=True,
        )
        self.register_buffer("kl_beta", torch.ones(2))  # annealing of the Gaussian and the Dirichlet KL
        self.base = base
        convert_cross_attention(cross_attention, width, config.exact_attention)
        freeze_unused(base)
        # Read once: a forward pass that inspects signatures cannot be compiled.
        self._encoder_argument_names = argument_names(base.get_encoder().forward) | RECORDED
        self._argument_names = self._encoder_argument_names | argument_names(base.forward)
        self._decoder_positions = decoder_positions(base)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Nvib):
            config = self.config
            prior = (config.prior_mu, config.prior_var, math.log(config.prior_alpha))
            if not getattr(module.prior_mu, "_is_hf_initialized", False):
                module.set_prior(*prior)
            taus = (config.tau_alpha, config.tau_sigma, config.tau_mu)
            for name, value in module.identity_parameters(*taus).items():
                init.copy_(module.get_parameter(name), value)
        elif module is self:
            init.ones_(self.kl_beta)
        else:
            super()._init_weights(module)

    @classmethod
    def from_base_pretrained(cls, base: str | PreTrainedModel, **kwargs) -> NvibForConditionalGeneration:
        """Wrap a pretrained encoder-decoder model.

        In ``eval()`` a fresh wrap computes what the base computes (for the default ``tau_*``).

        Args:
            base: name or path of a checkpoint, or a loaded model, which is changed in place.
            kwargs: settings of :class:`NvibConfig`; the others go to the base's ``from_pretrained``
                (``dtype``, ``attn_implementation``, ``revision``, ...).

        Raises:
            ValueError: the base has no cross-attention that is known; a setting outside its range.
            TypeError: an argument that neither takes.
        """
        settings, others = _split_settings(kwargs)
        if isinstance(base, PreTrainedModel):
            _refuse_unknown(others, "a loaded model")
        else:
            base = load_base(base, **others)
        return cls._wrap(base, settings)

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str | PreTrainedModel,
        decoder: str | PreTrainedModel | PreTrainedConfig,
        **kwargs,
    ) -> NvibForConditionalGeneration:
        """Join a pretrained encoder with a decoder that can cross-attend, and wrap the two.

        Args:
            encoder: name, path or model.
            decoder: name, path, model, or a configuration for fresh weights.
            kwargs: settings of :class:`NvibConfig`; the others go to both ``from_pretrained``.
        """
        settings, others = _split_settings(kwargs)
        return cls._wrap(join_encoder_decoder(encoder, decoder, **others), settings)

    @classmethod
    def _wrap(cls, base: PreTrainedModel, settings: dict) -> NvibForConditionalGeneration:
        config = NvibConfig(base_config=base.config, base_architecture=type(base).__name__, **settings)
        model = cls(config, base=base)
        model.name_or_path = config.name_or_path = base.name_or_path
        model.to(base.device)
        if base.dtype != torch.float32:
            model.nvib.mu_logvar.to(base.dtype)
        return model.train(base.training)

    def unwrap(self) -> PreTrainedModel:
        """The base model with its trained weights, as it was before wrapping. This model is spent afterwards."""
        restore_cross_attention(self.base)
        return self.base

    def freeze_base(self) -> NvibForConditionalGeneration:
        """Train the bottleneck alone."""
        self.base.requires_grad_(False)
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: NvibLatents | BaseModelOutput | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> NvibSeq2SeqLMOutput:
        """Logits and, with ``labels``, the loss.

        Args:
            input_ids, attention_mask, inputs_embeds, input_features, input_values, pixel_values: the encoder's
                inputs, as the base takes them.
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, past_key_values, use_cache: as in
                the base; made from ``labels`` if neither ids nor embeddings are given.
            encoder_outputs: latents (``encode``, ``sample_latents``, ``interpolate_latents``) in place of inputs.
            labels: ``(B, Nt)``; -100 is ignored.
            num_items_in_batch: target tokens of the whole optimisation step, over all micro-batches: the loss is
                the sum divided by it.
            generator: for the draws of training.
            kwargs: further inputs of the base's encoder and decoder, by name.

        Raises:
            ValueError: latents of another model; labels longer than the decoder's positions.
        """
        self._check_targets(labels)
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        latents, states = None, BaseModelOutput()
        if encoder_outputs is None:
            inputs = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "inputs_embeds": inputs_embeds,
                "input_features": input_features,
                "input_values": input_values,
                "pixel_values": pixel_values,
                **kwargs,
            }
            latents, states = self._encode({**inputs, **recorded}, generator=generator)
            packed = self._pack(latents)
        elif isinstance(encoder_outputs, NvibLatents):
            latents = encoder_outputs
            packed = self._pack(latents)
        else:
            packed = encoder_outputs[0]

        outputs = run_decoder(
            self.base,
            packed,
            states,
            {
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_attention_mask,
                "decoder_inputs_embeds": decoder_inputs_embeds,
                "past_key_values": past_key_values,
                "use_cache": use_cache,
                **recorded,
                **self._decoder_arguments(kwargs),
            },
        )
        kl_gaussian = None if latents is None else latents.kl_gaussian
        kl_dirichlet = None if latents is None else latents.kl_dirichlet
        loss = cross_entropy = None
        if labels is not None:
            weighted_kl = self._weighted_kl(kl_gaussian, kl_dirichlet)
            loss, cross_entropy = nvib_loss(
                outputs.logits, labels, weighted_kl, num_items_in_batch, self.config.label_smoothing
            )
        return NvibSeq2SeqLMOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.get("decoder_hidden_states"),
            decoder_attentions=outputs.get("decoder_attentions"),
            cross_attentions=outputs.get("cross_attentions"),
            encoder_last_hidden_state=states.last_hidden_state,
            encoder_hidden_states=states.hidden_states,
            encoder_attentions=states.attentions,
            cross_entropy=cross_entropy,
            kl_gaussian=kl_gaussian,
            kl_dirichlet=kl_dirichlet,
            latents=latents,
        )

    def _weighted_kl(self, kl_gaussian: Tensor | None, kl_dirichlet: Tensor | None) -> Tensor | None:
        """What one target token of an example pays for its latent, ``(B,)``."""
        if kl_gaussian is None or kl_dirichlet is None:
            return None
        beta = self.kl_beta.to(kl_gaussian.dtype)
        return (
            beta[0] * self.config.lambda_gaussian * kl_gaussian + beta[1] * self.config.lambda_dirichlet * kl_dirichlet
        )

    def _encoder_arguments(self, inputs: dict) -> dict:
        return {k: v for k, v in inputs.items() if k in self._encoder_argument_names and v is not None}

    def _decoder_arguments(self, inputs: dict) -> dict:
        """Further inputs of the decoder. What neither half takes is refused, with the nearest name."""
        for name, value in inputs.items():
            if value is not None and name not in self._argument_names:
                _refuse_unknown({name: value}, type(self).__name__, self._argument_names)
        return {k: v for k, v in inputs.items() if k not in self._encoder_argument_names}

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's inputs for these labels, by the base's own rule."""
        return shift_right(self.base, labels)

    def _check_targets(self, labels: Tensor | None) -> None:
        positions = self._decoder_positions
        if labels is not None and positions is not None and labels.shape[-1] > positions:
            raise ValueError(
                f"labels are {labels.shape[-1]} tokens long, but the decoder has {positions} positions. Truncate "
                f"them: tokenizer(..., max_length={positions}, truncation=True)."
            )

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.base.get_encoder() if modality is None else self.base.get_encoder(modality=modality)

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        return embeddings


def _split_settings(kwargs: dict) -> tuple[dict, dict]:
    """Keyword arguments that are settings of :class:`NvibConfig`, and the others."""
    names = {field.name for field in fields(NvibConfig)} - {field.name for field in fields(PreTrainedConfig)}
    names -= {"base_config", "base_architecture", "config_version"}
    settings = {name: value for name, value in kwargs.items() if name in names}
    others = {name: value for name, value in kwargs.items() if name not in names}
    for name in others:
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
            raise TypeError(f"{name!r} is no setting of NvibConfig. Did you mean {close[0]!r}?")
    return settings, others


def _refuse_unknown(arguments: dict, taker: str, names: Iterable[str] = ()) -> None:
    for name in arguments:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " Leave it out."
        raise TypeError(f"{taker} takes no argument {name!r}.{hint}")
