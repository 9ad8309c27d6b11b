"""Merging with mass: the rounds against one pair after the other, and both against attention itself."""

import math

import pytest
import torch
from torch import Tensor

from nvib_hf.layers import merging, mutual_neighbours
from nvib_hf.layers.merging import merge, naive_merge

SCALE = 0.5


def attention(query: Tensor, z: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """``K(q)`` and the mean that attention returns, by their definitions."""
    score = SCALE * query @ z.T + log_mass
    return score.logsumexp(-1), score.softmax(-1) @ z


def row(seed: int, length: int = 24, width: int = 4) -> tuple[Tensor, Tensor]:
    """A walk, and masses that differ by a factor of ten or so."""
    torch.manual_seed(seed)
    return torch.randn(length, width, dtype=torch.float64).cumsum(0), torch.randn(length, dtype=torch.float64)


def clusters(sizes: list[int], spread: float, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors around centres far from each other, those of one after those of another; each one's centre."""
    torch.manual_seed(seed)
    centre = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = 3 * torch.randn(len(sizes), width, dtype=torch.float64)
    return centres[centre] + spread * torch.randn(len(centre), width, dtype=torch.float64), centre


def cost(z: Tensor, log_mass: Tensor) -> float:
    """Of two vectors, by the formula."""
    a, b = log_mass.exp()
    return (min(1, 2 * a * b / (a + b)) * (z[0] - z[1]).square().sum()).item()


# ------------------------------------------------------------------------------------ against one pair at a time
@pytest.mark.parametrize("order", merging.ORDERS)
def test_one_pair_is_the_cheapest(order):
    for seed in range(12):
        z, log_mass = row(seed, length=12)
        expected = naive_merge(z, log_mass, len(z) - 1, order)
        made = merge(z[None], log_mass[None], num_vectors=len(z) - 1, order=order)
        assert made.assignment[0].tolist() == expected.assignment.tolist()


@pytest.mark.parametrize("order", merging.ORDERS)
def test_groups_that_lie_apart_are_found(order):
    z, centre = clusters([1, 5, 2, 7, 3], spread=0.05)
    log_mass = torch.randn(len(z), dtype=torch.float64)
    expected = naive_merge(z, log_mass, 5, order)
    made = merge(z[None], log_mass[None], num_vectors=5, order=order, logvar=torch.full_like(z[None], -math.inf))
    assert made.assignment[0].tolist() == expected.assignment.tolist() == centre.tolist()
    torch.testing.assert_close(made.z[0], expected.z)
    torch.testing.assert_close(made.log_mass[0], expected.log_mass)
    torch.testing.assert_close(made.logvar[0].exp(), expected.logvar.exp())
    assert made.counts.tolist() == [[1, 5, 2, 7, 3]] == [expected.counts.tolist()]


@pytest.mark.parametrize("order", merging.ORDERS)
@pytest.mark.parametrize("left", [3, 9])
def test_rounds_lose_little(order, left):
    """Of the spread within groups: no more than a few percent above that of one pair after the other."""
    rounds = one_by_one = 0.0
    for seed in range(8):
        z, log_mass = row(seed, length=18)
        none = torch.full_like(z[None], -math.inf)
        made = merge(z[None], log_mass[None], num_vectors=left, order=order, logvar=none)
        assert made.counts.tolist()[0].count(0) == 0
        expected = naive_merge(z, log_mass, left, order)
        rounds += (made.log_mass.exp() * made.logvar.exp().sum(-1)).sum().item()
        one_by_one += (expected.log_mass.exp() * expected.logvar.exp().sum(-1)).sum().item()
    assert rounds < 1.05 * one_by_one


def test_any_two_may_be_far_apart():
    """The same six vectors over and over: each is out of its like's reach, but six are enough."""
    z = torch.randn(6, 4, generator=torch.manual_seed(0)).repeat(5, 1)[None]
    made = merge(z, torch.zeros(1, 30), num_vectors=6, order="any")
    assert made.assignment.tolist() == [[*range(6)] * 5]
    torch.testing.assert_close(made.z, z[:, :6])
    assert merge(z, torch.zeros(1, 30), num_vectors=6).assignment.tolist() != [[*range(6)] * 5]


@pytest.mark.parametrize("kinds", range(1, mutual_neighbours.REACH + 1))
def test_kinds_that_take_turns_are_merged(kinds):
    """Each has its like within reach, so that one of each kind is left; further apart than that they stay."""
    z = 10 * torch.randn(kinds, 4, generator=torch.manual_seed(0)).repeat(20, 1)[None]
    made = merge(z, torch.zeros(1, len(z[0])), cost=1e-6)
    assert made.assignment.tolist() == [[*range(kinds)] * 20]


def test_what_is_out_of_reach_stays_apart():
    """Two equal vectors, with so many unlike ones between them."""
    for between in range(2 * mutual_neighbours.REACH):
        z = 10 * torch.randn(between + 2, 4, generator=torch.manual_seed(0))
        z[-1] = z[0]
        made = merge(z[None], torch.zeros(1, len(z)), cost=1e-6)
        assert (made.counts > 0).sum() == len(z) - (between < mutual_neighbours.REACH)


@pytest.mark.parametrize("kind", ["equal", "slope"])
def test_few_rounds(kind, monkeypatch):
    """Where every pair is as cheap as the next, or a little cheaper, they do not wait for each other."""
    rounds, nearest = [], mutual_neighbours._nearest_neighbours
    monkeypatch.setattr(mutual_neighbours, "_nearest_neighbours", lambda *given: rounds.append(1) or nearest(*given))
    z = torch.ones(1000, 1) if kind == "equal" else torch.linspace(1, 2, 1000)[:, None].square()
    made = merge(z[None], torch.zeros(1, 1000), num_vectors=10)
    assert (made.counts > 0).sum() == 10 and len(rounds) < 40


def test_groups_of_draws():
    """The mean of independent draws, weighed by mass, has the Gaussian that `Groups.of_draws` says."""
    z, _ = clusters([3, 2, 4], spread=0.3)
    log_mass, logvar = torch.randn(1, len(z)).double(), torch.randn(z.shape).double()
    log_mass[0, 4], groups = -math.inf, torch.tensor([[0, 0, 0, 1, -1, 2, 2, 2, 2]])
    made, generator = merging.Groups(groups, log_mass), torch.Generator().manual_seed(0)
    mu, of_groups = made.of_draws(z[None], logvar[None])
    noise = torch.randn(200_000, *z.shape, generator=generator, dtype=torch.float64)
    draws = z + (0.5 * logvar).exp() * noise
    for k in range(3):
        weights = log_mass[0].exp() * (groups[0] == k)
        means = torch.einsum("l,nlp->np", weights / weights.sum(), draws)
        torch.testing.assert_close(mu[0, k], means.mean(0), atol=2e-2, rtol=0)
        torch.testing.assert_close(of_groups[0, k].exp(), means.var(0), rtol=2e-2, atol=0)
    expected = [log_mass[0][groups[0] == k].logsumexp(0) for k in range(3)]
    torch.testing.assert_close(made.totals(log_mass)[0], torch.stack(expected))


# ------------------------------------------------------------------------------------ against attention
@pytest.mark.parametrize("order", merging.ORDERS)
def test_equal_vectors_merge_exactly(order):
    z, centre = clusters([4, 1, 6, 2], spread=0.0)
    log_mass = 3 * torch.randn(len(z), dtype=torch.float64)
    query = torch.randn(50, z.shape[1], dtype=torch.float64)
    made = merge(z[None], log_mass[None], num_vectors=4, order=order)
    assert made.assignment[0].tolist() == centre.tolist()
    for got, expected in zip(
        attention(query, made.z[0], made.log_mass[0]), attention(query, z, log_mass), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_cost_0_merges_equal_vectors_alone():
    z, centre = clusters([4, 1, 6, 2], spread=0.0)
    made = merge(z[None], torch.randn(1, len(z)), cost=0)
    assert made.assignment[0].tolist() == centre.tolist()
    torch.testing.assert_close(made.z[0], z[[0, 4, 5, 11]])


def test_the_error_is_of_second_order():
    """A tenth of the spread, a hundredth of the error; without the mass the error stays."""
    errors, without_mass = [], []
    for spread in (0.1, 0.01):
        z, _ = clusters([4, 1, 6, 2], spread)
        log_mass = torch.randn(len(z), generator=torch.manual_seed(1), dtype=torch.float64)
        query = torch.randn(50, z.shape[1], generator=torch.manual_seed(2), dtype=torch.float64)
        made = merge(z[None], log_mass[None], num_vectors=4)
        expected = attention(query, z, log_mass)[0]
        errors.append((attention(query, made.z[0], made.log_mass[0])[0] - expected).abs().max().item())
        bare = attention(query, made.z[0], torch.zeros(4, dtype=torch.float64))[0]
        without_mass.append((bare - expected).abs().max().item())
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.2)
    assert errors[0] < 0.1 < without_mass[1]


@pytest.mark.parametrize("order", merging.ORDERS)
def test_mass_mean_and_second_moment_are_kept(order):
    z, log_mass = row(3)
    logvar = torch.randn_like(z)
    made = merge(z[None], log_mass[None], share=0.25, logvar=logvar[None], order=order)
    weight, before = made.log_mass[0].exp()[:, None], log_mass.exp()[:, None]
    torch.testing.assert_close(weight.sum(), before.sum())
    torch.testing.assert_close((weight * made.z[0]).sum(0), (before * z).sum(0))
    second = made.logvar[0].exp() + made.z[0].square()
    torch.testing.assert_close((weight * second).sum(0), (before * (logvar.exp() + z.square())).sum(0))


# ------------------------------------------------------------------------------------ how far
def test_cost_is_where_it_stops():
    """Of every group the last two parts cost no more; of two that are left side by side, more."""
    z, log_mass = row(4, length=40)
    log_mass = log_mass - log_mass.exp().mean().log()
    made = merge(z[None], log_mass[None], cost=2.0)
    left = [(made.z[0, k : k + 2], made.log_mass[0, k : k + 2]) for k in range(made.z.shape[1] - 1)]
    assert 1 < len(left) < 39 and min(cost(*pair) for pair in left) > 2.0
    for group in range(made.z.shape[1]):
        inside = made.assignment[0] == group
        parts = merge(z[inside][None], log_mass[inside][None], num_vectors=2)
        if inside.sum() > 1:
            assert cost(parts.z[0], parts.log_mass[0]) <= 2.0 * 1.2  # in another order of rounds


@pytest.mark.parametrize("order", merging.ORDERS)
def test_no_pair_is_left_under_the_cost(order):
    """Costs within a step of the limit, on either side: what is too dear keeps nobody from what is not."""
    for seed in range(12):
        torch.manual_seed(seed)
        z = torch.arange(12.0)[:, None] + 0.003 * torch.randn(12, 1)  # all steps cost about the same
        made = merge(z[None], torch.zeros(1, 12), cost=1.0, order=order)
        z, log_mass = made.z[0].double(), made.log_mass[0].double()
        pairs = [(i, i + 1) for i in range(len(z) - 1)]
        assert 1 < len(z) < 12 and min(cost(z[[i, j]], log_mass[[i, j]]) for i, j in pairs) > 1.0 - 1e-5


def test_the_normaliser_and_the_length_do_not_matter():
    z, log_mass = row(5)
    expected = merge(z[None], log_mass[None], cost=1.0)
    moved = merge(z[None], log_mass[None] - 700, cost=1.0)
    twice = merge(torch.cat([z, z + 1e3])[None], log_mass.repeat(2)[None], cost=1.0)
    assert 1 < expected.z.shape[1] < len(z)
    assert moved.assignment.equal(expected.assignment)
    torch.testing.assert_close(moved.log_mass, expected.log_mass - 700)
    assert twice.z.shape[1] == 2 * expected.z.shape[1]
    assert twice.assignment[:, : len(z)].equal(expected.assignment)


@pytest.mark.parametrize(
    "how_far",
    [
        {"num_vectors": [9, 1, 40]},
        {"num_vectors": torch.tensor([9, 1, 40])},
        {"share": [0.5, 0.01, 1.0]},
        {"cost": [1.0, 1e9, 0.0]},
    ],
)
@pytest.mark.parametrize("order", merging.ORDERS)
def test_rows_are_merged_by_themselves(how_far, order):
    rows = [row(seed, length) for seed, length in ((0, 24), (1, 17), (2, 20))]
    z, log_mass = torch.full((3, 24, 4), math.nan, dtype=torch.float64), torch.full((3, 24), -math.inf).double()
    for i, (vectors, mass) in enumerate(rows):
        z[i, : len(vectors)], log_mass[i, : len(vectors)] = vectors, mass
    made = merge(z, log_mass, **how_far, order=order)
    [(name, values)] = how_far.items()
    for i, (vectors, mass) in enumerate(rows):
        alone = merge(vectors[None], mass[None], **{name: values[i]}, order=order)
        number = alone.z.shape[1]
        assert made.assignment[i].tolist() == alone.assignment[0].tolist() + [-1] * (24 - len(vectors))
        torch.testing.assert_close(made.z[i, :number], alone.z[0])
        torch.testing.assert_close(made.log_mass[i, :number], alone.log_mass[0])
        assert (made.z[i, number:] == 0).all() and (made.log_mass[i, number:] == -math.inf).all()
        assert made.counts[i].sum() == len(vectors)
    if name != "cost":
        wanted = {"num_vectors": [9, 1, 20], "share": [12, 1, 20]}[name]
        assert (made.counts > 0).sum(-1).tolist() == wanted


@pytest.mark.parametrize(
    ("length", "share", "left"), [(1500, 0.07, 105), (1500, 0.15, 225), (30, 0.1, 3), (7, 0.01, 1)]
)
def test_share_is_rounded(length, share, left):
    assert merge(torch.randn(1, length, 2), torch.zeros(1, length), share=share).z.shape[1] == left


@pytest.mark.parametrize("order", merging.ORDERS)
def test_what_is_dropped_is_not_there(order):
    """In the midst of a row, too: its neighbours are each other's."""
    z, log_mass = row(6)
    there = torch.rand(len(z), generator=torch.manual_seed(0)) > 0.4
    expected = merge(z[there][None], log_mass[there][None], num_vectors=5, order=order)
    made = merge(z[None], log_mass.masked_fill(~there, -math.inf)[None], num_vectors=5, order=order)
    assert made.assignment[0][there].equal(expected.assignment[0]) and (made.assignment[0][~there] == -1).all()
    torch.testing.assert_close(made.z, expected.z)


@pytest.mark.parametrize("order", merging.ORDERS)
def test_what_is_fixed_stays_as_it_is(order):
    """And in its place, and is not counted."""
    z, log_mass = row(7)
    fixed = torch.zeros(1, len(z), dtype=torch.bool)
    fixed[0, [0, 12]] = True
    z[1] = z[0]  # nothing would cost less
    made = merge(z[None], log_mass[None], num_vectors=4, fixed=fixed, order=order)
    others = merge(z[~fixed[0]][None], log_mass[~fixed[0]][None], num_vectors=4, order=order)
    assert made.z.shape[1] == 6
    of_fixed = made.assignment[0][[0, 12]]
    assert of_fixed[0] == 0 and (made.counts[0, of_fixed] == 1).all()
    torch.testing.assert_close(made.z[0, of_fixed], z[[0, 12]])
    torch.testing.assert_close(made.log_mass[0, of_fixed], log_mass[[0, 12]])
    rest = [k for k in range(6) if k not in of_fixed.tolist()]
    torch.testing.assert_close(made.z[:, rest], others.z)


def test_rows_without_vectors():
    z, log_mass = torch.randn(2, 5, 3), torch.zeros(2, 5)
    log_mass[1] = -math.inf
    made = merge(z, log_mass, num_vectors=2, logvar=torch.zeros_like(z))
    assert made.counts[1].tolist() == [0, 0] and (made.z[1] == 0).all() and (made.assignment[1] == -1).all()
    for nothing in (merge(z[1:], log_mass[1:], num_vectors=2), merge(z[:, :0], log_mass[:, :0], share=0.5)):
        assert nothing.z.shape[1:] == (1, 3) and (nothing.log_mass == -math.inf).all()


def test_masses_far_apart():
    """Over hundreds of nats: the heavy one decides, and nothing is lost."""
    z, log_mass = torch.randn(1, 6, 3), torch.tensor([[-900.0, -400.0, 0.0, 300.0, -1e4, 299.0]])
    made = merge(z, log_mass, num_vectors=1)
    torch.testing.assert_close(made.log_mass, log_mass.logsumexp(-1, keepdim=True))
    torch.testing.assert_close(made.z[0], (log_mass.softmax(-1) @ z)[0])


# ------------------------------------------------------------------------------------ tensors
@pytest.mark.parametrize("order", merging.ORDERS)
def test_gradients(order):
    z, log_mass = row(8, length=6, width=2)
    z, log_mass = z.repeat(2, 1, 1), log_mass.repeat(2, 1)
    log_mass[1, 4:] = -math.inf
    logvar = torch.randn_like(z)

    def merged(z, log_mass, logvar):
        made = merge(z, log_mass.where(there, -math.inf), num_vectors=3, logvar=logvar, order=order)
        return made.z, made.log_mass, made.logvar

    there = log_mass > -math.inf
    inputs = [x.requires_grad_() for x in (z, log_mass.masked_fill(~there, 0.0), logvar)]
    torch.autograd.gradcheck(merged, inputs)


def test_gradients_of_points():
    """Of a variance of 0 that stays one the gradient is 0, and not NaN."""
    z, log_mass = (x[None].requires_grad_() for x in row(9, length=6))
    none = torch.full_like(z, -math.inf).detach().requires_grad_()
    made = merge(z, log_mass, num_vectors=4, logvar=none)
    assert (made.logvar == -math.inf).any()
    (made.z.sum() + made.log_mass.sum() + made.logvar.exp().sum()).backward()
    assert all(x.grad.isfinite().all() for x in (z, log_mass, none))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """Vectors keep theirs, masses are in fp32 or better."""
    z, log_mass = row(10)
    z, log_mass = z[None].to(dtype), log_mass[None].to(dtype if dtype == torch.float64 else torch.float32)
    made = merge(z, log_mass, num_vectors=6, logvar=torch.zeros_like(z))
    expected = merge(z.double(), log_mass.double(), num_vectors=6, logvar=torch.zeros_like(z.double()))
    assert made.assignment.equal(expected.assignment)
    assert (made.z.dtype, made.logvar.dtype, made.log_mass.dtype) == (dtype, dtype, log_mass.dtype)
    torch.testing.assert_close(made.z.double(), expected.z, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of num_vectors, share and cost, but got none"),
        ({"share": 0.5, "cost": 1.0}, "but got share and cost"),
        ({"num_vectors": 0}, "num_vectors must be whole numbers of at least 1, but got 0"),
        ({"num_vectors": 2.5}, "num_vectors must be whole numbers"),
        (
            {"num_vectors": [1, 2, 3]},
            r"num_vectors must be a number or one for each of 2 examples, but has shape \(3,\)",
        ),
        ({"share": 0.0}, r"share must be in \(0, 1\], but got 0.0"),
        ({"share": [0.5, 1.5]}, r"share must be in \(0, 1\], but got \[0.5, 1.5\]"),
        ({"cost": -1.0}, "cost must be at least 0, but got -1.0"),
        ({"cost": math.nan}, "cost must be at least 0, but got nan"),
        ({"share": 0.5, "order": "time"}, "order must be one of 'neighbours', 'any', but got 'time'"),
        ({"share": 0.5, "z": torch.zeros(4, 3)}, r"z must be \(B, Nl, P\), but has shape \(4, 3\)"),
        (
            {"share": 0.5, "log_mass": torch.zeros(2, 3)},
            r"log_mass has shape \(2, 3\), but z of \(2, 4, 3\) needs \(2, 4\)",
        ),
        (
            {"share": 0.5, "logvar": torch.zeros(2, 4)},
            r"logvar has shape \(2, 4\), but z of \(2, 4, 3\) needs \(2, 4, 3\)",
        ),
        ({"share": 0.5, "fixed": torch.zeros(4, dtype=torch.bool)}, r"fixed has shape \(4,\)"),
        (
            {"share": 0.5, "fixed": torch.zeros(2, 4)},
            "fixed must be boolean, True = never merged, but is torch.float32",
        ),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        merge(**{"z": torch.zeros(2, 4, 3), "log_mass": torch.zeros(2, 4), **given})


@pytest.mark.parametrize("order", ["neighbours", "any"])
def test_no_example_is_no_error(order):
    made = merge(torch.zeros(0, 5, 3), torch.zeros(0, 5), share=0.5, logvar=torch.zeros(0, 5, 3), order=order)
    assert made.z.shape == (0, 1, 3) and made.assignment.shape == (0, 5) and made.logvar.shape == (0, 1, 3)


@pytest.mark.parametrize("order", ["neighbours", "any"])
def test_autocast_merges_the_same(order):
    z, log_mass = torch.randn(2, 60, 64, generator=torch.Generator().manual_seed(0)) + 20, torch.zeros(2, 60)
    expected = merge(z, log_mass, share=0.3, order=order)
    with torch.autocast("cpu", torch.bfloat16):
        made = merge(z, log_mass, share=0.3, order=order)
    assert torch.equal(made.assignment, expected.assignment)
