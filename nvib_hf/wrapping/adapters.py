"""What PEFT reads off a model and its configuration, so that a wrap takes the adapters that its base takes."""

from __future__ import annotations

import sys

from torch import nn

# By these names PEFT sizes prompts and prefixes: each architecture has some of them.
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
READ_BY_PEFT = (*SIZES, "hidden_size", "tie_word_embeddings")  # in a configuration as a dict


def default_targets(model_type: str, base_type: str) -> None:
    """Let PEFT look the modules that an adapter goes into by default up by the base's type, if PEFT is there.

    Its tables have an entry for each type of model, and all wraps are of one type: the entry is that of the model
    whose configuration is asked for, which PEFT does right before it looks.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            if base_type in table:
                table[model_type] = table[base_type]
            else:
                table.pop(model_type, None)


def check_is_bare(model: nn.Module) -> None:
    """Raise TypeError, or ValueError, for a model that something has been put around, or an adapter into."""
    name, module = type(model).__name__, type(model).__module__
    if module.startswith("peft.") or hasattr(model, "peft_config"):
        raise ValueError(
            f"The base has an adapter in it ({name}). Merge it first, model.merge_and_unload(), or wrap the base "
            "without it and put the adapter on the NVIB model: peft.get_peft_model(nvib_model, config)."
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"The base is compiled ({name}). Wrap the model that was compiled, model._orig_mod, and compile what "
            "from_base_pretrained returns."
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"The base is a {name}. Wrap the model in it, model.module, and put {name} around what "
            "from_base_pretrained returns."
        )
