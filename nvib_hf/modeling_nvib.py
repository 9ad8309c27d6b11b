"""``NvibForConditionalGeneration``: a pretrained encoder-decoder with a bottleneck between its halves."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from .architectures import check_names, cross_attention_scale, find_cross_attention, memory_width, row_of
from .base_model import (
    JOINED,
    argument_names,
    base_class,
    check_decoder_call,
    damage_explained,
    decoder_positions,
    freeze_unused,
    joined_vocabularies,
    run_decoder,
    shift_right,
)
from .configuration_nvib import NvibConfig
from .cross_attention import check_cache_was_found, convert_cross_attention
from .encoding import STATES, NvibBottleneck, NvibEncodingMixin
from .generation import NvibGenerationMixin
from .initialisation import prior_buffers
from .latent import NvibLatents
from .loss import nvib_loss, regulariser
from .model_card import NvibModelCardMixin
from .precision import SinglePrecisionMixin
from .validation import check_prior
from .versions import CACHE, given_cache, warn_if_untested
from .word_dropout import drop_words
from .wrapping import NvibWrappingMixin, check_base

RECORDED = {"output_attentions", "output_hidden_states"}
MEASURED = ("kl_gaussian", "kl_dirichlet", "num_vectors", "prop_vectors", "effective_vectors")
NOTHING_TO_READ = (
    "The decoder has nothing to read. Pass labels, decoder_input_ids or decoder_inputs_embeds; to write text call "
    "generate()."
)
FOLLOWS_THE_BASE = (
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "supports_gradient_checkpointing",
    "_can_compile_fullgraph",
)
# Some encoders share a class with their decoder, and its arguments.
OF_THE_DECODER = {"use_cache", CACHE, "encoder_hidden_states", "encoder_attention_mask"}


@dataclass
class NvibSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Output of :class:`NvibForConditionalGeneration`: that of a sequence-to-sequence model, and

    Args:
        cross_entropy: the reconstruction term of the loss, nats per target token, scalar.
        kl_gaussian, kl_dirichlet: the two KL terms, ``(B,)``, unweighted.
        num_vectors, prop_vectors, effective_vectors: of the latents, ``(B,)``: source vectors kept, their share of
            the source length, and ``exp(entropy(pi))``.
        latents: the :class:`~nvib_hf.NvibLatents` that were decoded; ``None`` at a step of generation, and from
            ``nn.DataParallel``, which gathers a mapping by what it iterates over.
    """

    cross_entropy: Tensor | None = None
    kl_gaussian: Tensor | None = None
    kl_dirichlet: Tensor | None = None
    num_vectors: Tensor | None = None
    prop_vectors: Tensor | None = None
    effective_vectors: Tensor | None = None
    latents: NvibLatents | None = None


