"""Columns that move to levels of a block type in turn, in compiled loops on a CPU, in fp32.

The moves are those of `workers.numerics.blocks.descent`, but for the last bits of sums. Points of a lattice, four
columns together, are left to torch's operators.
"""

import numpy as np
import torch
from torch import Tensor

from app.domain.methods.block_types import BlockType
from workers.numerics.blocks.levels import levels_by_halves
from workers.numerics.loops import columns as loops
from workers.numerics.loops.numbers import array
from workers.numerics.loops.threads import over_rows


def move_levels(kind: BlockType, levels: Tensor, pull: Tensor, factor: Tensor, near: Tensor, changes: Tensor) -> None:
    """Moves the levels of a batch in turn, each to the nearest to where the error of the outputs would be least.

    levels, pull   (out, B), fp32; both change, G within the batch only
    factor         of the batch's sub-blocks, (out, sub-blocks)
    near           H of the batch, (B, B)
    changes        of the weights, (out, B), written
    """
    ours = (array(levels), array(pull), array(factor.contiguous()), kind.columns, array(near.contiguous()))
    given = (*ours, *levels_of(kind), array(changes))
    rows, columns = levels.shape
    over_rows(rows, columns * columns // 2, lambda first, end: loops.move_levels(first, end, *given))


def levels_of(kind: BlockType) -> tuple[object, np.float32, np.float32]:
    """Levels as loops take them, the last one, and the first half."""
    last = np.float32(kind.levels[-1])
    if kind.uniform:
        return np.float32(kind.levels[0]), last, np.float32(0)
    first_half, table = levels_by_halves(kind, torch.device("cpu"))
    return array(table), last, np.float32(first_half)
