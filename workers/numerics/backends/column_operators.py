"""Columns of weights that are rounded in turn, a batch of them at a time, in torch's operators.

With U of `workers.methods.gptq` and w_j what is left of column j, for j of a batch:

    w_hat_j = Q(w_j),   e_j = (w_j - w_hat_j) / U[j, j],   w_k <- w_k - e_j U[j, k]  for all later k of the batch

Q rounds to a group's integers, to a group's multiples of floating-point values, or to a block type's levels; the last
may take four columns at once, on a lattice. The functions are those of `workers.numerics.backends.column_kernels`,
which has Triton's, with the same arguments and results. What comes behind the batch is `Columns.follow`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import ODD_LEVELS, BlockType
from app.domain.methods.named_schemes import Element
from workers.numerics.affine import Grid, GroupRange, affine_grid, round_to_grid
from workers.numerics.blocks.levels import QUAD, inverse, nearest_levels
from workers.numerics.floats.elements import rounded

COLUMNS = 128
"""Most columns of a batch: its updates are kept from the rest of the row until all of them are rounded."""


@dataclass(frozen=True)
class Columns:
    """A weight on its way, all but `factor` changed in place; rows of the weight lie side by side.

    left     what is left of the weight, (in, rows), fp32 or fp64; all tensors are contiguous
    factor   U, (in, in), in the same order of the columns
    group    that a column belongs to, int32 (in,)
    found    what columns are rounded to, (in, rows): integers q, values of an element, or levels
    errors   e of a batch, (COLUMNS, rows)
    weights  number of weights of the same rows side by side, each with its own factor (weights, in, in) and
             group (weights, in): for Triton's rounding to integers alone
    """

    left: Tensor
    factor: Tensor
    group: Tensor
    found: Tensor
    errors: Tensor
    weights: int = 1

    @classmethod
    def of(cls, weight: Tensor, order: Tensor, factor: Tensor, width: int) -> "Columns":
        """Of a weight (rows, in) of any float dtype in that order, in groups of `width` columns as they are stored."""
        left = weight.T[order].to(factor.dtype, copy=True)
        group = torch.div(order, width, rounding_mode="floor").int()
        empty = left.new_empty(COLUMNS, left.shape[1])
        return cls(left, factor.contiguous(), group, torch.empty_like(left), empty)

    @classmethod
    def side_by_side(cls, each: Sequence["Columns"]) -> "Columns":
        """Several weights of one shape as one; a copy."""
        left = torch.cat([columns.left for columns in each], 1)
        factor, group = (torch.stack([getattr(columns, name) for columns in each]) for name in ("factor", "group"))
        empty = left.new_empty(COLUMNS, left.shape[1])
        return cls(left, factor, group, torch.empty_like(left), empty, len(each))

    def follow(self, batch: slice) -> None:
        """Lets the columns behind a batch make up for its errors."""
        errors = self.errors[: batch.stop - batch.start]
        if self.weights == 1:
            self.left[batch.stop :].addmm_(self.factor[batch, batch.stop :].T, errors, alpha=-1)
            return
        # (weights, columns, rows), views whose rows lie together.
        left, errors = (x.view(len(x), self.weights, -1).transpose(0, 1) for x in (self.left, errors))
        left[:, batch.stop :].baddbmm_(self.factor[:, batch, batch.stop :].mT, errors, alpha=-1)

    def stored(self, orders: Sequence[Tensor]) -> Tensor:
        """`found` in the order in which columns are stored; an order for each weight."""
        parts = self.found.chunk(self.weights, 1)
        return torch.cat([torch.empty_like(x).index_copy_(0, o, x) for x, o in zip(parts, orders, strict=True)], 1)


@dataclass(frozen=True)
class IntegerGrid:
    """Grids of the groups, (groups, rows) in the working dtype.

    width   columns of a group whose grid is that of what is left of them when the first one is reached, and written
            then; None: grids stay
    """

    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    scale_dtype: torch.dtype
    width: int | None

    @classmethod
    def of(cls, grid: Grid, scheme: Scheme, scale_dtype: torch.dtype, width: int | None) -> "IntegerGrid":
        """From a grid (rows, groups)."""
        zero = None if grid.zero is None else grid.zero.T.contiguous()
        return cls(grid.scale.T.contiguous(), zero, scheme, scale_dtype, width)

    def put(self, group: int, columns: Tensor) -> None:
        """The grid of some columns (G, rows)."""
        new = affine_grid(GroupRange.of(columns.T), self.scheme, self.scale_dtype)
        self.scale[group] = new.scale
        if self.zero is not None and new.zero is not None:
            self.zero[group] = new.zero

    def of_rows(self, like: Grid) -> Grid:
        """As a grid (rows, groups), with the limits of another."""
        return Grid(self.scale.T, None if self.zero is None else self.zero.T, like.lowest, like.highest)


@dataclass(frozen=True)
class LevelGrid:
    """Factors of sub-blocks and their offsets, if they have any, (sub-blocks, rows) in the working dtype.

    importance   of columns' squared errors, (in,) in their order: levels of a lattice are the nearest by it
    """

    kind: BlockType
    factor: Tensor
    offset: Tensor | None
    importance: Tensor

    @classmethod
    def empty(cls, kind: BlockType, columns: int, like: Tensor, importance: Tensor) -> "LevelGrid":
        """No factors yet, of so many columns; `like` is (.., rows) in the working dtype."""
        factor = like.new_empty(columns // kind.columns, like.shape[1])
        return cls(kind, factor, torch.empty_like(factor) if kind.offset else None, importance)

    @property
    def together(self) -> int:
        """Columns that round together."""
        return QUAD if self.kind.levels == ODD_LEVELS else 1


def warm_ups(*_: object, **__: object) -> list[Callable[[], object]]:
    """An empty list: nothing is compiled."""
    return []


def lie_side_by_side(rows: int) -> bool:  # noqa: ARG001 - as in `workers.numerics.backends.column_kernels`
    """False: here each weight is rounded alone, in a cache."""
    return False


def round_integers(columns: Columns, batch: slice, grid: IntegerGrid) -> None:
    """Rounds a batch to integers q. A group whose grid is written begins in the batch and ends in it."""
    scheme, width = grid.scheme, grid.width
    lowest = -(2 ** (scheme.bits - 1)) if scheme.symmetric else 0
    highest = lowest + 2**scheme.bits - 1

    scales, zeros = grid.scale.unbind(), None if grid.zero is None else grid.zero.unbind()

    def rounding(column: Tensor, j: int, group: int) -> tuple[Tensor, Tensor]:
        if width is not None and j % width == 0:
            grid.put(group, columns.left[j : j + width])
        scale, zero = scales[group], None if zeros is None else zeros[group]
        codes = round_to_grid(column.unsqueeze(1), Grid(scale, zero, lowest, highest))[0].squeeze(1)
        return codes, scale * (codes if zero is None else codes - zero)

    _one_by_one(columns, batch, batch, rounding)


def round_floats(columns: Columns, batch: slice, scale: Tensor, element: Element) -> None:
    """Rounds a batch to values of an element, scales (groups, rows) in the working dtype."""

    scales = scale.unbind()

    def rounding(column: Tensor, _: int, group: int) -> tuple[Tensor, Tensor]:
        values = rounded(column / scales[group], element)
        return values, scales[group] * values

    _one_by_one(columns, batch, batch, rounding)


def round_levels(columns: Columns, batch: slice, now: slice, grid: LevelGrid) -> None:
    """Rounds the columns `now` of a batch to levels; groups are sub-blocks."""
    factors, inverses = grid.factor.unbind(), inverse(grid.factor).unbind()
    offsets = None if grid.offset is None else grid.offset.unbind()

    def rounding(left: Tensor, j: int, group: int) -> tuple[Tensor, Tensor]:
        factor, offset = factors[group], None if offsets is None else offsets[group]
        numbers = (left if offset is None else left - offset) * inverses[group]
        if grid.together == 1:
            levels = nearest_levels(numbers, grid.kind)
        else:
            importance = grid.importance[j : j + len(left)].expand(left.shape[1], -1)
            levels = nearest_levels(numbers.T.contiguous(), grid.kind, importance).T
        return levels, factor * levels if offset is None else torch.addcmul(offset, factor, levels)

    if grid.together == 1:
        _one_by_one(columns, batch, now, rounding)
    else:
        _some_together(columns, batch, now, rounding, grid.together)


Rounding = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""(what is left of a column, or of some together; its place; its group) -> what is found, and w_hat."""


