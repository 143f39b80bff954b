"""The search for the smallest point of a frontier whose distance keeps a limit, with few measurements.

A point's error is a prediction of its distance (KL) when it is rounded to nearest. That is measured where the search
needs it; elsewhere log KL is taken as a function of log error, straight between measured points, with slope 1 outside
where one is known alone. The errors fall from point to point, and of measured values that rise by noise the smaller one
before them counts, so that the prediction is monotone.

A method that tunes is closer than that by a factor which only making it tells: that of the last point made stands for
the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

SPREAD = 4.0
"""Two standard errors of a mean of single tokens, where those differ by twice their mean."""
MOST_MEASURED = 10
"""Points that are rounded and measured at the most."""
TINY = 1e-12


@dataclass(frozen=True)
class Curve:
    """Distances along a frontier.

    errors   of its points, falling
    rounded  measured KL of points that were rounded to nearest, by index
    made     the same of the method's result
    """

    errors: Sequence[float]
    rounded: Mapping[int, float] = field(default_factory=dict)
    made: Mapping[int, float] = field(default_factory=dict)

    def predicted(self, index: int) -> float | None:
        """KL of the point rounded to nearest; None where nothing was measured. Never rises with the index."""
        known = self._monotone()
        if not known:
            return None
        if index in known:
            return known[index]
        at, places = self._place(index), sorted(known)
        if len(places) == 1:
            return math.exp(self._log(known[places[0]]) + at - self._place(places[0]))
        pairs = list(pairwise(places))
        left, right = next(((a, b) for a, b in pairs if index < b), pairs[-1])
        x0, x1, y0, y1 = self._place(left), self._place(right), self._log(known[left]), self._log(known[right])
        slope = max(0.0, (y1 - y0) / (x1 - x0)) if x1 != x0 else 0.0
        near, base = (x0, y0) if index < right else (x1, y1)
        return math.exp(base + slope * (at - near))

    def _monotone(self) -> dict[int, float]:
        lowest, known = math.inf, {}
        for index in sorted(self.rounded):
            lowest = min(lowest, self.rounded[index])
            known[index] = lowest
        return known

    def _place(self, index: int) -> float:
        return math.log(max(self.errors[index], TINY))

    def _log(self, value: float) -> float:
        return math.log(max(value, TINY))

    def next_rounded(self, limit: float) -> int | None:
        """The point to measure next; None once the smallest that holds is known, or that none does."""
        last = len(self.errors) - 1
        if not self.rounded:
            return next((index for index, error in enumerate(self.errors) if error <= limit), last)
        if last not in self.rounded and min(self.rounded.values()) > limit:
            return self._larger(limit)
        holding, missing = bracket(self.rounded, limit)
        if holding is None or holding - missing <= 1 or len(self.rounded) >= MOST_MEASURED:
            return None
        inside = range(missing + 1, holding)
        guess = next((index for index in inside if (self.predicted(index) or 0.0) <= limit), holding)
        # A guess at the edge of what is known is right at once or goes on step by step: then halves are faster.
        if len(self.rounded) > 4 and guess in (holding, missing + 1):
            guess = (missing + holding) // 2
        return min(max(guess, missing + 1), holding - 1)

    def _larger(self, limit: float) -> int | None:
        """The next point above those that all miss; None if the largest does."""
        missing, last = max(self.rounded), len(self.errors) - 1
        return next((i for i in range(missing + 1, last) if (self.predicted(i) or 0.0) <= limit), last)

    def smallest_rounded(self, limit: float) -> int | None:
        """The smallest point that was measured to hold, rounded to nearest."""
        return bracket(self.rounded, limit)[0]

    def next_made(self, limit: float, rounds: int) -> int | None:
        """The point to make next; None once there is nothing to gain, or `rounds` were made."""
        holding, missing = bracket(self.made, limit)
        last = len(self.errors) - 1
        if (holding is not None and holding - missing <= 1) or missing == last or len(self.made) >= rounds:
            return None
        ratio = self._ratio()
        end = last if holding is None else holding - 1
        inside = range(missing + 1, end + 1)
        guess = next((index for index in inside if ratio * (self.predicted(index) or 0.0) <= limit), end)
        return guess

    def _ratio(self) -> float:
        """KL of what the method makes, as a share of rounding's: of the last point made in the order of size."""
        if not self.made:
            return 1.0
        index = list(self.made)[-1]
        return self.made[index] / max(self.predicted(index) or TINY, TINY)

    def chosen(self, limit: float) -> int:
        """The smallest point that was made and holds, or else the closest that was made."""
        holding, _ = bracket(self.made, limit)
        return min(self.made, key=lambda index: self.made[index]) if holding is None else holding


def margin(tokens: int) -> float:
    """Of text for text: a point holds if it keeps the limit divided by this on so many tokens, which are a sample."""
    return 1 + SPREAD / math.sqrt(max(1, tokens))


def bracket(values: Mapping[int, float], limit: float) -> tuple[int | None, int]:
    """The smallest index that keeps the limit, and the largest below it that does not (-1: none).

    None that keeps it: the largest that does not, of all.
    """
    holding = min((index for index, value in values.items() if value <= limit), default=None)
    below = (index for index, value in values.items() if value > limit and (holding is None or index < holding))
    return holding, max(below, default=-1)
