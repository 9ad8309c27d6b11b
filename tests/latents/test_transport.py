"""Transport between latents against plans found by trying them all, closed forms and what a metric must obey."""

import sys
from itertools import permutations

import pytest
import torch
from tiny_latents import INF, assert_same, components, mixture, sample
from tiny_nvib import tiny_nvib
from torch import Tensor

from nvib_hf import NvibLatents, concatenate_latents, latent_distance
from nvib_hf.latents.latents import pad_latents
from nvib_hf.latents.transport import gaussian_points, interpolate_by_transport, transport_distance, transport_plan

ENDS = [(mixture, mixture), (mixture, sample), (sample, mixture), (sample, sample)]


def dense(plan, rows: int, columns: int) -> Tensor:
    """Plans ``(B, N, M)``."""
    full = torch.zeros(len(plan.first), rows, columns, dtype=plan.log_weight.dtype)
    for b, entries in enumerate(zip(*plan, strict=True)):
        for i, j, log_weight in zip(*entries, strict=True):
            full[b, i, j] += log_weight.exp()
    return full


def only_seen(latents: NvibLatents, row: int) -> NvibLatents:
    """A row alone, as a batch of one without padding."""
    seen = latents.log_pi[row] > -INF
    fields = {name: value[row, seen][None] for name, value in latents.items() if name in ("z", "log_pi", "logvar")}
    return NvibLatents(**fields, attention_mask=seen[seen][None])


def costs(a: NvibLatents, b: NvibLatents, row: int) -> Tensor:
    """Squared Wasserstein distances of every two components, by the formula, in a loop."""
    return torch.tensor(
        [
            [(m - n).square().sum() + (s - r).square().sum() for _, n, r in components(b, row)]
            for _, m, s in components(a, row)
        ]
    )


