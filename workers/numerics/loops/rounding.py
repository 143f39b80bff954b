"""Loops of SignRound's fake quantizer; `workers.numerics.backends.rounding.rounding_loops` calls them.

Arrays are (groups, G), or (groups,) for what a group has one of; each loop takes groups `first` to `end`. A loop reads
and writes each number once, where torch's operators go through memory once for each step of a formula. Sums over a
group are in the order that the vector units like best: their last bits are the machine's.
"""

from typing import Any

import numpy as np

from workers.numerics.loops.compiled import adding_loop, loop
from workers.numerics.loops.numbers import rounded, stored, wide


@loop
def symmetric_scale(
    first: int, end: int, low: Any, high: Any, alpha: Any, beta: Any, levels: Any, smallest: Any, scale: Any
) -> None:
    """s of a symmetric grid before it is rounded to the dtype that stores it."""
    for g in range(first, end):
        below, above = -(low[g] * alpha[g]), high[g] * beta[g]
        s = (below if below > above else -above) / levels
        scale[g] = min(s, -smallest) if s < 0 else max(s, smallest)


@loop
def move_factors(
    first: int,
    end: int,
    low: Any,
    high: Any,
    alpha: Any,
    beta: Any,
    levels: Any,
    scale: Any,
    sums: Any,
    rate: Any,
    least: Any,
    most: Any,
    faults: Any,
) -> None:
    """alpha and beta of symmetric grids move by -`rate` times the signs of their gradients; faults are those of NaN."""
    for g in range(first, end):
        by_scale = sums[0, g] - sums[1, g] / scale[g]
        low_wins = -alpha[g] * low[g] > beta[g] * high[g]
        by_alpha = by_scale * (low[g] / -levels if low_wins else np.float32(0))
        by_beta = by_scale * (np.float32(0) if low_wins else high[g] / -levels)
        faults[g] = np.isnan(by_alpha)
        up, down = np.float32(by_alpha < 0), np.float32(by_alpha > 0)
        alpha[g] = min(max(alpha[g] + rate * (up - down), least), most)
        up, down = np.float32(by_beta < 0), np.float32(by_beta > 0)
        beta[g] = min(max(beta[g] + rate * (up - down), least), most)


@loop
def write(
    first: int, end: int, weight: Any, offset: Any, scale: Any, zero: Any, lowest: Any, highest: Any, out: Any
) -> None:
    """out = s * (q - z)"""
    for g in range(first, end):
        s, z = scale[g], zero[g]
        for j in range(weight.shape[1]):
            q = np.rint(offset[g, j] + wide(weight[g, j]) / s) + z
            out[g, j] = stored((min(max(q, lowest), highest) - z) * s, out)


@adding_loop
def move(
    first: int,
    end: int,
    weight: Any,
    offset: Any,
    scale: Any,
    zero: Any,
    lowest: Any,
    highest: Any,
    gradient: Any,
    rate: Any,
    sums: Any,
) -> None:
    """V moves by -`rate` times the sign of s * D * m; sums (4, groups) of D * (q - z), D * m * w, D, D * m."""
    for g in range(first, end):
        s, z = scale[g], zero[g]
        far = rate if s < 0 else -rate
        by_steps, by_weight = np.float32(0), np.float32(0)
        by_all, by_inside = np.float32(0), np.float32(0)
        for j in range(weight.shape[1]):
            w, d, v = wide(weight[g, j]), wide(gradient[g, j]), offset[g, j]
            q = np.rint(v + w / s) + z
            inside = np.float32(0) if q < lowest or q > highest else d
            by_steps += (min(max(q, lowest), highest) - z) * d
            by_weight += inside * w
            by_all += d
            by_inside += inside
            sign = np.float32(1) if inside > 0 else (np.float32(-1) if inside < 0 else np.float32(0))
            offset[g, j] = v + sign * far
        sums[0, g], sums[1, g], sums[2, g], sums[3, g] = by_steps, by_weight, by_all, by_inside


@loop
def keep(
    first: int, end: int, weight: Any, offset: Any, scale: Any, zero: Any, lowest: Any, highest: Any, codes: Any
) -> None:
    """codes = q - lowest, uint8"""
    for g in range(first, end):
        s, z = scale[g], zero[g]
        for j in range(weight.shape[1]):
            q = np.rint(offset[g, j] + wide(weight[g, j]) / s) + z
            codes[g, j] = np.uint8(np.int32(min(max(q, lowest), highest) - lowest))


@adding_loop
def lengths(first: int, end: int, weight: Any, roots: Any, scale: Any, lowest: Any, highest: Any, out: Any) -> None:
    """s * sqrt(sum of (root * (clamp(round(w/s)) - w/s))^2); bounds of clamping, (ranges, groups), give each a row of
    out. Groups take the rows of `roots` in turn.
    """
    for g in range(first, end):
        s, row = scale[g], g % roots.shape[0]
        for k in range(lowest.shape[0]):
            low, high, total = lowest[k, g], highest[k, g], np.float32(0)
            for j in range(weight.shape[1]):
                steps = wide(weight[g, j]) / s
                error = (min(max(np.rint(steps), low), high) - steps) * roots[row, j]
                total += error * error
            out[k, g] = np.sqrt(total) * s


@adding_loop
def least_symmetric(
    first: int,
    end: int,
    weight: Any,
    roots: Any,
    factors: Any,
    levels: Any,
    smallest: Any,
    stored_as: Any,
    low: Any,
    high: Any,
) -> None:
    """low, high (groups,): the symmetric range with the least weighted error, of `factors` times the full one and both
    signs of the scale, as `workers.numerics.backends.rounding.rounding_operators.search_range` tries them.

    stored_as   an array of the dtype that stores scales
    """
    zero, one = np.float32(0), np.float32(1)
    for g in range(first, end):
        row, bottom, top = g % roots.shape[0], zero, zero
        for j in range(weight.shape[1]):
            bottom, top = min(bottom, wide(weight[g, j])), max(top, wide(weight[g, j]))
        low_wins, widest = -bottom > top, max(-bottom, top)
        by_low: Any = low_wins
        least, reach = np.float32(np.inf), widest
        for k in range(factors.shape[0]):
            s = rounded(max(widest * factors[k] / levels, smallest), stored_as)
            positive, negative = zero, zero
            for j in range(weight.shape[1]):
                steps, root = wide(weight[g, j]) / s, roots[row, j]
                nearest = np.rint(steps)
                error = (min(max(nearest, -levels), levels - one) - steps) * root
                other = (min(max(nearest, one - levels), levels) - steps) * root
                positive += error * error
                negative += other * other
            positive, negative = np.sqrt(positive) * s, np.sqrt(negative) * s
            usual, turned = (positive, negative) if low_wins else (negative, positive)
            if usual < least:
                least, reach, by_low = usual, widest * factors[k], low_wins
            if turned < least:
                least, reach, by_low = turned, widest * factors[k], not low_wins
        low[g], high[g] = (-reach, zero) if by_low else (zero, reach)
