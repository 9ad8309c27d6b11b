"""Markdown of cards and reports."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields

import yaml  # type: ignore[import-untyped]  # it has no types
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from transformers import PreTrainedConfig

from ..configuration_nvib import NvibConfig, is_hub_id, setting_names
from ..versions import ADDRESS


def markdown_table(titles: Sequence[object], *rows: Sequence[object]) -> str:
    """A Markdown table. Its cells must be Markdown already."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verbatim(text: str) -> str:
    """A model's text as one line of Markdown that shows the text unchanged."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split())) or "*(nothing)*"


# The Hub's task by the encoder's input, except for translators. Any other input is speech.
TASKS = {"input_ids": "text-generation", "inputs_embeds": "text-generation", "pixel_values": "image-to-text"}
TRANSLATORS = ("fsmt", "m2m_100", "marian", "nllb-moe")

READ_TEXT = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)
inputs = tokenizer(["The first text.", "Another text."], padding=True, return_tensors="pt")"""

READ_SPEECH = """\
import numpy as np
from transformers import AutoFeatureExtractor, AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)
processor = AutoFeatureExtractor.from_pretrained({name}, trust_remote_code=True)
sounds = [np.zeros(16_000), np.zeros(16_000)]  # put your own here, at 16 kHz
inputs = processor(sounds, sampling_rate=16_000, return_tensors="pt")"""

READ_IMAGE = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({name}, trust_remote_code=True)
images = [Image.new("RGB", (224, 224)), Image.new("RGB", (224, 224))]  # put your own here
inputs = processor(images, return_tensors="pt")"""

USE = """\
model = AutoModelForSeq2SeqLM.from_pretrained({name}, trust_remote_code=True)


def decode(latents):
    tokens = model.generate(encoder_outputs=latents, max_new_tokens=32)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


tokens = model.generate(**inputs, max_new_tokens=32)  # as of any model
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
latents = model.encode(**inputs)
print(decode(latents))  # the same
print(decode(model.sample_latents(num_samples=2, num_vectors=8)))  # drawn from the prior
print(decode(model.interpolate_latents(latents[:1], latents[1:], weight=0.5)))  # needs the package POT"""

CITATION = """\
@inproceedings{henderson2023vae,
  title = {A {VAE} for Transformers with Nonparametric Variational Information Bottleneck},
  author = {Henderson, James and Fehr, Fabio},
  booktitle = {The Eleventh International Conference on Learning Representations},
  year = {2023}
}

@inproceedings{fehr2024nonparametric,
  title = {Nonparametric Variational Regularisation of Pretrained Transformers},
  author = {Fehr, Fabio and Henderson, James},
  booktitle = {The First Conference on Language Modeling},
  year = {2024}
}"""

TEXT = """\
# {title}

{base} with a nonparametric variational information bottleneck (NVIB) between encoder and decoder{inside}.

The encoder's vectors become a distribution over weighted sets of vectors. Training decodes a sample of it. Two KL
terms, one for the vectors and one for their weights, limit how much information passes. So each input has a latent
that you can decode. You can also draw latents from the prior, or interpolate between the latents of two inputs.

## Use

```python
{snippet}
```

`trust_remote_code=True` runs the code beside the weights, so you need only PyTorch and Transformers. nvib_hf made this
model: you can leave `trust_remote_code` out if nvib_hf is installed{install} and imported.

## Settings

{settings}

{training}## Citation

```bibtex
{citation}
```
"""


def model_card(model, name: str, training: str = "", **metadata) -> ModelCard:
    """The card of an NVIB model.

    Args:
        model: the :class:`~nvib_hf.NvibForConditionalGeneration`.
        name: repository or folder that the snippet loads.
        training: a section on its training.
        metadata: further fields of the card's header (``license``, ``language``, ``datasets``, ...). They win over
            those of ``model.card_metadata``. You have to state the licence, because a base's is not always known.

    Raises:
        TypeError: YAML cannot hold a field, or tags are not text.
    """
    read = {"input_ids": READ_TEXT, "pixel_values": READ_IMAGE}.get(model.main_input_name, READ_SPEECH)
    data = {
        "library_name": "transformers",
        "pipeline_tag": task_of(model),
        "base_model": base_ids(model.config) or None,
        **plain_fields({**model.card_metadata, **metadata}),
    }
    data["tags"] = list(dict.fromkeys([*(model.model_tags or []), *as_tags(data.get("tags", []))]))
    text = TEXT.format(
        title=verbatim(name.rsplit("/", 1)[-1]),
        base=_base(model.config),
        inside=_inside(model.config),
        snippet=f"{read}\n\n{USE}".format(name=as_literal(name)),
        settings=markdown_table(("setting", "value"), *((f"`{k}`", value) for k, value in _settings(model).items())),
        training=training and f"## Training\n\n{training.strip()}\n\n",
        install=f" (`pip install git+{ADDRESS}`)" if ADDRESS else "",
        citation=CITATION,
    )
    return ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}")


