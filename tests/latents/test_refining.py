"""Latents that a learned prior brings back to where texts are: on a walk, and around a text."""

from itertools import pairwise

import pytest
import torch
from tiny_latents import assert_same
from tiny_nvib import tiny_nvib
from tiny_prior import SIZES, cycles, fit, seeded

from nvib_hf import NvibForConditionalGeneration, NvibLatents
from nvib_hf.latents.refining import path_in_order


@pytest.fixture(scope="module")
def fitted() -> NvibForConditionalGeneration:
    model = tiny_nvib()
    fit(model)
    return model


def codes_of(model, latents: NvibLatents) -> list[list[int]]:
    """The codes of each row's vectors."""
    counts = ((latents.log_pi > -torch.inf).sum(-1) - 1).tolist()
    return [model.latent_prior.codes(row.z[:, 1 : n + 1])[0].tolist() for row, n in zip(latents, counts, strict=True)]


def follows(model) -> set[tuple[int, int]]:
    """Which code follows which."""
    return {(row[0], row[1]) for row in codes_of(model, cycles(model, 200, 5))}


def test_a_walk_keeps_its_ends_to_the_bit_and_takes_no_step_off_the_grammar(fitted):
    first, second = cycles(fitted, 12, 3), cycles(fitted, 12, 4)
    for weight, end in ((0, first), (1, second)):
        walk = fitted.interpolate_latents(first, second, weight, refine=3.0)
        ours, theirs = walk.compact(), end.compact()
        assert torch.equal(ours.z, theirs.z) and torch.equal(ours.log_pi, theirs.log_pi)
        seen = theirs.attention_mask
        assert torch.equal(ours.logvar[seen], theirs.logvar[seen])
    known = follows(fitted)
    assert len(known) == 4
    for weight in (0.25, 0.5, 0.75):
        walk = fitted.interpolate_latents(first, second, weight, refine=1e4)
        assert all(pair in known for row in codes_of(fitted, walk) for pair in pairwise(row))
        z, n = walk.z[:, 1:], walk.z.shape[1] - 1
        on_means = fitted.latent_prior.places[:n] + fitted.latent_prior.centres[fitted.latent_prior.codes(z)]
        seen = walk.attention_mask[:, 1:, None]
        torch.testing.assert_close(z, on_means.masked_fill(~seen, 0))
        if weight == 0.5:  # what is not refined leaves it
            moved = fitted.interpolate_latents(first, second, weight, refine=1e-6)
            assert not all(pair in known for row in codes_of(fitted, moved) for pair in pairwise(row))


def test_a_walk_goes_through_the_texts_from_their_beginnings_on():
    """Vector by vector, as the definition says."""
    generator = seeded()
    a, b = torch.randn(6, 7, 3, generator=generator), torch.randn(6, 5, 3, generator=generator)
    n_a, n_b = torch.tensor([7, 3, 1, 5, 2, 6]), torch.tensor([5, 5, 4, 1, 2, 3])
    for t in (0.0, 0.1, 0.5, 0.77, 1.0):
        path, counts = path_in_order(a, n_a, b, n_b, torch.full((6,), t))
        for row in range(6):
            of_a, of_b = a[row, : n_a[row]].tolist(), b[row, : n_b[row]].tolist()
            n = round((1 - t) * len(of_a) + t * len(of_b))
            assert counts[row] == n
            for i in range(n):
                moved = min(max(0.5 + (t * len(of_b) - (i + 0.5)) / (n / 2), 0.0), 1.0)
                old = of_a[min(max(len(of_a) - n + i, 0), len(of_a) - 1)]
                new = of_b[min(i, len(of_b) - 1)]
                expected = [(1 - moved) * x + moved * y for x, y in zip(old, new, strict=True)]
                assert path[row, i].tolist() == pytest.approx(expected, abs=1e-5)


