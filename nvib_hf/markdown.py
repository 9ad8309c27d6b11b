"""Markdown of cards and reports."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(titles: Sequence[object], *rows: Sequence[object]) -> str:
    """A table of cells that are Markdown already."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verbatim(text: str) -> str:
    """A model's text on one line of Markdown, where it reads as it stands."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split())) or "*(nothing)*"
