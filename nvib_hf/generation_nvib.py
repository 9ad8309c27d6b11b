"""``generate()`` from inputs or from latents: what it overrides of Transformers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from .latents.checks import check_latents, refuse_batch
from .latents.latents import NvibLatents
from .latents.merging import sharing
from .wrapping.base import STATES, LatentOutput
from .wrapping.sound import heard_frames, mark_end, mark_unheard

TOKEN_IDS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
# What is read instead of each other: of a base's own kind or refused.
MODALITIES = frozenset({"input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values"})


class NvibGenerationMixin(GenerationMixin):
    """Encodes once, drops the vectors that decoding cannot see, and decodes with any strategy."""

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As ``GenerationMixin.generate``; ``encoder_outputs`` may be :class:`~nvib_hf.NvibLatents`.

        Latents are left as they are. From inputs, the posterior is decoded in ``eval()`` and a sample of it in
        ``train()``; likewise from ``encoder_last_hidden_state``, which ``encode`` takes too, with the
        ``attention_mask`` that belongs to it. Whisper generates by its own ``generate()``, with its arguments
        (``language``, ``task``, ``return_timestamps``), unless ``decoder_input_ids`` say what to begin with; Pop2Piano
        by its own from sound (``composer``). ``merge_share`` is the share of their vectors that inputs are merged to,
        by default ``config.merge_share``.
        """
        if (share := kwargs.pop("merge_share", None)) is not None:
            if kwargs.get("encoder_outputs") is not None:
                raise ValueError(
                    f"merge_share={share} merges what generate() encodes, but encoder_outputs are encoded already. "
                    f"Pass encoder_outputs=model.merge_latents(latents, share={share})."
                )
            with sharing(share):
                return self.generate(inputs, generation_config, **kwargs)
        self._check_inputs(kwargs)
        as_base = self._has_a_generate_for(inputs, kwargs)
        for name, own in () if as_base else self._renamed.items():
            if (value := kwargs.pop(name, None)) is not None:
                kwargs[own] = value
        if kwargs.get(STATES) is not None:
            states = {name: kwargs.pop(name, None) for name in (STATES, "attention_mask")}
            with torch.no_grad():
                latents, _ = self._encode_alone(states, decode_only=True)
            kwargs["encoder_outputs"] = self._packed(latents)
        elif kwargs.get("encoder_outputs") is not None:
            kwargs["encoder_outputs"] = self._packed_encoder_outputs(kwargs["encoder_outputs"])
        if kwargs.get("encoder_outputs") is not None:
            self._check_rows(kwargs["encoder_outputs"].last_hidden_state, {"inputs": inputs, **kwargs})
        if as_base:
            return generate_as_base(self, inputs, generation_config, **kwargs)
        return super().generate(inputs, generation_config, **kwargs)

    @property
    def detect_language(self) -> Callable[..., Tensor]:
        """Whisper's: the language tokens of sounds, as their latents say."""
        return getattr(view_of_base(self), "detect_language")  # noqa: B009 (which a base need not have)

    def as_whisper(self) -> PreTrainedModel:
        """This model, of the same parameters, as one of Whisper's own class, for what asks for a model's type.

        A pipeline for speech is one: of Whisper alone it reads times, and recordings longer than a window.

        Raises:
            TypeError: the base is another model.
        """
        if not isinstance(self.base, WhisperForConditionalGeneration):
            raise TypeError(f"as_whisper() is for a Whisper with NVIB, but the base is {type(self.base).__name__}.")
        return view_of_base(self)

    @property
    def generate_with_fallback(self) -> Callable[..., Any]:
        """Whisper's, over latents; ``generate`` calls it."""
        return getattr(view_of_base(self), "generate_with_fallback")  # noqa: B009

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """As loading does. Where no file says which tokens to use, the base's configuration does, which is nested."""
        of_base = self.generation_config.to_dict()
        super().adjust_generation_fn(*args, **kwargs)
        loaded = self.generation_config
        if all(getattr(loaded, name) is None for name in TOKEN_IDS):
            for name, value in of_base.items():
                if getattr(loaded, name, None) is None:
                    setattr(loaded, name, value)

    def _check_inputs(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for what reads another modality than the base, as the base does."""
        others = (MODALITIES - self._argument_names).intersection(kwargs)
        if given := sorted(name for name in others if kwargs[name] is not None):
            known = ", ".join(sorted(MODALITIES & self._argument_names))
            raise ValueError(
                f"{given[0]} is nothing that {type(self.base).__name__} reads. Pass {known}, or latents as "
                "encoder_outputs."
            )

    def _check_rows(self, packed: Tensor, given: dict[str, Any]) -> None:
        """Raise ValueError unless there are latents, as many as rows of what is given beside them."""
        if not len(packed):
            raise ValueError("encoder_outputs are no latents at all: there is nothing to decode. Pass at least one.")
        for name in ("inputs", "decoder_input_ids", *sorted(self._source_names)):
            value = given.get(name)
            if isinstance(value, Tensor) and value.dim() > 1 and len(value) != len(packed):
                refuse_batch(packed, value, "decoder inputs" if name == "decoder_input_ids" else f"rows of {name}")

    def _has_a_generate_for(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether the base generates by its own method: Whisper, told by tokens what to write; Pop2Piano, of sound."""
        if hasattr(self.base, "get_mel_conditioner_outputs"):
            from_latents = any(kwargs.get(name) is not None for name in ("encoder_outputs", STATES))
            return not from_latents and (inputs is not None or kwargs.get("input_features") is not None)
        return kwargs.get("decoder_input_ids") is None and has_prompts(self.generation_config)

    def _packed_encoder_outputs(self, latents: NvibLatents | BaseModelOutput) -> BaseModelOutput:
        """What decoding reads of the latents. What is packed already is handed on: nothing changes it in place."""
        check_encoder_outputs(latents)
        if not isinstance(latents, NvibLatents):
            return latents
        check_latents(latents, self.nvib)
        return self._packed(latents.compact())

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in ``GenerationMixin``, without what generation hands on that is for no model, as a tokenizer is."""
        prepared = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in prepared.items() if name in self._forward_names}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """What the base's encoder takes is known, too."""
        others = {name: value for name, value in model_kwargs.items() if name not in self._encoder_argument_names}
        super()._validate_model_kwargs(others)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ) -> dict[str, Any]:
        recorded = {
            "output_attentions": generation_config.output_attentions or None,
            "output_hidden_states": generation_config.output_hidden_states or None,
        }
        name = model_input_name or self.main_input_name
        latents, states = self._encode_alone({**model_kwargs, **recorded, name: inputs_tensor}, decode_only=True)
        if model_kwargs.get("decoder_input_ids") is not None:
            self._check_rows(latents.z, {"decoder_input_ids": model_kwargs["decoder_input_ids"]})
        model_kwargs["encoder_outputs"] = self._packed(latents, states)
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeats all but the latents: the beams of a source share them, and their keys and values.

        Not so where PEFT has named an adapter for every beam.
        """
        packed = model_kwargs.pop("encoder_outputs")
        if expand_size > 1 and rows_have_adapters(self):
            packed = LatentOutput(packed.last_hidden_state.repeat_interleave(expand_size, dim=0))
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "encoder_outputs": packed}

    def _reorder_cache(self, cache, beam_idx):
        """Beams change places among those of their source, whose keys and values they share."""
        cache.self_attention_cache.reorder_cache(beam_idx)
        return cache


def has_prompts(generation_config: GenerationConfig) -> bool:
    """Whether a model of this configuration is told by tokens what to write: Whisper's checkpoints are."""
    return getattr(generation_config, "no_timestamps_token_id", None) is not None


