"""The frontier of size and error: the best allocations of so many sizes, from the smallest choices to the best ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.domain.methods import Candidate
from workers.engine.quantize.bit_budget import solve

POINTS = 24
"""Sizes that are looked at. From 2 to 8 bits a step is a quarter of a bit, which is a third of the distance or so."""


@dataclass(frozen=True)
class Point:
    """The allocation with the least error within a size.

    choices   of each linear, the index of its candidate
    bits      that the linears take
    error     sum of their errors
    gap       at most this share of the error is above the least
    """

    choices: Mapping[str, int]
    bits: int
    error: float
    gap: float


@dataclass(frozen=True)
class Scores:
    """Costs and errors of every linear's candidates, by full name; costs in bits."""

    candidates: Mapping[str, tuple[Candidate, ...]]
    costs: Mapping[str, Sequence[int]]
    errors: Mapping[str, Sequence[float]]
    groups: Sequence[Sequence[str]] = ()

    @property
    def least(self) -> int:
        """Bits of the smallest choices."""
        return sum(map(min, self.costs.values()))

    def best(self, limit: int) -> Point | None:
        """The point of a size in bits; None if nothing is so small."""
        solved = solve(self.candidates, self.costs, self.errors, limit, self.groups)
        if solved is None:
            return None
        allocation, choices = solved
        return Point(choices, allocation.cost, allocation.error, allocation.gap)


def frontier(scores: Scores, limit: int | None = None, count: int = POINTS) -> tuple[Point, ...]:
    """Points from the smallest to the largest; each is larger than the one before it, and has a smaller error.

    limit   a size in bits that is looked at besides
    count   of sizes, evenly spaced
    """
    largest = scores.best(sum(map(max, scores.costs.values())))
    if largest is None:
        return ()
    least, most = scores.least, largest.bits
    limits = [least + (most - least) * step // max(1, count - 1) for step in range(count)]
    found = [scores.best(size) for size in sorted({*limits, *([] if limit is None else [limit])})]
    points: list[Point] = []
    for point in sorted((p for p in (*found, largest) if p is not None), key=lambda p: (p.bits, p.error)):
        if not points or (point.bits > points[-1].bits and point.error < points[-1].error):
            points.append(point)
    return tuple(points)
