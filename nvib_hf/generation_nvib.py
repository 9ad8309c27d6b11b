"""``generate()`` from inputs or from latents: the methods of Transformers that it overrides."""

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
from .latents.merging import limit_of_call, limit_of_generation, merging
from .wrapping.base import STATES, LatentOutput
from .wrapping.sound import (
    MARGIN,
    STRIDE,
    end_of,
    heard_frames,
    mark_end,
    mark_unheard,
    mask_of_marks,
    silence_of,
    warn_without_mask,
)

TOKEN_IDS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
# Kinds of input. A base reads some of them; the others are refused.
MODALITIES = frozenset({"input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values"})


class NvibGenerationMixin(GenerationMixin):
    """Encodes once, leaves out the vectors that decoding cannot see, and decodes with any strategy."""

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As ``GenerationMixin.generate``; ``encoder_outputs`` may be :class:`~nvib_hf.NvibLatents`.

        Given latents do not change. Given inputs, it decodes the posterior in ``eval()`` and a sample of it in
        ``train()``. The same holds for ``encoder_last_hidden_state`` with its ``attention_mask``, which ``encode``
        takes too. Whisper uses its own ``generate()`` and its arguments (``language``, ``task``,
        ``return_timestamps``), unless you pass ``decoder_input_ids``. Pop2Piano uses its own on sound (``composer``).
        ``merge_share`` or ``merge_cost``: how far the latents of inputs are merged; by default the configuration says
        it. The output does not tell how many vectors are left: to see it, encode first, look at
        ``latents.num_vectors``, and pass ``encoder_outputs=latents``.
        """
        limit = {name: kwargs.pop(name, None) for name in ("merge_share", "merge_cost")}
        if kwargs.get("encoder_outputs") is not None:
            for name, value in limit.items():
                if value is not None:
                    raise ValueError(
                        f"{name}={value} merges what generate() encodes, but encoder_outputs are encoded already. "
                        f"Pass encoder_outputs=model.merge_latents(latents, {name.removeprefix('merge_')}={value})."
                    )
        with merging(limit_of_call(**limit)):  # a call inside another, as of an assistant, has its own
            return self._generate_with_this_limit(inputs, generation_config, kwargs)

    def _generate_with_this_limit(self, inputs, generation_config, kwargs: dict):
        self._check_inputs(kwargs)
        as_base = self._has_a_generate_for(inputs, kwargs)
        for name, own in () if as_base else self._renamed.items():
            if (value := kwargs.pop(name, None)) is not None:
                kwargs[own] = value
        if kwargs.get(STATES) is not None:
            states = {name: kwargs.pop(name, None) for name in (STATES, "attention_mask")}
            with torch.no_grad():
                latents, _ = self._encode_alone(states, decode_only=True, limit=limit_of_generation())
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
        """Whisper's method: the language tokens of sounds, read from their latents."""
        return getattr(view_of_base(self), "detect_language")  # noqa: B009 (not every base has it)

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
        """Whisper's method, over latents; ``generate`` calls it."""
        return getattr(view_of_base(self), "generate_with_fallback")  # noqa: B009

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """As in Transformers. If no file names the special tokens, they come from the base's nested configuration."""
        of_base = self.generation_config.to_dict()
        super().adjust_generation_fn(*args, **kwargs)
        loaded = self.generation_config
        if all(getattr(loaded, name) is None for name in TOKEN_IDS):
            for name, value in of_base.items():
                if getattr(loaded, name, None) is None:
                    setattr(loaded, name, value)

    def _check_inputs(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for inputs of a kind that the base does not read."""
        others = (MODALITIES - self._argument_names).intersection(kwargs)
        if given := sorted(name for name in others if kwargs[name] is not None):
            known = ", ".join(sorted(MODALITIES & self._argument_names))
            raise ValueError(
                f"{type(self.base).__name__} does not read {given[0]}. Pass {known}, or latents as encoder_outputs."
            )

    def _check_rows(self, packed: Tensor, given: dict[str, Any]) -> None:
        """Raise ValueError unless there are latents, and as many of them as examples in the other inputs."""
        if not len(packed):
            raise ValueError("encoder_outputs hold no latents, so there is nothing to decode. Pass at least one.")
        for name in ("inputs", "decoder_input_ids", *sorted(self._source_names)):
            value = given.get(name)
            if isinstance(value, Tensor) and value.dim() > 1 and len(value) != len(packed):
                refuse_batch(packed, value, "decoder inputs" if name == "decoder_input_ids" else f"examples of {name}")

    def _has_a_generate_for(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether the base generates by its own method: Whisper from its prompts, Pop2Piano from sound."""
        if hasattr(self.base, "get_mel_conditioner_outputs"):
            from_latents = any(kwargs.get(name) is not None for name in ("encoder_outputs", STATES))
            return not from_latents and (inputs is not None or kwargs.get("input_features") is not None)
        return kwargs.get("decoder_input_ids") is None and has_prompts(self.generation_config)

    def _packed_encoder_outputs(self, latents: NvibLatents | BaseModelOutput) -> BaseModelOutput:
        """What decoding reads of the latents. It returns packed latents as they are; nothing changes them."""
        check_encoder_outputs(latents)
        if not isinstance(latents, NvibLatents):
            return latents
        check_latents(latents, self.nvib)
        return self._packed(latents.compact())

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in ``GenerationMixin``, without arguments that ``forward`` does not take, such as a tokenizer."""
        prepared = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in prepared.items() if name in self._forward_names}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As in ``GenerationMixin``, but knows the arguments of the base's encoder too."""
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
        inputs = {**model_kwargs, **recorded, name: inputs_tensor}
        latents, states = self._encode_alone(inputs, decode_only=True, limit=limit_of_generation())
        if model_kwargs.get("decoder_input_ids") is not None:
            self._check_rows(latents.z, {"decoder_input_ids": model_kwargs["decoder_input_ids"]})
        model_kwargs["encoder_outputs"] = self._packed(latents, states)
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeats everything but the latents. The beams of a source share its latent, and its keys and values.

        If PEFT has named an adapter for every beam, the latents are repeated too.
        """
        packed = model_kwargs.pop("encoder_outputs")
        if expand_size > 1 and rows_have_adapters(self):
            packed = LatentOutput(packed.last_hidden_state.repeat_interleave(expand_size, dim=0))
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "encoder_outputs": packed}

    def _reorder_cache(self, cache, beam_idx):
        """Reorders the self-attention cache only: beams stay with their source, and share its keys and values."""
        cache.self_attention_cache.reorder_cache(beam_idx)
        return cache


def has_prompts(generation_config: GenerationConfig) -> bool:
    """Whether prompt tokens tell a model of this configuration what to write, as in Whisper's checkpoints."""
    return getattr(generation_config, "no_timestamps_token_id", None) is not None


def rows_have_adapters(model: PreTrainedModel) -> bool:
    """Whether PEFT's hooks run each example of a batch through an adapter of its own (``adapter_names``)."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, functools.partial) and "adapter_names" in hook.keywords for hook in hooks)


class LatentView:
    """Makes a base's own class encode and run the NVIB model; :func:`view_of_base` mixes it in first."""

    packed: LatentOutput | None
    model_of_latents: Any

    def __call__(self, *args, encoder_outputs=None, input_features=None, **kwargs):
        if encoder_outputs is None and self.packed is not None:  # detect_language(), outside of plain generation
            encoder_outputs, input_features = self._of_rows(input_features), None
        is_marked = self.model_of_latents.config.encode_sound_only and input_features is not None
        if is_marked and kwargs.get("attention_mask") is None:  # detect_language() has no mask
            kwargs["attention_mask"] = mask_of_marks(input_features)
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
        """As the base's, with ``merge_share`` and ``merge_cost``.

        Raises:
            ValueError: ``return_token_timestamps``, which are read off attention to all frames of the sound.
        """
        if kwargs.get("return_token_timestamps"):
            raise ValueError(
                "return_token_timestamps=True (return_timestamps='word' in a pipeline) reads times off attention to "
                "every frame, which a latent lacks. Pass return_timestamps=True for the times of segments."
            )
        limit = limit_of_call(kwargs.pop("merge_share", None), kwargs.pop("merge_cost", None))
        if limit is not None:
            with merging(limit):
                return self.generate(inputs, generation_config, **kwargs)
        if self._hears_sound_only:
            inputs = kwargs.pop("input_features", None) if inputs is None else inputs
            if inputs is not None and (mask := kwargs.get("attention_mask")) is not None:
                inputs = mark_unheard(inputs, heard_frames(inputs, mask))
            elif inputs is not None and inputs.shape[-1] == STRIDE * self.config.max_source_positions:
                warn_without_mask(inputs)  # longer sound need not end in silence
        given = () if inputs is None else (inputs,)
        return super().generate(*given, generation_config=generation_config, **kwargs)

    def _of_rows(self, sound: Tensor) -> LatentOutput:
        """The latents of the examples that are left."""
        return LatentOutput(self.packed.last_hidden_state[rows_of(sound)])

    def _prepare_text_encoder_decoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        if self.packed is not None:
            return {**model_kwargs, "encoder_outputs": self._of_rows(inputs_tensor)}
        prepare = self.model_of_latents._prepare_text_encoder_decoder_kwargs_for_generation
        if not self.model_of_latents.config.encode_sound_only:
            return prepare(inputs_tensor, model_kwargs, *args, **kwargs)
        # The mask covers all examples and their whole sound. The windows themselves mark where their sound ends.
        mask = mask_of_marks(inputs_tensor)
        prepared = prepare(inputs_tensor, {**model_kwargs, "attention_mask": mask}, *args, **kwargs)
        return {**prepared, "attention_mask": model_kwargs.get("attention_mask")}

    @property
    def _hears_sound_only(self) -> bool:
        return self.model_of_latents.config.encode_sound_only and self.packed is None

    def _retrieve_max_frames_and_seek(self, attention_mask=None, **sound):
        """Where each sound ends: Whisper's loop for timestamps would go on in the silence after it."""
        ends, seek = super()._retrieve_max_frames_and_seek(attention_mask=attention_mask, **sound)
        if attention_mask is None or not self._hears_sound_only:
            return ends, seek
        return end_of(attention_mask).to(ends).clamp(min=1), seek

    def _retrieve_segment(self, **window):
        """The segments of a window, without those that start after the end of its sound: nobody speaks there."""
        segments, offset = super()._retrieve_segment(**window)
        if self._hears_sound_only:
            row = window["prev_idx"]
            end = window["time_offset"][row] + window["seek_num_frames"][row] * window["time_precision_features"]
            segments = [segment for i, segment in enumerate(segments) if i == 0 or segment["start"] < end]
        return segments, offset

    def _get_input_segment(self, **window):
        """A window of long sound, with a margin after its end, which Whisper's loop would replace by zeros."""
        if window["input_features"] is None or not self._hears_sound_only:
            return super()._get_input_segment(**window)
        rows, frames = window["batch_idx_map"][: window["cur_bsz"]], window["seek_num_frames"]
        longer = (frames + STRIDE * MARGIN).clamp(max=window["num_segment_frames"])
        there = torch.minimum(longer, window["input_features"].shape[-1] - window["seek"])
        segment = super()._get_input_segment(**{**window, "seek_num_frames": longer})
        return mark_end(segment, frames[rows], there[rows], silence_of(window["input_features"]))

    def _expand_inputs_for_generation(self, *args, **kwargs):
        return self.model_of_latents._expand_inputs_for_generation(*args, **kwargs)

    def _reorder_cache(self, *args, **kwargs):
        return self.model_of_latents._reorder_cache(*args, **kwargs)


@functools.cache
def _view_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(base.__name__, (LatentView, base), {"__module__": base.__module__})


def view_of_base(model, packed: LatentOutput | None = None) -> PreTrainedModel:
    """A view of an NVIB model's base: it has the same parameters and generates from latents. The base does not change.

    Args:
        packed: latents to decode in place of the inputs' own.
    """
    view = copy.copy(model.base)
    view.__class__ = _view_class(type(model.base))
    # Set in vars(), not as a submodule: the base must not contain the model.
    generation_config = copy.deepcopy(model.generation_config)  # Pop2Piano writes into it
    vars(view).update(model_of_latents=model, packed=packed, generation_config=generation_config)
    return view


def generate_as_base(model, inputs=None, generation_config: GenerationConfig | None = None, **kwargs):
    """``generate()`` of the base's own class over the latents of ``model``.

    Each latent in ``encoder_outputs`` (packed) stands for one window of sound, which is decoded at once.
    """
    packed = kwargs.pop("encoder_outputs", None)
    if packed is not None:
        inputs = sound_for_rows(packed.last_hidden_state, model.base.config)
        kwargs.pop("input_features", None)
        kwargs["force_unique_generate_call"] = True
    return view_of_base(model, packed).generate(inputs, generation_config=generation_config, **kwargs)


def check_encoder_outputs(given: object) -> None:
    """Raise TypeError unless ``generate()`` can decode it."""
    if not isinstance(given, (NvibLatents, BaseModelOutput)):
        raise TypeError(
            f"encoder_outputs must be latents, but got {type(given).__name__}. Pass what encode(), "
            "sample_latents(), interpolate_latents() or concatenate_latents([...]) returned."
        )


# Whisper's loop reads only the length of its sound, removes examples that are done, and carries no other tensor along.
# If you pass latents without sound, each latent gets a window whose values are all the latent's number.
def sound_for_rows(latents: Tensor, config: PreTrainedConfig) -> Tensor:
    """A window ``(B, mels, frames)`` for each of ``B`` latents. :func:`rows_of` reads the latent's number from it."""
    rows = torch.arange(len(latents), device=latents.device, dtype=torch.float32)
    return rows[:, None, None].expand(-1, config.num_mel_bins, 2 * config.max_source_positions)


def rows_of(sound: Tensor) -> Tensor:
    """The numbers of the latents whose windows (:func:`sound_for_rows`) are left."""
    return sound[:, 0, 0].long()
