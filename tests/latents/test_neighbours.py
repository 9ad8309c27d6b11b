"""Distances between many latents, and nearest neighbours that are exact however few of them are computed."""

import numpy as np
import pytest
import torch
from tiny_latents import INF, WIDTH, mixture, sample

from nvib_hf import NvibLatents, concatenate_latents, latent_distance, latent_distances, nearest
from nvib_hf.latents import neighbours

pytest.importorskip("ot")

MAKE = {"mixture": mixture, "sample": sample}


def one_by_one(first, second):
    return torch.stack([latent_distance(latent, second) for latent in first])


def clustered(batch: int, length: int, seed: int, width: int = 16, groups: int = 20) -> NvibLatents:
    """Latents around some centres, as texts on some topics are."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(groups, 1, width, generator=torch.Generator().manual_seed(99))
    group = torch.randint(groups, (batch,), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    log_pi = torch.randn(batch, length, generator=generator).masked_fill(~mask, -INF).log_softmax(-1)
    z = centres[group] + torch.randn(batch, length, width, generator=generator)
    logvar = torch.randn(batch, length, width, generator=generator) - 1
    return NvibLatents(z=z, log_pi=log_pi, attention_mask=mask, logvar=logvar)


@pytest.mark.parametrize("second", MAKE)
@pytest.mark.parametrize("first", MAKE)
def test_every_distance_is_that_of_the_pair(first, second):
    ours, theirs = MAKE[first](batch=3, seed=5), MAKE[second](batch=5, length=4, seed=6)
    distances = latent_distances(ours, theirs)
    assert distances.shape == (3, 5) and distances.dtype == torch.float32
    torch.testing.assert_close(distances, one_by_one(ours, theirs), rtol=1e-4, atol=1e-5)


def test_a_matrix_of_distances_is_one():
    """Of a metric: zeros on its diagonal, symmetric, and the third side is never longer."""
    latents = mixture(batch=6)
    distances = latent_distances(latents, latents)
    torch.testing.assert_close(distances, distances.T)
    torch.testing.assert_close(distances.diagonal(), torch.zeros(6), rtol=0, atol=1e-3)
    assert (distances[:, None] <= distances[:, :, None] + distances.T[None] + 1e-4).all()


def test_what_is_hidden_does_not_count():
    latents = mixture(batch=4)
    changed = NvibLatents(**latents)
    changed.z = torch.where((latents.log_pi == -INF)[..., None], torch.nan, latents.z)
    torch.testing.assert_close(latent_distances(changed, latents), latent_distances(latents, latents))


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("block", [4, 128])
def test_neighbours_are_those_of_all_distances(k, block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    latents, corpus = clustered(5, 6, seed=1), clustered(40, 8, seed=2)
    distance, index = nearest(latents, corpus, k)
    expected, order = latent_distances(latents, corpus).sort(dim=-1, stable=True)
    assert torch.equal(index, order[:, :k])
    torch.testing.assert_close(distance, expected[:, :k])


def test_one_vector_each():
    """Transport is the distance of two points there."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, 1, WIDTH, generator=generator)
    points = NvibLatents(z=z, log_pi=torch.zeros(30, 1), attention_mask=torch.ones(30, 1, dtype=torch.bool))
    expected = torch.cdist(z[:, 0].double(), z[:7, 0].double()).float()
    torch.testing.assert_close(latent_distances(points, points[:7]), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(nearest(points, points).index[:, 0], torch.arange(30))


def test_few_of_500_times_500_are_computed(monkeypatch):
    """Seconds where all of them take minutes; the bounds leave a few of the 500 open."""
    computed = []
    transported = neighbours._transported
    monkeypatch.setattr(neighbours, "_transported", lambda *given: computed.append(1) or transported(*given))
    latents, corpus = clustered(500, 10, seed=3), clustered(500, 10, seed=4)
    distance, index = nearest(latents, corpus, k=5)
    assert len(computed) < 500 * 500 / 10
    rows = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:3]
    expected, order = latent_distances(latents[rows], corpus).sort(dim=-1, stable=True)
    assert torch.equal(index[rows], order[:, :5])
    torch.testing.assert_close(distance[rows], expected[:, :5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    latents = mixture().to(dtype=dtype)
    distances = latent_distances(latents, latents)
    assert distances.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(distances, one_by_one(latents, latents), rtol=1e-3, atol=1e-3)


def test_no_rows():
    assert latent_distances(mixture()[[]], mixture()).shape == (0, 4)
    assert nearest(mixture()[[]], mixture(), 2).index.shape == (0, 2)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2", 5])
def test_a_number_of_neighbours_that_there_is_not(k):
    with pytest.raises(ValueError, match=r"k must be a whole number of at least 1|k is 5, but the corpus has 4"):
        nearest(mixture(), mixture(), k)


def test_latents_that_cannot_be_compared():
    wide = NvibLatents(z=torch.randn(2, 3, 8), log_pi=torch.zeros(2, 3), attention_mask=torch.ones(2, 3).bool())
    empty = mixture()
    empty.log_pi[1] = -INF
    broken = mixture()
    broken.z[0, 0, 0] = torch.nan
    for other, message in ((wide, "6 and 8 wide"), (empty, "no vector left"), (broken, "must be finite")):
        with pytest.raises(ValueError, match=message):
            latent_distances(mixture(), other)
        with pytest.raises(ValueError, match=message):
            nearest(mixture(), other)


# ----------------------------------------------------------------------------------------------- other people's tools
def test_an_index_of_vectors_finds_and_transport_ranks():
    """The recipe for a corpus of millions: means in an index, and what it finds by transport."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    corpus, latents = clustered(300, 8, seed=1), clustered(4, 8, seed=2)
    index = neighbors.NearestNeighbors(n_neighbors=60).fit(corpus.pooled().numpy())
    _, found = index.kneighbors(latents.pooled().numpy())
    exact = nearest(latents, corpus, k=5)
    for row, candidates in enumerate(found):
        distance, order = nearest(latents[row], corpus[candidates], k=5)
        assert isinstance(candidates, np.ndarray)
        recalled = set(candidates[order[0]]) & set(exact.index[row].tolist())
        assert len(recalled) >= 4
        assert (distance[0] >= exact.distance[row] - 1e-5).all()


def test_clusters_of_the_means():
    cluster = pytest.importorskip("sklearn.cluster")
    near, far = clustered(20, 6, seed=1, groups=1), clustered(20, 6, seed=1, groups=1)
    far.z = far.z + 50
    latents = concatenate_latents([near, far])
    labels = cluster.KMeans(n_clusters=2, n_init=1, random_state=0).fit_predict(latents.pooled())
    assert len(set(labels[:20])) == len(set(labels[20:])) == 1 and labels[0] != labels[20]
