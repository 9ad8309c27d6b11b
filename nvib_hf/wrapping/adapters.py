"""What PEFT reads from a model and its configuration. With it a wrap takes the same adapters as its base."""

from __future__ import annotations

import sys

from torch import nn

# PEFT computes the sizes of prompts and prefixes from these. Each architecture has some of them.
SIZES = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
    "d_model",
    "n_embd",
    "num_attention_heads",
    "n_head",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
READ_BY_PEFT = (*SIZES, "hidden_size", "tie_word_embeddings")  # PEFT reads these in a configuration as a dict


def default_targets(model_type: str, base_type: str) -> None:
    """Let PEFT find an adapter's default modules by the base's type, if PEFT is imported.

    PEFT's tables have an entry for each type of model, but all wraps have the same type. So each time PEFT asks for a
    configuration, right before it looks, this sets the wraps' entry to that of the base.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            if base_type in table:
                table[model_type] = table[base_type]
            else:
                table.pop(model_type, None)


def check_is_bare(model: nn.Module) -> None:
    """Raise TypeError or ValueError for a model that is wrapped by something, or has an adapter."""
    name, module = type(model).__name__, type(model).__module__
    if module.startswith("peft.") or hasattr(model, "peft_config"):
        raise ValueError(
            f"The base has an adapter in it ({name}). Merge it first with model.merge_and_unload(), or wrap the base "
            "without it and put the adapter on the NVIB model: peft.get_peft_model(nvib_model, config)."
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"The base is compiled ({name}). Wrap the original model, model._orig_mod, and compile what "
            "from_base_pretrained returns."
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"The base is a {name}. Wrap the model in it, model.module, and put {name} around what "
            "from_base_pretrained returns."
        )