def split(latents: NvibLatents, seed: int = 0) -> NvibLatents:
    """The same mixtures: every component in two unequal parts, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.rand(latents.log_pi.shape, generator=generator) * 0.8 + 0.1
    order = torch.randperm(2 * part.shape[1], generator=generator)
    log_pi = torch.cat([latents.log_pi + part.log(), latents.log_pi + torch.log1p(-part)], dim=1)
    logvar = None if latents.logvar is None else torch.cat([latents.logvar] * 2, dim=1)[:, order]
    z = torch.cat([latents.z] * 2, dim=1)[:, order]
    return NvibLatents(z=z, log_pi=log_pi[:, order], logvar=logvar, attention_mask=log_pi[:, order] > -INF)


def one(z, log_pi, logvar=None) -> NvibLatents:
    """A batch of one."""
    as_rows = [None if x is None else torch.as_tensor(x, dtype=torch.float32)[None] for x in (z, log_pi, logvar)]
    return NvibLatents(z=as_rows[0], log_pi=as_rows[1], logvar=as_rows[2], attention_mask=as_rows[1] > -INF)


# --------------------------------------------------------------------------------------------------------- the plan
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_plan_of_equal_weights_is_the_best_permutation(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x, y = scale * torch.randn(2, 4, 3, 5, generator=generator)
    log_pi = torch.randn(4, 1, generator=generator).expand(4, 3)  # not normalised
    plan = transport_plan(x, log_pi, y, log_pi)
    distance = transport_distance(x, y, plan)
    for b in range(4):
        cost = {
            p: sum((x[b, i] - y[b, j]).square().sum() for i, j in enumerate(p)) / 3 for p in permutations(range(3))
        }
        best = min(cost, key=cost.get)
        assert plan.first[b].tolist() == [0, 1, 2] and tuple(plan.second[b].tolist()) == best
        torch.testing.assert_close(plan.log_weight[b].exp(), torch.full((3,), 1 / 3))
        torch.testing.assert_close(distance[b], cost[best].sqrt())


@pytest.mark.parametrize("seed", range(5))
def test_plan_of_two_by_two_components_is_the_best_of_a_line(seed):
    """All plans are one number, and the cost is linear in it: the best is at an end."""
    torch.manual_seed(seed)
    a, b = (one(torch.randn(2, 3), torch.randn(2).log_softmax(-1), torch.randn(2, 3)) for _ in range(2))
    (p, _), (r, s) = a.log_pi[0].exp(), b.log_pi[0].exp()
    cost = costs(a, b, 0)
    plans = [torch.tensor([[g, p - g], [r - g, s - p + g]]) for g in (max(p - s, torch.tensor(0.0)), min(p, r))]
    best = min(plans, key=lambda plan: (plan * cost).sum())
    points = [gaussian_points(x.z, x.logvar) for x in (a, b)]
    plan = transport_plan(points[0], a.log_pi, points[1], b.log_pi)
    torch.testing.assert_close(dense(plan, 2, 2)[0], best, atol=1e-6, rtol=1e-5)
    assert plan.first.shape == (1, 3)  # n + m - 1
    torch.testing.assert_close(latent_distance(a, b)[0], (best * cost).sum().sqrt())


def test_plan_moves_everything_in_few_parts_that_are_in_order():
    a, b = mixture(length=9, seed=3), mixture(length=7, seed=4)
    plan = transport_plan(a.z, a.log_pi, b.z, b.log_pi)
    full = dense(plan, 9, 7)
    torch.testing.assert_close(full.sum(2), a.log_pi.exp(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(full.sum(1), b.log_pi.exp(), atol=1e-6, rtol=1e-4)
    parts = (plan.log_weight > -INF).sum(-1)
    assert (parts <= a.attention_mask.sum(-1) + b.attention_mask.sum(-1) - 1).all()
    for b, count in enumerate(parts.tolist()):
        pairs = list(zip(plan.first[b, :count].tolist(), plan.second[b, :count].tolist(), strict=True))
        assert pairs == sorted(set(pairs))


def test_rounding_makes_no_parts():
    """1/10 against two of 1/20, which no float is: ten components split in two, and nothing beside them."""
    x = torch.randn(1, 10, 6)
    y = torch.cat([x, x], dim=1)[:, torch.randperm(20)]
    plan = transport_plan(x, torch.full((1, 10), 0.1).log(), y, torch.full((1, 20), 0.05).log())
    assert plan.first[0].tolist() == [i // 2 for i in range(20)]


def test_small_weights_are_no_rounding():
    """exp(-30) is a component's whole weight: it is where it was."""
    a, b = one(torch.randn(3, 4), [0.0, -30.0, -20.0]), one(torch.randn(1, 4), [0.0])
    between = interpolate_by_transport(a, b, 0.5)
    torch.testing.assert_close(between.log_pi, a.log_pi.log_softmax(-1), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- a distance
@pytest.mark.parametrize("make", [mixture, sample])
def test_distance_of_one_mixture_written_in_two_ways_is_zero(make):
    latents = make(length=6)
    assert (latent_distance(latents, latents) == 0).all()
    assert (latent_distance(latents, split(latents)) < 1e-6).all()
    assert (latent_distance(split(latents), split(latents, seed=1)) < 1e-6).all()


@pytest.mark.parametrize("first, second", ENDS)
def test_distance_is_symmetric_and_grows_by_no_detour(first, second):
    for seed in range(5):
        a, b, c = first(length=6, seed=seed), second(seed=seed + 10), mixture(length=4, seed=seed + 20)
        torch.testing.assert_close(latent_distance(a, b), latent_distance(b, a))
        assert (latent_distance(a, c) <= latent_distance(a, b) + latent_distance(b, c) + 1e-5).all()
        # of one end on the way, nothing is lost
        between = interpolate_by_transport(a, c, 0.3)
        direct = latent_distance(a, between) + latent_distance(between, c)
        torch.testing.assert_close(direct, latent_distance(a, c), rtol=1e-4, atol=1e-4)


def test_distance_of_single_gaussians_is_their_wasserstein_distance():
    """In one dimension it is the L2 distance of the quantile functions, which is integrated here."""
    a, b = one([[0.3]], [0.0], [[-0.4]]), one([[1.1]], [0.0], [[0.9]])
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    quantiles = [
        torch.distributions.Normal(x.z.double()[0, 0], (0.5 * x.logvar.double()[0, 0]).exp()).icdf(u) for x in (a, b)
    ]
    expected = (quantiles[0] - quantiles[1]).square().mean().sqrt()
    torch.testing.assert_close(latent_distance(a, b)[0].double(), expected, rtol=1e-4, atol=0)


def test_distance_to_a_point_counts_the_deviation():
    a, b = one([[1.0, 2.0]], [0.0], [[4.0, 0.0]]), one([[1.0, 2.0]], [0.0])
    expected = torch.tensor([4.0, 0.0]).exp().sum().sqrt()
    torch.testing.assert_close(latent_distance(a, b)[0], expected)


def test_distance_is_at_least_that_of_the_means():
    a, b = mixture(length=6, seed=3), mixture(seed=4)
    means = (a.pooled() - b.pooled()).norm(dim=-1)
    assert (means < latent_distance(a, b)).all()
    shifted = NvibLatents(
        z=a.z + 2.0, log_pi=a.log_pi, logvar=a.logvar, attention_mask=a.attention_mask
    )  # all the same way: equal
    torch.testing.assert_close(latent_distance(a, shifted), (a.pooled() - shifted.pooled()).norm(dim=-1))


def test_gradient_of_the_distance():
    a, b = mixture(batch=2, seed=3), mixture(batch=2, seed=4)
    a, b = a.to(torch.float64), b.to(torch.float64)
    a.log_pi, b.log_pi = a.log_pi.double(), b.log_pi.double()

    def distance(z, logvar):
        return latent_distance(NvibLatents(z=z, log_pi=a.log_pi, logvar=logvar, attention_mask=a.attention_mask), b)

    assert torch.autograd.gradcheck(distance, (a.z.requires_grad_(), a.logvar.requires_grad_()))
    same = mixture()
    same.z.requires_grad_()
    latent_distance(same, mixture()).sum().backward()
    assert (same.z.grad == 0).all()


# --------------------------------------------------------------------------------------------------------- the path
@pytest.mark.parametrize("first, second", ENDS)
def test_ends_of_the_path_are_the_ends(first, second):
    a, b = first(length=6, seed=3), second(seed=4)
    for weight, end in ((0, a), (1, b)):
        between = interpolate_by_transport(a, b, weight)
        for row in range(4):
            expected = components(end, row)
            for got, wanted in zip(components(between, row), expected, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_ends_keep_what_has_no_weight_in_float64():
    a, b = one(torch.randn(3, 4), [0.0, -2000.0, -3000.0]), one(torch.randn(1, 4), [0.0])
    assert torch.equal(interpolate_by_transport(a, b, 0).log_pi, a.log_pi)
    assert (interpolate_by_transport(a, b, 0.5).log_pi > -INF).sum() == 1


@pytest.mark.parametrize("weight", [1e-6, 1 - 1e-6])
def test_path_reaches_its_ends_without_a_jump(weight):
    a, b = mixture(length=6, seed=3), mixture(seed=4)
    between = interpolate_by_transport(a, b, weight)
    assert (latent_distance(between, a if weight < 0.5 else b) < 1e-4).all()


@pytest.mark.parametrize("first, second", ENDS)
def test_path_is_a_geodesic(first, second):
    a, b = first(length=6, seed=3), second(seed=4)
    whole = latent_distance(a, b)
    for s, t in ((0, 0.25), (0.25, 0.6), (0.6, 1)):
        part = latent_distance(interpolate_by_transport(a, b, s), interpolate_by_transport(a, b, t))
        torch.testing.assert_close(part, (t - s) * whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first, second", ENDS)
def test_components_on_the_way(first, second):
    a, b = first(length=6, seed=3), second(seed=4)
    between = interpolate_by_transport(a, b, 0.3)
    assert (between.logvar is None) == (a.logvar is None and b.logvar is None)
    assert set(between.keys()) <= {"z", "log_pi", "logvar", "attention_mask"}  # of no text
    for row in range(4):
        ends = components(a, row), components(b, row)
        middle = components(between, row)
        assert len(middle) <= len(ends[0]) + len(ends[1]) - 1
        torch.testing.assert_close(sum(weight for weight, _, _ in middle), torch.tensor(1.0))
        for _, mean, deviation in middle:
            pairs = [(0.7 * m + 0.3 * n, 0.7 * s + 0.3 * r) for _, m, s in ends[0] for _, n, r in ends[1]]
            assert any(
                torch.allclose(mean, m, atol=1e-5) and torch.allclose(deviation, s, atol=1e-5) for m, s in pairs
            )


def test_shorter_rows_are_padded():
    between = interpolate_by_transport(mixture(length=6, seed=3), mixture(seed=4), torch.tensor([0.0, 0.5, 0.5, 1.0]))
    seen = between.log_pi > -INF
    assert torch.equal(between.attention_mask, seen) and not seen.all()
    assert (between.z[~seen] == 0).all() and (between.logvar[~seen] == 0).all()


@pytest.mark.parametrize("first, second", ENDS)
def test_padding_and_dropped_vectors_are_left_out(first, second):
    """Whatever stands there: each row is what it is with nothing but the vectors that are seen."""
    a, b = first(length=6, seed=3), second(seed=4)
    a.log_pi[1:, [0, 2]] = -INF  # dropped, but for a row that fills the batch's length
    wide = [pad_latents(x, x.z.shape[1] + 3, with_logvar=x.logvar is not None) for x in (a, b)]
    for ends in ((a, b), wide):
        for x in ends:
            x.z[x.log_pi == -INF] = float("nan")
        distance = latent_distance(*ends)
        between = interpolate_by_transport(*ends, torch.tensor([0.0, 0.4, 1.0, 0.9]))
        for row, t in enumerate((0.0, 0.4, 1.0, 0.9)):
            seen = [only_seen(x, row) for x in (a, b)]
            torch.testing.assert_close(distance[row], latent_distance(*seen)[0])
            assert_same(only_seen(between, row), only_seen(interpolate_by_transport(*seen, t), 0))
        assert between.z.isfinite().all()


@pytest.mark.parametrize("weight", [0.25, torch.linspace(0, 1, 4)], ids=["number", "four"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (4, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("first, second", ENDS)
def test_batches_are_their_rows(first, second, sizes, weight):
    a, b = first(batch=sizes[0], length=6, seed=3), second(batch=sizes[1], seed=4)
    between = interpolate_by_transport(a, b, weight)
    size = max(*sizes, *torch.as_tensor(weight).shape)
    assert between.batch_size == size
    distance = latent_distance(a, b)
    assert distance.shape == (max(sizes),)
    for row, t in enumerate(torch.as_tensor(weight).expand(size).tolist()):
        ends = a[min(row, sizes[0] - 1)], b[min(row, sizes[1] - 1)]
        assert_same(between[row].compact(), interpolate_by_transport(*ends, t).compact())
        torch.testing.assert_close(distance[min(row, len(distance) - 1)], latent_distance(*ends)[0])


def test_a_walk_solves_one_plan(monkeypatch):
    import ot

    solved = []
    monkeypatch.setattr(ot, "emd", lambda *args, solve=ot.emd, **options: solved.append(1) or solve(*args, **options))
    interpolate_by_transport(mixture(batch=1), mixture(batch=1, seed=1), torch.linspace(0, 1, 7))
    assert len(solved) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_weights_and_plans_in_full(dtype):
    a, b = mixture(length=6, seed=3).to(dtype), mixture(seed=4).to(dtype)
    between, full = (
        interpolate_by_transport(x, y, 0.3) for x, y in ((a, b), (a.to(torch.float32), b.to(torch.float32)))
    )
    assert between.z.dtype == between.logvar.dtype == dtype and between.log_pi.dtype == torch.float32
    assert torch.equal(between.log_pi, full.log_pi)
    torch.testing.assert_close(between.z, full.z.to(dtype), rtol=0, atol=0)
    assert latent_distance(a, b).dtype == a.pooled().dtype == torch.float32


def test_gradients_on_the_path_reach_both_means():
    a, b = mixture(length=6, seed=3), sample(seed=4)
    a.z.requires_grad_()
    b.z.requires_grad_()
    between = interpolate_by_transport(a, b, torch.tensor([0.25, 0.25, 0.25, 0.0]))
    (between.log_pi.exp()[..., None] * between.z).sum().backward()
    torch.testing.assert_close(a.z.grad[:3, :, 0], 0.75 * a.log_pi[:3].exp(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.z.grad[:3, :, 0], 0.25 * b.log_pi[:3].exp(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a.z.grad[3, :, 0], a.log_pi[3].exp())
    assert (b.z.grad[3] == 0).all()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_gradients_towards_a_point_are_numbers(weight):
    """A sample's deviations are 0, where a logarithm has no gradient."""
    a, b = mixture(length=6, seed=3), sample(seed=4)
    for x in (a.z, a.logvar, b.z):
        x.requires_grad_()
    between = interpolate_by_transport(a, b, weight)
    (between.z.sum() + between.logvar[between.logvar > -INF].sum()).backward()
    assert all(x.grad.isfinite().all() for x in (a.z, a.logvar, b.z))


# ------------------------------------------------------------------------------------------------ what is not there
def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    model, latents = tiny_nvib(), sample(batch=2)
    latents.z = torch.randn(2, 3, 32)
    for call in (lambda: model.interpolate_latents(latents, latents, 0.5), lambda: latent_distance(latents, latents)):
        with pytest.raises(ImportError, match=r"POT.*pip install 'nvib-hf\[interpolation\]'"):
            call()
    assert model.interpolate_latents(latents, latents, 0.5, method="mixture").z.shape == (2, 6, 32)


def test_latents_that_cannot_be_moved():
    good, empty, broken = mixture(batch=2), mixture(batch=2), mixture(batch=2)
    empty.log_pi[1] = -INF
    broken.z[0, 1] = float("nan")
    for bad, message in ((empty, "no vector left"), (broken, "must be finite")):
        for ends in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match=message):
                interpolate_by_transport(*ends, 0.5)
    with pytest.raises(ValueError, match=r"\(2, 5, 6\) and \(3, 5, 6\).*batch size"):
        latent_distance(good, mixture(batch=3))
    with pytest.raises(ValueError, match="method must be one of 'transport', 'mixture', but got 'linear'"):
        tiny_nvib().interpolate_latents(good, good, 0.5, method="linear")


def test_pooled_is_the_mean_of_the_mixture():
    latents = mixture(length=6)
    latents.z[latents.log_pi == -INF] = float("nan")
    expected = torch.stack([sum(w * m for w, m, _ in components(latents, row)) for row in range(4)])
    torch.testing.assert_close(latents.pooled(), expected)
    torch.testing.assert_close(concatenate_latents([latents, split(latents)]).pooled(), torch.cat([expected] * 2))
