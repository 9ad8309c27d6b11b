"""Train a text VAE with a nonparametric latent space (NVIB), then look at what it learnt.

    python examples/text_vae.py                        # clauses of the Bible in Basic English, minutes on a CPU
    python examples/text_vae.py --purpose samples      # more steps, less reconstruction, better samples
    python examples/text_vae.py --purpose few-vectors  # more steps, only a part of the vectors: others are dropped
    python examples/text_vae.py --purpose merged       # more steps, only a part of the vectors: they are merged
    python examples/text_vae.py --characters           # a vector for each character in place of each sub-word
    python examples/text_vae.py --text my_lines.txt    # any text file, one text per line; few are recombined
    python examples/text_vae.py --model text_vae       # show a trained folder again
    python examples/minilm.py                          # the same with a pretrained encoder and a fresh decoder

`examples/minimal.py` is the same way in 60 lines. The latent of a text is a set of weighted vectors, as many as the
text has tokens. Nothing else reaches the decoder. Training reconstructs each text from a sample of its latent. Two KL
terms hold the vectors near a Gaussian and their pseudo-counts near a Dirichlet process: as near as the cross-entropy
that you accept allows. A prior is then learnt of the latents. The script prints samples from it, held-out texts beside
their reconstructions, a walk between two texts and the size of the latents, and it draws the tokens' pseudo-counts.
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
from few_texts import Recombined
from pseudo_counts import draw_pseudo_counts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from nvib_hf import (
    ConstraintCallback,
    NvibForConditionalGeneration,
    NvibTrainer,
    decode_latents,
    encode_texts,
    evaluate,
    reconstruct,
)

MAX_LENGTH = 64  # tokens; longer texts are cut, unless told otherwise: the tokenizers below say so
FEW_TEXTS = 5000  # fewer than these are recombined in training
NUM_WATCHED = 256  # texts that the constraint looks at, at most: they are not trained on
TEMPERATURE = 0.7  # of the samples from a learned prior
MERGE_COST = 2.0  # between those of vectors that training has made superfluous, below 1, and of others, above 3


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


def tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Dataset:
    """Source and target token ids: a text is its own target."""
    sources, start = tokenizer(texts, truncation=True).input_ids, model.config.decoder_start_token_id
    targets = [ids[1:] if ids[0] == start else ids for ids in sources]  # the decoder starts with that token anyway
    return Dataset.from_dict({"input_ids": sources, "labels": targets, "length": [len(ids) for ids in sources]})


def num_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> int:
    """How many texts have more tokens than the tokenizer keeps, and lose their end."""
    return sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(texts, verbose=False).input_ids)


# ---------------------------------------------------------------------------------------------- models
def train_tokenizer(texts: list[str], vocab_size: int = 2048, max_length: int = MAX_LENGTH) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training texts, which reproduces any text exactly. The smallest has a token per byte."""
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
    more = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": max_length}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more, **special)


def bart(
    texts: list[str], max_length: int = MAX_LENGTH, characters: bool = False, **nvib
) -> tuple[NvibForConditionalGeneration, PreTrainedTokenizerBase]:
    """A small BART with fresh weights and a vocabulary learnt from the texts."""
    vocab_size = 0 if characters else min(2048, 512 + 4 * len(texts))  # few texts teach few tokens
    tokenizer = train_tokenizer(texts, vocab_size, max_length)
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


@dataclass
class Purpose:
    """What is accepted and what is asked for, and the steps in which a small BART reaches it.

    Args:
        cross_entropy: of training, in nats per token, which the KLs are raised to.
        rate: by how much the multiplier of the KLs may rise in a step, in log.
        keep: share of the vectors to keep; ``None`` keeps all.
        merge: the least share to which training merges the vectors of a text; 1 merges none.
        prior_steps: in which a prior of the latents is learnt if all vectors are kept; 0 learns none.
    """

    cross_entropy: float
    steps: int
    rate: float = 0.005
    keep: float | None = None
    merge: float = 1.0
    prior_steps: int = 0

    @property
    def settings(self) -> dict[str, float]:
        """Of the model."""
        return {**(CONSTRAINED if self.keep is None else DROPPING), "training_merge_share": self.merge}

    def steering(self) -> ConstraintCallback:
        return ConstraintCallback(self.cross_entropy, target_prop_vectors=self.keep, rate=self.rate)