def task_of(model) -> str:
    """The Hub's task for a model."""
    if model.config.base_config.model_type in TRANSLATORS:
        return "translation"
    return TASKS.get(model.main_input_name, "automatic-speech-recognition")


def as_literal(text: str) -> str:
    """A text as a Python literal on one line, without characters that would end a block of code."""
    return json.dumps(text, ensure_ascii=False).replace("`", r"\x60")


def plain_fields(given: dict[str, object]) -> dict[str, object]:
    """The fields of a header that are not empty.

    Raises:
        TypeError: YAML cannot hold a field.
    """
    for field, value in given.items():
        try:
            yaml.safe_dump({field: value})
        except yaml.YAMLError:
            raise TypeError(
                f"The model card's {field} must be text, a number, or lists and dicts of these, but got {value!r}. "
                "Convert it, for instance with .tolist() or str()."
            ) from None
    return {field: value for field, value in given.items() if value}


def as_tags(tags: object) -> list[str]:
    """One tag, or a list of them."""
    tags = [tags] if isinstance(tags, str) else tags
    if not isinstance(tags, (list, tuple, set)) or not all(isinstance(tag, str) for tag in tags):
        raise TypeError(f"The model card's tags must be a list of texts, but got {tags!r}. Pass ['one', 'another'].")
    return list(tags)


def base_ids(config: NvibConfig) -> list[str]:
    """The repositories that the model was made from: an NVIB model trained further, the base, or its halves."""
    for parts in ([config], [config.base_config], _halves(config)):
        if found := [part.name_or_path for part in parts if is_hub_id(part.name_or_path)]:
            return found
    return []


def _halves(config: NvibConfig) -> list[PreTrainedConfig]:
    """The encoder's and the decoder's configuration, if the base has both."""
    halves = [getattr(config.base_config, name, None) for name in ("encoder", "decoder")]
    return halves if all(isinstance(half, PreTrainedConfig) for half in halves) else []


def _base(config: NvibConfig) -> str:
    """The base model in words."""
    kinds = " and ".join(f"`{half.model_type}`" for half in _halves(config))
    architecture = f"`{config.base_architecture}`" + (f" of {kinds}" if kinds else "")
    links = " and ".join(f"[{name}](https://huggingface.co/{name})" for name in base_ids(config))
    return f"{links} ({architecture})" if links else f"A {architecture}"


def _inside(config: NvibConfig) -> str:
    """Which self-attentions have NVIB too, in words."""
    where = []
    for kind, layers in config.attentions.items():
        if kind != "cross":
            some = "all layers" if layers == "all" else f"layers {', '.join(map(str, layers))}"
            where.append(f"the {kind}'s self-attention ({some})")
    return f", and in {' and '.join(where)}" if where else ""


def _settings(model) -> dict[str, str]:
    """The bottleneck's settings, with the layer's current prior."""
    config, layer = model.config, model.nvib
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name in setting_names()}
    if config.latent_prior is None:
        del given["latent_prior_frozen"]
    settings = {name: f"`{value!r}`" for name, value in given.items() if value is not None}
    if not layer.prior_mu.is_meta:
        settings["prior_mu"] = _summary(layer.prior_mu)
        settings["prior_var"] = _summary(layer.prior_logvar.exp())
        settings["dropping_share"] = f"`{layer.dropping_share.item():.4g}`"
        log_alpha = layer.prior_log_alpha.item()
        settings["prior_alpha"] = f"`{math.exp(log_alpha):.4g}`" if log_alpha < 20 else f"exp(`{log_alpha:.4g}`)"
    return settings


def _summary(values: Tensor) -> str:
    """The number, if all channels have the same one; otherwise their range."""
    low, high = values.min().item(), values.max().item()
    if low == high:
        return f"`{low:.4g}`"
    return f"{values.numel()} values, `{low:.4g}` to `{high:.4g}`"