class NvibForConditionalGeneration(
    NvibModelCardMixin,
    SinglePrecisionMixin,
    PreTrainedModel,
    NvibWrappingMixin,
    NvibEncodingMixin,
    NvibGenerationMixin,
):
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
    # s / 2 * ||x||^2 in the pseudo-counts must cancel to the last bit against the attention's bias. When loading;
    # afterwards see SinglePrecisionMixin.
    _keep_in_fp32_modules_strict = [r"nvib\.(alpha|keep|prior)_\w+", "nvib.threshold_share", "kl_beta"]

    def __init__(self, config: NvibConfig, base: PreTrainedModel | None = None) -> None:
        warn_if_untested()
        if base is None:
            architecture = base_class(config.base_config, config.base_architecture)
        else:
            architecture = type(base)
            check_base(base)
        for name in FOLLOWS_THE_BASE:
            setattr(self, name, getattr(architecture, name))
        super().__init__(config)
        if base is None:
            base = architecture._from_config(config.base_config)
        else:
            for module in base.modules():
                module._is_hf_initialized = True  # post_init would draw the weights of modules it does not know anew
        # The live configuration, so that a change of attention implementation or vocabulary is seen on both sides.
        config.base_config, config.base_architecture = base.config, architecture.__name__
        self.main_input_name = base.main_input_name

        cross_attention = find_cross_attention(base)
        for module in cross_attention:
            check_names(module)
        # Their places in the cache.
        self._cached_layers = tuple(module.layer_idx for module in cross_attention if row_of(module).cache)
        check_decoder_call(base, cached=bool(self._cached_layers))
        width = memory_width(cross_attention[0])
        check_prior(config.prior_mu, config.prior_var, config.prior_alpha, width)
        scales = {cross_attention_scale(module) for module in cross_attention}
        if len(scales) > 1:
            raise ValueError(
                f"The cross-attention layers of {architecture.__name__} have different scales ({sorted(scales)}), "
                "but one latent with one norm term serves them all. For GPT-2 set "
                "scale_attn_by_inverse_layer_idx=False."
            )
        self.scale = scales.pop()
        self.base = base  # first, so that the model's dtype is the base's
        with init.no_init_weights():  # initialize_weights sets all of them
            self.nvib = NvibBottleneck(
                width,
                width,
                delta=config.delta,
                kappa=config.kappa,
                alpha_activation=config.alpha_activation,
                dropping=config.dropping,
                alpha_threshold=config.alpha_threshold,
                threshold_share=config.threshold_share,
                kl_weights=config.kl_weights,
                scale=self.scale,
                batch_first=True,
            )
        self.register_buffer("kl_beta", torch.ones(3))  # of lambda_gaussian, lambda_dirichlet, lambda_vectors
        convert_cross_attention(cross_attention, width, config.exact_attention, config.dropping == "hard")
        freeze_unused(base)
        # Read once: a forward pass that inspects signatures cannot be compiled.
        self._encoder_argument_names = (argument_names(base.get_encoder().forward) - OF_THE_DECODER) | RECORDED
        self._argument_names = self._encoder_argument_names | argument_names(base.forward) | {STATES}
        self._decoder_positions = decoder_positions(base)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.model_tags = ["nvib"]  # of the model card; pushing adds to the list
        self.card_metadata: dict = {}  # the model card's license, language, datasets, ...
        self.post_init()

    def initialize_weights(self) -> None:
        """What was not loaded: the base's by its own rules, which would pass it over in a model from elsewhere."""
        self.base.initialize_weights()
        if not getattr(self.nvib, "_is_hf_initialized", False):
            self._initialize_nvib()
        super().initialize_weights()

    @torch.no_grad()
    def _initialize_nvib(self) -> None:
        """Prior and identity of the NVIB layer, tensor by tensor, but for those that were loaded."""
        config, layer = self.config, self.nvib
        buffers = prior_buffers(config.prior_mu, config.prior_var, math.log(config.prior_alpha))
        for name, value in (buffers | {"threshold_share": config.threshold_share}).items():
            init.copy_(layer.get_buffer(name), torch.as_tensor(value))
        parameters = layer.identity_parameters(config.tau_alpha, config.tau_sigma, config.tau_mu)
        for name, value in parameters.items():
            init.copy_(layer.get_parameter(name), value)
        for module in layer.modules():
            module._is_hf_initialized = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.ones_(self.kl_beta)
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
        if pretrained_model_name_or_path is None and kwargs.get("state_dict") is None:
            raise ValueError(
                "There is no name to load an NVIB model by. If this is for an adapter, the model had not been saved "
                "when that was put on it: wrap the base again and call PeftModel.from_pretrained(model, adapter)."
            )
        with damage_explained(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        if output_loading_info:
            return model, info
        missing = sorted(info["missing_keys"])
        if missing and kwargs.get("state_dict") is None and not kwargs.get("ignore_mismatched_sizes"):
            raise OSError(
                f"The checkpoint {pretrained_model_name_or_path} lacks {len(missing)} of the model's weights "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Fetch it again, or pass "
                "ignore_mismatched_sizes=True to start those weights afresh."
            )
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: NvibLatents | BaseModelOutput | None = None,
        cache: Cache | None = None,
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
        past_key_values: Cache | None = None,
        encoder_last_hidden_state: Tensor | None = None,
        **kwargs,
    ) -> NvibSeq2SeqLMOutput:
        """Logits and, with ``labels``, the loss.

        Args:
            input_ids, attention_mask, inputs_embeds, input_features, input_values, pixel_values: the encoder's
                inputs, as the base takes them.
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, cache, use_cache: as in
                the base; if neither ids nor embeddings are given made from ``labels``, or from ``input_ids`` where
                the base does that (BART).
            encoder_outputs: latents (``encode``, ``sample_latents``, ``interpolate_latents``) in place of inputs.
            labels: ``(B, Nt)``; -100 is ignored.
            num_items_in_batch: target tokens of the whole optimisation step, over all micro-batches: the loss is
                the sum divided by it.
            generator: for the draws of training.
            encoder_last_hidden_state: of an earlier call, in place of the encoder's inputs; see :meth:`encode`.
            past_key_values: the name of ``cache`` before Transformers 5.24.
            kwargs: further inputs of the base's encoder and decoder, by name.

        Raises:
            ValueError: nothing for the decoder to read; latents of another model; labels longer than the decoder's
                positions, or taken away by the Trainer's own label smoothing.
        """
        if labels is None and num_items_in_batch is not None:
            raise ValueError(
                "The Trainer took the labels out of the inputs, so its loss would lack the KL terms. Set "
                "label_smoothing_factor to 0 in TrainingArguments and use NvibConfig(label_smoothing=...) instead; "
                "in place of a compute_loss_func, override Trainer.compute_loss."
            )
        cache = given_cache(cache, past_key_values)
        repeats_source = labels is None and decoder_input_ids is None and decoder_inputs_embeds is None
        if repeats_source and (input_ids is None or isinstance(self.base, JOINED)):
            raise ValueError(NOTHING_TO_READ)
        self._check_targets(labels, input_ids if repeats_source else decoder_input_ids, cache)
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if self.training and self.config.word_dropout > 0 and decoder_input_ids is not None:
                decoder_input_ids = self._drop_words(decoder_input_ids, generator)
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
                STATES: encoder_last_hidden_state,
                **kwargs,
            }
            latents, states = self._encode({**inputs, **recorded}, generator=generator)
            packed = self._pack(latents)
        elif isinstance(encoder_outputs, NvibLatents):
            latents = encoder_outputs
            self._check_latents(latents)
            packed = self._pack(latents)
        else:
            packed = encoder_outputs[0]
        if latents is not None or labels is not None:  # only while decoding do the beams of a source share its latent
            read = (x for x in (decoder_input_ids, decoder_inputs_embeds, input_ids) if x is not None)
            self._check_batch(packed, next(read))

        decoder_inputs = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            CACHE: cache,
            "use_cache": use_cache,
            **recorded,
            **self._decoder_arguments(kwargs),
        }
        if repeats_source:
            outputs = self._decode_source(packed, states, {**decoder_inputs, "input_ids": input_ids})
        else:
            outputs = run_decoder(self.base, packed, states, decoder_inputs)
        cache = outputs.get(CACHE)
        check_cache_was_found(cache, self._cached_layers)
        if latents is None and labels is None:  # a step of decoding, to which the rest has nothing to add
            return outputs
        measured = {name: None if latents is None else getattr(latents, name) for name in MEASURED}
        loss = cross_entropy = None
        if labels is not None:
            regularisation = None if latents is None else regulariser(latents, self.kl_beta, self.config)
            loss, cross_entropy = nvib_loss(
                outputs.logits, labels, regularisation, num_items_in_batch, self.config.label_smoothing
            )
        return NvibSeq2SeqLMOutput(
            loss=loss,
            logits=outputs.logits,
            **{CACHE: cache},
            decoder_hidden_states=outputs.get("decoder_hidden_states"),
            decoder_attentions=outputs.get("decoder_attentions"),
            cross_attentions=outputs.get("cross_attentions"),
            encoder_last_hidden_state=states.last_hidden_state,
            encoder_hidden_states=states.hidden_states,
            encoder_attentions=states.attentions,
            cross_entropy=cross_entropy,
            **measured,
            latents=None if getattr(self, "_is_replica", False) else latents,
        )

    def _decoder_arguments(self, inputs: dict) -> dict:
        """Further inputs of the decoder."""
        self._refuse_unknown_inputs(inputs)
        return {k: v for k, v in inputs.items() if k not in self._encoder_argument_names}

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's inputs for these labels, by the base's own rule."""
        return shift_right(self.base, labels)

    def _drop_words(self, decoder_input_ids: Tensor, generator: torch.Generator | None) -> Tensor:
        token_id = self.config.word_dropout_token_id
        if token_id is None:
            token_id = self.config.pad_token_id
        if token_id is None:
            raise ValueError("word_dropout needs a token in place of words: set word_dropout_token_id.")
        return drop_words(decoder_input_ids, self.config.word_dropout, token_id, generator)

    def _decode_source(self, packed: Tensor, states: BaseModelOutput, inputs: dict):
        """The decoder over what the base makes of ``input_ids`` by its own rule; many have none, and raise."""
        try:
            return run_decoder(self.base, packed, states, inputs)
        except (TypeError, ValueError) as error:
            raise ValueError(NOTHING_TO_READ) from error

    def _check_targets(self, labels, decoder_input_ids, cache) -> None:
        name, tokens = ("decoder_input_ids", decoder_input_ids) if labels is None else ("labels", labels)
        positions = self._decoder_positions
        if tokens is None or positions is None or cache is not None:
            return
        if tokens.shape[-1] > positions:
            raise ValueError(
                f"{name} are {tokens.shape[-1]} tokens long, but the decoder has {positions} positions. Truncate "
                f"them: tokenizer(..., max_length={positions}, truncation=True)."
            )

    def _check_batch(self, packed: Tensor, decoder_inputs: Tensor) -> None:
        """One latent would be broadcast to all targets without a word."""
        if len(packed) != len(decoder_inputs):
            raise ValueError(
                f"There are {len(packed)} latents but {len(decoder_inputs)} decoder inputs. Pass one latent for each "
                "row of labels or decoder_input_ids: latents[[0] * n] repeats the first n times."
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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As of the base. Where an encoder and a decoder were joined: of both, if their vocabularies are as large.

        Raises:
            ValueError: the two have vocabularies of their own.
        """
        if isinstance(self.base, JOINED) and new_num_tokens is not None:
            halves = joined_vocabularies(self.base)
        else:
            halves = [self.base]
        for half in halves:
            embeddings = half.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.vocab_size = embeddings.num_embeddings
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        return embeddings
