"""The figure of `whisper.py`: what of a sound is merged into one vector, and word error by the number of vectors."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator
from speech import RATE, Utterance

from nvib_hf.layers.merging import merge

if TYPE_CHECKING:
    from whisper import Recogniser

matplotlib.use("Agg")
SHARE = 0.05
LINES = {
    "merged to a share": "all 1500 merged to",
    "merged by cost": "all 1500 merged where",
    "sound only, silence stored": "encoder over the sound|the same, .*the sound",
    "sound only": "encoder cut to the sound",
    "trained, merged": ".+, all 1500 merged to",
    "trained, dropped": ".+, what it keeps",
}


@torch.no_grad()
def groups(recogniser: "Recogniser", utterance: Utterance) -> np.ndarray:
    """For each vector of a sound, which vector it is merged into."""
    model = recogniser.models["whole"]
    read = model.encode(**recogniser.inputs([utterance])).attended(model.scale, "means")
    return merge(read.vectors[:, 1:], read.bias[:, 1:], share=SHARE).assignment[0].numpy()  # without the prior's


def draw(recogniser: "Recogniser", utterance: Utterance, errors: dict[str, dict[str, float]], path: Path) -> None:
    """The spectrogram of an utterance over its merged vectors; word error by the share of vectors, by row."""
    features = recogniser.inputs([utterance])["input_features"][0].numpy()
    figure, (sound, curve) = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=(2, 1), layout="constrained")
    seconds = len(utterance.sound) / RATE
    sound.imshow(features, origin="lower", aspect="auto", cmap="magma", extent=(0, 30, 0, len(features)))
    merged = groups(recogniser, utterance)
    colours = merged * 7 % 20  # of vectors beside each other, unlike ones
    sound.imshow(colours[None], aspect="auto", cmap="tab20", interpolation="nearest", extent=(0, 30, -7, -1))
    sound.set(xlim=(0, min(30, 2 * seconds)), ylim=(-7, len(features)), xlabel="seconds (of 30)", ylabel="mel channel")
    sound.set_title(f"1500 vectors merged into {merged.max() + 1} (below: a colour each)")
    for label, pattern in LINES.items():
        points = sorted(
            (100 * of["vectors"] / 1500, of["error"]) for row, of in errors.items() if re.match(pattern, row)
        )
        if points:
            curve.plot(*zip(*points, strict=True), "o-", label=label)
    curve.axhline(errors["plain"]["error"], color="gray", linestyle="--", label="plain")
    curve.set(xscale="log", xlabel="vectors that the decoder reads, %", ylabel="word error, %", ylim=(0, None))
    ticks = (1, 3, 5, 10, 15, 25, 50)
    curve.set_xticks(ticks, [f"{share:g}" for share in ticks], minor=False)
    curve.xaxis.set_minor_locator(NullLocator())
    curve.legend(fontsize="small")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
