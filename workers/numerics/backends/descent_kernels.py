"""Triton kernels of coordinate descent on a block type's numbers: columns and sub-blocks in turn, in a few launches.

The moves and their order are those of `workers.numerics.blocks.descent`. Rows do not depend on each other, so a program
takes some of them through a whole part of their columns: COLUMNS whose levels move, or a PANEL of blocks whose scales
do. What that changes reaches the other columns' G by one product for each part.

Within a panel G is not needed, only what it is along the numbers that move. With v_s the change of a row by a unit of
number s, b_s = G v_s and A_st = v_s H v_t, a move of s by c changes b_t by c A_st; b is computed once, and a row of A
when s is reached. All arithmetic is fp32.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.domain.methods.block_types import ODD_LEVELS, BlockType, SmallIntegers
from workers.numerics.backends.column_kernels import _inverse, _nearest_level, _to_whole, level_facts
from workers.numerics.backends.column_operators import COLUMNS
from workers.numerics.backends.lattice_kernels import inverse_quads, move_points

ROWS, WARPS = 16, 1
"""Of a program whose levels move, and its warps."""
NUMBER_ROWS, NUMBER_WARPS = 16, 4
"""Of a program whose scales move."""
PANEL = 256
"""Columns whose scales move in one launch; whole blocks of every type."""
LARGEST = tl.constexpr(65504.0)
"""Of fp16."""


def sweep(
    kind: BlockType,
    hessian: Tensor,
    levels: Tensor,
    numbers: Tensor,
    scale: Tensor,
    minimum_numbers: Tensor,
    minimum: Tensor,
    pull: Tensor,
) -> None:
    """A sweep, in place; all but H are the tensors of `descent`'s state in fp32, with rows last."""
    count = len(levels)
    changes, own = torch.empty_like(levels[:PANEL]), kind.weights // kind.columns
    factor = scale.repeat_interleave(own, 0).mul_(numbers)
    quads = inverse_quads(hessian) if kind.levels == ODD_LEVELS else None
    for first in range(0, count, COLUMNS):
        batch = slice(first, min(first + COLUMNS, count))
        if quads is None:
            move_levels(levels, pull, factor, hessian, batch, kind, changes)
        else:
            move_points(levels, pull, factor, hessian, quads, batch, kind.columns, changes)
        _follow(pull, hessian, batch, changes)
    panels = [slice(first, min(first + PANEL, count)) for first in range(0, count, PANEL)]
    if kind.scales is not None:
        small = (kind.scales, kind.minimums)
        for panel in panels:
            move_numbers(
                kind, levels, pull, hessian, (scale, minimum), (numbers, minimum_numbers), panel, changes, small
            )
            _follow(pull, hessian, panel, changes)
    for panel in panels:
        move_numbers(kind, levels, pull, hessian, (numbers, minimum_numbers), (scale, minimum), panel, changes, None)
        _follow(pull, hessian, panel, changes)


def _follow(pull: Tensor, hessian: Tensor, columns: slice, changes: Tensor) -> None:
    pull.addmm_(hessian[columns].T, changes[: columns.stop - columns.start])


def move_levels(
    levels: Tensor, pull: Tensor, factor: Tensor, hessian: Tensor, batch: slice, kind: BlockType, changes: Tensor
) -> None:
    """Moves the levels of a batch in turn, each to the nearest to where the error of the outputs would be least.

    levels, pull   (in, rows), fp32; levels change
    factor         of sub-blocks, (sub-blocks, rows)
    hessian        H, (in, in)
    changes        of the weights of the batch, (COLUMNS, rows), written
    """
    table, facts = level_facts(kind, levels.device)
    rows = levels.shape[1]
    _move_levels[(triton.cdiv(rows, ROWS),)](
        levels,
        pull,
        factor,
        hessian,
        levels if table is None else table,
        changes,
        rows,
        len(hessian),
        batch.start,
        batch.stop,
        kind.columns,
        COLUMNS=COLUMNS,
        ROWS=ROWS,
        num_warps=WARPS,
        **facts,
    )


