"""Loops of SignRound's fake quantizer on llama.cpp's block types;
`workers.numerics.backends.rounding.block_rounding_loops` calls them.

Arrays are (sub-blocks, columns), or (sub-blocks,) for what a sub-block has one of; each loop takes sub-blocks `first`
to `end`. `levels` is the type's first level where they are whole numbers that follow each other, else all of them by
their codes, both fp32; `offset` has no element where the type has none.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from workers.numerics.loops.compiled import loop
from workers.numerics.loops.numbers import stored, wide


@loop
def write(first: int, end: int, place: Any, high: Any, factor: Any, offset: Any, levels: Any, out: Any) -> None:
    """out = f * L_q + o"""
    for g in range(first, end):
        f, o = factor[g], offset[g] if len(offset) else np.float32(0)
        for j in range(place.shape[1]):
            out[g, j] = stored(f * _level(place[g, j], high, levels) + o, out)


@loop
def step(
    first: int,
    end: int,
    place: Any,
    high: Any,
    factor: Any,
    offset: Any,
    levels: Any,
    out: Any,
    gradient: Any,
    rate: Any,
    faults: Any,
) -> None:
    """x moves by -`rate` times the sign of f * D * m; out as `write` has it. NaN gradients, which a sub-block's fault
    counts, move nothing.
    """
    for g in range(first, end):
        f, o = factor[g], offset[g] if len(offset) else np.float32(0)
        far = rate if f > 0 else (-rate if f < 0 else np.float32(0))
        faulty = np.int32(0)
        for j in range(place.shape[1]):
            d, x = wide(gradient[g, j]), place[g, j]
            faulty += np.int32(np.isnan(d))
            q = np.rint(x)
            inside = np.float32(0) if q < 0 or q > high else d
            place[g, j] = x - (far if inside > 0 else (-far if inside < 0 else np.float32(0)))
        for j in range(place.shape[1]):
            out[g, j] = stored(f * _level(place[g, j], high, levels) + o, out)
        faults[g] = faulty


@loop
def keep(first: int, end: int, place: Any, high: Any, codes: Any) -> None:
    """codes = q, uint8"""
    for g in range(first, end):
        for j in range(place.shape[1]):
            codes[g, j] = np.uint8(np.int32(min(max(np.rint(place[g, j]), np.float32(0)), high)))


def _level(x: Any, high: Any, levels: Any) -> Any:
    """The level that a place is rounded to."""
    raise NotImplementedError("compiled only")


@overload(_level)
def _of_place(x: Any, high: Any, levels: Any) -> Any:  # noqa: ARG001 - types alone
    if isinstance(levels, types.Float):

        def even(x: Any, high: Any, levels: Any) -> Any:
            return min(max(np.rint(x), np.float32(0)), high) + levels

        return even

    def from_table(x: Any, high: Any, levels: Any) -> Any:
        q = np.rint(x) if x > 0 else np.float32(0)  # of NaN, too: it is an index
        return levels[np.int32(q if q < high else high)]

    return from_table
