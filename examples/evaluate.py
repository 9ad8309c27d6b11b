"""Measure NVIB models on held-out texts: what they reconstruct, what their latents cost and keep, what they write.

    python examples/evaluate.py text_vae --text text_vae/held_out.txt
    python examples/evaluate.py weak strong --text held_out.txt --training-text train.txt --language-model smollm2

Prints a table for each model, writes `evaluation.json`, `evaluation.md` and figures, and puts the results into each
model's card. Several models, trained with different weights on the KLs, are the points of one rate-distortion curve.
"""

import argparse
import json
import time
from pathlib import Path

import language_model
import torch
from figures import pyplot
from pseudo_counts import draw_pseudo_counts
from text_vae import read_texts, title
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from nvib_hf import add_to_model_card, evaluate, evaluation_section
from nvib_hf.evaluation.report import result_tables


# ---------------------------------------------------------------------------------------------- printing
def print_results(name: str, results: dict) -> None:
    settings = results["settings"]
    title(
        f"{name}, {settings['texts']} held-out texts, {settings['texts_cut']} cut to {settings['max_length']} tokens"
    )
    for table in result_tables(results):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for label, *values in table:
            cells = (f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
            print("  ".join([f"  {label:{widths[0]}}", *cells]).rstrip())
        print()
    for method, path in results.get("interpolation", {}).items():
        title(f"Between two held-out texts, by {method}")
        for i, text in enumerate(path["example"]):
            print(f"  {i / (len(path['example']) - 1):.2f}  {text}")


# ----------------------------------------------------------------------------------------------- figures
def draw_rate_distortion(results: dict[str, dict], path: Path) -> None:
    """A point for each model: what its latents cost, what they lose."""
    points = []
    for name, of_model in results.items():
        numbers = of_model["rate_distortion"]
        if "rate" in numbers:
            points.append((numbers["rate"], numbers["cross_entropy"], name))
    if not points:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    rates, distortions, names = zip(*sorted(points), strict=True)
    axes.plot(rates, distortions, "o-")
    for rate, distortion, name in zip(rates, distortions, names, strict=True):
        axes.annotate(name, (rate, distortion), xytext=(5, 5), textcoords="offset points", size=8)
    axes.set(xlabel="rate: nats per text", ylabel="distortion: cross-entropy, nats per token")
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_kept_by_length(results: dict[str, dict], path: Path) -> None:
    """A line for each model: the share of the vectors kept by source length."""
    kept = {name: groups for name, of_model in results.items() if (groups := of_model["kept"]["by_length"])}
    if not kept:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name, groups in kept.items():
        lengths = [sum(map(int, group["group"].split("-"))) / 2 for group in groups]
        axes.plot(lengths, [group["kept"] for group in groups], "o-", label=name)
    axes.set(xlabel="tokens of the text", ylabel="share of the vectors kept", ylim=(0, 1.05))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------- main
def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="trained folders; several make a curve")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="held-out texts, one per line")
    parser.add_argument("--targets", type=Path, metavar="FILE", help="what to write of each text (default: itself)")
    parser.add_argument("--training-text", type=Path, metavar="FILE", help="to see what samples copy")
    parser.add_argument("--language-model", metavar="NAME", help="judge of fluency: smollm2, a folder or a hub name")
    parser.add_argument("--language-model-cache", type=Path, metavar="DIR", help="keeps smollm2 as it is when read")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR", help="default: evaluation")
    parser.add_argument("--samples", type=int, default=200, help="latents drawn from the prior (default: 200)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="longer texts are cut (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="16 texts and 8 samples: everything runs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    texts, targets = read_texts(args.text), None
    if args.targets is not None:  # line by line, so none is left out
        texts, targets = (path.read_text(encoding="utf-8").splitlines() for path in (args.text, args.targets))
    settings = {"num_samples": args.samples, "seed": args.seed, "max_length": args.max_length}
    if args.quick:
        texts, targets = texts[:16], targets and targets[:16]
        settings |= {"num_samples": 8, "num_pairs": 4, "importance_samples": 2}
    if args.training_text is not None:
        settings["training_texts"] = read_texts(args.training_text)
    if args.language_model is not None:
        judge, judge_tokenizer = language_model.load(args.language_model, args.language_model_cache)
        settings.update(language_model=judge.to(args.device), lm_tokenizer=judge_tokenizer)

    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    for folder in args.models:
        name = Path(folder).name if Path(folder).name not in results else str(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).to(args.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        results[name] = evaluate(model, tokenizer, texts, targets, **settings)
        print_results(name, results[name])
        if (Path(folder) / "README.md").exists():
            add_to_model_card(folder, results[name])
        draw_pseudo_counts(model, tokenizer, texts[:8], args.output / f"pseudo_counts_{len(results)}.png")

    (args.output / "evaluation.json").write_text(json.dumps(results, indent=2, allow_nan=False), encoding="utf-8")
    sections = [f"# {name}\n\n{evaluation_section(of_model)}\n" for name, of_model in results.items()]
    (args.output / "evaluation.md").write_text("\n".join(sections), encoding="utf-8")
    draw_rate_distortion(results, args.output / "rate_distortion.png")
    draw_kept_by_length(results, args.output / "kept_by_length.png")
    print(f"\nResults and figures are in {args.output}. This took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