def move_numbers(
    kind: BlockType,
    levels: Tensor,
    pull: Tensor,
    hessian: Tensor,
    by: tuple[Tensor, Tensor],
    moving: tuple[Tensor, Tensor],
    panel: slice,
    changes: Tensor,
    integers: tuple[SmallIntegers, SmallIntegers | None] | None,
) -> None:
    """Moves factors' numbers of a panel and, where the type has offsets, those of offsets, the two of a part in turn.

    by         what multiplies levels, and what offsets are multiples of, (blocks or sub-blocks, rows)
    moving     the numbers, (sub-blocks or blocks, rows), written
    changes    of the weights of the panel, (PANEL, rows), written
    integers   which numbers there are for sub-blocks; None: numbers of fp16, for blocks
    """
    part, sub = (kind.weights, kind.columns) if integers is None else (kind.columns, kind.weights)
    small, other = (None, None) if integers is None else integers
    rows = levels.shape[1]
    _move_numbers[(triton.cdiv(rows, NUMBER_ROWS),)](
        levels,
        pull,
        hessian,
        *by,
        *moving,
        changes,
        rows,
        len(hessian),
        panel.start,
        panel.stop - panel.start,
        TWO=kind.offset if integers is None else other is not None,
        WHOLE=small is not None,
        FIRST=0 if small is None else small.first,
        STEP=1 if small is None else small.step,
        MOST=0 if small is None else small.largest,
        MOST_2=0 if other is None else other.largest,
        SUB=sub,
        PART=part,
        PANEL=PANEL,
        ROWS=NUMBER_ROWS,
        CHUNK=16,
        num_warps=NUMBER_WARPS,
    )


