"""Whisper's decoder trained to read fewer vectors: adapters over merged vectors, or a decision what to drop.

    python examples/experiments/whisper_training.py adapters  # minutes of a CPU core each
    python examples/experiments/whisper_training.py dropping
    python examples/whisper.py --trained adapters dropping    # what came of it, beside what needs no training

The encoder stays as it is, so its output is computed once. The plain model is the teacher: its transcripts are the
targets, and of adapters also what it expects of each token. So sound is all that is needed: `--audio` takes a folder
of yours. Otherwise flite and espeak-ng speak, in voices and sentences that `whisper.py` does not test. Needs the
extra `examples` (pip install nvib-hf[examples]).
"""

import argparse
import copy
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import torch
from peft import LoraConfig, get_peft_model
from speech import RATE, Utterance, recorded, with_noise
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Seq2SeqTrainingArguments
from transformers.utils import logging
from whisper import BATCH, Recogniser, load
from whisper_speech import clauses_to_train_on, to_train_on

from nvib_hf import ConstraintCallback, NvibForConditionalGeneration, NvibLatents, NvibTrainer
from nvib_hf.layers.cross_entropy import IGNORED

SHARES = 0.02, 0.06  # of 1500, between which each batch of the adapters' training is merged
NOISE = 10  # decibels below the sound, in every second utterance


# ------------------------------------------------------------------------------------ data
class Transcripts(Dataset):
    """Encoder outputs and what the plain model makes of them: transcripts, and the last states of its decoder there.

    Outputs and states are kept in half precision.
    """

    def __init__(self, recogniser: Recogniser, utterances: list[Utterance]) -> None:
        plain = recogniser.models["whole"]
        self.encoded: list[Tensor] = []
        self.tokens: list[list[int]] = []
        self.states: list[Tensor] = []
        by_length = sorted(utterances, key=lambda x: len(x.sound))
        for i in tqdm(range(0, len(by_length), BATCH), "encoder and transcripts, once"):
            sounds = by_length[i : i + BATCH]
            latents = plain.encode(**recogniser.inputs(sounds))
            self.encoded.extend(latents.z[:, 1:].half())  # a fresh wrap's means are what its encoder made
            tokens = recogniser.generate(plain, latents, max(len(x.sound) for x in sounds) / RATE)
            with torch.no_grad():
                given = {"encoder_outputs": latents, "decoder_input_ids": tokens[:, :-1]}
                states = plain(**given, output_hidden_states=True).decoder_hidden_states[-1]
            rows = [self._to_the_end(row, plain) for row in tokens.tolist()]
            self.tokens.extend(rows)
            self.states.extend(of[: len(row) - 1].half() for of, row in zip(states, rows, strict=True))
        self.prompt_length = len(recogniser.processor.tokenizer.prefix_tokens)

    def _to_the_end(self, row: list[int], model: NvibForConditionalGeneration) -> list[int]:
        end = model.generation_config.eos_token_id
        return row[: row.index(end, 1) + 1] if end in row[1:] else row

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        return {"encoder_last_hidden_state": self.encoded[index].float(), "tokens": self.tokens[index]}

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """The prompt is given, and is no target."""
        length = max(len(row["tokens"]) for row in rows) - 1
        inputs, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), IGNORED)
        for i, row in enumerate(rows):
            tokens = torch.tensor(row["tokens"])
            inputs[i, : len(tokens) - 1] = tokens[:-1]
            labels[i, self.prompt_length - 1 : len(tokens) - 1] = tokens[self.prompt_length :]
        encoded = torch.stack([row["encoder_last_hidden_state"] for row in rows])
        return {"encoder_last_hidden_state": encoded, "decoder_input_ids": inputs, "labels": labels}

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Of utterances of about the same length, which stand beside each other; and the states of their targets."""
        chance, first = random.Random(seed), self.prompt_length - 1
        for _ in range(steps):
            start = chance.randrange(max(len(self) - size, 0) + 1)
            rows = range(start, min(start + size, len(self)))
            yield self.collate([self[i] for i in rows]), torch.cat([self.states[i][first:].float() for i in rows])


# ------------------------------------------------------------------------------------ training
def train_adapters(model: NvibForConditionalGeneration, data: Transcripts, steps: int, seed: int):
    """The model with the keys and values of its cross-attention trained, by low-rank adapters that become part of it.

    Over merged vectors it learns to expect what the plain model expects over all: the loss is the divergence between
    the two, nats a token. Each batch is merged to another share, whose logarithm is uniform.
    """
    torch.manual_seed(seed)
    keys_and_values = r".*decoder\.layers.*encoder_attn\.(k|v)_proj"
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=keys_and_values))
    trained = [x for x in adapted.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    chance, mean, bar = random.Random(seed), None, tqdm(total=steps, desc="adapters")
    head = model.get_output_embeddings()
    model.eval()  # the posterior is not sampled: the plain model's is a point
    for batch, states in data.batches(BATCH, steps, seed):
        share = math.exp(chance.uniform(*map(math.log, SHARES)))
        encoded, is_target = batch.pop("encoder_last_hidden_state"), batch.pop("labels") != IGNORED
        with torch.no_grad():
            expected = head(states).log_softmax(-1)
            latents: NvibLatents = model.encode(encoder_last_hidden_state=encoded, merge_share=share)
        logits = model(encoder_outputs=latents, **batch).logits[is_target]
        loss = F.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(nats=f"{mean:.3f}")
        bar.update()
    return adapted.merge_and_unload()


@torch.no_grad()
def cross_entropy(model: NvibForConditionalGeneration, data: Transcripts) -> float:
    """Of a model that keeps everything: how sure the plain one is of its own transcripts, nats a token."""
    total = tokens = 0
    for i in tqdm(range(0, len(data), BATCH), "cross-entropy", leave=False):
        batch = data.collate([data[j] for j in range(i, min(i + BATCH, len(data)))])
        count = (batch["labels"] != IGNORED).sum().item()
        total, tokens = total + count * model.eval()(**batch).cross_entropy.item(), tokens + count
    return total / tokens


def train_dropping(model: NvibForConditionalGeneration, data: Transcripts, steps: int, seed: int):
    """The model with one linear unit of NVIB's layer trained, which decides what is dropped: 15 % is to be kept."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("nvib.keep_"))
    callback = ConstraintCallback(
        cross_entropy=cross_entropy(model, data) + 0.05,
        target_prop_vectors=0.15,
        start_beta=0.2,
        rate=0.01,
        dropping_share=1.0,
        interval=5,
    )
    arguments = Seq2SeqTrainingArguments(
        output_dir="unused",
        max_steps=steps,
        per_device_train_batch_size=6,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        seed=seed,
        use_cpu=True,
    )
    NvibTrainer(model, arguments, data_collator=data.collate, train_dataset=data, callbacks=[callback]).train()
    model.nvib.dropping_share.fill_(1.0)  # what was learnt counts, should the cross-entropy never have been met
    return model


