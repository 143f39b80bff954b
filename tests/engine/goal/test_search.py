"""The frontier against brute force, and the search on it against known curves."""

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.formats import ExportFormat
from app.domain.goals.stored_size import stored_bits
from app.domain.methods import Candidate, Scheme, SchemeName
from workers.engine.goal.frontier import Scores, frontier
from workers.engine.goal.search import Curve, bracket

SCHEMES = [
    *(Scheme(bits=bits, group_size=32, symmetric=True) for bits in (2, 3, 4, 8)),
    *map(Scheme.named, (SchemeName.NVFP4A16, SchemeName.FP8A16)),
]


def scores(seed: int, linears: int, *, tied: bool = False) -> Scores:
    """Linears of different shapes with errors that fall about fourfold a bit, each scheme by chance better or worse."""
    generator = np.random.default_rng(seed)
    names = [f"model.layers.{n}" for n in range(linears)]
    shapes = {name: (int(generator.integers(1, 5)) * 32, int(generator.integers(1, 5)) * 32) for name in names}
    candidates = {name: tuple(map(Candidate, SCHEMES)) for name in names}
    costs = {
        n: [stored_bits((ExportFormat.NATIVE,), c, shapes[n], 16) for c in found] for n, found in candidates.items()
    }
    errors = {n: [float(generator.uniform(0.3, 3) * 4.0**-s.bits) for s in SCHEMES] for n in names}
    return Scores(candidates, costs, errors, [names[:2]] if tied else ())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [False, True])
def test_a_point_over_schemes_is_the_best_of_all_allocations(seed: int, tied: bool) -> None:
    known = scores(seed, 4, tied=tied)
    names = list(known.costs)
    everything = [
        (sum(known.costs[n][x] for n, x in zip(names, choice, strict=True)),
         sum(known.errors[n][x] for n, x in zip(names, choice, strict=True)))
        for choice in product(range(len(SCHEMES)), repeat=4)
        if not tied or choice[0] == choice[1]
    ]  # fmt: skip
    for limit in sorted({cost for cost, _ in everything})[:: 40 if tied else 160]:
        point = known.best(limit)
        assert point is not None
        assert point.bits <= limit
        assert point.error == pytest.approx(min(error for cost, error in everything if cost <= limit), rel=1e-9)
        assert not tied or point.choices[names[0]] == point.choices[names[1]]
    assert known.best(min(cost for cost, _ in everything) - 1) is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 12))
def test_a_frontier_is_monotone_whatever_the_errors(seed: int, linears: int, count: int) -> None:
    known = scores(seed, linears)
    points = frontier(known, limit=known.least + 1000, count=count)
    assert points
    assert points[0].bits == known.least
    for smaller, larger in pairwise(points):
        assert smaller.bits < larger.bits
        assert smaller.error > larger.error
    assert points[-1].error == pytest.approx(sum(map(min, known.errors.values())))


def test_a_size_that_is_asked_for_is_a_point() -> None:
    known = scores(3, 8)
    limit = known.least * 3 // 2
    best = known.best(limit)
    assert best is not None
    assert best.bits in {point.bits for point in frontier(known, limit)}
    assert max(p.bits for p in frontier(known, limit) if p.bits <= limit) == best.bits


ERRORS = [4.0 ** -(0.25 * index) for index in range(24)]


def rounded_until_known(true: list[float], limit: float) -> Curve:
    rounded: dict[int, float] = {}
    while (index := Curve(ERRORS, rounded).next_rounded(limit)) is not None:
        assert index not in rounded
        rounded[index] = true[index]
    return Curve(ERRORS, rounded)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 3.0), st.floats(0.01, 50.0), st.floats(1e-4, 10.0))
def test_the_smallest_that_holds_is_found_with_few_measurements(power: float, scale: float, limit: float) -> None:
    true = [scale * error**power for error in ERRORS]
    curve = rounded_until_known(true, limit)
    expected = next((index for index, kl in enumerate(true) if kl <= limit), None)
    assert curve.smallest_rounded(limit) == expected
    assert len(curve.rounded) <= 8
    if expected:
        assert expected - 1 in curve.rounded, "the next smaller one is known to miss"
    predicted = [curve.predicted(index) or 0.0 for index in range(len(ERRORS))]
    assert all(a >= b for a, b in pairwise(predicted))


def test_noise_does_not_make_the_prediction_rise() -> None:
    curve = Curve(ERRORS, {2: 0.5, 6: 0.6, 10: 0.01})
    predicted = [curve.predicted(index) or 0.0 for index in range(24)]
    assert all(a >= b for a, b in pairwise(predicted))
    assert Curve(ERRORS).predicted(3) is None
    assert Curve(ERRORS, {4: 0.1}).predicted(8) == pytest.approx(0.1 / 4)


def makings(true: list[float], made: list[float], limit: float, rounds: int) -> Curve:
    curve, found = rounded_until_known(true, limit), dict[int, float]()
    while (index := Curve(ERRORS, curve.rounded, found).next_made(limit, rounds)) is not None:
        assert index not in found
        found[index] = made[index]
    return Curve(ERRORS, curve.rounded, found)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.1, 1.3), st.floats(0.8, 1.2), st.floats(0.002, 0.5))
def test_rounds_end_at_the_smallest_that_the_method_holds(gain: float, power: float, limit: float) -> None:
    true = [error**1.2 for error in ERRORS]
    made = [gain * kl**power for kl in true]
    curve = makings(true, made, limit, 8)
    expected = next(index for index, kl in enumerate(made) if kl <= limit)
    assert curve.chosen(limit) == expected
    assert expected == 0 or expected - 1 in curve.made


def test_rounds_are_bounded_and_the_best_of_them_is_the_result() -> None:
    true = [error**1.2 for error in ERRORS]
    worse: list[Any] = [3.0 * kl for kl in true]
    curve = makings(true, worse, 0.01, 1)
    assert len(curve.made) == 1
    assert bracket(curve.made, 0.01)[0] is None, "nothing that holds was made"
    assert curve.chosen(0.01) == min(curve.made, key=lambda index: curve.made[index])
    two = makings(true, worse, 0.01, 2)
    assert bracket(two.made, 0.01)[0] is not None, "the second round knows how far off the first was"
