"""GPTQ's loop in a block type: columns are rounded in turn, and those that are left make up for the error.

With U of `workers.methods.gptq`, for columns B that round together, one or the four of a lattice's point:

    e_B = (W[:, B] - w_hat_B) U[B, B]^-1,   W[:, after B] <- W[:, after B] - e_B U[B, after B]

A block's factors and offsets are searched (`workers.numerics.blocks.search`) when its first column is reached, on
weights that make up for the errors so far. What the error of a column costs in the end is e^2, so the squares are
weighted by 1 / U[j, j]^2. In another order than the stored one all blocks are searched before, on the original weights,
weighted by the inputs' second moments.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import ODD_LEVELS
from workers.numerics.backend import column_kernels
from workers.numerics.backends.column_operators import COLUMNS, Columns, LevelGrid
from workers.numerics.blocks.levels import QUAD, codes_of
from workers.numerics.blocks.search import block_weights, column_weights, search_blocks, search_into
from workers.numerics.blocks.stored_parts import columns_of, empty_weight
from workers.numerics.quantized import BlockWeight


def columns_together(scheme: Scheme) -> int:
    """Consecutive columns that round together: four where a type takes levels from a lattice."""
    return QUAD if scheme.blocks is not None and scheme.blocks.levels == ODD_LEVELS else 1


def eliminate(
    weight: Tensor, scheme: Scheme, factor: Tensor | None, moments: Tensor, order: Tensor | None = None
) -> BlockWeight:
    """The formulas of the module docstring for a weight (rows, in) of any float dtype.

    factor   U, (in, in), fp32 or fp64; None: nothing is made up for, and what is found is the search's weight
    moments  second moments of the inputs, (in,)
    order    of the columns, (in,), in which U is; those that round together lie together. None: as they are stored
    """
    if factor is None:
        return search_blocks(weight, scheme, moments)
    assert scheme.blocks is not None  # noqa: S101 - for the type checker
    kind, turn = scheme.blocks, torch.arange(weight.shape[1], device=weight.device) if order is None else order
    columns, kernels = Columns.of(weight, turn, factor, kind.columns), column_kernels(weight.device, factor.dtype)
    importance = (1 / factor.diagonal().square() if order is None else moments).to(factor.dtype)
    weights = block_weights(importance, kind.weights) if order is None else column_weights(importance, weight)
    grid, made = LevelGrid.empty(kind, len(turn), columns.left, importance[turn]), empty_weight(weight, scheme)

    def search(some: Tensor, first: int) -> None:
        own = slice(first // kind.columns, (first + some.shape[1]) // kind.columns)
        offset = None if grid.offset is None else grid.offset[own]
        here = slice(first, first + some.shape[1])
        search_into(columns_of(made, here), some, weights[here], grid.factor[own], offset, codes=False)

    if order is not None:
        search(weight, 0)
    for batch in _parts(slice(0, len(turn)), COLUMNS):
        for now in _parts(batch, min(kind.weights, COLUMNS) if order is None else COLUMNS):
            if order is None and now.start % kind.weights == 0:
                search(columns.left[now.start : now.start + kind.weights].T, now.start)
            kernels.round_levels(columns, batch, now, grid)
        columns.follow(batch)
    codes = codes_of(columns.stored([turn]).T.float(), kind).contiguous()
    return replace(made, codes=codes)


def _parts(whole: slice, width: int) -> Iterator[slice]:
    yield from (slice(first, min(first + width, whole.stop)) for first in range(whole.start, whole.stop, width))