def _one_by_one(columns: Columns, batch: slice, now: slice, rounding: Rounding) -> None:
    """The module docstring's formulas for the columns `now`."""
    left, factor = columns.left, columns.factor
    errors = columns.errors[now.start - batch.start : now.stop - batch.start]
    each = (left[now], columns.found[now], errors, factor.diagonal()[now])
    groups = columns.group[now].tolist()
    for place, (column, found, error, diagonal) in enumerate(zip(*(of.unbind() for of in each), strict=True)):
        j = now.start + place
        codes, w_hat = rounding(column, j, groups[place])
        found.copy_(codes)
        torch.div(column - w_hat, diagonal, out=error)
        left[j + 1 : batch.stop].addr_(factor[j, j + 1 : batch.stop], error, alpha=-1)


def _some_together(columns: Columns, batch: slice, now: slice, rounding: Rounding, together: int) -> None:
    """The same with e_B = (w_B - w_hat_B) U[B, B]^-1 for so many columns B at once, (together, rows)."""
    left, factor = columns.left, columns.factor
    groups = columns.group[now].tolist()
    for j in range(now.start, now.stop, together):
        some = slice(j, j + together)
        columns.found[some], w_hat = rounding(left[some], j, groups[j - now.start])
        error = torch.linalg.solve_triangular(factor[some, some].T, left[some] - w_hat, upper=False)
        columns.errors[j - batch.start : j - batch.start + together] = error
        left[some.stop : batch.stop].addmm_(factor[some, some.stop : batch.stop].T, error, alpha=-1)
