"""A picture of what weighs how much in the latents of texts."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nvib_hf import NvibForConditionalGeneration


def draw_pseudo_counts(
    model: NvibForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, texts: list[str], path: Path
) -> None:
    """The tokens of some texts, shaded by their share of the text's pseudo-counts; first the prior's component."""
    from matplotlib import cm, colormaps
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    sources = [tokenizer([text], truncation=True, return_tensors="pt").to(model.device) for text in texts]
    latents = [model.encode(**source, merge_share=1.0) for source in sources]  # merged, they are no tokens' any more
    shares = [x.log_alpha[0].softmax(-1).tolist() for x in latents]
    ids = [source.input_ids[0].tolist() for source in sources]
    rows = [["prior", *(tokenizer.decode([id]).strip() for id in row)] for row in ids]
    # One unit of the x axis is one character of a monospaced font.
    width = max(sum(len(token) + 2 for token in tokens) for tokens in rows)
    highest, colours = max(map(max, shares)), colormaps["Blues"]
    figure = Figure(figsize=(0.085 * width + 1.2, 0.34 * len(rows) + 0.6), layout="constrained")
    axes, font = figure.subplots(), {"ha": "center", "va": "center", "size": 8, "family": "monospace"}
    for y, (tokens, of_text) in enumerate(zip(rows, shares, strict=True)):
        x = 0
        for place, (token, share) in enumerate(zip(tokens, of_text, strict=False)):  # the model may cut a text
            axes.add_patch(Rectangle((x, y - 0.42), len(token) + 1.8, 0.84, color=colours(share / highest)))
            ink, style = "white" if share > 0.6 * highest else "black", "normal" if place else "italic"
            axes.text(x + len(token) / 2 + 0.9, y, token, color=ink, style=style, **font)
            x += len(token) + 2
    axes.set(xlim=(-0.5, width), ylim=(len(rows) - 0.4, -0.6))
    axes.axis("off")
    scale = cm.ScalarMappable(Normalize(0, highest), colours)
    figure.colorbar(scale, ax=axes, label="share of the pseudo-counts", fraction=0.03, pad=0.01)
    figure.savefig(path, dpi=150)
