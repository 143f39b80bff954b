"""The best factor, and offset, of each sub-block by itself: real numbers, before they become codes.

For numbers x with weights a, levels l and trial factors f_t that spread the levels a little more or less than the
range:

    l = level nearest to (x - o) / f_t
    without an offset    f = sum(a x l) / sum(a l^2)                          least squares with these levels
    with one             f, o jointly, o <= 0 where the type asks for it      (else o = 0, and f as above); where all
                         levels are one, which leaves f open, f = 0 and o the mean of x

The pair of the least sum a (x - f l - o)^2 over the trials is kept, and refined by the same two steps in turn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain.methods.block_types import ODD_LEVELS, BlockType
from workers.numerics.backend import sub_block_loops
from workers.numerics.blocks.levels import inverse, nearest_levels


@dataclass(frozen=True)
class Trials:
    """Factors that are tried: the range over the levels' own, divided by `count` numbers from `low` to `high`."""

    count: int
    low: float
    high: float

    def spreads(self) -> list[float]:
        """The divisors."""
        return torch.linspace(self.low, self.high, self.count).tolist()


REFINEMENTS = 2
ALIKE = 1e-6
"""Share of the levels' mean square that their variance is at most where they count as one: it is rounding in fp32."""


def trials_of(kind: BlockType) -> Trials:
    """More, and further apart, for fewer levels."""
    levels = len(kind.levels)
    if levels <= 4:
        return Trials(14, 0.65, 1.5) if kind.offset else Trials(28, 0.6, 2.8)
    if levels <= 8:
        return Trials(16, 0.75, 1.35)
    if kind.levels == ODD_LEVELS:
        return Trials(10, 0.8, 1.35)
    return Trials(12, 0.85, 1.2) if levels <= 16 else Trials(8, 0.95, 1.05)


def edges_of(kind: BlockType) -> tuple[int, ...]:
    """Levels that the widest number is tried at: both ends, but where they are the same without their signs."""
    lowest, highest = kind.levels[0], kind.levels[-1]
    return (highest,) if lowest == -highest else (lowest, highest)


@dataclass(frozen=True)
class Fit:
    """Factors and offsets of sub-blocks (...,), and the sums of squared errors that they leave."""

    factor: Tensor
    offset: Tensor
    error: Tensor

    def take(self, other: "Fit") -> None:
        """Exchange those that another fit is better for."""
        better = other.error < self.error
        for mine, theirs in ((self.factor, other.factor), (self.offset, other.offset), (self.error, other.error)):
            torch.where(better, theirs, mine, out=mine)


def fit_sub_blocks(numbers: Tensor, weights: Tensor, kind: BlockType) -> Fit:
    """The best fit of each sub-block; numbers and weights fp32 (..., columns)."""
    return _fit_with_offset(numbers, weights, kind) if kind.offset else _fit_factor(numbers, weights, kind)


def _fit_factor(numbers: Tensor, weights: Tensor, kind: BlockType) -> Fit:
    edges, loops = edges_of(kind), sub_block_loops(kind, numbers.device, numbers.dtype)
    if loops is not None:
        divisors = [edge * spread for spread in trials_of(kind).spreads() for edge in edges]
        unsigned = len(edges) == 1
        factor, error = loops.fit_factors(numbers, weights, kind, divisors, unsigned=unsigned, refinements=REFINEMENTS)
        return Fit(factor, torch.zeros_like(factor), error)
    weighted = weights * numbers
    energy = (weighted * numbers).sum(-1)
    widest = numbers.gather(-1, numbers.abs().argmax(-1, keepdim=True)).squeeze(-1)
    widest = widest.abs() if len(edges) == 1 else widest

    def solved(factor: Tensor) -> Fit:
        levels = nearest_levels(numbers * inverse(factor).unsqueeze(-1), kind)
        product, square = (weighted * levels).sum(-1), (weights * levels.square()).sum(-1)
        found = product * inverse(square)
        return Fit(found, torch.zeros_like(found), energy - found * product)

    best: Fit | None = None
    for spread in trials_of(kind).spreads():
        for edge in edges:
            found = solved(widest / (edge * spread))
            if best is None:
                best = found
            else:
                best.take(found)
    assert best is not None  # noqa: S101 - for the type checker
    for _ in range(REFINEMENTS):
        best.take(solved(best.factor))
    return best


def _fit_with_offset(numbers: Tensor, weights: Tensor, kind: BlockType) -> Fit:
    """Offsets of either sign where they are stored as they are, else none above 0."""
    free, loops = kind.minimums is None, sub_block_loops(kind, numbers.device, numbers.dtype)
    if loops is not None:
        given = (numbers, weights, kind, trials_of(kind).spreads())
        return Fit(*loops.fit_with_offsets(*given, free=free, alike=ALIKE, refinements=REFINEMENTS))
    low, high = numbers.amin(-1), numbers.amax(-1)
    low = low if free else low.clamp(max=0)
    weighted = weights * numbers
    total, first, energy = weights.sum(-1), weighted.sum(-1), (weighted * numbers).sum(-1)
    reach = kind.levels[-1]

    def solved(factor: Tensor, offset: Tensor) -> Fit:
        scaled = (numbers - offset.unsqueeze(-1)).mul_(inverse(factor).unsqueeze(-1))
        levels = nearest_levels(scaled, kind)
        by_level = weights * levels
        one, two, product = by_level.sum(-1), (by_level * levels).sum(-1), (weighted * levels).sum(-1)
        determinant = total * two - one * one
        alike = determinant <= ALIKE * total * two
        slope = torch.where(alike, 0.0, (total * product - first * one) * inverse(determinant))
        shift = torch.where(alike, first * inverse(total), (two * first - one * product) * inverse(determinant))
        if not free:
            above = shift > 0
            slope, shift = torch.where(above, product * inverse(two), slope), shift.clamp(max=0)
        # The quadratic form itself, and not what is left of the energy: the fit need not be its minimum.
        error = energy - 2 * (slope * product + shift * first)
        error += slope * slope * two + 2 * slope * shift * one + shift * shift * total
        return Fit(slope, shift, error.clamp_(min=0))

    spread = (high - low).clamp(min=0) / reach
    best = solved(spread, low)
    for divisor in trials_of(kind).spreads():
        best.take(solved(spread / divisor, low))
        best.take(solved(spread / divisor, low + spread * reach * (1 - 1 / divisor) / 2))
    for _ in range(REFINEMENTS):
        best.take(solved(best.factor, best.offset))
    return best
