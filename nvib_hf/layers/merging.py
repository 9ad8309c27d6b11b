r"""Merging: replaces weighted vectors by fewer ones, from which attention reads the same to first order.

From a set of vectors, attention with a bias :math:`b_j` per key reads

.. math:: K(q) = \log \sum_j w_j e^{s\, u^\top z_j}, \qquad w_j = e^{b_j}, \quad u = W_k^\top q

and its gradient. :math:`w_j` is the *mass* of a vector. Several vectors can be replaced by one vector at their mean,
with the mass of all; the error is of second order in their distances. Dropping a vector loses its mass, merging does
not.

* :func:`merge` merges a batch, in rounds of many pairs at once;
* :func:`merge_in_place` leaves the sequence as long as it is, and puts the merged vector in the place of each;
* :func:`naive_merge` is the definition, one pair after another. Tests compare the rounds with it.

Source: this project, by the reduction of mixtures. If all masses are equal at the start, the bias is the
"proportional attention" of ToMe (Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .denoising_attention import at_least_float32
from .distributions import log_of_positive
from .mutual_neighbours import REACH, assigned
from .settings import check_choice

Limit = float | Sequence[float] | Tensor
ORDERS = ("neighbours", "any")


class Merged(NamedTuple):
    """The result of :func:`merge`. Merged vectors are in the order of the first vector in each.

    ``z`` ``(B, K, P)``, 0 in padding; ``log_mass`` ``(B, K)``, ``-inf`` in padding; ``logvar`` ``(B, K, P)`` or
    ``None``; ``counts`` ``(B, K)``: how many vectors each merged vector replaces, 0 in padding; ``assignment``
    ``(B, Nl)``: the number of the merged vector that each vector went into, -1 where there was no vector.
    """

    z: Tensor
    log_mass: Tensor
    logvar: Tensor | None
    counts: Tensor
    assignment: Tensor


def merge(
    z: Tensor,
    log_mass: Tensor,
    *,
    num_vectors: int | Sequence[int] | Tensor | None = None,
    share: float | Sequence[float] | Tensor | None = None,
    cost: float | Sequence[float] | Tensor | None = None,
    logvar: Tensor | None = None,
    fixed: Tensor | None = None,
    order: str = "neighbours",
) -> Merged:
    r"""Fewer vectors with the mass of all, merged where that costs least.

    .. math::
        W = \sum_{j \in C} w_j, \qquad m = \frac{1}{W} \sum_{j \in C} w_j z_j, \qquad
        v = \frac{1}{W} \sum_{j \in C} w_j \bigl(\sigma_j^2 + (z_j - m)^2\bigr)

    Groups :math:`C` grow by merging pairs. The next pair is the one with the lowest cost

    .. math:: c_{ij} = \min\Bigl(1, \frac{2 w_i w_j}{w_i + w_j}\Bigr) \lVert z_i - z_j \rVert^2

    Masses are in units of the example's mean mass, so that its length and the weights' normaliser do not matter. What
    weighs next to nothing costs next to nothing. Between vectors of more than the mean mass only the distance counts:
    a query that looks for one of them reads that one, whatever the mass of the other. A round merges all pairs of
    mutually nearest vectors, cheapest first, until enough are merged. The choice of groups has no gradient; masses,
    means and variances have.

    Args:
        z: vectors before any projection, ``(B, Nl, P)``.
        log_mass: :math:`b`, ``(B, Nl)``, ``-inf`` where there is no vector (padding, dropped).
        num_vectors: how many vectors to leave, at least 1. A number above the vectors there are merges nothing.
        share: the share of an example's vectors to leave, in (0, 1], rounded, at least 1 vector.
        cost: merge as long as a pair costs at most this; 0 merges only equal vectors. Give exactly one of the three,
            as one number or one per example.
        logvar: log-variances ``(B, Nl, P)``, ``-inf`` for 0. The spread of merged vectors is added.
        fixed: ``(B, Nl)``, True where a vector is neither merged nor counted (the prior's component).
        order: ``"neighbours"`` merges vectors that are at most ``REACH`` places apart; those that are merged already,
            fixed or absent do not count. ``"any"`` merges any two vectors. It compares all pairs in every round, and
            needs many rounds if few pairs are mutually nearest (a minute for 1500 random vectors of many dimensions).

    Raises:
        ValueError: shapes do not fit; none or several of num_vectors, share and cost; a value is out of range.

    Source: this project. Without the 1 the cost is twice Ward's criterion (1963), the increase of the spread. With
    ``order="any"`` the rounds are those of agglomerative clustering by reciprocal nearest neighbours (Murtagh, 1983).
    """
    return reduced(z, log_mass, logvar, assign(z, log_mass, num_vectors, share, cost, logvar, fixed, order))


@torch.no_grad()
def assign(
    z: Tensor,
    log_mass: Tensor,
    num_vectors: Limit | None = None,
    share: Limit | None = None,
    cost: Limit | None = None,
    logvar: Tensor | None = None,
    fixed: Tensor | None = None,
    order: str = "neighbours",
) -> Tensor:
    """``Merged.assignment`` of :func:`merge`, whose arguments these are: which vectors are merged."""
    _check(z, log_mass, logvar, fixed, order)
    present = log_mass > float("-inf")
    mergeable = present if fixed is None else present & ~fixed
    fewest, highest_cost = _limits(num_vectors, share, cost, mergeable.sum(-1))
    if not len(z):
        return torch.full_like(present, -1, dtype=torch.long)
    return assigned(z, log_mass, present, mergeable, fewest, highest_cost, order)


class Groups(NamedTuple):
    """Which vectors were merged, and how they were weighed.

    ``assignment`` ``(B, Nl)``, as in :class:`Merged`; ``log_mass`` ``(B, Nl)``, of each vector before.
    """

    assignment: Tensor
    log_mass: Tensor

    def of_draws(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        r"""What merging makes of independent draws of Gaussians ``(B, Nl, P)``: Gaussians ``(B, K, P)``.

        .. math:: \frac1W \sum_{j \in C} w_j z_j \sim
            \mathcal N\Bigl(\frac1W \sum_j w_j \mu_j, \; \sum_j \Bigl(\frac{w_j}{W}\Bigr)^2 \sigma_j^2\Bigr)

        Returns:
            Means and log-variances; 0 in padding.
        """
        made = reduced(mu, self.log_mass, None, self.assignment)
        of_group = made.log_mass.gather(1, self.assignment.clamp(min=0))
        share = (self.log_mass - of_group).exp().masked_fill(self.assignment < 0, 0)
        variance = reduced(share[..., None] * logvar.exp(), self.log_mass, None, self.assignment).z
        return made.z, log_of_positive(variance).masked_fill((made.counts == 0)[..., None], 0)

    def totals(self, log_weight: Tensor) -> Tensor:
        """Logarithms ``(B, K)`` of what positive weights ``(B, Nl)`` sum to in each group; ``-inf`` in padding."""
        return reduced(log_weight[..., None], log_weight, None, self.assignment).log_mass


class MergedInPlace(NamedTuple):
    """What :func:`merge_in_place` made of a batch.

    ``z`` ``(B, Nl, P)`` and ``log_mass`` ``(B, Nl)``: of the group that a vector became part of; ``keep`` ``(B, Nl)``:
    True for the first vector of each group; ``group`` ``(B, Nl)``: its number, -1 where there was no vector.
    """

    z: Tensor
    log_mass: Tensor
    keep: Tensor
    group: Tensor

    def total(self, log_weight: Tensor) -> Tensor:
        """Logarithms of what positive weights ``(B, Nl)`` sum to in the group of each vector."""
        return Groups(self.group, log_weight).totals(log_weight).gather(1, self.group.clamp(min=0))


def merge_in_place(z: Tensor, log_mass: Tensor, share: float) -> MergedInPlace:
    """:func:`merge`, with each vector replaced by what it became part of, so that the sequence keeps its length.

    Args:
        z, log_mass, share: as :func:`merge` takes them.
    """
    made = merge(z, log_mass, share=share)
    group, there = made.assignment.clamp(min=0), made.assignment >= 0
    # Groups are numbered by their first vectors.
    before = F.pad(made.assignment, (1, 0), value=-1).cummax(-1).values[:, :-1]
    return MergedInPlace(
        z=torch.where(there[..., None], made.z.take_along_dim(group[..., None], dim=1), z),
        log_mass=made.log_mass.gather(1, group).masked_fill(~there, float("-inf")),
        keep=made.assignment > before,
        group=made.assignment,
    )


def _check(z: Tensor, log_mass: Tensor, logvar: Tensor | None, fixed: Tensor | None, order: str) -> None:
    """Raise ValueError if shapes do not fit together, or a setting is outside its range."""
    if z.dim() != 3:
        raise ValueError(f"z must be (B, Nl, P), but has shape {tuple(z.shape)}.")
    for name, value, shape in (
        ("log_mass", log_mass, z.shape[:2]),
        ("logvar", logvar, z.shape),
        ("fixed", fixed, z.shape[:2]),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but z of {tuple(z.shape)} needs {tuple(shape)}.")
    if fixed is not None and fixed.dtype != torch.bool:
        raise ValueError(f"fixed must be boolean, True = never merged, but is {fixed.dtype}. Pass fixed.bool().")
    check_choice("order", order, ORDERS)


def _limits(
    num_vectors: Limit | None, share: Limit | None, cost: Limit | None, count: Tensor
) -> tuple[Tensor, Tensor]:
    """For each example: the fewest vectors to leave, and the logarithm of the highest cost, each ``(B,)``.

    Args:
        count: vectors that may merge, ``(B,)``.
    """
    given = {"num_vectors": num_vectors, "share": share, "cost": cost}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"merge takes exactly one of num_vectors, share and cost, but got {' and '.join(given) or 'none'}."
        )
    [(name, value)] = given.items()
    try:
        values = torch.as_tensor(value, device=count.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number or one for each example, but got {value!r}.") from error
    if values.dim() > 1 or values.numel() not in (1, len(count)):
        raise ValueError(
            f"{name} must be a number or one for each of {len(count)} examples, but has shape {tuple(values.shape)}."
        )
    allowed = {
        "num_vectors": ((values >= 1) & (values % 1 == 0), "whole numbers of at least 1"),
        "share": ((values > 0) & (values <= 1), "in (0, 1]"),
        "cost": (values >= 0, "at least 0"),
    }
    right, which = allowed[name]
    if not right.all():
        raise ValueError(f"{name} must be {which}, but got {value}.")
    values = values.expand(len(count))
    no_limit = torch.full(count.shape, float("inf"), device=count.device)
    if name == "cost":
        return torch.ones_like(count), values.double().log().float()
    return values.long() if name == "num_vectors" else (values * count).round().long().clamp(min=1), no_limit


def reduced(z: Tensor, log_mass: Tensor, logvar: Tensor | None, assignment: Tensor) -> Merged:
    """What groups are replaced by: mass, mean and variance, by sums in at least fp32 over all vectors of each."""
    present = assignment >= 0
    number = int(F.pad(assignment, (0, 1)).max()) + 1 if len(z) else 1  # at least 1, possibly of padding
    row = torch.arange(len(z), device=z.device)[:, None] * number
    into = (assignment.clamp(min=0) + row).flatten()

    def total(x: Tensor) -> Tensor:
        """Sums of ``(B, Nl, ...)`` over groups, ``(B, K, ...)``. Vectors without a group must be 0."""
        empty = x.new_zeros(len(z) * number, *x.shape[2:])
        return empty.index_add(0, into, x.flatten(0, 1)).view(len(z), number, *x.shape[2:])

    def of_group(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, into).view(*assignment.shape, *x.shape[2:])

    mass = at_least_float32(log_mass).masked_fill(~present, float("-inf"))
    highest = mass.new_full((len(z), number), float("-inf"))
    highest = highest.scatter_reduce(1, assignment.clamp(min=0), mass.detach(), "amax")
    highest = highest.masked_fill(highest == float("-inf"), 0)
    weight = (mass - of_group(highest)).exp()
    sums = total(weight)
    weight = weight / of_group(sums).masked_fill(~present, 1)  # 0 in padding
    vectors = at_least_float32(z).masked_fill(~present[..., None], 0)
    mean = total(weight[..., None] * vectors)
    variance = None
    if logvar is not None:
        own = at_least_float32(logvar).exp().masked_fill(~present[..., None], 0)
        spread = (vectors - of_group(mean)).square()
        variance = log_of_positive(total(weight[..., None] * (own + spread)))
        variance = variance.masked_fill((sums == 0)[..., None], 0).to(logvar.dtype)
    return Merged(mean.to(z.dtype), log_of_positive(sums) + highest, variance, total(present.long()), assignment)


def naive_merge(z: Tensor, log_mass: Tensor, num_vectors: int, order: str = "neighbours") -> Merged:
    """The definition of :func:`merge`, for one example ``(Nl, P)``, ``(Nl,)``: always the cheapest pair. For tests."""
    z, mass = z.double(), log_mass.double().exp()
    mass = mass / mass[mass > 0].mean()
    groups = [[j] for j in range(len(z)) if mass[j] > 0]

    def moments() -> tuple[Tensor, Tensor]:
        total = torch.stack([mass[group].sum() for group in groups])
        return total, torch.stack([mass[group] @ z[group] for group in groups]) / total[:, None]

    while len(groups) > num_vectors:
        total, mean = moments()
        harmonic_mean = 2 / (1 / total[:, None] + 1 / total)
        costs = harmonic_mean.clamp(max=1) * (mean[:, None] - mean).square().sum(-1)
        pairs = torch.ones_like(costs).triu(1).tril(REACH if order == "neighbours" else len(groups))
        i, j = divmod(int(costs.masked_fill(pairs == 0, float("inf")).argmin()), len(groups))
        groups[i] = groups[i] + groups.pop(j)
    assignment = torch.full((len(z),), -1)
    for k, group in enumerate(groups):
        assignment[group] = k
    total, mean = moments()
    variance = [mass[g] @ (z[g] - mean[k]).square() / total[k] for k, g in enumerate(groups)]
    log_total = torch.stack([log_mass.double()[group].logsumexp(0) for group in groups])
    counts = torch.tensor([len(group) for group in groups])
    return Merged(mean, log_total, torch.stack(variance).log(), counts, assignment)
