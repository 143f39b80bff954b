"""Bit allocation as a multiple-choice knapsack, near-optimal with a bound on the gap.

    min  sum_i e_i,x_i     s.t.  sum_i c_i,x_i <= B,   one choice x_i for every item i

For any multiplier lam >= 0, L(lam) = sum_i min_j (e_ij + lam*c_ij) - lam*B is a lower bound of the optimum (Lagrange).
The steps along the items' lower convex hulls, taken in order of gain per cost until one no longer fits, give the lam
with the best bound (it is the optimum of the linear relaxation) and a first solution. With reduced costs
r_ij = e_ij + lam*c_ij - min_k (e_ik + lam*c_ik) >= 0, any solution x of cost C has

    sum_i e_i,x_i  =  L(lam) + sum_i r_i,x_i + lam*(B - C)

so that the last two terms are its gap, choices with r above the best known gap are discarded, and the rest is
solved by a dynamic programme over (cost, error) states that starts with the items of the smallest r. It is exact, and
known to be, unless more than `STATES` states that do not dominate each other are alive at a time; then those with the
least r stay, and no solution is better than L(lam) plus the least r that was dropped. This is the minimal-core scheme
of Pisinger (A minimal algorithm for the multiple-choice knapsack problem, 1995), stated with multipliers.

Deterministic. Cost about items * STATES * choices left; costs are whole numbers, so that no budget is exceeded by
rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

STATES = 1 << 14
CLOSED = 1e-12
"""Relative gap that is due to rounding alone."""

Whole = NDArray[np.int64]
Real = NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """One choice per item.

    cost    sum of the choices' costs, at most the budget
    error   sum of their errors
    bound   no allocation within the budget has a lower error
    """

    choices: tuple[int, ...]
    cost: int
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """(error - bound) / error: at most this share of the error is above the optimum."""
        return max(0.0, self.error - self.bound) / self.error if self.error > 0 else 0.0


@dataclass(frozen=True)
class _Relaxed:
    """Result of the linear relaxation: multiplier, bound, a solution, and r of every choice (inf: dominated)."""

    multiplier: float
    bound: float
    base: list[int]
    reduced: list[Real]


@dataclass(frozen=True)
class _States:
    """Partial solutions against the base: cost and sum of r, and the parent state and choice of each."""

    cost: Whole
    reduced: Real
    parent: Whole
    choice: Whole

    def take(self, index: NDArray[np.intp]) -> "_States":
        return _States(self.cost[index], self.reduced[index], self.parent[index], self.choice[index])


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> Allocation:
    """The choice of each item that gives the least error within the budget.

    costs, errors   of each item's choices, in any order and of any number; errors finite

    Raises:
        ValueError: the cheapest choices together cost more than the budget.
    """
    c = [np.asarray(cost, dtype=np.int64) for cost in costs]
    e = [np.asarray(error, dtype=np.float64) for error in errors]
    least = sum(int(cost.min()) for cost in c)
    if least > budget:
        raise ValueError(f"the cheapest choices cost {least}, more than the budget of {budget}")
    relaxed = _relax(c, e, budget)
    solution, proven = _search(c, relaxed, budget)
    choices = _fill(c, e, solution, budget)
    cost, error = _sums(c, e, choices)
    return Allocation(tuple(choices), cost, error, min(error, relaxed.bound + proven))


def _sums(c: list[Whole], e: list[Real], choices: Sequence[int]) -> tuple[int, float]:
    cost = sum(int(cost[x]) for cost, x in zip(c, choices, strict=True))
    return cost, float(sum(error[x] for error, x in zip(e, choices, strict=True)))


def _undominated(cost: Whole, error: Real) -> list[int]:
    """Choices that no other one beats in both, by rising cost."""
    kept: list[int] = []
    for index in np.lexsort((error, cost)):
        if not kept or error[index] < error[kept[-1]]:
            kept.append(int(index))
    return kept


def _hull(cost: Whole, error: Real) -> list[int]:
    """The lower convex hull of the undominated choices, by rising cost: gains per cost fall strictly."""
    hull: list[int] = []
    for index in _undominated(cost, error):
        while len(hull) > 1 and _gain(cost, error, hull[-2], hull[-1]) <= _gain(cost, error, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _gain(cost: Whole, error: Real, before: int, after: int) -> float:
    return float((error[before] - error[after]) / (cost[after] - cost[before]))


def _relax(c: list[Whole], e: list[Real], budget: int) -> _Relaxed:
    hulls = [_hull(cost, error) for cost, error in zip(c, e, strict=True)]
    steps = sorted(
        ((-_gain(c[i], e[i], a, b), i, k) for i, h in enumerate(hulls) for k, (a, b) in enumerate(pairwise(h)))
    )
    base = [hull[0] for hull in hulls]
    spent, multiplier = sum(int(cost[x]) for cost, x in zip(c, base, strict=True)), 0.0
    for gain, i, k in steps:
        cost = int(c[i][hulls[i][k + 1]] - c[i][hulls[i][k]])
        if spent + cost > budget:
            multiplier = -gain
            break
        base[i], spent = hulls[i][k + 1], spent + cost
    weighted = [error + multiplier * cost for cost, error in zip(c, e, strict=True)]
    reduced = []
    for item_cost, error, both in zip(c, e, weighted, strict=True):
        r = np.full(len(item_cost), np.inf)
        index = _undominated(item_cost, error)
        r[index] = both[index] - both.min()
        reduced.append(r)
    return _Relaxed(multiplier, float(sum(w.min() for w in weighted)) - multiplier * budget, base, reduced)


def _search(c: list[Whole], relaxed: _Relaxed, budget: int) -> tuple[list[int], float]:
    """The best solution of the dynamic programme, and how far above L any solution is proven to be."""
    base, lam = relaxed.base, relaxed.multiplier
    slack = budget - sum(int(cost[x]) for cost, x in zip(c, base, strict=True))
    gap, best, closed = lam * slack, (0, 0), CLOSED * max(abs(relaxed.bound), lam * slack)
    dropped = math.inf
    order = sorted(range(len(c)), key=lambda i: (np.delete(relaxed.reduced[i], base[i]).min(initial=np.inf), i))
    stages = [_States(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))]
    falls = np.array([int(c[i].min()) - int(c[i][base[i]]) for i in order] + [0])
    room = (
        slack - np.cumsum(falls[::-1])[::-1]
    )  # the cost that the items from there on can give back, added to the slack
    for stage, i in enumerate(order, start=1):
        if gap <= closed or relaxed.reduced[i][np.arange(len(c[i])) != base[i]].min(initial=np.inf) >= gap:
            break  # no later item has a smaller one
        states = _extended(stages[-1], c[i] - c[i][base[i]], relaxed.reduced[i], base[i], gap)
        states = _undominated_states(states, lam, int(room[stage]))
        if len(states.cost) > STATES:
            states, least = _least_reduced(states)
            dropped = min(dropped, least)
        stages.append(states)
        fits = np.flatnonzero(states.cost <= slack)
        gaps = states.reduced[fits] + lam * (slack - states.cost[fits])
        if len(fits) and gaps.min() < gap:
            gap, best = float(gaps.min()), (stage, int(fits[gaps.argmin()]))
    return _traced(stages, order, base, best), min(gap, dropped)


def _extended(states: _States, cost: Whole, reduced: Real, base: int, gap: float) -> _States:
    """Every state with every choice of one more item that may still lead below `gap`; `cost` against the base's."""
    choices = [base, *(j for j in np.flatnonzero(reduced < gap).tolist() if j != base)]
    count = len(states.cost)
    extended = _States(
        np.concatenate([states.cost + cost[j] for j in choices]),
        np.concatenate([states.reduced + (reduced[j] if j != base else 0) for j in choices]),
        np.tile(np.arange(count), len(choices)),
        np.repeat(np.array(choices), count),
    )
    return extended.take(np.flatnonzero(extended.reduced < gap))


