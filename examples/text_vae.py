"""Train a text VAE with a nonparametric latent space (NVIB), then look at what it learnt.

    python examples/text_vae.py                      # clauses of the Bible in Basic English, minutes on a CPU
    python examples/text_vae.py --base minilm        # the pretrained encoder of all-MiniLM-L6-v2, a fresh decoder
    python examples/text_vae.py --text my_lines.txt  # any text file, one text a line
    python examples/text_vae.py --model text_vae     # show a trained folder again

The latent of a text is a set of weighted vectors, as many as the text has tokens, and nothing else reaches the
decoder. Training reconstructs each text from a sample of that latent while two KL terms hold the vectors near a
Gaussian and their pseudo-counts near a Dirichlet process. It prints held-out texts beside their reconstructions,
samples from the prior, a walk between two texts, the size of the latents, and draws the tokens' pseudo-counts.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bbe
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    set_seed,
)

from nvib_hf import KLAnnealingCallback, NvibForConditionalGeneration, NvibTrainer

MAX_TOKENS = 64  # longer texts are cut


# ---------------------------------------------------------------------------------------------- texts
def read_texts(path: Path | None) -> list[str]:
    """The lines of a text file, or the clauses of the corpus; each once, whatever its capitals."""
    lines = path.read_text(encoding="utf-8").splitlines() if path else bbe.clauses()
    texts = (" ".join(line.split()) for line in lines)
    return list({text.casefold(): text for text in texts if text}.values())


def split(texts: list[str], num_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out texts, which have none in common."""
    shuffled = random.Random(seed).sample(texts, len(texts))
    num_held_out = min(num_held_out, len(texts) // 10)
    if num_held_out < 2:
        raise SystemExit(f"{len(texts)} different texts are too few: give at least 20, one a line.")
    return shuffled[num_held_out:], shuffled[:num_held_out]


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Dataset:
    """Source and target token ids. The target is the source without a leading [CLS]: the decoder starts with it."""
    sources = tokenizer(texts, truncation=True, max_length=MAX_TOKENS).input_ids
    targets = [ids[1:] if ids[0] == tokenizer.cls_token_id else ids for ids in sources]
    return Dataset.from_dict({"input_ids": sources, "labels": targets, "length": [len(ids) for ids in sources]})


# ---------------------------------------------------------------------------------------------- models
def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training texts, which reproduces any text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


def bart(texts: list[str], **nvib) -> tuple[NvibForConditionalGeneration, PreTrainedTokenizerBase]:
    """A small BART with fresh weights and a vocabulary learnt from the texts."""
    tokenizer = train_tokenizer(texts)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=MAX_TOKENS + 2,
        dropout=0.0,
        init_std=128**-0.5,  # the usual 0.02 is for wide models: this one would not learn to copy with it
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=None,
    )
    return NvibForConditionalGeneration.from_base_pretrained(BartForConditionalGeneration(config), **nvib), tokenizer
