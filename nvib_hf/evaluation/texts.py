"""What all measurements share: texts to batches and back, and a model in evaluation mode."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..latents.checks import check_count
from ..latents.latents import NvibLatents, concatenate_latents
from ..layers.cross_entropy import IGNORED

MAX_LENGTH = 64  # tokens; by default the measures cut longer texts
UNLIMITED = 10**6  # tokens; a tokenizer without a limit has 10**30
# What configurations call the number of their positions
POSITIONS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in ``eval()``, without gradients. Afterwards every module gets its own mode back."""
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
        ValueError: a string instead of a list, or an empty list.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"{name} must be a list of at least one text, but got {texts!r:.60}.")
    return list(texts)


def check_targets(targets: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The targets as a list, one for each text.

    Raises:
        ValueError: another number of them.
    """
    targets = check_texts(targets, "targets")
    if len(targets) != len(texts):
        raise ValueError(f"There are {len(targets)} targets, but {len(texts)} texts. Pass one target for each text.")
    return targets


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def cut_to(max_length: int) -> dict[str, Any]:
    """Arguments of a tokenizer that cut texts. Fast ones overflow at the limit that those without one have."""
    return {"truncation": True, "max_length": min(max_length, UNLIMITED)}


def token_lengths(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int = MAX_LENGTH) -> list[int]:
    """How many tokens each text has after it is cut."""
    return [len(ids) for ids in tokenizer(texts, **cut_to(max_length)).input_ids]


def encoder_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int = MAX_LENGTH
) -> BatchEncoding:
    """The texts as the encoder takes them: token ids and mask, padded, on the model's device."""
    inputs = tokenizer(texts, **cut_to(max_length), padding=True, return_tensors="pt")
    return inputs.to(model.device)


def target_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> list[list[int]]:
    """The tokens of targets that reproduce the texts.

    If the decoder starts with the leading token anyway, such as BERT's [CLS], that token is not a target.
    """
    targets = tokenizer(text_target=texts, **cut_to(max_length)).input_ids
    labels = [[token] for token in range(3) if token != model.config.pad_token_id]
    inputs = model.prepare_decoder_input_ids_from_labels(torch.tensor(labels, device=model.device))
    starts = {*inputs[:, 0].tolist()}
    if len(starts) > 1:  # mBART's decoder starts with the last token of the text
        return targets
    return [ids[1:] if len(ids) > 1 and ids[0] in starts else ids for ids in targets]  # an empty text is its end


def labels_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> Tensor:
    """:func:`target_ids` as a batch of labels, ``(B, Nt)``, padded with -100."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in target_ids(model, tokenizer, texts, max_length)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(model.device)


# ------------------------------------------------------------------------------------ texts to latents and back
def length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> int:
    """``max_length``, or how many tokens of a text the tokenizer and the model take.

    This is the least of ``tokenizer.model_max_length`` and the positions of encoder and decoder. If none of them is
    known, as with T5, it is 512. A ``max_length`` of 10**30, as tokenizers without a limit have it, counts as none.
    """
    if max_length and max_length < UNLIMITED:
        return max_length
    config = model.config
    halves = (config.get_text_config(encoder=True), config.get_text_config(decoder=True))
    limits = [getattr(half, name, None) for half in halves for name in POSITIONS]
    known = [limit for limit in (tokenizer.model_max_length, *limits) if limit is not None and limit < UNLIMITED]
    return min(known, default=512)


def encode_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    **encode_kwargs,
) -> NvibLatents:
    """The latents of texts as one batch, in the given order: in evaluation mode, without gradients.

    Args:
        model: a model with NVIB whose encoder reads tokens.
        texts: a list; pass a single text as a list of one.
        max_length: tokens; longer texts are cut. By default as many as the tokenizer and the model take: the least of
            ``tokenizer.model_max_length`` and the positions of encoder and decoder, or 512 if neither has a limit.
        batch_size: how many texts are encoded at a time.
        encode_kwargs: ``sample`` and ``generator`` of ``model.encode``. By default you get posteriors, not a sample.

    Raises:
        ValueError: one string in place of a list, or an empty list.

    Example:
        >>> from transformers import BartConfig, BartForConditionalGeneration, BartTokenizer
        >>> from nvib_hf import NvibForConditionalGeneration, decode_latents, encode_texts
        >>> texts = ["the king gave bread", "the priest took oil from the house"]
        >>> tokenizer = BartTokenizer().train_new_from_iterator(texts, vocab_size=300)
        >>> config = BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1)
        >>> model = NvibForConditionalGeneration.from_base_pretrained(BartForConditionalGeneration(config))
        >>> latents = encode_texts(model, tokenizer, texts)
        >>> latents.num_vectors.tolist() == [len(tokenizer(text).input_ids) for text in texts]
        True
        >>> between = model.interpolate_latents(latents[0], latents[1], weight=0.5, method="mixture")
        >>> len(decode_latents(model, tokenizer, between, max_length=8))
        1
    """
    texts, max_length = check_texts(texts), length_limit(model, tokenizer, max_length)
    batch_size = check_count("batch_size", batch_size)
    with evaluating(model):
        batches = [
            model.encode(**encoder_inputs(model, tokenizer, texts[i : i + batch_size], max_length), **encode_kwargs)
            for i in range(0, len(texts), batch_size)
        ]
    return batches[0] if len(batches) == 1 else concatenate_latents(batches)


def decode_latents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    latents: NvibLatents,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    **generate_kwargs,
) -> list[str]:
    """Decode latents to texts, one for each latent: greedily, in evaluation mode.

    The latents can be from :func:`encode_texts`, ``model.sample_latents``, ``model.interpolate_latents``,
    ``model.vary_latents`` or ``model.blend_latents``.

    Args:
        max_length: the most tokens to write, with the default of :func:`encode_texts`. A model that has not learnt to
            end a text writes that many.
        batch_size: how many texts are written at a time.
        generate_kwargs: further arguments of ``generate()``, for instance ``num_beams=4``.

    Example:
        >>> from transformers import BartConfig, BartForConditionalGeneration, BartTokenizer
        >>> from nvib_hf import NvibForConditionalGeneration, decode_latents
        >>> texts = ["the king gave bread", "the priest took oil from the house"]
        >>> tokenizer = BartTokenizer().train_new_from_iterator(texts, vocab_size=300)
        >>> config = BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1)
        >>> model = NvibForConditionalGeneration.from_base_pretrained(BartForConditionalGeneration(config))
        >>> latents = model.sample_latents(num_samples=3, num_vectors=5)
        >>> len(decode_latents(model, tokenizer, latents, max_length=8))
        3
    """
    max_length, batch_size = length_limit(model, tokenizer, max_length), check_count("batch_size", batch_size)
    check_one_text_each(generate_kwargs)
    written: list[str] = []
    with evaluating(model):
        for i in range(0, len(latents), batch_size):
            some = latents[i : i + batch_size]
            written += generate_texts(model, tokenizer, max_length, encoder_outputs=some, **generate_kwargs)
    return written


def reconstruct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    **generate_kwargs,
) -> list[str]:
    """Encode each text and decode it again, in the given order: greedily, in evaluation mode.

    Compare the result with :func:`as_read` of the texts. Any encoder-decoder with ``generate()`` works, without NVIB
    too.

    Args:
        max_length: the most tokens to read and to write, with the default of :func:`encode_texts`.
        batch_size: how many texts are reconstructed at a time.
        generate_kwargs: further arguments of ``generate()``, for instance ``num_beams=4``.

    Raises:
        ValueError: one string in place of a list, or an empty list.

    Example:
        >>> from transformers import BartConfig, BartForConditionalGeneration, BartTokenizer
        >>> from nvib_hf import NvibForConditionalGeneration, reconstruct
        >>> texts = ["the king gave bread", "the priest took oil from the house"]
        >>> tokenizer = BartTokenizer().train_new_from_iterator(texts, vocab_size=300)
        >>> config = BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1)
        >>> model = NvibForConditionalGeneration.from_base_pretrained(BartForConditionalGeneration(config))
        >>> len(reconstruct(model, tokenizer, texts, max_length=8))
        2
    """
    texts, max_length = check_texts(texts), length_limit(model, tokenizer, max_length)
    batch_size = check_count("batch_size", batch_size)
    check_one_text_each(generate_kwargs)
    written = [""] * len(texts)
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size):
            inputs = encoder_inputs(model, tokenizer, [texts[i] for i in batch], max_length)
            for i, text in zip(
                batch, generate_texts(model, tokenizer, max_length, **inputs, **generate_kwargs), strict=True
            ):
                written[i] = text
    return written


def check_one_text_each(generate_kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of ``generate()`` by which it returns something else than one text for each."""
    for name, plain in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        if (value := generate_kwargs.get(name)) not in (None, plain):
            raise ValueError(f"{name}={value} does not give one text for each. Call model.generate(...) for it.")


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, **generate_kwargs
) -> list[str]:
    """Generate texts of at most ``max_length`` tokens, greedily or as ``generate_kwargs`` say."""
    settings = {"max_new_tokens": max_length, "num_beams": 1, "do_sample": False, **generate_kwargs}
    return decoded(tokenizer, model.generate(**settings))


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[list[int]]) -> list[str]:
    """Token ids as texts, without special tokens and the space around them."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def as_read(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None, is_target: bool = False
) -> list[str]:
    """The texts after the tokenizer has encoded and decoded them: cut, and without capitals that it does not know.

    By default the tokenizer's own limit cuts them. Set ``is_target`` for texts that the decoder writes.
    """
    given = {"text_target" if is_target else "text": check_texts(texts)}
    return decoded(tokenizer, tokenizer(**given, **cut_to(max_length or tokenizer.model_max_length)).input_ids)


def num_cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, is_target: bool = False) -> int:
    """How many texts have more tokens than ``max_length``, and so lose their end."""
    given = {"text_target" if is_target else "text": check_texts(texts)}
    return sum(len(ids) > max_length for ids in tokenizer(**given, verbose=False).input_ids)


def negative_log_likelihood(model: PreTrainedModel, labels: Tensor, **inputs) -> Tensor:
    """What the labels of each example cost in nats, ``(B,)``, with teacher forcing.

    ``inputs`` are the encoder's inputs, or ``encoder_outputs``.
    """
    logits = model(**inputs, labels=labels).logits  # (B, Nt, V)
    return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").sum(-1)


def reconstruction_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``exact_match`` (share, 0 to 1), ``bleu`` (of the corpus, 0 to 100) and ``token_error``.

    ``token_error`` is the number of words inserted, deleted or replaced, divided by the words of the references.

    Raises:
        ValueError: the numbers of predictions and references differ.
        ImportError: sacrebleu is not installed.
    """
    predictions, references = check_texts(predictions, "predictions"), check_texts(references, "references")
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions, but {len(references)} references. Pass one each.")
    pairs = list(zip(predictions, references, strict=True))
    return {
        "exact_match": sum(a == b for a, b in pairs) / len(pairs),
        "bleu": sacrebleu().corpus_bleu(predictions, [references]).score,
        "token_error": sum(word_edits(a, b) for a, b in pairs) / max(sum(len(b.split()) for b in references), 1),
    }


