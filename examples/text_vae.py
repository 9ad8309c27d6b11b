"""Train a text VAE with a nonparametric latent space (NVIB), then look at what it learnt.

    python examples/text_vae.py                        # clauses of the Bible in Basic English, minutes on a CPU
    python examples/text_vae.py --purpose samples      # more steps, less reconstruction, better samples
    python examples/text_vae.py --purpose few-vectors  # more steps, only a part of the vectors
    python examples/text_vae.py --base minilm          # the pretrained encoder of all-MiniLM-L6-v2, a fresh decoder
    python examples/text_vae.py --text my_lines.txt    # any text file, one text per line
    python examples/text_vae.py --model text_vae       # show a trained folder again

The latent of a text is a set of weighted vectors, as many as the text has tokens, and nothing else reaches the
decoder. Training reconstructs each text from a sample of that latent while two KL terms hold the vectors near a
Gaussian and their pseudo-counts near a Dirichlet process: as near as the accepted cross-entropy allows. It prints
held-out texts beside their reconstructions, samples from the prior, a walk between two texts, the size of the latents,
and draws the tokens' pseudo-counts.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import bbe
import torch
from datasets import Dataset
from figures import draw_pseudo_counts
from minilm import minilm
from shared_trainer import make_trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from nvib_hf import ConstraintCallback, NvibForConditionalGeneration, NvibTrainer
from nvib_hf.evaluation.rate_distortion import divergences
from nvib_hf.evaluation.samples import interpolations
from nvib_hf.evaluation.texts import (
    MAX_LENGTH,
    as_read,
    encode_texts,
    evaluating,
    generate_texts,
    length_batches,
    reconstruct,
    target_ids,
    token_lengths,
)


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
        raise SystemExit(f"{len(texts)} different texts are too few: give at least 20, one per line.")
    return shuffled[num_held_out:], shuffled[:num_held_out]


def tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Dataset:
    """Source and target token ids: a text is its own target."""
    sources = tokenizer(texts, truncation=True, max_length=MAX_LENGTH).input_ids
    targets = target_ids(model, tokenizer, texts, MAX_LENGTH)
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
        max_position_embeddings=MAX_LENGTH + 2,
        dropout=0.0,
        init_std=128**-0.5,  # the usual 0.02 is for wide models: this one would not learn to copy with it
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=None,
    )
    return NvibForConditionalGeneration.from_base_pretrained(BartForConditionalGeneration(config), **nvib), tokenizer


@dataclass
class Recipe:
    """How a base is made and trained."""

    build: Callable
    learning_rate: float


RECIPES = {"bart": Recipe(bart, learning_rate=1e-3), "minilm": Recipe(minilm, learning_rate=5e-4)}


# Training starts from noisy vectors of moderate weight: there is no pretrained function to keep. A prior that expects
# less than one pseudo-count per token (delta) keeps the weights balanced: a vector of small weight is often lost.
NVIB = {"lambda_gaussian": 0.05, "lambda_dirichlet": 0.05, "delta": 0.3, "tau_alpha": 0.0, "tau_sigma": 0.3}
# Under a constraint these say only what counts how much among the terms.
CONSTRAINED = {**NVIB, "lambda_gaussian": 1.0, "lambda_dirichlet": 1.0}
DROPPING = {
    **NVIB,
    "lambda_gaussian": 0.3,
    "lambda_dirichlet": 0.3,
    "lambda_vectors": 5.0,
    "alpha_threshold": 0.1,
    "delta": 1.0,
}
# The same with a decision of its own in place of the threshold.
HARD_DROPPING = {name: value for name, value in DROPPING.items() if name != "alpha_threshold"} | {"dropping": "hard"}


@dataclass
class Purpose:
    """What is accepted and what is asked for, and the steps in which a small BART reaches it.

    Args:
        cross_entropy: of training, in nats per token, which the KLs are raised to.
        rate: by how much the multiplier of the KLs may rise in a step, in log.
        keep: share of the vectors to keep; ``None`` keeps all.
    """

    cross_entropy: float
    steps: int
    rate: float = 0.005
    keep: float | None = None

    @property
    def settings(self) -> dict[str, float]:
        """Of the model."""
        return CONSTRAINED if self.keep is None else DROPPING

    def steering(self) -> ConstraintCallback:
        return ConstraintCallback(self.cross_entropy, target_prop_vectors=self.keep, rate=self.rate)


PURPOSES = {
    "reconstruction": Purpose(cross_entropy=0.8, steps=2600, rate=0.02),
    "samples": Purpose(cross_entropy=1.8, steps=5000, rate=0.02),
    "few-vectors": Purpose(cross_entropy=0.3, steps=5000, keep=0.5),
}


# -------------------------------------------------------------------------------------------- training
def purpose_of(args) -> Purpose:
    """The chosen purpose, with what the command line says otherwise."""
    given = {"cross_entropy": args.cross_entropy, "keep": args.keep, "steps": args.max_steps}
    return replace(PURPOSES[args.purpose], **{name: value for name, value in given.items() if value is not None})


def train(model, tokenizer, texts: list[str], callbacks: list[TrainerCallback], **arguments) -> NvibTrainer:
    """Train on the texts, in batches of similar length; the learning rate falls linearly to nothing.

    ``arguments`` are those of :func:`shared_trainer.make_trainer`.
    """
    trainer = make_trainer(
        model,
        tokenizer,
        tokens_of(model, tokenizer, texts),
        trainer={"processing_class": tokenizer, "callbacks": callbacks},
        train_sampling_strategy="group_by_length",
        warmup_steps=0.05,
        **arguments,
    )
    trainer.train()
    return trainer


# ---------------------------------------------------------------------------------------------- showing
def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def show_reconstructions(model, tokenizer, texts: list[str]) -> None:
    title("Held-out texts and their reconstructions")
    for original, copy in zip(as_read(tokenizer, texts), reconstruct(model, tokenizer, texts), strict=True):
        print(f"  {original}\n{'=' if copy == original else '!'} {copy}\n")


def show_samples(model, tokenizer, lengths: list[int], seed: int) -> None:
    title("Samples from the prior")
    generator = torch.Generator(model.device).manual_seed(seed)
    latents = model.sample_latents(len(lengths), lengths, generator=generator)
    for length, text in zip(lengths, generate_texts(model, tokenizer, encoder_outputs=latents), strict=True):
        print(f"  {length:2d} vectors  {text}")


def show_interpolation(model, tokenizer, first: str, second: str, steps: int = 7) -> None:
    title("Between two held-out texts")
    (walk,) = interpolations(model, tokenizer, [(first, second)], steps)
    for i, text in enumerate(walk):
        print(f"  {i / (steps - 1):.2f}  {text}")


def show_figures(model, tokenizer, held_out: list[str]) -> None:
    """Exact reconstructions and what the latents cost, over held-out texts of 4 to 12 words (or all, if none is)."""
    texts = [text for text in held_out if 4 <= len(text.split()) <= 12] or held_out
    pairs = zip(reconstruct(model, tokenizer, texts), as_read(tokenizer, texts), strict=True)
    exact, statistics = sum(a == b for a, b in pairs), []
    names = ("num_vectors", "prop_vectors", "effective_vectors", "kl_gaussian", "kl_dirichlet")
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts), batch_size=100):
            latents = encode_texts(model, tokenizer, [texts[i] for i in batch])
            tokens = latents.attention_mask.sum(-1) - 1.0  # without the prior's component
            measured = {**latents, **divergences(model.nvib, latents)}
            statistics.append(torch.stack([tokens, *(measured[name].float() for name in names)]))
    length, kept, share, effective, kl_gaussian, kl_dirichlet = torch.cat(statistics, dim=1).mean(1).tolist()
    title(f"Figures over {len(texts)} held-out texts (greedy decoding, means per text)")
    print(f"  exact reconstructions   {100 * exact / len(texts):.1f} %")
    print(f"  vectors kept            {kept:.1f} of {length:.1f} ({100 * share:.0f} %), effective {effective:.1f}")
    print(f"  KL of the vectors       {kl_gaussian:.0f} nats")
    print(f"  KL of the weights       {kl_dirichlet:.2f} nats")


def show(model, tokenizer, held_out: list[str], args) -> None:
    some = held_out[:8]
    show_reconstructions(model, tokenizer, some)
    show_samples(model, tokenizer, token_lengths(tokenizer, held_out[8:16] or some), args.seed)
    show_interpolation(model, tokenizer, *held_out[:2])
    show_figures(model, tokenizer, held_out)
    path = args.output / "pseudo_counts.png"
    draw_pseudo_counts(model, tokenizer, some, path)
    print(f"\nThe model is in {args.model or args.output}, the tokens' pseudo-counts are drawn in {path}.")


# ------------------------------------------------------------------------------------------------ main
def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=RECIPES, default="bart", help="what becomes a VAE (default: bart)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text file, one text per line, for the corpus")
    parser.add_argument("--model", type=Path, metavar="DIR", help="show this trained folder, train nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: text_vae, or the shown folder")
    parser.add_argument("--purpose", choices=PURPOSES, default="reconstruction", help="what the latents are for")
    parser.add_argument("--cross-entropy", type=float, metavar="NATS", help="the cross-entropy per token to accept")
    parser.add_argument("--keep", type=float, metavar="SHARE", help="share of the vectors to keep (default: all)")
    parser.add_argument("--max-steps", type=int, help="training steps (these three default to the purpose's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="10 small steps: everything runs, nothing is learnt")
    args = parser.parse_args()
    args.output = args.output or args.model or Path("text_vae")
    if args.quick:
        args.max_steps = args.max_steps or 10
    return args


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    start = time.perf_counter()
    if args.model is not None:
        model = NvibForConditionalGeneration.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        held_out = read_texts(args.text or args.model / "held_out.txt")
    else:
        texts, held_out = split(read_texts(args.text), num_held_out=40 if args.quick else 1000, seed=args.seed)
        recipe = RECIPES[args.base]
        purpose = purpose_of(args)
        model, tokenizer = recipe.build(texts, **purpose.settings)
        print(
            f"{len(texts)} texts to train on, {len(held_out)} held out, {model.num_parameters() / 1e6:.1f}M parameters"
        )
        trainer = train(
            model,
            tokenizer,
            texts,
            [purpose.steering()],
            output_dir=args.output,
            max_steps=purpose.steps,
            per_device_train_batch_size=16 if args.quick else 64,
            learning_rate=recipe.learning_rate,
            logging_steps=min(100, purpose.steps),
            seed=args.seed,
        )
        trainer.save_model()
        (args.output / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    args.output.mkdir(parents=True, exist_ok=True)
    show(model.eval(), tokenizer, held_out, args)
    print(f"All this took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
