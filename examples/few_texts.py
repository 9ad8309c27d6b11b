"""How a text VAE is trained on few texts, which it would learn by heart."""

import random
from collections.abc import Callable, Sequence

from torch.utils.data import Dataset


class Recombined(Dataset):
    """Few texts, recombined anew each time: most are the beginning of one and the end of another.

    So none can be learnt by heart, and the decoder has to read its latent.

    Args:
        encode: texts to examples, with ``input_ids`` and ``labels``.
        share: of the examples that are recombined.
    """

    def __init__(
        self, texts: list[str], encode: Callable[[list[str]], Sequence[dict]], seed: int, share: float = 0.7
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
