"""A tiny Whisper with prompts, and sounds of several lengths for it."""

import copy

import torch
from tiny_models import VOCAB_SIZE, tiny_base
from transformers import GenerationConfig, PreTrainedModel

from nvib_hf import NvibForConditionalGeneration

WINDOW, FRAMES = 64, 128  # vectors, and the frames they are made of
LENGTHS = [40, 20, 61]  # of sounds, in frames
TIMESTAMPS = WINDOW + 1
PROMPTS = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": 30, "<|fr|>": 31, "<|de|>": 32},
    "task_to_id": {"transcribe": 33, "translate": 34},
    "prev_sot_token_id": 35,
    "no_timestamps_token_id": VOCAB_SIZE - 1,
    "max_initial_timestamp_index": 10,
    "max_length": 14,
    "return_timestamps": False,
}


def whisper_base() -> PreTrainedModel:
    """With a window of 64 vectors, and Whisper's prompts."""
    base = tiny_base("whisper", max_source_positions=WINDOW, vocab_size=VOCAB_SIZE + TIMESTAMPS)
    settings = {**base.generation_config.to_dict(), **PROMPTS, "_from_model_config": False}
    base.generation_config = GenerationConfig(**settings)
    return base.eval()


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
