"""A tiny Whisper with prompts, and sounds of several lengths for it."""

import copy

import torch
from tiny_models import VOCAB_SIZE, tiny_base
from transformers import GenerationConfig, PreTrainedModel

from nvib_hf import NvibForConditionalGeneration

WINDOW, FRAMES = 64, 128  # vectors, and the frames they are made of
LENGTHS = [40, 20, 61]  # of sounds, in frames
TIMESTAMPS = WINDOW + 1


def prompts(first_timestamp: int, max_length: int) -> dict:
    """What is Whisper's own in a configuration of generation."""
    return {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 30, "<|fr|>": 31, "<|de|>": 32},
        "task_to_id": {"transcribe": 33, "translate": 34},
        "prev_sot_token_id": 35,
        "no_timestamps_token_id": first_timestamp - 1,
        "max_initial_timestamp_index": 10,
        "max_length": max_length,
        "return_timestamps": False,
    }


def with_prompts(base: PreTrainedModel, own: dict) -> PreTrainedModel:
    """The base, set to generate as Whisper's checkpoints do."""
    # A configuration made from a model's would be read without what is Whisper's own.
    settings = {**base.generation_config.to_dict(), **own, "_from_model_config": False}
    base.generation_config = GenerationConfig(**settings)
    return base.eval()


def whisper_base() -> PreTrainedModel:
    """With a window of 64 vectors, and Whisper's prompts."""
    base = tiny_base("whisper", max_source_positions=WINDOW, vocab_size=VOCAB_SIZE + TIMESTAMPS)
    return with_prompts(base, prompts(VOCAB_SIZE, max_length=14))


def wrapped(base, **settings) -> NvibForConditionalGeneration:
    """A copy of the base, wrapped to encode the sound only."""
    settings = {"encode_sound_only": True, **settings}
    return NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), **settings).eval()


def features(frames: int = FRAMES, batch: int = 3) -> torch.Tensor:
    """Noise ``(batch, 8, frames)``."""
    return torch.randn(batch, 8, frames, generator=torch.Generator().manual_seed(3))


def mask_of(lengths: list[int], frames: int = FRAMES) -> torch.Tensor:
    """1 where there is sound, ``(B, frames)``."""
    return (torch.arange(frames) < torch.tensor(lengths)[:, None]).long()