PURPOSES = {
    "reconstruction": Purpose(cross_entropy=0.8, steps=2600, rate=0.02, prior_steps=1000),
    "samples": Purpose(cross_entropy=1.8, steps=5000, rate=0.02),
    "few-vectors": Purpose(cross_entropy=0.3, steps=5000, keep=0.5),
    "merged": Purpose(cross_entropy=0.4, steps=5000, rate=0.02, merge=0.4, prior_steps=1000),
}


# -------------------------------------------------------------------------------------------- training
def purpose_of(args) -> Purpose:
    """The chosen purpose, with what the command line says otherwise."""
    given = {name: getattr(args, name) for name in ("cross_entropy", "keep", "merge", "prior_steps")}
    given["steps"] = args.max_steps
    return replace(PURPOSES[args.purpose], **{name: value for name, value in given.items() if value is not None})


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples,
    quiet: bool = False,
    trainer: dict | None = None,
    **arguments,
) -> NvibTrainer:
    """A Trainer that saves and reports nothing by itself; of models with NVIB and of plain ones.

    Args:
        examples: with ``input_ids`` and ``labels``.
        quiet: print nothing.
        trainer: further arguments of the Trainer.
        arguments: further ones of ``Seq2SeqTrainingArguments``, or other values of those below.
    """
    defaults = {
        "per_device_train_batch_size": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": quiet,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    made = NvibTrainer(
        model,
        Seq2SeqTrainingArguments(**{**defaults, **arguments}),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        **(trainer or {}),
    )
    if quiet:
        made.remove_callback(PrinterCallback)
    return made