def rows_have_adapters(model: PreTrainedModel) -> bool:
    """Whether PEFT runs each row of a batch through an adapter of its own (``adapter_names``): its hooks say so."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, functools.partial) and "adapter_names" in hook.keywords for hook in hooks)


class LatentView:
    """Mixed in before a base's own class by :func:`view_of_base`: what it encodes and runs is the NVIB model."""

    packed: LatentOutput | None
    model_of_latents: Any

    def __call__(self, *args, encoder_outputs=None, input_features=None, **kwargs):
        if encoder_outputs is None and self.packed is not None:  # asked for a language, outside of plain generation
            encoder_outputs, input_features = self._of_rows(input_features), None
        source = {"encoder_outputs": encoder_outputs, "input_features": input_features}
        return self.model_of_latents(*args, **source, **kwargs)

    def get_compiled_call(self, *args, **kwargs):
        return self.model_of_latents.get_compiled_call(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> Self:
        self.model_of_latents._apply(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> Self:
        self.model_of_latents.train(mode)
        return super().train(mode)

    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs):
        """As the base's.

        Raises:
            ValueError: ``return_token_timestamps``, which are read off attention to all frames of the sound.
        """
        if kwargs.get("return_token_timestamps"):
            raise ValueError(
                "return_token_timestamps=True (return_timestamps='word' in a pipeline) reads times off attention to "
                "every frame, which a latent lacks. Pass return_timestamps=True for the times of segments."
            )
        mask = kwargs.get("attention_mask")
        if self.model_of_latents.config.encode_sound_only and self.packed is None and mask is not None:
            inputs = kwargs.pop("input_features", None) if inputs is None else inputs
            inputs = mark_unheard(inputs, heard_frames(inputs, mask))
        given = () if inputs is None else (inputs,)
        return super().generate(*given, generation_config=generation_config, **kwargs)

    def _of_rows(self, sound: Tensor) -> LatentOutput:
        """The latents of the rows that are left."""
        return LatentOutput(self.packed.last_hidden_state[rows_of(sound)])

    def _prepare_text_encoder_decoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        if self.packed is not None:
            return {**model_kwargs, "encoder_outputs": self._of_rows(inputs_tensor)}
        prepare = self.model_of_latents._prepare_text_encoder_decoder_kwargs_for_generation
        if not self.model_of_latents.config.encode_sound_only:
            return prepare(inputs_tensor, model_kwargs, *args, **kwargs)
        # The mask is of all rows and of all of the sound; these rows' own length is marked in them.
        prepared = prepare(inputs_tensor, {**model_kwargs, "attention_mask": None}, *args, **kwargs)
        return {**prepared, "attention_mask": model_kwargs.get("attention_mask")}

    def _get_input_segment(self, **window):
        """A window cut out of long sound. Whisper's loop fills it up with zeros, which are no silence."""
        segment = super()._get_input_segment(**window)
        if segment is None or not self.model_of_latents.config.encode_sound_only or self.packed is not None:
            return segment
        rows = window["batch_idx_map"][: window["cur_bsz"]]
        return mark_end(segment, window["seek_num_frames"][rows])

    def _expand_inputs_for_generation(self, *args, **kwargs):
        return self.model_of_latents._expand_inputs_for_generation(*args, **kwargs)

    def _reorder_cache(self, *args, **kwargs):
        return self.model_of_latents._reorder_cache(*args, **kwargs)


@functools.cache
def _view_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(base.__name__, (LatentView, base), {"__module__": base.__module__})


def view_of_base(model, packed: LatentOutput | None = None) -> PreTrainedModel:
    """The base of an NVIB model, of the same parameters, that generates from latents; the base is left as it is.

    Args:
        packed: latents in place of those of its inputs.
    """
    view = copy.copy(model.base)
    view.__class__ = _view_class(type(model.base))
    # Beside the modules: the base has not got the model in it.
    generation_config = copy.deepcopy(model.generation_config)  # Pop2Piano writes into it
    vars(view).update(model_of_latents=model, packed=packed, generation_config=generation_config)
    return view


def generate_as_base(model, inputs=None, generation_config: GenerationConfig | None = None, **kwargs):
    """``generate()`` of the base's own class over the latents of ``model``.

    Latents, packed as ``encoder_outputs``, are of one window of sound, which is written in one go.
    """
    packed = kwargs.pop("encoder_outputs", None)
    if packed is not None:
        inputs = sound_for_rows(packed.last_hidden_state, model.base.config)
        kwargs.pop("input_features", None)
        kwargs["force_unique_generate_call"] = True
    return view_of_base(model, packed).generate(inputs, generation_config=generation_config, **kwargs)


def check_encoder_outputs(given: object) -> None:
    """Raise TypeError for what ``generate()`` cannot decode."""
    if not isinstance(given, (NvibLatents, BaseModelOutput)):
        raise TypeError(
            f"encoder_outputs must be latents, but got {type(given).__name__}. Pass what encode(), "
            "sample_latents(), interpolate_latents() or concatenate_latents([...]) returned."
        )


# Whisper's loop reads only the length of its sound, drops rows that are done, and carries no other tensor along.
# Where there are latents and no sound, a window stands for each of them: its number, everywhere.
def sound_for_rows(latents: Tensor, config: PreTrainedConfig) -> Tensor:
    """A window ``(B, mels, frames)`` for each of ``B`` latents, from which :func:`rows_of` reads which one it is."""
    rows = torch.arange(len(latents), device=latents.device, dtype=torch.float32)
    return rows[:, None, None].expand(-1, config.num_mel_bins, 2 * config.max_source_positions)


def rows_of(sound: Tensor) -> Tensor:
    """Which latents the windows of :func:`sound_for_rows` that are left stand for."""
    return sound[:, 0, 0].long()
