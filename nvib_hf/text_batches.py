"""Texts to batches and back, and a model in evaluation: what all measurements share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from .latent import NvibLatents
from .loss import IGNORED

MAX_LENGTH = 64  # tokens; longer texts are cut


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in ``eval()`` and without gradients; every module's mode is as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def check_texts(texts: Sequence[str], name: str = "texts") -> list[str]:
    """The texts as a list.

    Raises:
        ValueError: one string in place of a list, or none at all.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"{name} must be a list of at least one text, but got {texts!r:.60}.")
    return list(texts)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def token_lengths(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int = MAX_LENGTH) -> list[int]:
    """How many tokens each text has, once it is cut."""
    return [len(ids) for ids in tokenizer(texts, truncation=True, max_length=max_length).input_ids]


def encoder_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int = MAX_LENGTH
) -> BatchEncoding:
    """The texts as the encoder takes them: token ids and mask, padded, on the model's device."""
    inputs = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return inputs.to(model.device)


def encode_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int = MAX_LENGTH,
    **encode_kwargs,
) -> NvibLatents:
    """The texts' latents; ``encode_kwargs`` are ``sample`` and ``generator`` of ``model.encode``."""
    return model.encode(**encoder_inputs(model, tokenizer, texts, max_length), **encode_kwargs)


def target_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> list[list[int]]:
    """The tokens of targets that reproduce the texts.

    A leading token that the decoder starts with anyway, such as BERT's [CLS], is no target.
    """
    targets = tokenizer(text_target=texts, truncation=True, max_length=max_length).input_ids
    labels = [[token] for token in range(3) if token != model.config.pad_token_id]
    inputs = model.prepare_decoder_input_ids_from_labels(torch.tensor(labels, device=model.device))
    starts = {*inputs[:, 0].tolist()}
    if len(starts) > 1:  # as mBART's, which starts with the last token of the text
        return targets
    return [ids[1:] if {*ids[:1]} == starts else ids for ids in targets]


def labels_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> Tensor:
    """:func:`target_ids` as a batch of labels, ``(B, Nt)``, padded with -100."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in target_ids(model, tokenizer, texts, max_length)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(model.device)


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH, **generate_kwargs
) -> list[str]:
    """What the model generates, as texts: at most ``max_length`` tokens, greedily, or as ``generate_kwargs`` say."""
    settings = {"max_new_tokens": max_length, "num_beams": 1, "do_sample": False, **generate_kwargs}
    return decoded(tokenizer, model.generate(**settings))


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[list[int]]) -> list[str]:
    """Token ids as texts, without special tokens and the space around them."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def as_read(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int = MAX_LENGTH) -> list[str]:
    """The texts as the tokenizer gives them back: cut, and without the capitals that it does not know."""
    return decoded(tokenizer, tokenizer(check_texts(texts), truncation=True, max_length=max_length).input_ids)


def negative_log_likelihood(model: PreTrainedModel, labels: Tensor, **inputs) -> Tensor:
    """What each row of labels costs, in nats, ``(B,)``, teacher-forced.

    ``inputs`` are the encoder's, or ``encoder_outputs``.
    """
    logits = model(**inputs, labels=labels).logits  # (B, Nt, V)
    return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").sum(-1)
