"""Which tokens of a text have a vector that is kept: by its length, by their place, by how frequent they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .text_batches import MAX_LENGTH, check_texts, encode_texts, evaluating, length_batches


def kept_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
) -> list[dict]:
    """One record for each source token, in the texts' order.

    ``text`` (its index), ``length`` (source tokens of the text), ``position``, ``relative_position`` (0 to 1),
    ``token``, ``special`` (an end-of-text mark or the like), ``frequency`` (how often the token stands in the
    given texts), ``log_alpha`` and ``kept``. Empty where latents have no pseudo-counts, or not one for each token.
    """
    texts = check_texts(texts)
    encodings = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    frequency = Counter(id for ids in encodings for id in ids)
    special, records = set(tokenizer.all_special_ids), [[] for _ in texts]
    with evaluating(model):
        for batch in length_batches([len(ids) for ids in encodings], batch_size):
            latents = encode_texts(model, tokenizer, [texts[i] for i in batch], max_length, sample=False)
            if latents.log_alpha is None or latents.log_alpha.shape[1] != 1 + max(len(encodings[i]) for i in batch):
                return []
            # by the mask, not by place: the tokenizer may pad on the left
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
    """Share of tokens kept by how often they occur, in quarters of the running text; special tokens do not count.

    Occurrences of one token stay together, so the quarters are only about as large as each other.
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