def _undominated_states(states: _States, lam: float, room: int) -> _States:
    """The states that can come back into the budget and that no other one beats in cost and in error."""
    states = states.take(np.flatnonzero(states.cost <= room))
    error = states.reduced - lam * states.cost
    order = np.lexsort((error, states.cost))
    least = np.minimum.accumulate(np.concatenate([[np.inf], error[order][:-1]]))
    return states.take(order[error[order] < least])


def _least_reduced(states: _States) -> tuple[_States, float]:
    """The `STATES` states with the least r, and the least r of the others."""
    order = np.argsort(states.reduced, kind="stable")
    return states.take(np.sort(order[:STATES])), float(states.reduced[order[STATES]])


def _traced(stages: list[_States], order: list[int], base: list[int], best: tuple[int, int]) -> list[int]:
    choices, (stage, state) = list(base), best
    while stage > 0:
        choices[order[stage - 1]] = int(stages[stage].choice[state])
        state, stage = int(stages[stage].parent[state]), stage - 1
    return choices


def _fill(c: list[Whole], e: list[Real], choices: list[int], budget: int) -> list[int]:
    """Spends the rest of the budget, while a single other choice of an item lowers the error within the budget."""
    filled = list(choices)
    while True:
        left = budget - _sums(c, e, filled)[0]
        gains = [
            np.where(cost - cost[x] <= left, error[x] - error, 0) for cost, error, x in zip(c, e, filled, strict=True)
        ]
        item = max(range(len(c)), key=lambda i: gains[i].max())
        if gains[item].max() <= 0:
            return filled
        filled[item] = int(gains[item].argmax())
