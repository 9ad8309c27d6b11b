"""Train a text VAE with a nonparametric latent space (NVIB), then look at what it learnt.

    python examples/text_vae.py                        # clauses of the Bible in Basic English, minutes on a CPU
    python examples/text_vae.py --purpose samples      # more steps, less reconstruction, better samples
    python examples/text_vae.py --purpose few-vectors  # more steps, only a part of the vectors
    python examples/text_vae.py --base minilm          # the pretrained encoder of all-MiniLM-L6-v2, a fresh decoder
    python examples/text_vae.py --text my_lines.txt    # any text file, one text per line; few lines are recombined
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
from functools import partial
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

# Fewer texts than these are recombined in training.
FEW_TEXTS = 5000

# Texts that the constraint watches, at most: they are not trained on.
NUM_WATCHED = 256


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
        raise SystemExit(f"{len(texts)} different texts are too few: give at least 20, one per line, better 400.")
    return shuffled[num_held_out:], shuffled[:num_held_out]


def tokens_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int = MAX_LENGTH
) -> Dataset:
    """Source and target token ids: a text is its own target."""
    sources = tokenizer(texts, truncation=True, max_length=max_length).input_ids
    targets = target_ids(model, tokenizer, texts, max_length)
    return Dataset.from_dict({"input_ids": sources, "labels": targets, "length": [len(ids) for ids in sources]})


class Recombined(torch.utils.data.Dataset):
    """Few texts, recombined anew each time: most are the beginning of one and the end of another.

    So none can be learnt by heart, and the decoder has to read its latent.

    Args:
        encode: texts to examples, as :func:`tokens_of` makes them.
        share: of the examples that are recombined.
    """

    def __init__(
        self, texts: list[str], encode: Callable[[list[str]], Dataset], seed: int, share: float = 0.7
    ) -> None:
        self.texts, self.encode, self.share = [text.split() for text in texts], encode, share
        self.random = random.Random(seed)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        words = self.texts[index]
        if self.random.random() < self.share:
            other = self.random.choice(self.texts)
            beginning, end = self.random.randint(0, len(words)), self.random.randint(0, len(other))
            words = words[:beginning] + other[end:] or words
        return self.encode([" ".join(words)])[0]


def saved_max_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens at which a model's texts were cut, as its tokenizer says, if it does."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else MAX_LENGTH


def num_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> int:
    """How many texts are longer than so many tokens, and lose their end."""
    return sum(len(ids) > max_length for ids in tokenizer(texts).input_ids)


# ---------------------------------------------------------------------------------------------- models
def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training texts, which reproduces any text exactly; few texts teach it few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=min(2048, 512 + 4 * len(texts)),
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


def bart(
    texts: list[str], max_length: int = MAX_LENGTH, **nvib
) -> tuple[NvibForConditionalGeneration, PreTrainedTokenizerBase]:
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
        max_position_embeddings=max_length + 2,
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


def train(
    model,
    tokenizer,
    texts: list[str],
    callbacks: list[TrainerCallback],
    watched: list[str] | None = None,
    recombine: bool = False,
    max_length: int = MAX_LENGTH,
    **arguments,
) -> NvibTrainer:
    """Train on the texts, in batches of similar length; the learning rate falls linearly to nothing.

    Args:
        watched: texts that are not trained on, for the constraint to look at.
        recombine: see :class:`Recombined`.
        max_length: tokens; longer texts are cut.
        arguments: those of :func:`shared_trainer.make_trainer`.
    """
    encode = partial(tokens_of, model, tokenizer, max_length=max_length)
    trainer = make_trainer(
        model,
        tokenizer,
        Recombined(texts, encode, arguments.get("seed", 0)) if recombine else encode(texts),
        trainer={
            "processing_class": tokenizer,
            "callbacks": callbacks,
            "eval_dataset": encode(watched) if watched else None,
        },
        train_sampling_strategy="random" if recombine else "group_by_length",
        warmup_steps=0.05,
        **arguments,
    )
    trainer.train()
    return trainer


def train_on(corpus: list[str], args) -> tuple[NvibForConditionalGeneration, PreTrainedTokenizerBase, list[str]]:
    """A trained model and its tokenizer, both saved, and the texts held out for the end."""
    max_length = args.max_length = args.max_length or MAX_LENGTH
    texts, held_out = split(corpus, num_held_out=40 if args.quick else 1000, seed=args.seed)
    num_watched = min(len(held_out), NUM_WATCHED)
    texts, watched = texts[:-num_watched], texts[-num_watched:]
    few = len(texts) < FEW_TEXTS
    purpose, recipe = purpose_of(args), RECIPES[args.base]
    model, tokenizer = recipe.build(texts, max_length=max_length, **purpose.settings)
    print(
        f"{len(texts)} texts to train on, {len(watched)} for the constraint to watch, {len(held_out)} held out, "
        f"{model.num_parameters() / 1e6:.1f}M parameters"
    )
    if few:
        print(
            f"Fewer than {FEW_TEXTS} texts are easily learnt by heart: training recombines them. "
            "More lines are better: examples/README.md says what 100 to 3000 came to."
        )
    if cut := num_cut(tokenizer, corpus, max_length):
        print(f"{cut} of {len(corpus)} texts have more than {max_length} tokens and lose their end (--max-length).")
    trainer = train(
        model,
        tokenizer,
        texts,
        [purpose.steering()],
        watched,
        recombine=few,
        max_length=max_length,
        output_dir=args.output,
        max_steps=purpose.steps,
        per_device_train_batch_size=16 if args.quick else 32 if few else 64,
        per_device_eval_batch_size=64,
        learning_rate=recipe.learning_rate,
        logging_steps=min(100, purpose.steps),
        seed=args.seed,
    )
    tokenizer.model_max_length = max_length  # for who loads the folder
    trainer.save_model()
    (args.output / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    return model, tokenizer, held_out


# ---------------------------------------------------------------------------------------------- showing
def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def show_reconstructions(model, tokenizer, texts: list[str], max_length: int) -> None:
    title("Held-out texts and their reconstructions")
    written = reconstruct(model, tokenizer, texts, max_length=max_length)
    for original, copy in zip(as_read(tokenizer, texts, max_length), written, strict=True):
        print(f"  {original}\n{'=' if copy == original else '!'} {copy}\n")


def show_samples(model, tokenizer, lengths: list[int], seed: int, max_length: int) -> None:
    title("Samples from the prior")
    generator = torch.Generator(model.device).manual_seed(seed)
    latents = model.sample_latents(len(lengths), lengths, generator=generator)
    written = generate_texts(model, tokenizer, max_length, encoder_outputs=latents)
    for length, text in zip(lengths, written, strict=True):
        print(f"  {length:2d} vectors  {text}")


def show_interpolation(model, tokenizer, first: str, second: str, max_length: int, steps: int = 7) -> None:
    title("Between two held-out texts")
    (walk,) = interpolations(model, tokenizer, [(first, second)], steps, max_length=max_length)
    for i, text in enumerate(walk):
        print(f"  {i / (steps - 1):.2f}  {text}")


def show_figures(model, tokenizer, held_out: list[str], max_length: int) -> None:
    """Exact reconstructions, and what latents cost, over held-out texts of at least 4 words (or all, if none is)."""
    texts = [text for text in held_out if len(text.split()) >= 4] or held_out
    written = reconstruct(model, tokenizer, texts, max_length=max_length)
    exact = sum(a == b for a, b in zip(written, as_read(tokenizer, texts, max_length), strict=True))
    statistics = []
    names = ("num_vectors", "prop_vectors", "effective_vectors", "kl_gaussian", "kl_dirichlet")
    with evaluating(model):
        for batch in length_batches(token_lengths(tokenizer, texts, max_length), batch_size=100):
            latents = encode_texts(model, tokenizer, [texts[i] for i in batch], max_length)
            tokens = latents.attention_mask.sum(-1) - 1.0  # without the prior's component
            measured = {**latents, **divergences(model.nvib, latents)}
            statistics.append(torch.stack([tokens, *(measured[name].float() for name in names)]))
    length, kept, share, effective, kl_gaussian, kl_dirichlet = torch.cat(statistics, dim=1).mean(1).tolist()
    title(f"Figures over {len(texts)} held-out texts (greedy decoding, means per text)")
    print(f"  exact reconstructions   {100 * exact / len(texts):.1f} %")
    print(f"  vectors kept            {kept:.1f} of {length:.1f} ({100 * share:.0f} %), effective {effective:.1f}")
    print(f"  KL of the vectors       {kl_gaussian:.0f} nats")
    print(f"  KL of the weights       {kl_dirichlet:.2f} nats")
    if left_out := len(held_out) - len(texts):
        print(
            f"\n{left_out} of {len(held_out)} held-out texts are not in these figures: they have fewer than 4 words."
        )
    if cut := num_cut(tokenizer, texts, max_length):
        print(f"\n{cut} of these texts are longer than {max_length} tokens: only their beginning counts.")


def show(model, tokenizer, held_out: list[str], args) -> None:
    some, max_length = held_out[:8], args.max_length
    show_reconstructions(model, tokenizer, some, max_length)
    lengths = token_lengths(tokenizer, held_out[8:16] or some, max_length)
    show_samples(model, tokenizer, lengths, args.seed, max_length)
    show_interpolation(model, tokenizer, *held_out[:2], max_length)
    show_figures(model, tokenizer, held_out, max_length)
    path = args.output / "pseudo_counts.png"
    draw_pseudo_counts(model, tokenizer, some, path, max_length)
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
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help=f"longer texts are cut (default: {MAX_LENGTH})"
    )
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
        args.max_length = args.max_length or saved_max_length(tokenizer)
        held_out = read_texts(args.text or args.model / "held_out.txt")
    else:
        model, tokenizer, held_out = train_on(read_texts(args.text), args)
    args.output.mkdir(parents=True, exist_ok=True)
    show(model.eval(), tokenizer, held_out, args)
    print(f"All this took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
