"""``NvibForConditionalGeneration``: a pretrained encoder-decoder with a bottleneck between its halves.

Read from top to bottom: how the model is made, ``encode`` (inputs to latents), ``forward`` (latents, decoder, loss).
``generate`` is in ``generation_nvib.py``.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from .configuration_nvib import NvibConfig
from .generation_nvib import NvibGenerationMixin
from .latents.checks import check_latents, refuse_batch
from .latents.latents import NvibLatents
from .latents.learned import charged_by_prior, check_prior_of_state, prior_of
from .latents.merging import limit_of_call, merge_limit, merged_so_far, posterior_of
from .latents.sampling import NvibLatentsMixin
from .layers.cross_entropy import IGNORED
from .layers.denoising_attention import pack
from .layers.exporting import is_exporting
from .layers.latent_prior import LatentPrior
from .layers.nvib import NvibLayer
from .layers.settings import check_prior
from .loss import LABELS_WERE_TAKEN, layer_terms, nvib_loss, regulariser
from .outputs import NvibSeq2SeqLMOutput
from .versions import CACHE, old_name_of_the_cache, warn_if_untested
from .wrapping.architecture import architecture_name
from .wrapping.base import (
    JOINED,
    NOTHING_TO_READ,
    STATES,
    LatentOutput,
    argument_names,
    base_class,
    check_known,
    decoder_positions,
    drop_words,
    freeze_unused,
    gathering,
    join_encoder_decoder,
    load_base,
    other_names_of_the_source,
    run_decoder,
    run_decoder_over_source,
)
from .wrapping.cross_attention import check_cache_was_found, convert_cross_attention
from .wrapping.halves import BaseHalvesMixin
from .wrapping.pretrained import NvibPreTrainedModel
from .wrapping.self_attention import ForwardPass
from .wrapping.sound import SoundMixin
from .wrapping.source import read_source
from .wrapping.wrap import (
    check_attentions,
    check_base,
    cross_attention_of,
    make_layer,
    split_settings,
    wrap,
)

RECORDED = {"output_attentions", "output_hidden_states"}
FOLLOWS_THE_BASE = (
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "supports_gradient_checkpointing",
    "_can_compile_fullgraph",
    "input_modalities",
)
# Some encoders share a class with their decoder, and its arguments.
OF_THE_DECODER = {"use_cache", CACHE, "encoder_hidden_states", "encoder_attention_mask"}


class NvibForConditionalGeneration(
    NvibLatentsMixin, SoundMixin, BaseHalvesMixin, NvibPreTrainedModel, NvibGenerationMixin
):
    r"""An encoder-decoder model whose decoder reads a distribution instead of the encoder's vectors.

    The NVIB layer turns the encoder's output into a posterior over mixtures. Training samples from the posterior;
    evaluation attends to it. The decoder's cross-attention becomes denoising attention. The loss is

    .. math:: CE + \beta_G \lambda_G \, \overline{KL_G} + \beta_D \lambda_D \, \overline{KL_D}

    The means over a batch weigh examples by target tokens, as the cross-entropy does. Callbacks move the multipliers
    :math:`\beta` in training (:class:`~nvib_hf.KLAnnealingCallback`, :class:`~nvib_hf.ConstraintCallback`). In
    evaluation the multipliers are 1, so you can compare evaluation losses over a training.

    Args:
        config: the configuration.
        base: the model to wrap, changed in place. ``None`` makes a fresh one from ``config.base_config``.

    Example:
        >>> from transformers import BartConfig, BartForConditionalGeneration
        >>> sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
        >>> bart = BartForConditionalGeneration(BartConfig(vocab_size=50, decoder_attention_heads=2, **sizes))
        >>> model = NvibForConditionalGeneration.from_base_pretrained(bart, lambda_gaussian=0.01)
        >>> latents = model.eval().encode(input_ids=torch.tensor([[5, 6, 7, 2]]))
        >>> tokens = model.generate(encoder_outputs=latents, max_new_tokens=5)

    Source: Henderson & Fehr (ICLR 2023); Fehr & Henderson (COLM 2024).
    """

    nvib: NvibLayer
    latent_prior: LatentPrior | None
    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch and leaves the scaling to the loss
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _load_base = staticmethod(load_base)
    _auto_name = "AutoModelForSeq2SeqLM"
    _has_card = True

    def __init__(self, config: NvibConfig, base: PreTrainedModel | None = None) -> None:
        warn_if_untested()
        config.check()  # loading may have changed settings
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
                module._is_hf_initialized = True  # else post_init draws the weights of unknown modules anew
        # The live configuration: both sides then see a change of the attention implementation or the vocabulary.
        config.base_config, config.base_architecture = base.config, architecture_name(architecture)
        config.attentions = check_attentions(config)
        cross_attention, width, self.scale, self._cached_layers = cross_attention_of(base)
        check_prior(config.prior_mu, config.prior_var, config.prior_alpha, width)
        self.base = base  # first, so that the model's dtype is the base's
        with init.no_init_weights():  # initialize_weights sets all of them
            self.nvib = make_layer(config, width, self.scale)
            halves = {"encoder": base.get_encoder(), "decoder": base.get_decoder()}
            self._put_into_self_attention(halves)
        self.latent_prior = prior_of(config, width)
        if self.latent_prior is not None:
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, r"latent_prior\.(?!is_fitted)\w+"]
        self.register_load_state_dict_pre_hook(check_prior_of_state)
        self.register_buffer("kl_beta", torch.ones(3))  # of lambda_gaussian, lambda_dirichlet, lambda_vectors
        if config.encode_sound_only:
            self.make_silence()
        convert_cross_attention(cross_attention, width, self.scale, config.exact_attention)
        freeze_unused(base)
        # Read once: a forward pass that inspects signatures cannot be compiled.
        self._encoder_argument_names = (argument_names(base.get_encoder().forward) - OF_THE_DECODER) | RECORDED
        self._renamed = other_names_of_the_source(base, self._encoder_argument_names)
        self.main_input_name = self._renamed.get("inputs", base.main_input_name)
        self._source_names = self._encoder_argument_names | set(self._renamed)
        self._argument_names = self._source_names | argument_names(base.forward) | {STATES}
        self._forward_names = self._argument_names | argument_names(self.forward)
        self._takes_source_tokens = not isinstance(base, JOINED) and "input_ids" in argument_names(base.forward)
        self._decoder_positions = decoder_positions(base)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.model_tags = [*(base.model_tags or []), "nvib"]  # of the model card; pushing adds to the list
        self.card_metadata: dict = {}  # the model card's license, language, datasets, ...
        self.post_init()

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str | PreTrainedModel,
        decoder: str | PreTrainedModel | PreTrainedConfig,
        **kwargs,
    ) -> Self:
        """Join a pretrained encoder with a decoder that can cross-attend, and wrap the two.

        Args:
            encoder: name, path or model.
            decoder: name, path, model, or a configuration for fresh weights.
            kwargs: settings of :class:`NvibConfig`. The others go to ``from_pretrained`` of both models.
        """
        settings, others = split_settings(kwargs)
        return wrap(cls, join_encoder_decoder(encoder, decoder, **others), settings)

    # ------------------------------------------------------------------------------------------------- encoding
    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        merge_share: float | None = None,
        merge_cost: float | None = None,
        **inputs,
    ) -> NvibLatents:
        """Inputs to latents. They carry a graph in ``train()``, and in ``eval()`` if an input requires gradients.

        In a graph of ``torch.export`` or ``torch.onnx`` they have only what decoding reads.

        Args:
            input_ids, attention_mask, inputs: what the base's encoder takes. So that a frozen encoder need not run
                again, you can pass ``encoder_last_hidden_state`` ``(B, Ns, H)`` of an earlier call instead, with its
                mask if it had one (``(B, Ns)``, or as the encoder took it).
            sample: True draws from the posterior (``kappa`` vectors per component); False takes the posterior itself.
                By default the model's mode decides, as it always does in the encoder's own attentions.
            generator: for the draws.
            merge_share, merge_cost: how far latents are merged; by default the configuration says it.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        check_known(inputs, type(self).__name__, self._argument_names)
        # Outside of training nobody needs gradients, and the latents of a corpus would keep all its graphs in memory.
        with_graph = self.training or any(isinstance(x, Tensor) and x.requires_grad for x in inputs.values())
        limit = limit_of_call(merge_share, merge_cost)
        with nullcontext() if with_graph else torch.no_grad():
            return self._encode_alone(inputs, sample, generator, is_exporting(), limit)[0]

    def _encode_alone(
        self,
        inputs: dict,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        decode_only: bool = False,
        limit: dict[str, float] | None = None,
    ) -> tuple[NvibLatents, BaseModelOutput]:
        """:meth:`_encode` outside of ``forward``."""
        with ForwardPass(generator, shortens=decode_only and not self.training):
            return gathering(self, "_encode")(inputs, sample, generator, decode_only, limit)

    def _encode(
        self,
        inputs: dict,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        decode_only: bool = False,
        asked: dict[str, float] | None = None,
    ) -> tuple[NvibLatents, BaseModelOutput]:
        """Latents, and the encoder's own output. ``decode_only`` keeps the fields and vectors that decoding reads."""
        source = read_source(self, inputs)
        limit = merge_limit(self.config, self.training, source.vectors, generator, asked)
        mass = {} if source.log_mass is None else {"log_mass": source.log_mass}
        made = self.nvib(source.vectors, source.padding, sample, generator, decode_only, **mass)
        latents = NvibLatents.of(made, self.scale)
        if source.share is not None and latents.prop_vectors is not None:
            latents.prop_vectors = latents.prop_vectors * source.share
        latents.num_stored = source.num_stored
        if limit:
            latents, groups = merged_so_far(latents, self.scale, self.config.evaluation, limit, posterior_of(made))
        if latents.kl_gaussian is not None and not self.config.latent_prior_frozen:
            latents.kl_gaussian = charged_by_prior(self, made, groups if limit else None)
        if decode_only and latents.logvar is None:  # in a sample, the draws decide which vectors have weight
            latents = latents.compact()
        return latents, source.outputs

    def _packed(self, latents: NvibLatents, states: BaseModelOutput | None = None) -> LatentOutput:
        """What the decoder reads of latents. It replaces the encoder's output and carries its other ``states``."""
        packed = pack(latents.attended(self.scale, self.config.evaluation))
        return (
            LatentOutput(packed) if states is None else LatentOutput(packed, states.hidden_states, states.attentions)
        )

    # -------------------------------------------------------------------------------------------------- forward
    @can_return_tuple
    @old_name_of_the_cache
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
                the base. Without ids and embeddings they are made from ``labels``, or from ``input_ids`` where
                the base does that (BART).
            encoder_outputs: latents (``encode``, ``sample_latents``, ``interpolate_latents``) in place of inputs.
            labels: ``(B, Nt)``; -100 is ignored.
            num_items_in_batch: target tokens of the whole optimisation step, over all micro-batches. The loss is
                the sum divided by this number.
            generator: for the draws of training.
            encoder_last_hidden_state: from an earlier call, in place of the encoder's inputs; see :meth:`encode`.
            past_key_values: the name of ``cache`` before Transformers 5.24.
            kwargs: further inputs of the base's encoder and decoder, by name.

        Raises:
            ValueError: the decoder has nothing to read; the latents are of another model; labels are longer than the
                decoder's positions; the Trainer's own label smoothing took the labels away.
        """
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
        given = {name: value for name, value in inputs.items() if value is not None}
        if not given.keys() <= self._argument_names:
            check_known(given, type(self).__name__, self._argument_names)
        if labels is None and num_items_in_batch is not None:
            raise ValueError(LABELS_WERE_TAKEN)
        if generator is not None:
            self._check_generator(generator)
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        decoder_inputs = self._decoder_inputs(
            labels,
            input_ids,
            generator,
            {
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_attention_mask,
                "decoder_inputs_embeds": decoder_inputs_embeds,
                CACHE: past_key_values if cache is None else cache,
                "use_cache": use_cache,
                **recorded,
                **{name: value for name, value in kwargs.items() if name not in self._source_names},
            },
        )
        is_packed = encoder_outputs is not None and not isinstance(encoder_outputs, NvibLatents)
        if is_packed and labels is None:  # a step of decoding
            with ForwardPass(generator) if self._self_attention_names else nullcontext():
                return self._decode(encoder_outputs, decoder_inputs)

        latents = states = None
        decode_only = labels is None and is_exporting()  # a graph holds only what decoding reads
        # The pass holds what self-attentions with NVIB share and record. Without such attentions it is not needed.
        records: dict | None = None if decode_only else {}
        with ForwardPass(generator, records=records) if self._self_attention_names else nullcontext():
            if encoder_outputs is None:
                latents, states = self._encode({**given, **recorded}, None, generator, decode_only)
            elif not is_packed:
                latents = encoder_outputs
                check_latents(latents, self.nvib)
            packed = encoder_outputs if latents is None else self._packed(latents, states)
            read = (decoder_inputs.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids"))
            if packed[0].shape[0] != (read := next(x for x in read if x is not None)).shape[0]:
                refuse_batch(packed[0], read)
            outputs = self._decode(packed, decoder_inputs)
        targets = None if labels is None else labels != IGNORED
        attentions = self._self_attentions() if records else {}
        terms, charged = layer_terms(latents, attentions, records or {}, targets)
        loss = cross_entropy = None
        if labels is not None:
            regularisation = regulariser(charged, self.kl_beta if self.training else None, self.config)
            loss, cross_entropy = nvib_loss(
                outputs.logits, labels, regularisation, num_items_in_batch, self.config.label_smoothing
            )
        of_layers, states = set(terms.kl_gaussian) - {"cross"}, BaseModelOutput() if states is None else states
        return NvibSeq2SeqLMOutput(
            loss=loss,
            logits=outputs.logits,
            **{CACHE: outputs.get(CACHE)},
            decoder_hidden_states=outputs.get("decoder_hidden_states"),
            decoder_attentions=outputs.get("decoder_attentions"),
            cross_attentions=outputs.get("cross_attentions"),
            encoder_last_hidden_state=states.last_hidden_state,
            encoder_hidden_states=states.hidden_states,
            encoder_attentions=states.attentions,
            cross_entropy=cross_entropy,
            kl_gaussian=charged.kl_gaussian,
            kl_dirichlet=charged.kl_dirichlet,
            num_vectors=None if latents is None else latents.num_vectors,
            prop_vectors=None if latents is None else latents.prop_vectors,
            effective_vectors=None if latents is None else latents.effective_vectors,
            layer_kl_gaussian=terms.kl_gaussian if of_layers else None,
            layer_kl_dirichlet=terms.kl_dirichlet if of_layers else None,
            layer_prop_vectors=terms.prop_vectors if of_layers else None,
            latents=None if decode_only or getattr(self, "_is_replica", False) else latents,
        )

    # generate() reads the signature at every step. A stored one also works for code from the Hub.
    forward.__signature__ = inspect.signature(forward)

    def _decoder_inputs(
        self, labels: Tensor | None, input_ids: Tensor | None, generator: torch.Generator | None, given: dict
    ) -> dict:
        """What the decoder reads: the given tokens, tokens made from the labels, or what the base makes of the source.

        ``given`` holds the decoder's inputs by name. If there is only a source, the result has ``"input_ids"`` too.
        """
        tokens, embeds = given["decoder_input_ids"], given["decoder_inputs_embeds"]
        if labels is None and tokens is None and embeds is None:
            if input_ids is None or not self._takes_source_tokens:
                raise ValueError(NOTHING_TO_READ)
            given = {**given, "input_ids": input_ids}
        read = labels if labels is not None else given.get("input_ids", tokens)
        positions = self._decoder_positions
        if given[CACHE] is None and read is not None and positions is not None and read.shape[-1] > positions:
            raise ValueError(
                f"{'decoder_input_ids' if labels is None else 'labels'} are {read.shape[-1]} tokens long, but the "
                f"decoder has {positions} positions. Truncate them: tokenizer(..., max_length={positions}, "
                "truncation=True)."
            )
        if labels is None:
            return given
        if tokens is None and embeds is None:
            tokens = self.prepare_decoder_input_ids_from_labels(labels)
        if self.training and self.config.word_dropout > 0 and tokens is not None:
            token_id = self.config.word_dropout_token_id
            token_id = self.config.pad_token_id if token_id is None else token_id
            tokens = drop_words(tokens, self.config.word_dropout, token_id, generator)
        return {**given, "decoder_input_ids": tokens, "use_cache": False}

    def _decode(self, packed: LatentOutput | BaseModelOutput | tuple, inputs: dict) -> Seq2SeqLMOutput:
        """The base's decoder over a packed latent."""
        latent = packed if isinstance(packed, LatentOutput) else LatentOutput(packed[0])
        run = run_decoder_over_source if "input_ids" in inputs else run_decoder
        outputs = run(self.base, latent, inputs)
        if (cache := outputs.get(CACHE)) is not None:
            check_cache_was_found(cache, self._cached_layers)
        return outputs

    def _read(self, batch: dict[str, Tensor]) -> None:
        """Run the encoder on a batch, and the decoder too if it has NVIB layers of its own."""
        batch = {name: value.to(self.device) for name, value in batch.items()}
        if "decoder" not in self.config.attentions:
            self.encode(**{name: value for name, value in batch.items() if name in self._encoder_argument_names})
            return
        labels = batch.get("labels")
        if labels is not None and "decoder_attention_mask" not in batch:  # shifted, as the decoder's inputs will be
            batch["decoder_attention_mask"] = F.pad(labels[:, :-1] != IGNORED, (1, 0), value=True).long()
        self(**batch)
