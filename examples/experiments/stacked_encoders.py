"""NVIB in the last three layers of an encoder of characters: which ones each layer keeps, and what that is good for.

    python examples/experiments/stacked_encoders.py          # two runs at a time, within an hour on two CPU cores
    python examples/experiments/stacked_encoders.py --quick  # everything runs, nothing is learnt

The setting of Behjati, Fehr & Henderson, *Learning to Abstract with NVIB* (Findings of EMNLP 2023), at a small size:
pieces of clauses of the Bible in Basic English, character by character, an encoder of four layers, in the last three
of which what one layer drops is gone from those above it, and pseudo-counts accumulate. Beside it an autoencoder of
the same size without a bottleneck.
"""

import random
import statistics
import string
import sys
import textwrap
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae as example
import torch
from baselines import AutoencoderBottleneck, with_bottleneck
from figures import pyplot
from regulariser import make_model
from runner import cell, over_seeds, parser, run_all, table_of_rows, write_report
from training import clauses, train
from transformers import set_seed

from nvib_hf import ConstraintCallback, NvibForConditionalGeneration, reconstruct
from nvib_hf.evaluation.rate_distortion import rate_distortion
from nvib_hf.evaluation.texts import as_read, encoder_inputs, evaluating, labels_of, reconstruction_scores

FULL = {"texts": None, "longest": 24, "held_out": 500, "batch_size": 32}
QUICK = {"texts": 400, "longest": 24, "held_out": 32, "batch_size": 8}
CHARACTERS = 260  # bytes and special tokens: a vocabulary without merges
ENCODER_LAYERS, STACK = 4, [1, 2, 3]
TYPING_ERRORS = (0.05, 0.1, 0.2)
SHORTEST = 12  # characters of a piece
SHOWN = 6  # texts that the figure draws

# Pseudo-counts start near 1: the norm's part of log(alpha), s / 2 * ||x||^2, is about 11 after a layer norm.
NVIB = {
    **example.DROPPING,
    "attentions": {"cross": "all", "encoder": STACK},
    "accumulate_alpha": True,
    "tau_alpha": {"encoder": -10.0, "cross": -10.0},
}
# What is accepted, in nats per character, and the steps.
METHODS = {"plain": (None, 4000), "NVIB 0.25 accepted": (0.25, 7000), "NVIB 0.1 accepted": (0.1, 5000)}


# ------------------------------------------------------------------------------------------------ one run
def pieces(texts: list[str], longest: int) -> list[str]:
    """The texts, cut between words where they are longer than so many characters; each piece once."""
    found = (piece for text in texts for piece in textwrap.wrap(text, longest) if len(piece) >= SHORTEST)
    return list(dict.fromkeys(found))


def build(method: str, texts: list[str]):
    """Model, tokenizer and callbacks.

    A Marian, whose positions are sinusoids: with positions to learn, copying takes several times the steps.
    """
    tokenizer = example.train_tokenizer(texts, CHARACTERS)
    positions = example.MAX_LENGTH + 2
    base = make_model(tokenizer, encoder_layers=ENCODER_LAYERS, max_position_embeddings=positions, dropout=0.0)
    accepted, _ = METHODS[method]
    if accepted is None:
        return with_bottleneck(base, AutoencoderBottleneck, tau_sigma=0.0), tokenizer, []
    model = NvibForConditionalGeneration.from_base_pretrained(base, **NVIB)
    return model, tokenizer, [ConstraintCallback(accepted, rate=0.01)]


