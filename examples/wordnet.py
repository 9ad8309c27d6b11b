"""WordNet 3.0 as it installs with Debian (`apt install wordnet-base`): words, example sentences, definitions.

No package of PyPI ships it. The folder is `/usr/share/wordnet`, or the one that WordNet's own variable `WNSEARCHDIR`
names.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDER = "/usr/share/wordnet"
PARTS = ("noun", "verb", "adj", "adv")
# WordNet's own rules of detachment (morphy(7)): an ending and what stands in its place in the base form.
ENDINGS = {
    "noun": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "verb": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "adj": "er: est: er:e est:e",
    "adv": "",
}


def path(name: str) -> Path:
    """A file of WordNet.

    Raises:
        FileNotFoundError: WordNet is not installed.
    """
    found = Path(os.environ.get("WNSEARCHDIR", FOLDER)) / name
    if not found.is_file():
        raise FileNotFoundError(
            f"There is no WordNet in {found.parent}. Install it with `apt install wordnet-base`, or let the variable "
            "WNSEARCHDIR name the folder that holds its files (data.noun, ...)."
        )
    return found


def is_installed() -> bool:
    try:
        return path("data.noun").is_file()
    except FileNotFoundError:
        return False


def synsets(part: str) -> Iterator[tuple[list[str], str]]:
    """The words of each synset of a part of speech, as they are written, and its gloss."""
    for line in path(f"data.{part}").read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        fields = fields.split(" ")
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        yield [word.partition("(")[0] for word in words], gloss.strip()  # galore(ip): where an adjective may stand


def lexicographer_files(part: str) -> Iterator[tuple[int, str, list[str]]]:
    """Of each synset of a part of speech: the number of its topic (lexnames(5WN)), its definition, its examples."""
    for line in path(f"data.{part}").read_text(encoding="latin-1").splitlines():
        if not line.startswith("  "):
            fields, _, gloss = line.partition(" | ")
            definition = re.split(r'[;:]? *"', gloss)[0].strip(" ;")
            yield (
                int(fields.split(" ")[1]),
                definition,
                [text.strip(" ,;") for text in re.findall(r'"([^"]+)"', gloss)],
            )


@cache
def words(part: str) -> frozenset[str]:
    """Single words of a part of speech as they are written: proper nouns have a capital."""
    return frozenset(word for synset, _ in synsets(part) for word in synset if "_" not in word)


def lemmas() -> set[str]:
    """Common words: all that WordNet has as a single word in lower case."""
    return {word for part in PARTS for word in words(part) if word == word.lower()}


@cache
def irregular(part: str) -> dict[str, list[str]]:
    """Irregular forms and their base forms."""
    lines = (line.split() for line in path(f"{part}.exc").read_text(encoding="latin-1").splitlines())
    return {form: bases for form, *bases in lines}


def is_inflected(word: str) -> bool:
    """Whether a word is a form of a common word, by WordNet's own rules and lists of exceptions."""
    for part in PARTS:
        bases = list(irregular(part).get(word, []))
        for rule in ENDINGS[part].split():
            ending, replacement = rule.split(":")
            if word.endswith(ending):
                bases.append(word.removesuffix(ending) + replacement)
        if any(base in words(part) for base in bases):
            return True
    return False


def example_sentences(min_words: int = 3, max_words: int = 12) -> list[str]:
    """The example sentences and phrases of all synsets, each text once, of so many words."""
    glosses = (gloss for part in PARTS for _, gloss in synsets(part))
    found = (text.strip(" ,;") for gloss in glosses for text in re.findall(r'"([^"]+)"', gloss))
    return [text for text in dict.fromkeys(found) if min_words <= len(text.split()) <= max_words]


def definitions(min_words: int = 3, max_words: int = 12) -> list[str]:
    """The definitions of all synsets without their examples, each text once, of so many words."""
    glosses = (gloss for part in PARTS for _, gloss in synsets(part))
    found = (re.split(r'[;:]? *"', gloss)[0].strip(" ;") for gloss in glosses)
    return [text for text in dict.fromkeys(found) if min_words <= len(text.split()) <= max_words]


def corpus_for(quick: bool, jobs: int = 1) -> str:
    """``"wordnet"``, or for a quick experiment where it is not installed ``"bbe"``.

    With no ``jobs`` finished runs are only reported, for which it need not be installed.
    """
    if quick and not is_installed():
        print("WordNet is not installed (apt install wordnet-base): texts of the Bible in Basic English instead.")
        return "bbe"
    if jobs:
        path("data.noun")
    return "wordnet"