def kept_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
) -> list[dict]:
    """One record for each source token, in the texts' order.

    A record has ``text`` (its index), ``length`` (source tokens of the text), ``position``, ``relative_position`` (0
    to 1), ``token``, ``special`` (an end-of-text mark or the like), ``frequency`` (how often the token occurs in the
    given texts), ``log_alpha`` and ``kept``. The list is empty if latents do not have one pseudo-count per token.
    """
    texts, max_length = check_texts(texts), length_limit(model, tokenizer, max_length)
    encodings = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    frequency = Counter(id for ids in encodings for id in ids)
    special = set(tokenizer.all_special_ids)
    records: list[list[dict]] = [[] for _ in texts]
    with evaluating(model):
        for batch in length_batches([len(ids) for ids in encodings], batch_size):
            latents = encode_texts(model, tokenizer, [texts[i] for i in batch], max_length=max_length)
            if latents.log_alpha is None or latents.log_alpha.shape[1] != 1 + max(len(encodings[i]) for i in batch):
                return []
            # by the mask, not by position: the tokenizer may pad on the left
            mask, kept = latents.attention_mask[:, 1:], latents.log_pi[:, 1:] > -math.inf
            for row, i in enumerate(batch):
                ids, log_alpha = encodings[i], latents.log_alpha[row, 1:][mask[row]].tolist()
                for position, (id, value, is_kept) in enumerate(
                    zip(ids, log_alpha, kept[row][mask[row]].tolist(), strict=True)
                ):
                    records[i].append(
                        {
                            "text": i,
                            "length": len(ids),
                            "position": position,
                            "relative_position": position / max(len(ids) - 1, 1),
                            "token": tokenizer.convert_ids_to_tokens(id),
                            "special": id in special,
                            "frequency": frequency[id],
                            "log_alpha": value,
                            "kept": is_kept,
                        }
                    )
    return [record for of_text in records for record in of_text]