def train(
    model,
    tokenizer,
    texts: list[str],
    callbacks: list[TrainerCallback],
    watched: list[str] | None = None,
    recombine: bool = False,
    **arguments,
) -> NvibTrainer:
    """Train on the texts, in batches of similar length; the learning rate falls linearly to nothing.

    Args:
        watched: texts that are not trained on, for the constraint to look at.
        recombine: see :class:`Recombined`.
        arguments: those of :func:`make_trainer`.
    """
    encode, seed = partial(tokens_of, model, tokenizer), arguments.get("seed", 0)
    trainer = make_trainer(
        model,
        tokenizer,
        Recombined(texts, encode, seed) if recombine else encode(texts),
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


def learn_prior(model, tokenizer, texts: list[str], watched: list[str], steps: int, seed: int, **more) -> None:
    """Give the model a prior of the texts' latents, with as many codes as they teach; see `fit_latent_prior`."""
    latents, held_out = (encode_texts(model, tokenizer, some) for some in (texts, watched))
    vectors = int((latents.log_pi > -torch.inf).sum()) - len(latents)  # without the prior's own
    # Texts to come may be longer than all of these.
    sizes = {"num_codes": min(2048, max(vectors // 8, 1)), "d_model": 128, "max_length": tokenizer.model_max_length}
    model.fit_latent_prior(latents, held_out, sizes=sizes, max_steps=steps, seed=seed, **more)


# ---------------------------------------------------------------------------------------------- showing
def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def show_reconstructions(model, tokenizer, texts: list[str]) -> None:
    title("Held-out texts and their reconstructions")
    read = tokenizer.batch_decode(tokenizer(texts, truncation=True).input_ids, skip_special_tokens=True)
    for original, copy in zip(read, reconstruct(model, tokenizer, texts), strict=True):
        print(f"  {original}\n{'=' if copy == original else '!'} {copy}\n")


def show_samples(model, tokenizer, like: list[str], seed: int) -> None:
    """As many samples as there are texts: of their lengths, unless a learned prior draws lengths too."""
    if model.latent_prior is None:
        title("Samples from the prior")
        how = {"num_vectors": [len(ids) for ids in tokenizer(like, truncation=True).input_ids]}
    else:
        title(f"Samples from the learned prior, temperature {TEMPERATURE}")
        how = {"temperature": TEMPERATURE}
    latents = model.sample_latents(len(like), generator=torch.Generator(model.device).manual_seed(seed), **how)
    lengths = latents.attention_mask.sum(-1).tolist()
    for length, text in zip(lengths, decode_latents(model, tokenizer, latents), strict=True):
        print(f"  {length:2d} vectors  {text}")


def show_interpolation(model, tokenizer, first: str, second: str, steps: int = 7) -> None:
    title("Between two held-out texts")
    latents, weights = encode_texts(model, tokenizer, [first, second]), torch.linspace(0, 1, steps)
    walk = model.interpolate_latents(latents[0], latents[1], weights)
    for weight, text in zip(weights.tolist(), decode_latents(model, tokenizer, walk), strict=True):
        print(f"  {weight:.2f}  {text}")


def show_figures(model, tokenizer, held_out: list[str]) -> None:
    """Exact reconstructions, and what latents cost, over held-out texts of at least 4 words (or all, if none is)."""
    texts = [text for text in held_out if len(text.split()) >= 4] or held_out
    fewer = {"num_samples": 0, "num_pairs": 0, "importance_samples": 0}  # than `evaluate` measures otherwise
    results = evaluate(model, tokenizer, texts, max_length=tokenizer.model_max_length, **fewer)
    costs, exact = results["rate_distortion"], results["reconstruction"]["exact_match"]
    length = sum(len(ids) for ids in tokenizer(texts, truncation=True).input_ids) / len(texts)
    kept = f"{costs['num_vectors']:.1f} of {length:.1f} ({100 * costs['prop_vectors']:.0f} %)"
    per_token = {name: costs[f"kl_{name}_per_token"] for name in ("gaussian", "dirichlet")}
    per_text = {name: costs["rate"] * kl / sum(per_token.values()) for name, kl in per_token.items()}
    title(f"Figures over {len(texts)} held-out texts (greedy decoding, means per text)")
    print(f"  exact reconstructions   {100 * exact:.1f} %")
    print(f"  vectors kept            {kept}, effective {costs['effective_vectors']:.1f}")
    print(f"  KL of the vectors       {per_text['gaussian']:.0f} nats")
    print(f"  KL of the weights       {per_text['dirichlet']:.2f} nats")
    if "rate_learned" in costs:
        print(f"  both, learned prior     {costs['rate_learned']:.0f} nats")
    if left_out := len(held_out) - len(texts):
        print(f"\n{left_out} of {len(held_out)} held-out texts are left out here: they have fewer than 4 words.")
    if cut := num_cut(tokenizer, texts):
        print(f"\n{cut} of these texts have more than {tokenizer.model_max_length} tokens: their beginning counts.")


def show(model, tokenizer, held_out: list[str], args) -> None:
    some = held_out[:8]
    show_samples(model, tokenizer, held_out[8:16] or some, args.seed)
    show_reconstructions(model, tokenizer, some)
    show_interpolation(model, tokenizer, *held_out[:2])
    show_figures(model, tokenizer, held_out)
    path = args.output / "pseudo_counts.png"
    draw_pseudo_counts(model, tokenizer, some, path)
    print(f"\nThe model is in {args.model or args.output}, the tokens' pseudo-counts are drawn in {path}.")


# ------------------------------------------------------------------------------------------------ main
def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text file, one text per line, for the corpus")
    parser.add_argument("--model", type=Path, metavar="DIR", help="show this trained folder, train nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: text_vae, or the shown folder")
    parser.add_argument("--purpose", choices=PURPOSES, default="reconstruction", help="what the latents are for")
    parser.add_argument("--cross-entropy", type=float, metavar="NATS", help="the cross-entropy per token to accept")
    parser.add_argument("--keep", type=float, metavar="SHARE", help="share of the vectors to keep (default: all)")
    parser.add_argument("--merge", type=float, metavar="SHARE", help="least share of the vectors that training draws")
    parser.add_argument(
        "--max-steps", type=int, help="training steps (these four, and --prior-steps, default to the purpose's)"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help=f"longer texts are cut (default: {MAX_LENGTH})"
    )
    parser.add_argument("--characters", action="store_true", help="texts of characters, not of sub-words; longer")
    parser.add_argument("--prior-steps", type=int, help="steps in which a prior of the latents is learnt, 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="10 small steps: everything runs, nothing is learnt")
    args = parser.parse_args()
    args.output = args.output or args.model or Path("text_vae")
    if args.quick:
        args.max_steps = args.max_steps or 10
        if args.prior_steps is None and PURPOSES[args.purpose].prior_steps:
            args.prior_steps = 2
    return args


def train_on(corpus: list[str], build: Callable, learning_rate: float, args) -> tuple:
    """A trained model and its tokenizer, both saved, and the texts held out for the end."""
    texts, held_out = split(corpus, num_held_out=40 if args.quick else 1000, seed=args.seed)
    num_watched = min(len(held_out), NUM_WATCHED)
    texts, watched = texts[:-num_watched], texts[-num_watched:]
    few, purpose = len(texts) < FEW_TEXTS, purpose_of(args)
    if args.characters and build is not bart:
        raise SystemExit("--characters is for a model from nothing: a pretrained encoder reads the tokens it knows.")
    more = {"characters": True} if args.characters else {}
    model, tokenizer = build(texts, args.max_length or MAX_LENGTH * (4 if more else 1), **more, **purpose.settings)
    print(
        f"{len(texts)} texts to train on, {len(watched)} for the constraint to watch, {len(held_out)} held out, "
        f"{model.num_parameters() / 1e6:.1f}M parameters"
    )
    if few:
        print(
            f"Fewer than {FEW_TEXTS} texts are easily learnt by heart: training recombines them. More lines are "
            "better: examples/README.md says what 100 to 3000 came to."
        )
    if cut := num_cut(tokenizer, corpus):
        print(
            f"{cut} of {len(corpus)} texts have more than {tokenizer.model_max_length} tokens and lose their end: "
            "--max-length takes more."
        )
    trainer = train(
        model,
        tokenizer,
        texts,
        [purpose.steering()],
        watched,
        recombine=few,
        output_dir=args.output,
        max_steps=purpose.steps,
        per_device_train_batch_size=16 if args.quick else 32 if few else 64,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        logging_steps=min(100, purpose.steps),
        seed=args.seed,
    )
    if purpose.merge < 1:
        model.config.merge_cost = MERGE_COST
    if purpose.prior_steps and purpose.keep is None:
        learn_prior(model, tokenizer, texts[:200] if args.quick else texts, watched, purpose.prior_steps, args.seed)
    trainer.save_model()
    (args.output / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    return model, tokenizer, held_out


def main(build: Callable = bart, learning_rate: float = 1e-3) -> None:
    """Train and show, or show alone; ``build`` makes a model and its tokenizer from the training texts."""
    args = parse_arguments()
    set_seed(args.seed)
    start = time.perf_counter()
    if args.model is not None:
        model = NvibForConditionalGeneration.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.model_max_length = args.max_length or tokenizer.model_max_length
        held_out = read_texts(args.text or args.model / "held_out.txt")
    else:
        model, tokenizer, held_out = train_on(read_texts(args.text), build, learning_rate, args)
    args.output.mkdir(parents=True, exist_ok=True)
    show(model.eval(), tokenizer, held_out, args)
    print(f"All this took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
