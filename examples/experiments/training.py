"""The training that the experiments share, and the clauses on which most of them train."""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples
import text_vae as example

SPLIT_SEED = 0  # of the held-out texts, which all runs share


def clauses(num_texts: int | None, num_held_out: int) -> tuple[list[str], list[str]]:
    """Training and held-out clauses of 4 to 12 words, the same for all seeds; of the first ``num_texts``."""
    texts = [text for text in example.read_texts(None) if 4 <= len(text.split()) <= 12]
    return example.split(texts[:num_texts], num_held_out, SPLIT_SEED)


def train(
    model, tokenizer, callbacks: list[TrainerCallback], texts: list[str], settings: dict, learning_rate: float = 1e-3
) -> list[dict]:
    """The example's training, with ``steps``, ``batch_size`` and ``seed`` of the settings; returns its log.

    The log has about 20 entries, however many the steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = example.train(
            model,
            tokenizer,
            texts,
            callbacks,
            quiet=True,
            output_dir=folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=learning_rate,
            logging_steps=max(settings["steps"] // 20, 1),
            seed=settings["seed"],
            use_cpu=True,
        )
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trace_of(log: list[dict], names: Iterable[str]) -> dict[str, list[float]]:
    """Some numbers of a log, a list for each that it has: what a record keeps of it."""
    return {name: [entry[name] for entry in log] for name in names if name in log[-1]}