def warm_ups(columns: int, kind: BlockType, device: torch.device) -> list[Callable[[], object]]:
    """A sweep on a few rows, which compiles the kernels for linears of so many columns."""
    if columns % kind.weights:
        return []
    shape = {size: torch.ones(columns // size, ROWS, device=device) for size in (1, kind.columns, kind.weights)}
    subs, blocks = shape[kind.columns], shape[kind.weights]
    state = (shape[1].clone(), subs.clone(), blocks.clone(), subs.clone(), blocks.clone(), shape[1].clone())
    return [partial(sweep, kind, torch.eye(columns, device=device), *state)]


@triton.jit(do_not_specialize=["first", "last"])
def _move_levels(  # type: ignore[no-untyped-def]
    LEVELS,
    PULL,
    SCALE,
    HESSIAN,
    TABLE,
    CHANGES,
    rows,
    columns,
    first,
    last,
    width,
    UNIFORM: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    FIRST_HALF: tl.constexpr,
    LAST_HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, COLUMNS)
    at = (first + place).to(tl.int64)
    inside = at < last
    pull = tl.load(PULL + at[:, None] * rows + row[None, :], mask=inside[:, None] & real[None, :], other=0.0)
    line = tl.load(HESSIAN + first * columns + at, mask=inside, other=0.0)
    level = tl.load(LEVELS + (row * 0 + first) * rows + row, mask=real, other=0.0)
    for j in range(first, last):
        near, before = line, level
        # What the next column asks for is on its way while this one moves.
        line = tl.load(HESSIAN + (j + 1) * columns + at, mask=inside & (at > j), other=0.0)
        level = tl.load(LEVELS + (row * 0 + j + 1) * rows + row, mask=real & (row * 0 + j + 1 < last), other=0.0)
        diagonal = tl.load(HESSIAN + j * columns + j)
        scale = tl.load(SCALE + (row * 0 + j // width) * rows + row, mask=real, other=1.0)
        own = tl.sum(tl.where(place[:, None] == j - first, pull, 0.0), 0)
        wanted = before - own * tl.div_rn(_inverse(scale), diagonal + own * 0.0)
        after = _nearest_level(wanted, TABLE, UNIFORM, LOWEST, HIGHEST, FIRST_HALF, LAST_HALF)
        change = (after - before) * scale
        tl.store(LEVELS + (row * 0 + j) * rows + row, after, mask=real)
        tl.store(CHANGES + (row * 0 + j - first) * rows + row, change, mask=real)
        pull = pull + near[:, None] * change[None, :]


@triton.jit
def _moved(wanted, WHOLE: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number nearest to `wanted` that can be stored."""
    if WHOLE:
        code = tl.minimum(tl.maximum(_to_whole((wanted - FIRST) / STEP), 0.0), MOST * 1.0)
        after = code * STEP + FIRST
    else:
        after = tl.minimum(tl.maximum(wanted, -LARGEST), LARGEST).to(tl.float16).to(tl.float32)
    return after


@triton.jit
def _by_part(x, ROWS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the columns of each part, (ROWS, PARTS)."""
    return tl.sum(tl.reshape(x, (ROWS, PARTS, PART)), 2)


@triton.jit
def _of_part(x, here):  # type: ignore[no-untyped-def]
    """The column of (ROWS, PARTS) that is here."""
    return tl.sum(tl.where(here, x, 0.0), 1)


@triton.jit
def _spread(x, ROWS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """(ROWS, PARTS) for every column."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (ROWS, PARTS, PART)), (ROWS, PARTS * PART))


@triton.jit(do_not_specialize=["first", "width"])
def _move_numbers(  # type: ignore[no-untyped-def]
    LEVELS,
    PULL,
    HESSIAN,
    BY,
    BY_2,
    NUMBERS,
    NUMBERS_2,
    CHANGES,
    rows,
    columns,
    first,
    width,
    TWO: tl.constexpr,
    WHOLE: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    MOST: tl.constexpr,
    MOST_2: tl.constexpr,
    SUB: tl.constexpr,
    PART: tl.constexpr,
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    PARTS: tl.constexpr = PANEL // PART
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, PANEL)
    inside = place < width
    held = real[:, None] & inside[None, :]
    at = (first + place)[None, :] * rows + row[:, None]
    by = (first + place)[None, :] // SUB * rows + row[:, None]
    unit = tl.load(LEVELS + at, mask=held, other=0.0) * tl.load(BY + by, mask=held, other=0.0)
    pull = tl.load(PULL + at, mask=held, other=0.0)
    slope = _by_part(pull * unit, ROWS, PARTS, PART)
    moved = slope * 0.0
    if TWO:
        unit_2 = tl.load(BY_2 + by, mask=held, other=0.0)
        slope_2 = _by_part(pull * unit_2, ROWS, PARTS, PART)
        moved_2 = slope * 0.0
    number_of_part = tl.arange(0, PARTS)[None, :]
    some = tl.arange(0, CHUNK)
    for s in range(width // PART):
        pushed = tl.zeros((ROWS, PANEL), tl.float32)
        pushed_2 = tl.zeros((ROWS, PANEL), tl.float32)
        for c in range(0, PART, CHUNK):
            j = first + s * PART + c + some
            own = j[None, :] * rows + row[:, None]
            own_by = j[None, :] // SUB * rows + row[:, None]
            part = tl.load(LEVELS + own, mask=real[:, None], other=0.0)
            part = part * tl.load(BY + own_by, mask=real[:, None], other=0.0)
            near = tl.load(HESSIAN + j[:, None] * columns + (first + place)[None, :], mask=inside[None, :], other=0.0)
            pushed += tl.dot(part, near, input_precision="ieee")
            if TWO:
                part_2 = tl.load(BY_2 + own_by, mask=real[:, None], other=0.0)
                pushed_2 += tl.dot(part_2, near, input_precision="ieee")
        here = number_of_part == s
        stored = (row * 0 + first // PART + s) * rows + row
        curve = _by_part(pushed * unit, ROWS, PARTS, PART)
        number = tl.load(NUMBERS + stored, mask=real, other=0.0)
        wanted = number - _of_part(slope, here) * _inverse(_of_part(curve, here))
        after = _moved(wanted, WHOLE, FIRST, STEP, MOST)
        tl.store(NUMBERS + stored, after, mask=real)
        change = (after - number)[:, None]
        moved = tl.where(here, change, moved)
        slope += change * curve
        if TWO:
            slope_2 += change * _by_part(pushed * unit_2, ROWS, PARTS, PART)
            curve_2 = _by_part(pushed_2 * unit_2, ROWS, PARTS, PART)
            number = tl.load(NUMBERS_2 + stored, mask=real, other=0.0)
            wanted = number - _of_part(slope_2, here) * _inverse(_of_part(curve_2, here))
            after = _moved(wanted, WHOLE, 0, 1, MOST_2)
            tl.store(NUMBERS_2 + stored, after, mask=real)
            change = (after - number)[:, None]
            moved_2 = tl.where(here, change, moved_2)
            slope_2 += change * curve_2
            slope += change * _by_part(pushed_2 * unit, ROWS, PARTS, PART)
    change = unit * _spread(moved, ROWS, PARTS, PART)
    if TWO:
        change += unit_2 * _spread(moved_2, ROWS, PARTS, PART)
    tl.store(CHANGES + place[None, :] * rows + row[:, None], change, mask=held)
