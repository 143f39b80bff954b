"""Triton kernels for columns that are rounded in turn: a batch of them in one launch, some rows of it in each program.

Rows do not depend on each other, so a program takes its rows of a batch (COLUMNS, ROWS) into registers and goes through
the columns there: what takes ten launches a column in eager code is one for 128. Formulas are in
`workers.numerics.backends.column_operators`, whose functions these are.

Arithmetic is fp32. Divisions and roundings are those of IEEE; a product and the difference after it may be rounded
once (fma) where eager code rounds twice, which now and then moves a number across a middle between two codes. A NaN
stays in its row, and a value of 0 has no sign.

The interpreter runs the same code on a CPU (TRITON_INTERPRET=1); there the tests compare it with the plain one.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import BlockType
from app.domain.methods.named_schemes import Element
from workers.numerics.affine import SMALLEST_SCALE
from workers.numerics.backends.column_operators import COLUMNS, Columns, IntegerGrid, LevelGrid
from workers.numerics.backends.rounding.float_rounding_kernels import _unclamped, _value
from workers.numerics.backends.rounding.rounding_kernels import STORED, TO_NEAREST, _grid
from workers.numerics.blocks.levels import codes_of, levels_by_halves
from workers.numerics.floats.elements import LAST_INDEX

ROWS, WARPS = 16, 1
"""Rows of a program, and its warps: one, since a step waits for its sums longer than it computes."""
INTEGERS, FLOATS, LEVELS = 0, 1, 2


def lie_side_by_side(rows: int) -> bool:
    """True if several weights of so many rows can be rounded to integers in one launch."""
    return rows % ROWS == 0


def round_integers(columns: Columns, batch: slice, grid: IntegerGrid) -> None:
    """Rounds a batch to integers q. A group whose grid is written begins in the batch and ends in it."""
    facts = _of_integers(grid.scheme, grid.scale_dtype, grid.width)
    _eliminate(columns, batch, batch, grid.scale, grid.zero, None, **facts)


def round_floats(columns: Columns, batch: slice, scale: Tensor, element: Element) -> None:
    """Rounds a batch to values of an element, scales (groups, rows), fp32."""
    _eliminate(columns, batch, batch, scale, None, KIND=FLOATS, FP4=element is Element.E2M1, LAST=LAST_INDEX[element])


def round_levels(columns: Columns, batch: slice, now: slice, grid: LevelGrid) -> None:
    """Rounds the columns `now` of a batch to levels; groups are sub-blocks."""
    if grid.together > 1:
        from workers.numerics.backends.lattice_kernels import round_points  # noqa: PLC0415 - it imports this one

        round_points(columns, batch, now, grid)
        return
    table, facts = level_facts(grid.kind, grid.factor.device)
    _eliminate(columns, batch, now, grid.factor, grid.offset, table, KIND=LEVELS, **facts)


def level_facts(kind: BlockType, device: torch.device) -> tuple[Tensor | None, dict[str, float]]:
    """Tables of levels and of codes by halves, one after the other, and what kernels know of a type when they compile.

    No tables for consecutive integers.
    """
    first, table = (0, None) if kind.uniform else _tables(kind, device)
    facts = {"UNIFORM": kind.uniform, "LOWEST": float(kind.levels[0]), "HIGHEST": float(kind.levels[-1])}
    return table, {**facts, "FIRST_HALF": float(first), "LAST_HALF": float(0 if table is None else len(table) // 2 - 1)}


@cache
def _tables(kind: BlockType, device: torch.device) -> tuple[int, Tensor]:
    first, levels = levels_by_halves(kind, device)
    return first, torch.cat([levels, codes_of(levels, kind).float()])


def warm_ups(
    columns: int, scheme: Scheme, scale_dtype: torch.dtype, device: torch.device
) -> list[Callable[[], object]]:
    """A launch of each kernel on a few rows, which compiles them for linears of so many columns in a scheme."""
    if columns % scheme.width(columns) or (scheme.blocks is not None and columns % scheme.blocks.weights):
        return []
    order, weight = torch.arange(columns, device=device), torch.ones(ROWS, columns, device=device)
    factor, batch = torch.eye(columns, device=device), slice(0, min(columns, COLUMNS))
    work = Columns.of(weight, order, factor, scheme.width(columns))
    groups = torch.ones(columns // scheme.width(columns), ROWS, device=device)
    if scheme.blocks is not None:
        return _of_levels(work, batch, scheme.blocks, groups)
    if scheme.row is not None and scheme.row.element in LAST_INDEX:
        return [partial(round_floats, work, batch, groups, scheme.row.element)]
    zero = None if scheme.symmetric else groups.clone()
    return [
        partial(round_integers, work, batch, IntegerGrid(groups, zero, scheme, scale_dtype, width))
        for width in {None, scheme.width(columns) if scheme.width(columns) <= COLUMNS else None}
    ]


def _of_levels(work: Columns, batch: slice, kind: BlockType, factor: Tensor) -> list[Callable[[], object]]:
    grid = LevelGrid(kind, factor, factor.clone() if kind.offset else None, work.factor.diagonal())
    return [partial(round_levels, work, batch, batch, grid)]


def _of_integers(scheme: Scheme, scale_dtype: torch.dtype, width: int | None) -> dict[str, object]:
    return {
        "KIND": INTEGERS,
        "BITS": scheme.bits,
        "SYMMETRIC": scheme.symmetric,
        "STORED_AS": STORED[scale_dtype],
        "WIDTH": width or 0,
        "SMALLEST": SMALLEST_SCALE[scale_dtype],
    }


def _eliminate(
    columns: Columns,
    batch: slice,
    now: slice,
    scale: Tensor,
    other: Tensor | None,
    table: Tensor | None = None,
    **facts: object,
) -> None:
    rows = columns.left.shape[1]
    _round_columns[(triton.cdiv(rows, ROWS),)](
        columns.left,
        columns.factor,
        columns.group,
        columns.found,
        columns.errors,
        scale,
        scale if other is None else other,
        scale if table is None else table,
        rows,
        len(columns.left),
        rows // columns.weights,
        batch.start,
        batch.stop,
        now.start,
        now.stop,
        OTHER=other is not None,
        COLUMNS=COLUMNS,
        ROWS=ROWS,
        num_warps=WARPS,
        **facts,
    )


@triton.jit
def _to_whole(x):  # type: ignore[no-untyped-def]
    """The nearest whole number, ties to even; of a NaN, some number."""
    return (tl.minimum(tl.maximum(x, -4194304.0), 4194303.0) + TO_NEAREST) - TO_NEAREST


@triton.jit
def _inverse(x):  # type: ignore[no-untyped-def]
    """1 / x, and 0 where x is 0."""
    zero = x == 0
    return tl.where(zero, 0.0, tl.div_rn(x * 0.0 + 1.0, tl.where(zero, 1.0, x)))


@triton.jit
def _nearest_level(  # type: ignore[no-untyped-def]
    numbers,
    TABLE,
    UNIFORM: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    FIRST_HALF: tl.constexpr,
    LAST_HALF: tl.constexpr,
):
    """`workers.numerics.blocks.levels.nearest_levels`."""
    if UNIFORM:
        level = tl.minimum(tl.maximum(_to_whole(numbers), LOWEST), HIGHEST)
    else:
        half = tl.minimum(tl.maximum(tl.floor(numbers * 2) - FIRST_HALF, 0.0), LAST_HALF)
        level = tl.load(TABLE + half.to(tl.int32))
    return level


@triton.jit(do_not_specialize=["own", "first", "last", "begin", "end"])
def _round_columns(  # type: ignore[no-untyped-def]
    LEFT,
    FACTOR,
    GROUP,
    FOUND,
    ERRORS,
    SCALE,
    ZERO,
    TABLE,
    rows,
    columns,
    own,
    first,
    last,
    begin,
    end,
    KIND: tl.constexpr,
    OTHER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr = 4,
    SYMMETRIC: tl.constexpr = True,
    STORED_AS: tl.constexpr = tl.float32,
    WIDTH: tl.constexpr = 0,
    SMALLEST: tl.constexpr = 0.0,
    FP4: tl.constexpr = False,
    LAST: tl.constexpr = 0,
    UNIFORM: tl.constexpr = True,
    LOWEST: tl.constexpr = 0.0,
    HIGHEST: tl.constexpr = 0.0,
    FIRST_HALF: tl.constexpr = 0.0,
    LAST_HALF: tl.constexpr = 0.0,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    # Of weights side by side, of `own` rows each, a program has rows of one.
    weight = (tl.program_id(0) * ROWS // own).to(tl.int64)
    FACTOR += weight * columns * columns
    GROUP += weight * columns
    place = tl.arange(0, COLUMNS)
    at = (first + place).to(tl.int64)
    inside = at < last
    tile = at[:, None] * rows + row[None, :]
    held = inside[:, None] & real[None, :]
    left = tl.load(LEFT + tile, mask=held, other=0.0)
    line = tl.load(FACTOR + begin * columns + at, mask=inside, other=0.0)
    for j in range(begin, end):
        upper = tl.where(at > j, line, 0.0)
        # The next row is on its way while this one is used.
        line = tl.load(FACTOR + (j + 1) * columns + at, mask=inside & (at > j), other=0.0)
        diagonal = tl.load(FACTOR + j * columns + j)
        group = tl.load(GROUP + j).to(tl.int64) * rows + row
        if WIDTH > 0 and j % WIDTH == 0:
            members = ((at >= j) & (at < j + WIDTH))[:, None]
            low = tl.minimum(tl.min(tl.where(members, left, 0.0), 0), 0.0)
            high = tl.maximum(tl.max(tl.where(members, left, 0.0), 0), 0.0)
            broken = tl.sum((members & (left != left)).to(tl.int32), 0) > 0  # noqa: PLR0124 - NaN alone differs
            new_scale, new_zero = _grid(
                low, high, low * 0.0 + 1.0, low * 0.0 + 1.0, SMALLEST, BITS, SYMMETRIC, STORED_AS
            )
            tl.store(SCALE + group, tl.where(broken, float("nan"), new_scale), mask=real)
            if OTHER:
                tl.store(ZERO + group, new_zero, mask=real)
            tl.debug_barrier()
        scale = tl.load(SCALE + group, mask=real, other=1.0)
        column = tl.sum(tl.where(place[:, None] == j - first, left, 0.0), 0)
        if KIND == 0:
            number = _to_whole(tl.div_rn(column, scale))
            lowest = -(2.0 ** (BITS - 1)) if SYMMETRIC else 0.0
            highest = 2.0 ** (BITS - 1) - 1 if SYMMETRIC else 2.0**BITS - 1
            zero = scale * 0.0
            if OTHER:
                zero = tl.load(ZERO + group, mask=real, other=0.0)
            found = tl.minimum(tl.maximum(number + zero, lowest), highest)
            hat = scale * (found - zero)
        elif KIND == 1:
            index = _unclamped(column, column * 0.0, scale, FP4)
            found = _value(tl.minimum(tl.maximum(index, -LAST * 1.0), LAST * 1.0), FP4)
            hat = scale * found
        else:
            number = column
            if OTHER:
                offset = tl.load(ZERO + group, mask=real, other=0.0)
                number = column - offset
            found = _nearest_level(number * _inverse(scale), TABLE, UNIFORM, LOWEST, HIGHEST, FIRST_HALF, LAST_HALF)
            hat = scale * found
            if OTHER:
                hat = hat + offset
        error = tl.div_rn(column - hat, diagonal + column * 0.0)
        tl.store(FOUND + (row * 0 + j) * rows + row, found, mask=real)
        tl.store(ERRORS + (row * 0 + j - first) * rows + row, error, mask=real)
        left = left - upper[:, None] * error[None, :]
    if end < last:
        tl.store(LEFT + tile, left, mask=held & (at >= end)[:, None])