def test_without_a_prior_to_speak_of_a_walk_is_the_nearest_codes_of_that_path(fitted):
    first, second, prior = cycles(fitted, 12, 3), cycles(fitted, 12, 4), fitted.latent_prior
    walk, expected = fitted.interpolate_latents(first, second, 0.6, refine=1e-6), []
    for a, b in zip(first, second, strict=True):
        rows = [x.z[0, 1:][x.attention_mask[0, 1:]] for x in (a, b)]
        (x_a, n_a), (x_b, n_b) = ((x[None] - prior.places[: len(x)], torch.tensor([len(x)])) for x in rows)
        (path,), _ = path_in_order(x_a, n_a, x_b, n_b, torch.tensor([0.6]))
        distances = (path[:, None] - prior.centres).square() / prior.draws_logvar.exp().mean(0)
        expected.append(distances.sum(-1).argmin(-1).tolist())
    assert codes_of(fitted, walk) == expected


def test_a_walk_of_two_latents_is_one_of_many_rows_and_is_decoded(fitted):
    first, second = cycles(fitted, 2, 3)
    weights = torch.tensor([0.0, 0.3, 0.6, 1.0])
    walk = fitted.interpolate_latents(first, second, weights, refine=3.0)
    for row, weight in zip(walk, weights.tolist(), strict=True):
        alone = fitted.interpolate_latents(first, second, weight, refine=3.0)
        assert torch.equal(row.compact().z, alone.compact().z)
        torch.testing.assert_close(row.compact().log_pi, alone.compact().log_pi)
    ours = fitted.generate(encoder_outputs=walk, max_new_tokens=5)
    for row, end in ((0, first), (3, second)):
        assert torch.equal(ours[row], fitted.generate(encoder_outputs=end, max_new_tokens=5)[0])


def test_draws_come_back_to_their_text(fitted):
    """Of noise that hides some codes, the prior finds more of them than distances alone do."""
    latents = cycles(fitted, 200, 6)
    own = codes_of(fitted, latents)

    def shares(refine: float) -> float:
        drawn = fitted.vary_latents(latents, 30.0, generator=seeded(), refine=refine)
        found = codes_of(fitted, drawn)
        assert list(map(len, found)) == list(map(len, own))
        return sum(map(list.__eq__, found, own)) / len(own)

    nearest, refined = shares(1e-6), shares(30.0**2)
    assert nearest < 0.7 and refined > nearest + 0.15
    again = fitted.vary_latents(latents, 30.0, generator=seeded(), refine=900.0)
    assert_same(again, fitted.vary_latents(latents, 30.0, generator=seeded(), refine=900.0))
    assert again.logvar is None
    plain = fitted.vary_latents(latents, 30.0, generator=seeded())
    assert_same(plain, fitted.vary_latents(latents, 30.0, generator=seeded(), refine=0))


def test_what_cannot_be_refined_is_named(fitted):
    latents, bare = cycles(fitted, 2, 3), tiny_nvib()
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="refine must be 0, which refines nothing, or positive, but got"):
            fitted.vary_latents(latents, refine=value)
    with pytest.raises(TypeError, match="refine must be a number, but got True"):
        fitted.interpolate_latents(latents, latents, 0.5, refine=True)
    for model in (bare, tiny_nvib(latent_prior=SIZES)):
        with pytest.raises(ValueError, match="refine needs a learned prior, but this model"):
            model.interpolate_latents(latents, latents, 0.5, refine=3.0)
        with pytest.raises(ValueError, match="refine needs a learned prior, but this model"):
            model.vary_latents(latents, refine=3.0)
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\], but got 2"):
        fitted.interpolate_latents(latents, latents, 2, refine=3.0)
    longer = tiny_nvib(latent_prior={**SIZES, "max_length": 3})
    longer.latent_prior.is_fitted.fill_(True)
    with pytest.raises(ValueError, match="this prior's max_length is 3"):
        longer.interpolate_latents(latents, latents, 0.5, refine=3.0)
