"""AdamW's step against the formula in fp64 Python, and what must not move anything."""

import math

import pytest
import torch

from workers.numerics.adamw import AdamW


def by_formula(gradients: list[float], start: float, rate: float, decay: float) -> float:
    """The paper's algorithm with betas 0.9 and 0.999, and no epsilon to speak of."""
    p, m, v = start, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        p -= rate * decay * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p -= rate * (m / (1 - 0.9**t)) / math.sqrt(v / (1 - 0.999**t))
    return p


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_steps_are_the_formula_however_small_the_gradients_are(unit: float) -> None:
    gradients = [0.3, -1.2, 0.7, 0.05, -0.4]
    p = torch.tensor([0.5], dtype=torch.float64)
    optimizer = AdamW.of(p)
    for g in gradients:
        optimizer.step(p, torch.tensor([g * unit], dtype=torch.float64), 0.1, 0.2)
    assert float(p) == pytest.approx(by_formula(gradients, 0.5, 0.1, 0.2), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_none(value: float) -> None:
    ours, other = torch.tensor([0.5, -0.5]), torch.tensor([0.5, -0.5])
    first, second = AdamW.of(ours), AdamW.of(other)
    for g in (1.0, value, -2.0):
        first.step(ours, torch.tensor([1.0, g]), 0.1, 0.0)
        second.step(other, torch.tensor([1.0, g if math.isfinite(g) else 0.0]), 0.1, 0.0)
    assert torch.equal(ours, other)
    assert bool(ours.isfinite().all())


def test_after_a_reset_it_begins_anew() -> None:
    p = torch.tensor([0.5])
    optimizer = AdamW.of(p)
    for _ in range(3):
        optimizer.step(p, torch.tensor([3.0]), 0.1, 0.0)
    optimizer.reset()
    assert all(not bool(part.any()) for part in (optimizer.mean, optimizer.square, optimizer.count))
