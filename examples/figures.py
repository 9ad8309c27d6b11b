"""Figures that several examples draw."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.evaluation.texts import MAX_LENGTH, encode_texts, evaluating


def pyplot():
    """Matplotlib's, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_pseudo_counts(
    model: NvibForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    path: Path,
    max_length: int = MAX_LENGTH,
) -> None:
    """The tokens of some texts, shaded by their share of the text's pseudo-counts; first the prior's component."""
    plt, rows = pyplot(), []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length).input_ids
        tokens = ["prior", *(tokenizer.decode([id]).strip() for id in ids)]
        with evaluating(model):
            shares = encode_texts(model, tokenizer, [text], max_length).log_alpha[0].softmax(-1)
        rows.append((tokens, shares.tolist()))
    # One unit of the x axis is one character of a monospaced font.
    width = max(sum(len(token) + 2 for token in tokens) for tokens, _ in rows)
    highest = max(max(shares) for _, shares in rows)
    figure, axes = plt.subplots(figsize=(0.085 * width + 1.2, 0.34 * len(rows) + 0.6), layout="constrained")
    colours = plt.get_cmap("Blues")
    for y, (tokens, shares) in enumerate(rows):
        x = 0
        for token, share in zip(tokens, shares, strict=True):
            box = plt.Rectangle((x, y - 0.42), len(token) + 1.8, 0.84, color=colours(share / highest))
            axes.add_patch(box)
            ink = "white" if share > 0.6 * highest else "black"
            style = "italic" if token == tokens[0] else "normal"
            x_middle = x + len(token) / 2 + 0.9
            axes.text(x_middle, y, token, ha="center", va="center", color=ink, style=style, size=8, family="monospace")
            x += len(token) + 2
    axes.set(xlim=(-0.5, width), ylim=(len(rows) - 0.4, -0.6))
    axes.axis("off")
    scale = plt.cm.ScalarMappable(plt.Normalize(0, highest), colours)
    figure.colorbar(scale, ax=axes, label="share of the pseudo-counts", fraction=0.03, pad=0.01)
    figure.savefig(path, dpi=150)
    plt.close(figure)
