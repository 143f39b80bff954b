"""GPTQ's loop in a block type: columns are rounded in turn, and those that are left make up for the error.

With U of `workers.methods.gptq`, for columns B that round together, one or the four of a lattice's point:

    e_B = (W[:, B] - w_hat_B) U[B, B]^-1,   W[:, after B] <- W[:, after B] - e_B U[B, after B]

A block's factors and offsets are searched (`workers.numerics.blocks.search`) when its first column is reached, on
weights that make up for the errors so far. What the error of a column costs in the end is e^2, so the squares are
weighted by 1 / U[j, j]^2. In another order than the stored one all blocks are searched before, on the original weights,
weighted by the inputs' second moments.
"""

from dataclasses import replace

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import ODD_LEVELS, BlockType
from workers.numerics.blocks.levels import QUAD, codes_of, nearest_levels
from workers.numerics.blocks.search import search_blocks
from workers.numerics.blocks.stored_parts import beside
from workers.numerics.blocks.sub_blocks import inverse
from workers.numerics.quantized import BlockWeight

LAZY_COLUMNS = 128
"""Columns whose updates are kept from the rest of the row until all of them are rounded."""


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
    turn = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    columns, places = weight.T[turn].to(factor.dtype, copy=True), turn.tolist()
    importance = 1 / factor.diagonal().square() if order is None else moments
    grid, width = _Grid(scheme, importance.to(factor.dtype)), columns_together(scheme)
    if order is not None:
        grid.search(weight, 0)
    levels = torch.empty_like(columns)
    for first in range(0, len(columns), LAZY_COLUMNS):
        batch = slice(first, min(first + LAZY_COLUMNS, len(columns)))
        errors = torch.empty_like(columns[batch])
        for j in range(batch.start, batch.stop, width):
            now, at = slice(j, j + width), slice(places[j], places[j] + width)
            if order is None and j % grid.kind.weights == 0:
                grid.search(columns[j : j + grid.kind.weights].T.contiguous(), j)
            levels[at], w_hat = grid.rounded(columns[now], at)
            error = _divided(columns[now] - w_hat, factor[now, now])
            errors[j - first : j - first + width] = error
            columns[j + width : batch.stop].addmm_(factor[now, j + width : batch.stop].T, error, alpha=-1)
        columns[batch.stop :].addmm_(factor[batch, batch.stop :].T, errors, alpha=-1)
    return replace(grid.weight(), codes=codes_of(levels.T.float(), grid.kind).contiguous(), dtype=weight.dtype)


def _divided(off: Tensor, upper: Tensor) -> Tensor:
    """e_B as columns (some, rows), of those that are off."""
    return off / upper if len(off) == 1 else torch.linalg.solve_triangular(upper.T, off, upper=False)


class _Grid:
    """Factors and offsets of a weight's blocks, searched as they are asked for.

    importance   of the columns' squared errors, (in,)
    """

    def __init__(self, scheme: Scheme, importance: Tensor) -> None:
        assert scheme.blocks is not None  # noqa: S101 - for the type checker
        self.kind: BlockType = scheme.blocks
        self._scheme, self._importance = scheme, importance
        self._parts: list[BlockWeight] = []
        self._factor: list[Tensor] = []
        self._inverse: list[Tensor] = []
        self._offset: list[Tensor] = []

    def search(self, weight: Tensor, first: int) -> None:
        """The grid of some blocks whose first column this is, (rows, columns)."""
        found = search_blocks(weight, self._scheme, self._importance[first : first + weight.shape[1]])
        self._parts.append(found)
        factor = found.factor().T.to(self._importance.dtype)
        self._factor += factor.unbind()
        self._inverse += inverse(factor).unbind()
        if (offset := found.offset()) is not None:
            self._offset += offset.T.to(self._importance.dtype).unbind()

    def rounded(self, columns: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """Levels and w_hat of columns (some, rows), which are stored there."""
        group = at.start // self.kind.columns
        factor, offset = self._factor[group], self._offset[group] if self._offset else None
        numbers = (columns if offset is None else columns - offset) * self._inverse[group]
        if len(columns) == 1:
            levels = nearest_levels(numbers, self.kind)
        else:
            importance = self._importance[at].expand(columns.shape[1], -1)
            levels = nearest_levels(numbers.T.contiguous(), self.kind, importance).T
        return levels, factor * levels if offset is None else torch.addcmul(offset, factor, levels)

    def weight(self) -> BlockWeight:
        """The blocks side by side, with codes that do not matter yet."""
        return beside(self._parts)
