"""The allocator against brute force and against an independent solver."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from workers.numerics import allocation
from workers.numerics.allocation import Allocation, allocate


def brute_force(costs: list[list[int]], errors: list[list[float]], budget: int) -> float:
    found = np.inf
    for choice in itertools.product(*(range(len(cost)) for cost in costs)):
        if sum(cost[x] for cost, x in zip(costs, choice, strict=True)) <= budget:
            found = min(found, sum(error[x] for error, x in zip(errors, choice, strict=True)))
    return float(found)


def by_milp(costs: list[list[int]], errors: list[list[float]], budget: int) -> float:
    c, e = np.concatenate(costs).astype(float), np.concatenate(errors)
    items = np.repeat(np.arange(len(costs)), [len(cost) for cost in costs])
    one_each = (items[None] == np.arange(len(costs))[:, None]).astype(float)
    limits = [LinearConstraint(c[None], ub=[budget]), LinearConstraint(one_each, 1, 1)]
    solved = milp(
        e, integrality=np.ones(len(e)), bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 1e-7}
    )
    assert solved.success
    return float(solved.fun)


def check(found: Allocation, costs: list[list[int]], errors: list[list[float]], budget: int) -> None:
    """Checks any answer: its sums, the budget, the certificate, and that no single change would be better."""
    assert found.cost == sum(cost[x] for cost, x in zip(costs, found.choices, strict=True)) <= budget
    assert found.error == pytest.approx(sum(error[x] for error, x in zip(errors, found.choices, strict=True)))
    assert found.bound <= found.error
    for cost, error, x in zip(costs, errors, found.choices, strict=True):
        for other, lower in zip(cost, error, strict=True):
            assert lower >= error[x] or found.cost - cost[x] + other > budget


def quantizers(items: int, choices: int, seed: int) -> tuple[list[list[int]], list[list[float]], int]:
    """Matrices of a few sizes with errors that fall about fourfold a bit, as those of quantizers do."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([331_776, 110_592, 884_736], items)
    bits = rng.integers(2 * 64, 8 * 64, (items, choices))
    scale = rng.lognormal(0, 2, (items, 1)) * sizes[:, None]
    errors = scale * 4.0 ** (-bits / 64) * rng.lognormal(0, 0.1, bits.shape)
    budget = int(2.75 * sizes.sum()) if choices > 10 else int(4 * sizes.sum())
    return (bits * sizes[:, None] // 64).tolist(), errors.tolist(), budget


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 5), st.floats(0, 1))
def test_small_cases_equal_brute_force(seed: int, items: int, most: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    costs = [rng.integers(1, 40, rng.integers(1, most + 1)).tolist() for _ in range(items)]
    errors = [rng.integers(0, 30, len(cost)).astype(float).tolist() for cost in costs]
    least, highest = sum(map(min, costs)), sum(map(max, costs))
    budget = least + int(share * (highest - least))
    found = allocate(costs, errors, budget)
    check(found, costs, errors, budget)
    assert found.error == pytest.approx(brute_force(costs, errors, budget))
    assert found.gap < 1e-9, "it is known to be the optimum"


@pytest.mark.parametrize("seed", range(6))
def test_the_unit_of_errors_changes_no_choice(seed: int) -> None:
    """A power of two, so that every sum and comparison is the same but for its exponent."""
    costs, errors, budget = quantizers(7, 5, seed)
    plain = allocate(costs, errors, budget)
    small = allocate(costs, [[error * 2.0**-60 for error in each] for each in errors], budget)
    assert small.choices == plain.choices
    assert small.bound == plain.bound * 2.0**-60
    assert plain.error == pytest.approx(brute_force(costs, errors, budget))


@pytest.mark.parametrize("seed", range(4))
def test_medium_cases_are_as_good_as_those_of_a_solver(seed: int) -> None:
    costs, errors, budget = quantizers(30, 12, seed)
    found = allocate(costs, errors, budget)
    check(found, costs, errors, budget)
    reference = by_milp(costs, errors, budget)
    assert found.error <= reference * (1 + 1e-6)
    assert found.bound <= reference * (1 + 1e-6)


def test_a_whole_model_takes_seconds_and_the_gap_is_small() -> None:
    costs, errors, budget = quantizers(210, 100, 7)
    started = time.perf_counter()
    found = allocate(costs, errors, budget)
    assert time.perf_counter() - started < 30
    check(found, costs, errors, budget)
    assert found.gap < 1e-4
    assert allocate(costs, errors, budget) == found


def test_a_loose_budget_takes_the_best_and_a_tight_one_the_cheapest() -> None:
    costs, errors, _ = quantizers(20, 8, 3)
    loose = allocate(costs, errors, 10**12)
    assert loose.error == pytest.approx(sum(map(min, errors)))
    assert loose.gap == pytest.approx(0, abs=1e-12)
    least = sum(map(min, costs))
    assert allocate(costs, errors, least).cost == least
    with pytest.raises(ValueError, match="more than the budget"):
        allocate(costs, errors, least - 1)


def test_a_bound_stays_a_bound_where_states_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for three states the optimum is missed now and then, and the certificate must not say otherwise."""
    monkeypatch.setattr(allocation, "STATES", 3)
    rng, missed = np.random.default_rng(1), 0
    for _ in range(60):
        costs = rng.integers(1, 60, (7, 3)).tolist()
        errors = rng.uniform(0, 30, (7, 3)).tolist()
        budget = sum(map(min, costs)) + int(rng.integers(10, 120))
        found, optimum = allocate(costs, errors, budget), brute_force(costs, errors, budget)
        check(found, costs, errors, budget)
        assert found.bound <= optimum * (1 + 1e-9)
        missed += found.error > optimum * (1 + 1e-9)
    assert missed > 3, "a test of dropped states"


def test_a_gap_is_a_share_of_the_error() -> None:
    assert Allocation((0,), 1, error=4.0, bound=3.0).gap == 0.25
    assert Allocation((0,), 1, error=4.0, bound=5.0).gap == 0
    assert Allocation((0,), 1, error=0.0, bound=0.0).gap == 0


def test_states_and_the_gap_that_counts_as_none() -> None:
    assert allocation.STATES == 16_384
    assert allocation.CLOSED == 1e-12