def with_typing_errors(text: str, share: float, draw: random.Random) -> str:
    """One letter in so many is another, missing, doubled, or has changed places with the next."""
    letters = list(text)
    for i in range(len(letters)):
        if letters[i].isalpha() and draw.random() < share:
            kind = draw.randrange(4)
            if kind == 0:
                letters[i] = draw.choice(string.ascii_lowercase)
            elif kind == 1:
                letters[i] = ""
            elif kind == 2:
                letters[i] *= 2
            elif i + 1 < len(letters):
                letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def kept_by_layer(model: NvibForConditionalGeneration, tokenizer, texts: list[str]) -> dict[str, list[list[bool]]]:
    """Which tokens of each text are left, by layer from below to above, ``"cross"`` being what the decoder reads."""
    kept: dict[str, list[list[bool]]] = {}
    for text in texts:
        with evaluating(model):
            inputs = encoder_inputs(model, tokenizer, [text])
            seen: dict[str, tuple] = {}

            def see(name: str, into: dict = seen):
                return lambda layer, args, output: into.__setitem__(name, output)

            hooks = [layer.register_forward_hook(see(name)) for name, layer in model.nvib_layers().items()]
            model.encode(**inputs)
            for hook in hooks:
                hook.remove()
        left = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
        for name in (*(f"encoder.{i}" for i in STACK), "cross"):
            posterior = seen[name].posterior if name == "cross" else seen[name][1]
            left = left & posterior.keep[0, 1:]
            kept.setdefault(name, []).append(left.tolist())
    return kept


def one(settings: dict) -> dict:
    """Train with one seed; what is kept, reconstructed, and put right."""
    texts, held_out = clauses(settings["texts"], settings["held_out"])
    texts, held_out = pieces(texts, settings["longest"]), pieces(held_out, settings["longest"])
    held_out = [text for text in held_out if text not in set(texts)][: settings["held_out"]]
    set_seed(settings["seed"])
    model, tokenizer, callbacks = build(settings["method"], texts)
    train(model, tokenizer, callbacks, texts, settings)
    references = as_read(tokenizer, held_out)
    results = reconstruction_scores(reconstruct(model, tokenizer, held_out), references)
    if METHODS[settings["method"]][0] is not None:
        costs = rate_distortion(model, tokenizer, held_out, seed=settings["seed"])
        results |= {name: costs[name] for name in ("rate", "prop_vectors")}
        kept = kept_by_layer(model, tokenizer, held_out)
        results["kept"] = {name: statistics.fmean(sum(row) / len(row) for row in rows) for name, rows in kept.items()}
        results["shown"] = [
            {"text": text, "kept": {name: [int(x) for x in rows[i]] for name, rows in kept.items()}}
            for i, text in enumerate(references[:SHOWN])
        ]
        ends = [[c == " " for c in (*text[1:], " ")] for text in references]  # the last letter of each word
        results["kept_at_ends_of_words"] = share_of(kept["cross"], ends)
        results["kept_elsewhere"] = share_of(kept["cross"], [[not x for x in row] for row in ends])
        subwords = example.train_tokenizer(texts)
        of_characters = [len(row) for row in kept["cross"]]
        results["words"] = sum(len(text.split()) for text in references) / sum(of_characters)
        results["subwords"] = sum(len(ids) for ids in subwords(references).input_ids) / sum(of_characters)
    draw = random.Random(settings["seed"])
    for share in TYPING_ERRORS:
        wrong = [with_typing_errors(text, share, draw) for text in references]
        scores = reconstruction_scores(reconstruct(model, tokenizer, wrong), wrong)
        results[f"copied_{share}"] = scores["exact_match"]
        results[f"likelihood_{share}"] = cross_entropy_of(model, tokenizer, wrong, references)
    return results


def share_of(kept: list[list[bool]], chosen: list[list[bool]]) -> float:
    """The share kept of the chosen characters."""
    pairs = [(a, b) for row, some in zip(kept, chosen, strict=True) for a, b in zip(row, some, strict=False)]
    return sum(a for a, b in pairs if b) / max(sum(b for _, b in pairs), 1)


def cross_entropy_of(model, tokenizer, sources: list[str], targets: list[str]) -> float:
    """Nats per character of the targets, teacher-forced, read from other sources."""
    total = count = 0
    with evaluating(model):
        for i in range(0, len(sources), 50):
            inputs = encoder_inputs(model, tokenizer, sources[i : i + 50])
            labels = labels_of(model, tokenizer, targets[i : i + 50], 64)
            tokens = int((labels >= 0).sum())
            total += model(**inputs, labels=labels).cross_entropy.item() * tokens
            count += tokens
    return total / count


