"""``NvibForConditionalGeneration``: a pretrained encoder-decoder with a bottleneck between its halves.

The way of the data: ``encode`` (``encoding.py``: encoder, NVIB layer, latents), then ``forward`` (packed latents,
decoder, loss) or ``generate`` (``generation.py``).
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from .base_loading import base_class
from .base_model import (
    JOINED,
    STATES,
    argument_names,
    decoder_positions,
    drop_words,
    freeze_unused,
    run_decoder,
    run_decoder_over_source,
    shift_right,
)
from .checks import (
    NOTHING_TO_READ,
    check_attentions,
    check_base,
    check_batch,
    check_labels_were_left,
    check_latents,
    check_positions,
    check_replacement,
)
from .configuration_nvib import NvibConfig
from .cross_attention import check_cache_was_found, convert_cross_attention
from .encoding import NvibEncodingMixin
from .generation import NvibGenerationMixin
from .latent import NvibLatents
from .latent_methods import NvibLatentsMixin
from .layer_terms import begin_recording, end_recording
from .loss import IGNORED, nvib_loss, regulariser
from .model_card import NvibModelCardMixin
from .nvib_layers import NvibLayersMixin
from .outputs import LatentOutput, NvibSeq2SeqLMOutput, joined_output
from .precision import SinglePrecisionMixin
from .pretrained import NvibSeq2SeqPretrainedMixin
from .validation import check_prior
from .versions import CACHE, given_cache, warn_if_untested
from .wrapping import cross_attention_of, make_layer, put_into_self_attention

RECORDED = {"output_attentions", "output_hidden_states"}
FOLLOWS_THE_BASE = (
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "supports_gradient_checkpointing",
    "_can_compile_fullgraph",
)
# Some encoders share a class with their decoder, and its arguments.
OF_THE_DECODER = {"use_cache", CACHE, "encoder_hidden_states", "encoder_attention_mask"}


class NvibForConditionalGeneration(
    NvibModelCardMixin,
    NvibEncodingMixin,
    NvibLatentsMixin,
    NvibSeq2SeqPretrainedMixin,
    NvibLayersMixin,
    SinglePrecisionMixin,
    PreTrainedModel,
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

        config.attentions = check_attentions(config.attentions)
        cross_attention, width, self.scale, self._cached_layers = cross_attention_of(base)
        check_prior(config.prior_mu, config.prior_var, config.prior_alpha, width)
        self.base = base  # first, so that the model's dtype is the base's
        with init.no_init_weights():  # initialize_weights sets all of them
            self.nvib = make_layer(config, width, self.scale)
            halves = {"encoder": base.get_encoder(), "decoder": base.get_decoder()}
            names = put_into_self_attention(base, halves, config)
        self._self_attention_names = {layer: f"base.{name}" for layer, name in names.items()}
        self.register_buffer("kl_beta", torch.ones(3))  # of lambda_gaussian, lambda_dirichlet, lambda_vectors
        convert_cross_attention(cross_attention, width, config.exact_attention, config.dropping == "hard")
        freeze_unused(base)
        # Read once: a forward pass that inspects signatures cannot be compiled.
        self._encoder_argument_names = (argument_names(base.get_encoder().forward) - OF_THE_DECODER) | RECORDED
        self._argument_names = self._encoder_argument_names | argument_names(base.forward) | {STATES}
        self._takes_source_tokens = not isinstance(base, JOINED) and "input_ids" in argument_names(base.forward)
        self._decoder_positions = decoder_positions(base)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.model_tags = ["nvib"]  # of the model card; pushing adds to the list
        self.card_metadata: dict = {}  # the model card's license, language, datasets, ...
        self.post_init()

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
        check_labels_were_left(labels, num_items_in_batch)
        self._check_names(kwargs)
        cache = given_cache(cache, past_key_values)
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        repeats_source = labels is None and decoder_input_ids is None and decoder_inputs_embeds is None
        if repeats_source and (input_ids is None or not self._takes_source_tokens):
            raise ValueError(NOTHING_TO_READ)
        if cache is None:
            name, read = ("decoder_input_ids", decoder_input_ids) if labels is None else ("labels", labels)
            check_positions(name, input_ids if repeats_source else read, self._decoder_positions)
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if self.training and self.config.word_dropout > 0 and decoder_input_ids is not None:
                decoder_input_ids = self._drop_words(decoder_input_ids, generator)

        latents = states = None
        is_step = labels is None and encoder_outputs is not None and not isinstance(encoder_outputs, NvibLatents)
        self._check_generator(generator)
        layers = {} if is_step else self._self_attentions()  # a step of decoding, to which the rest has nothing to add
        begin_recording(layers.values(), generator)
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
                **recorded,
            }
            latents, states = self._encode(inputs, generator=generator)
            latent = self._packed(latents, states)
        elif isinstance(encoder_outputs, NvibLatents):
            latents = encoder_outputs
            check_latents(latents, self.nvib)
            latent = self._packed(latents)
        else:
            latent = encoder_outputs if isinstance(encoder_outputs, LatentOutput) else LatentOutput(encoder_outputs[0])
        if latents is not None or labels is not None:  # only while decoding do the beams of a source share its latent
            read = (x for x in (decoder_input_ids, decoder_inputs_embeds, input_ids) if x is not None)
            check_batch(latent.last_hidden_state, next(read))

        decoder_inputs = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            CACHE: cache,
            "use_cache": use_cache,
            **recorded,
            **{name: value for name, value in kwargs.items() if name not in self._encoder_argument_names},
        }
        if repeats_source:
            outputs = run_decoder_over_source(self.base, latent, {**decoder_inputs, "input_ids": input_ids})
        else:
            outputs = run_decoder(self.base, latent, decoder_inputs)
        check_cache_was_found(outputs.get(CACHE), self._cached_layers)
        if is_step:
            return outputs
        terms = end_recording(layers, None if labels is None else labels != IGNORED)
        terms.add_latents(latents)
        loss = cross_entropy = None
        if labels is not None:
            regularisation = regulariser(terms.charged(), self.kl_beta, self.config)
            loss, cross_entropy = nvib_loss(
                outputs.logits, labels, regularisation, num_items_in_batch, self.config.label_smoothing
            )
        is_replica = getattr(self, "_is_replica", False)
        return joined_output(outputs, states, latents, terms, loss, cross_entropy, with_latents=not is_replica)

    # generate() asks for it at every step of a model whose code may come from the Hub.
    forward.__signature__ = inspect.signature(forward)

    def _read(self, batch: dict[str, Tensor]) -> None:
        """Run what reads the inputs of a batch: the encoder, and the decoder too if it has NVIB layers of its own."""
        batch = {name: value.to(self.device) for name, value in batch.items()}
        if "decoder" not in self.config.attentions:
            self.encode(**{name: value for name, value in batch.items() if name in self._encoder_argument_names})
            return
        labels = batch.get("labels")
        if labels is not None and "decoder_attention_mask" not in batch:  # shifted, as the decoder's inputs will be
            batch["decoder_attention_mask"] = F.pad(labels[:, :-1] != IGNORED, (1, 0), value=True).long()
        self(**batch)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's inputs for these labels, by the base's own rule."""
        return shift_right(self.base, labels)

    def _drop_words(self, decoder_input_ids: Tensor, generator: torch.Generator | None) -> Tensor:
        token_id = self.config.word_dropout_token_id
        if token_id is None:
            token_id = self.config.pad_token_id
        check_replacement(token_id)
        return drop_words(decoder_input_ids, self.config.word_dropout, token_id, generator)
