"""The level of a block type that is nearest to a number, inside compiled loops.

`levels` is the type's first level where they are whole numbers that follow each other up to `last`, else a level for
every half from `first_half` on (`workers.numerics.blocks.levels.levels_by_halves`); all are fp32.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload


def nearest(number: Any, levels: Any, last: Any, first_half: Any) -> Any:
    """The nearest level; ties of whole numbers go to even ones."""
    raise NotImplementedError("compiled only")


@overload(nearest)
def _of_number(number: Any, levels: Any, last: Any, first_half: Any) -> Any:  # noqa: ARG001 - types alone
    if isinstance(levels, types.Float):

        def even(number: Any, levels: Any, last: Any, first_half: Any) -> Any:  # noqa: ARG001
            return min(max(np.rint(number), levels), last)

        return even

    def from_table(number: Any, levels: Any, last: Any, first_half: Any) -> Any:  # noqa: ARG001
        half = np.floor(number * np.float32(2)) - first_half
        most = np.float32(len(levels) - 1)
        half = half if half > 0 else np.float32(0)  # of NaN, too: it is an index
        return levels[np.int32(half if half < most else most)]

    return from_table