def kept_by_length(records: list[dict], width: int = 4) -> list[dict]:
    """Share of vectors kept by source length, in groups of ``width`` lengths; special tokens count."""
    return _grouped(records, lambda r: (r["length"] - 1) // width, lambda g: f"{g * width + 1}-{(g + 1) * width}")


def kept_by_position(records: list[dict]) -> list[dict]:
    """Share of tokens kept in each third of a text; special tokens do not count."""
    names = ("first third", "middle third", "last third")
    words = [record for record in records if not record["special"]]
    return _grouped(words, lambda r: min(int(3 * r["relative_position"]), 2), lambda g: names[g])


def kept_by_frequency(records: list[dict]) -> list[dict]:
    """Share of tokens kept, by how often they occur: in quarters of the running text, without special tokens.

    All occurrences of a token are in the same quarter, so the quarters are only about equally large.
    """
    words = [record for record in records if not record["special"]]
    if not words:
        return []
    ordered = sorted(record["frequency"] for record in words)
    limits = [ordered[(len(ordered) * quarter) // 4] for quarter in (1, 2, 3)]
    names = ("rarest quarter", "second quarter", "third quarter", "most frequent quarter")
    return _grouped(words, lambda r: sum(r["frequency"] > limit for limit in limits), lambda g: names[g])


def _grouped(records: list[dict], group_of: Callable[[dict], int], name_of: Callable[[int], str]) -> list[dict]:
    """For each group in order: its name, number of tokens, share kept, mean log pseudo-count."""
    groups: dict[int, list[dict]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    return [
        {
            "group": name_of(group),
            "tokens": len(members),
            "kept": sum(r["kept"] for r in members) / len(members),
            "log_alpha": sum(r["log_alpha"] for r in members) / len(members),
        }
        for group, members in sorted(groups.items())
    ]


def sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError(
            "BLEU needs the package sacrebleu, which is not installed. Install it with "
            "`pip install 'nvib-hf[evaluation]'` or `pip install sacrebleu`."
        ) from error
    return sacrebleu


def word_edits(first: str, second: str) -> int:
    """Levenshtein's distance in words: the fewest words to insert, delete or replace."""
    a, b = first.split(), second.split()
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]
