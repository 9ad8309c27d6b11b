"""The reader of WordNet, on a folder of a few lines in WordNet's format, and on WordNet where it is installed."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import wordnet

FILES = {
    "data.noun": (
        "  1 This software and database is being provided to you, the LICENSEE\n"
        "00001740 03 n 02 entity 0 living_thing 0 001 ~ 00001930 n 0000 | that which has its own existence  \n"
        '00001930 03 n 01 box 0 000 | a thing to put things in; "he rummaged through a box"; "two"  \n'
        "00002000 03 n 02 church 0 dog 0 000 | no definition  \n"
        "00002137 03 n 01 London 0 001 @i 00001930 n 0000 | the capital of England  \n"
    ),
    # sixteen words: their number is hexadecimal
    "data.verb": (
        "00001740 29 v 10 "
        + " ".join(f"verb{chr(97 + i)} {i:x}" for i in range(15))
        + " stop 0 000 01 + 02 00 | to end "
        'something that runs: "she stopped the clock by hand"; "they stop"- Anon  \n'
    ),
    "data.adj": '00001740 00 a 02 galore(ip) 0 big(a) 0 000 | in abundance; "whiskey galore for all of us"  \n',
    "data.adv": "00001740 02 r 01 bigly 0 000 | in a big way  \n",
    "noun.exc": "oxen ox\n",
    "verb.exc": "stopped stop\nran run\n",
    "adj.exc": "bigger big\n",
    "adv.exc": "",
}


@pytest.fixture(autouse=True)
def fresh_caches():
    yield
    wordnet.words.cache_clear()
    wordnet.irregular.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    wordnet.words.cache_clear()
    wordnet.irregular.cache_clear()
    return tmp_path


def test_lemmas_are_single_words_in_lower_case(folder):
    verbs = {f"verb{chr(97 + i)}" for i in range(15)}
    assert wordnet.lemmas() == {"entity", "box", "church", "dog", "stop", "galore", "big", "bigly"} | verbs


@pytest.mark.parametrize(
    ("word", "inflected"),
    [
        ("boxes", True),  # a rule: ches, shes, xes, ...
        ("churches", True),
        ("entities", True),
        ("dogs", True),
        ("stops", True),
        ("stopping", False),  # a doubled letter is no rule, and this form is in no list here
        ("stopped", True),  # irregular
        ("bigger", True),
        ("oxen", False),  # the list's base form is no word of this folder
        ("box", False),
        ("londons", False),  # nothing is inflected from a name that is written otherwise
        ("smith", False),
    ],
)
def test_inflected_forms(folder, word, inflected):
    assert wordnet.is_inflected(word) == inflected


def test_glosses_are_cut_into_definitions_and_examples(folder):
    assert wordnet.example_sentences() == [
        "he rummaged through a box",
        "she stopped the clock by hand",
        "whiskey galore for all of us",
    ]
    assert wordnet.example_sentences(1, 2) == ["two", "they stop"]
    assert wordnet.definitions() == [
        "that which has its own existence",
        "a thing to put things in",
        "the capital of England",
        "to end something that runs",
        "in a big way",
    ]


def test_without_wordnet_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    assert not wordnet.is_installed()
    with pytest.raises(FileNotFoundError, match="apt install wordnet-base"):
        wordnet.lemmas()
    with pytest.raises(FileNotFoundError, match="apt install wordnet-base"):
        wordnet.corpus_for(quick=False)
    assert wordnet.corpus_for(quick=True) == "bbe"
    assert "apt install wordnet-base" in capsys.readouterr().out


@pytest.mark.skipif(not wordnet.is_installed(), reason="WordNet is not installed (Debian: wordnet-base)")
def test_wordnet_itself():
    lemmas, examples = wordnet.lemmas(), wordnet.example_sentences()
    assert {"dog", "run", "beautiful", "quickly"} < lemmas and not {"london", "dogs", "living_thing"} & lemmas
    assert wordnet.is_inflected("dogs") and not wordnet.is_inflected("jernigan")
    assert len(examples) > 40_000 and len(wordnet.definitions()) > 80_000
    assert not any(re.search('["|]', text) for text in examples)
