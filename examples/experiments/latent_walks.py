"""Between texts and around them, with and without a learned prior: `refine=` of walks and draws.

    python examples/experiments/latent_walks.py          # ten minutes of a CPU core, after the main job
    python examples/experiments/latent_walks.py --quick  # everything runs, nothing is learnt

The model is that of `examples/text_vae.py --output DIR/vae`, which is trained if the folder is not there; DIR is
`--output`. Walks of seven steps join held-out texts, two by two as they stand in `held_out.txt`; draws are around the
first of them. The first 80 held-out texts are left out: on them the strength 3 was chosen. All is decoded greedily.
"""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae as example
import torch
from language_model import load_or_tiny, load_smollm2
from latent_prior import train_vae
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from transformers import AutoTokenizer

from nvib_hf import NvibForConditionalGeneration, decode_latents, encode_texts
from nvib_hf.evaluation.samples import distinct_n, fluency, interpolation_scores, self_bleu
from nvib_hf.evaluation.texts import as_read, word_edits

FULL = {"pairs": 100, "texts": 100, "real": 300, "refine": [0.0, 1.0, 2.0, 3.0, 4.0], "judge": "smollm2"}
QUICK = {"pairs": 2, "texts": 4, "real": 4, "refine": [0.0, 3.0], "judge": "tiny"}
STEPS = [i / 6 for i in range(7)]
JUDGED = [0.25, 0.5, 0.75]
DRAWS = [(1.0, 0.0), (1.0, 1.0), (2.0, 0.0), (2.0, 3.0), (2.0, 6.0), (3.0, 6.0)]  # temperature, refine
SHOWN = 3  # walks
CHOSEN_ON = 80  # texts
LEGEND = """
Perplexity is that of the language model that judges, to that of 300 held-out texts; largest step: share of a walk's
word edits in the largest of its six steps (17 % is even); self-BLEU: of the texts at weight 0.5.
"""


def one(settings: dict, folder: Path) -> dict:
    """Walks and draws of every kind, by the model in ``folder``."""
    model = NvibForConditionalGeneration.from_pretrained(folder / "vae").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "vae")
    held_out = as_read(tokenizer, example.read_texts(folder / "vae" / "held_out.txt"))
    held_out = held_out[CHOSEN_ON if settings["judge"] != "tiny" else 0 :]
    judge = load_or_tiny(settings["judge"], held_out, folder / "smollm2")
    real = fluency(*judge, held_out[: settings["real"]])

    def ratio(texts: list[str]) -> float:
        return fluency(*judge, [text or "." for text in texts]) / real

    ends = (held_out[: 2 * settings["pairs"] : 2], held_out[1 : 2 * settings["pairs"] : 2])
    first, second = (encode_texts(model, tokenizer, texts) for texts in ends)
    results: dict = {"real": {"self_bleu": self_bleu(ends[0])}, "walks": {}, "draws": {}}
    for refine in settings["refine"]:
        texts = {
            weight: decode_latents(model, tokenizer, model.interpolate_latents(first, second, weight, refine=refine))
            for weight in sorted({*STEPS, *JUDGED})
        }
        paths = list(zip(*(texts[weight] for weight in STEPS), strict=True))
        results["walks"][str(refine)] = {
            **interpolation_scores(paths),
            **{f"fluency_{weight}": ratio(texts[weight]) for weight in JUDGED},
            "self_bleu": self_bleu(texts[0.5]),
            "distinct_2": distinct_n(texts[0.5], 2),
            "an_end": sum(text in pair for *pair, text in zip(*ends, texts[0.5], strict=True)) / len(paths),
            "examples": [list(path) for path in paths[:SHOWN]],
        }
    given = held_out[: settings["texts"]]
    latents = encode_texts(model, tokenizer, given)
    for temperature, refine in DRAWS:
        chance = torch.Generator().manual_seed(settings["seed"])
        drawn = model.vary_latents(latents, temperature, generator=chance, refine=refine)
        texts = decode_latents(model, tokenizer, drawn)
        results["draws"][f"temperature {temperature}, refine {refine}"] = {
            "fluency": ratio(texts),
            "given": sum(map(str.__eq__, texts, given)) / len(given),
            "edits": sum(map(word_edits, texts, given)) / len(given),
            "self_bleu": self_bleu(texts),
            "examples": texts[:4],
        }
    return results


def report(group: list[dict]) -> str:
    results = group[0]["results"]
    of_walks = [
        {
            "refine": "none: transport" if float(refine) == 0 else refine,
            **{f"perplexity at {weight}": cell([found[f"fluency_{weight}"]]) for weight in JUDGED},
            "largest step, %": cell([100 * x for x in [found.get("largest_step")] if x is not None], 1),  # or no edits
            "words edited in a step": cell([found["word_edits"]]),
            "self-BLEU": cell([found["self_bleu"]], 1),
            "an end at 0.5, %": cell([100 * found["an_end"]], 1),
        }
        for refine, found in results["walks"].items()
    ]
    of_draws = [
        {
            "around a text": name,
            "perplexity": cell([found["fluency"]]),
            "the text itself, %": cell([100 * found["given"]], 0),
            "words changed": cell([found["edits"]], 1),
            "self-BLEU": cell([found["self_bleu"]], 1),
        }
        for name, found in results["draws"].items()
    ]
    parts = [
        LEGEND.strip(),
        f"The first texts of the pairs have self-BLEU {results['real']['self_bleu']:.1f}.",
        table_of_rows(of_walks),
        table_of_rows(of_draws),
    ]
    for refine, found in results["walks"].items():
        if refine in ("0.0", "3.0"):
            parts.append(f"The first walks, refine {refine}:")
            for path in found["examples"]:
                steps = pairwise(["", *path])
                parts.append("\n".join(f"- {text}{' (again)' * (text == before)}" for before, text in steps))
    return "\n\n".join(parts)


def main() -> None:
    args = parser(__doc__.splitlines()[0], "latent_walks", ["walks"]).parse_args()
    args.seeds = args.seeds[:1]
    if args.jobs:
        train_vae(args.output / "vae", args.quick)
        if not args.quick:
            load_smollm2(args.output / "smollm2")
    runs = {f"walks-seed{seed}": {"seed": seed, **(QUICK if args.quick else FULL)} for seed in args.seeds}
    records = run_all(partial(one, folder=args.output), runs, args.output, args.jobs)
    write_report(args, "Between texts and around them", report(over_seeds(records)[0]))


if __name__ == "__main__":
    main()