# Of each method: settings of the wrap, the training, its steps, what it listens to.
METHODS = {
    "adapters": ({}, train_adapters, 600, clauses_to_train_on),
    "dropping": ({"dropping": "relaxed", "lambda_vectors": 1.0}, train_dropping, 300, to_train_on),
}


def utterances_of(options: argparse.Namespace, spoken: Callable[[int, int], list[Utterance]]) -> list[Utterance]:
    if options.audio is not None:
        return recorded(options.audio)
    made = spoken(options.utterances, options.seed)
    return made[::2] + with_noise(made[1::2], NOISE, options.seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--model", default="tiny.en", help="tiny.en or base of packages; or of the Hub, or a folder")
    parser.add_argument("--audio", type=Path, help="a folder of recordings; no transcripts are needed")
    parser.add_argument("--utterances", type=int, default=480, help="synthetic ones (%(default)s)")
    parser.add_argument("--steps", type=int, help="of training (adapters 600, dropping 300)")
    parser.add_argument("--output", type=Path, help="folder of the model (default: the method's name)")
    parser.add_argument("--seed", type=int, default=24)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    settings, train, steps, spoken = METHODS[options.method]
    base, processor = load(options.model)
    data = Transcripts(Recogniser(base, processor), utterances_of(options, spoken))
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), **settings)
    start = time.perf_counter()
    model = train(model, data, options.steps or steps, options.seed)
    print(f"{len(data)} utterances, trained in {(time.perf_counter() - start) / 60:.1f} minutes.")
    folder = options.output or Path(options.method)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
