"""Loops over columns of weights that move in turn to levels of a block type, each row for itself.

A batch's columns move one after another, and the columns of the batch that follow know of it; what comes
behind the batch is a product of the caller's. Levels are given as `workers.numerics.loops.levels` takes them.
"""

from typing import Any

import numpy as np

from workers.numerics.loops.compiled import loop
from workers.numerics.loops.levels import nearest


@loop
def move_levels(
    first: int,
    end: int,
    now: Any,
    pull: Any,
    factor: Any,
    columns: int,
    near: Any,
    levels: Any,
    last: Any,
    first_half: Any,
    changes: Any,
) -> None:
    """Levels of a batch move to where the error of outputs is least; `workers.numerics.blocks.descent` has the formula.

    now      levels, (rows, B); pull  G of the batch, (rows, B); both change
    factor   of sub-blocks of so many `columns`, (rows, sub-blocks of the batch); near  H of the batch, (B, B)
    changes  of weights, (rows, B), written
    """
    for r in range(first, end):
        for j in range(near.shape[0]):
            f, before = factor[r, j // columns], now[r, j]
            unit = np.float32(0) if f == 0 else np.float32(1) / f
            wanted = before - pull[r, j] * (unit / near[j, j])
            after = nearest(wanted, levels, last, first_half)
            change = (after - before) * f
            now[r, j], changes[r, j] = after, change
            if change != 0:
                for k in range(j + 1, near.shape[0]):
                    pull[r, k] += change * near[j, k]
