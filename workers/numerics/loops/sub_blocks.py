"""Loops that fit a factor, and an offset, to each sub-block of a block type; formulas and order of the trials are those
of `workers.numerics.blocks.sub_blocks`.

Arrays are (sub-blocks, columns), or (sub-blocks,) for what is found; each loop takes sub-blocks `first` to `end`.
Levels are given as `workers.numerics.loops.levels` takes them.
"""

from typing import Any

import numpy as np

from workers.numerics.loops.compiled import adding_loop
from workers.numerics.loops.levels import nearest


@adding_loop
def fit_factors(
    first: int,
    end: int,
    numbers: Any,
    weights: Any,
    divisors: Any,
    unsigned: bool,
    refinements: int,
    levels: Any,
    last: Any,
    first_half: Any,
    factor: Any,
    error: Any,
) -> None:
    """The best factor of those that begin as the widest number, or its magnitude, over each divisor."""
    zero, one = np.float32(0), np.float32(1)
    for g in range(first, end):
        widest, energy, least, best = zero, zero, zero, zero
        for j in range(numbers.shape[1]):
            x = numbers[g, j]
            energy += weights[g, j] * x * x
            widest = x if abs(x) > abs(widest) else widest
        widest = abs(widest) if unsigned else widest
        for trial in range(len(divisors) + refinements):
            tried = widest / divisors[trial] if trial < len(divisors) else best
            unit = zero if tried == 0 else one / tried
            product, square = zero, zero
            for j in range(numbers.shape[1]):
                level = nearest(numbers[g, j] * unit, levels, last, first_half)
                weighted = weights[g, j] * level
                product += weighted * numbers[g, j]
                square += weighted * level
            found = product * (zero if square == 0 else one / square)
            left = energy - found * product
            if trial == 0 or left < least:
                least, best = left, found
        factor[g], error[g] = best, least


@adding_loop
def fit_with_offsets(
    first: int,
    end: int,
    numbers: Any,
    weights: Any,
    divisors: Any,
    free: bool,
    alike: Any,
    refinements: int,
    levels: Any,
    last: Any,
    first_half: Any,
    factor: Any,
    offset: Any,
    error: Any,
) -> None:
    """The best factor and offset; the latter at most 0 unless it is `free`."""
    zero, one, two = np.float32(0), np.float32(1), np.float32(2)
    for g in range(first, end):
        low, high = numbers[g, 0], numbers[g, 0]
        total, line, energy = zero, zero, zero
        for j in range(numbers.shape[1]):
            x, weighted = numbers[g, j], weights[g, j] * numbers[g, j]
            low, high = min(low, x), max(high, x)
            total += weights[g, j]
            line += weighted
            energy += weighted * x
        low = low if free or low < 0 else zero
        spread = max(high - low, zero) / last
        least, best, shift = zero, zero, zero
        count = 1 + 2 * len(divisors)
        for trial in range(count + refinements):
            if trial == 0:
                tried, at = spread, low
            elif trial < count:
                divisor = divisors[(trial - 1) // 2]
                tried = spread / divisor
                at = low if trial % 2 else low + spread * last * (one - one / divisor) / two
            else:
                tried, at = best, shift
            unit = zero if tried == 0 else one / tried
            by_one, by_level, product = zero, zero, zero
            for j in range(numbers.shape[1]):
                level = nearest((numbers[g, j] - at) * unit, levels, last, first_half)
                weighted = weights[g, j] * level
                by_one += weighted
                by_level += weighted * level
                product += weighted * numbers[g, j]
            determinant = total * by_level - by_one * by_one
            if determinant <= alike * total * by_level:
                slope, put = zero, zero if total == 0 else line / total
            else:
                slope = (total * product - line * by_one) / determinant
                put = (by_level * line - by_one * product) / determinant
            if not free and put > 0:
                slope, put = product * (zero if by_level == 0 else one / by_level), zero
            left = energy - two * (slope * product + put * line)
            left += slope * slope * by_level + two * slope * put * by_one + put * put * total
            left = max(left, zero)
            if trial == 0 or left < least:
                least, best, shift = left, slope, put
        factor[g], offset[g], error[g] = best, shift, least