# ------------------------------------------------------------------------------------------------- report
def draw(shown: list[dict], path: Path) -> None:
    """The characters of some texts, a line for each layer; what is kept is black."""
    plt = pyplot()
    names = list(shown[0]["kept"])
    width = max(len(example_["text"]) for example_ in shown)
    height = len(shown) * (len(names) + 1)
    figure, axis = plt.subplots(figsize=(0.13 * width + 1.6, 0.2 * height), layout="constrained")
    y = 0
    for record in shown:
        for name in names:
            axis.text(-1, y, name, ha="right", va="center", size=7)
            for x, (letter, kept) in enumerate(zip(record["text"], record["kept"][name], strict=False)):
                colour = "black" if kept else "0.85"
                axis.text(
                    x, y, letter.replace(" ", "␣"), ha="center", va="center", color=colour, size=8, family="monospace"
                )
            y += 1
        y += 1
    axis.set(xlim=(-1, width), ylim=(y, -1))
    axis.axis("off")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(args, groups: list[list[dict]]) -> str:
    def of(group: list[dict], name: str, factor: float = 1.0, digits: int = 1) -> str:
        values = (record["results"].get(name) for record in group)
        return cell((None if value is None else factor * value for value in values), digits)

    rows = [
        {
            "model": group[0]["settings"]["method"],
            "steps": group[0]["settings"]["steps"],
            "exact, %": of(group, "exact_match", 100),
            "BLEU": of(group, "bleu"),
            "nats a text": of(group, "rate", 1, 0),
            **{
                f"cross-entropy of the text from one with {share:.0%} wrong letters": of(
                    group, f"likelihood_{share}", 1, 2
                )
                for share in TYPING_ERRORS
            },
            **{f"wrong letters copied ({share:.0%}), %": of(group, f"copied_{share}", 100) for share in TYPING_ERRORS},
        }
        for group in groups
    ]
    parts = [table_of_rows(rows)]
    args.report.parent.mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(group for group in groups if "kept" in group[0]["results"]):
        names = group[0]["results"]["kept"]
        kept = {name: cell((100 * record["results"]["kept"][name] for record in group), 1) for name in names}
        more = {
            "words": of(group, "words", 100),
            "sub-words of 2048": of(group, "subwords", 100),
            "kept of the words' last letters": of(group, "kept_at_ends_of_words", 100),
            "of all other characters": of(group, "kept_elsewhere", 100),
        }
        figure = args.report.with_name(f"{args.report.stem}_{number}.png")
        draw(group[0]["results"]["shown"], figure)
        parts += [
            f"## {group[0]['settings']['method']}",
            "Vectors left after each layer, % of the characters (the end of the text is one):",
            table_of_rows([{**kept, **more}]),
            f"![What each layer keeps of some texts]({figure.name})",
        ]
    size = groups[0][0]["settings"]
    minutes = sum(record["seconds"] for group in groups for record in group) / 60
    return (
        f"{size['batch_size']} pieces of clauses a step, of at most {size['longest']} characters; "
        f"{minutes:.0f} minutes of one core in all.\n\n" + "\n\n".join(parts)
    )


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "stacked_encoders", METHODS)
    arguments.set_defaults(seeds=[0])
    args = arguments.parse_args()
    size = QUICK if args.quick else FULL
    runs = {
        f"{method.replace(' ', '_')}-seed{seed}": {
            "method": method,
            "steps": 4 if args.quick else METHODS[method][1],
            "seed": seed,
            **size,
        }
        for method in args.only
        for seed in args.seeds
    }
    groups = over_seeds(run_all(one, runs, args.output, args.jobs))
    write_report(args, "An encoder of characters that drops them layer by layer", report(args, groups))


if __name__ == "__main__":
    main()
