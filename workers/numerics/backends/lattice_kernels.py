"""Triton kernels for columns of a lattice's type (IQ3_S): four in turn are rounded to a point of it, or move to one.

What `column_kernels` and `descent_kernels` do for one column, with the same arguments; formulas are in
`workers.numerics.backends.column_operators` and `workers.numerics.blocks.descent`. Each of four columns is a vector of
its own, (ROWS,): nothing goes from thread to thread but the four themselves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.numerics.backends.column_kernels import ROWS, _inverse, _to_whole
from workers.numerics.backends.column_operators import COLUMNS, Columns, LevelGrid
from workers.numerics.blocks.levels import NEIGHBOURS, QUAD, neighbours


def round_points(columns: Columns, batch: slice, now: slice, grid: LevelGrid) -> None:
    """Rounds the columns `now` of a batch to points, nearest by the columns' importance."""
    rows = columns.left.shape[1]
    _round_points[(triton.cdiv(rows, ROWS),)](
        columns.left,
        columns.factor,
        columns.group,
        columns.found,
        columns.errors,
        grid.factor,
        grid.importance,
        neighbours(grid.factor.device),
        rows,
        len(columns.factor),
        batch.start,
        batch.stop,
        now.start,
        now.stop,
        COLUMNS=COLUMNS,
        ROWS=ROWS,
        NEIGHBOURS=NEIGHBOURS,
        num_warps=4,
    )


def inverse_quads(hessian: Tensor) -> Tensor:
    """H_B^-1 of every four columns B, (in / 4, 4, 4)."""
    quads = hessian.view(len(hessian) // QUAD, QUAD, -1, QUAD).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverses: Tensor = torch.linalg.inv(quads).contiguous()
    return inverses


def move_points(
    levels: Tensor,
    pull: Tensor,
    factor: Tensor,
    hessian: Tensor,
    quads: Tensor,
    batch: slice,
    width: int,
    changes: Tensor,
) -> None:
    """`descent_kernels.move_levels` four by four, where that lowers the error; `quads` are `inverse_quads`.

    width   columns of a sub-block
    """
    rows = levels.shape[1]
    _move_points[(triton.cdiv(rows, ROWS),)](
        levels,
        pull,
        factor,
        hessian,
        quads,
        neighbours(levels.device),
        changes,
        rows,
        len(hessian),
        batch.start,
        batch.stop,
        width,
        COLUMNS=COLUMNS,
        ROWS=ROWS,
        NEIGHBOURS=NEIGHBOURS,
        num_warps=4,
    )


@triton.jit
def _cell(magnitude):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(_to_whole((magnitude - 1) / 2), 0.0), 7.0).to(tl.int32)


@triton.jit
def _signed(point, number):  # type: ignore[no-untyped-def]
    return tl.where(number < 0, -point, point)


@triton.jit
def _nearest_point(x0, x1, x2, x3, w0, w1, w2, w3, POINTS, NEIGHBOURS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest of the points near to where four numbers lie, by weights, as four vectors."""
    m0, m1, m2, m3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    cell = _cell(m0) + 8 * _cell(m1) + 64 * _cell(m2) + 512 * _cell(m3)
    at = POINTS + cell * (NEIGHBOURS * 4)
    b0, b1, b2, b3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    least = (b0 - m0) * (b0 - m0) * w0 + (b1 - m1) * (b1 - m1) * w1
    least += (b2 - m2) * (b2 - m2) * w2 + (b3 - m3) * (b3 - m3) * w3
    for other in range(1, NEIGHBOURS):
        here = at + other * 4
        p0, p1, p2, p3 = tl.load(here), tl.load(here + 1), tl.load(here + 2), tl.load(here + 3)
        error = (p0 - m0) * (p0 - m0) * w0 + (p1 - m1) * (p1 - m1) * w1
        error += (p2 - m2) * (p2 - m2) * w2 + (p3 - m3) * (p3 - m3) * w3
        better = error < least
        b0, b1 = tl.where(better, p0, b0), tl.where(better, p1, b1)
        b2, b3 = tl.where(better, p2, b2), tl.where(better, p3, b3)
        least = tl.where(better, error, least)
    return _signed(b0, x0), _signed(b1, x1), _signed(b2, x2), _signed(b3, x3)


@triton.jit
def _column(tile, place, j):  # type: ignore[no-untyped-def]
    """One column of a tile (COLUMNS, ROWS)."""
    return tl.sum(tl.where(place[:, None] == j, tile, 0.0), 0)


@triton.jit(do_not_specialize=["first", "last", "begin", "end"])
def _round_points(  # type: ignore[no-untyped-def]
    LEFT,
    FACTOR,
    GROUP,
    FOUND,
    ERRORS,
    SCALE,
    IMPORTANCE,
    POINTS,
    rows,
    columns,
    first,
    last,
    begin,
    end,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, COLUMNS)
    at = (first + place).to(tl.int64)
    inside = at < last
    tile = at[:, None] * rows + row[None, :]
    held = inside[:, None] & real[None, :]
    left = tl.load(LEFT + tile, mask=held, other=0.0)
    for j in range(begin, end, 4):
        behind = inside & (at > j + 3)
        upper = FACTOR + j * columns + j
        u01, u02, u03 = tl.load(upper + 1), tl.load(upper + 2), tl.load(upper + 3)
        u12, u13, u23 = tl.load(upper + columns + 2), tl.load(upper + columns + 3), tl.load(upper + 2 * columns + 3)
        scale = tl.load(SCALE + tl.load(GROUP + j).to(tl.int64) * rows + row, mask=real, other=1.0)
        inverse = _inverse(scale)
        c0, c1 = _column(left, place, j - first), _column(left, place, j - first + 1)
        c2, c3 = _column(left, place, j - first + 2), _column(left, place, j - first + 3)
        l0, l1, l2, l3 = _nearest_point(
            c0 * inverse,
            c1 * inverse,
            c2 * inverse,
            c3 * inverse,
            tl.load(IMPORTANCE + j),
            tl.load(IMPORTANCE + j + 1),
            tl.load(IMPORTANCE + j + 2),
            tl.load(IMPORTANCE + j + 3),
            POINTS,
            NEIGHBOURS,
        )
        zero = c0 * 0.0
        e0 = tl.div_rn(c0 - scale * l0, tl.load(upper) + zero)
        e1 = tl.div_rn(c1 - scale * l1 - e0 * u01, tl.load(upper + columns + 1) + zero)
        e2 = tl.div_rn(c2 - scale * l2 - e0 * u02 - e1 * u12, tl.load(upper + 2 * columns + 2) + zero)
        e3 = tl.div_rn(c3 - scale * l3 - e0 * u03 - e1 * u13 - e2 * u23, tl.load(upper + 3 * columns + 3) + zero)
        found = FOUND + (row * 0 + j) * rows + row
        tl.store(found, l0, mask=real)
        tl.store(found + rows, l1, mask=real)
        tl.store(found + 2 * rows, l2, mask=real)
        tl.store(found + 3 * rows, l3, mask=real)
        errors = ERRORS + (row * 0 + j - first) * rows + row
        tl.store(errors, e0, mask=real)
        tl.store(errors + rows, e1, mask=real)
        tl.store(errors + 2 * rows, e2, mask=real)
        tl.store(errors + 3 * rows, e3, mask=real)
        line = FACTOR + j * columns + at
        left -= tl.load(line, mask=behind, other=0.0)[:, None] * e0[None, :]
        left -= tl.load(line + columns, mask=behind, other=0.0)[:, None] * e1[None, :]
        left -= tl.load(line + 2 * columns, mask=behind, other=0.0)[:, None] * e2[None, :]
        left -= tl.load(line + 3 * columns, mask=behind, other=0.0)[:, None] * e3[None, :]
    if end < last:
        tl.store(LEFT + tile, left, mask=held & (at >= end)[:, None])


@triton.jit
def _times_quad(QUADS, g0, g1, g2, g3):  # type: ignore[no-untyped-def]
    """The sum of four vectors by four numbers that lie there."""
    return tl.load(QUADS) * g0 + tl.load(QUADS + 1) * g1 + tl.load(QUADS + 2) * g2 + tl.load(QUADS + 3) * g3


@triton.jit(do_not_specialize=["first", "last"])
def _move_points(  # type: ignore[no-untyped-def]
    LEVELS,
    PULL,
    SCALE,
    HESSIAN,
    QUADS,
    POINTS,
    CHANGES,
    rows,
    columns,
    first,
    last,
    width,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, COLUMNS)
    at = (first + place).to(tl.int64)
    inside = at < last
    pull = tl.load(PULL + at[:, None] * rows + row[None, :], mask=inside[:, None] & real[None, :], other=0.0)
    for j in range(first, last, 4):
        scale = tl.load(SCALE + (row * 0 + j // width) * rows + row, mask=real, other=1.0)
        inverse = _inverse(scale)
        own = HESSIAN + j * columns + j
        g0, g1 = _column(pull, place, j - first), _column(pull, place, j - first + 1)
        g2, g3 = _column(pull, place, j - first + 2), _column(pull, place, j - first + 3)
        level = LEVELS + (row * 0 + j) * rows + row
        b0 = tl.load(level, mask=real, other=1.0)
        b1 = tl.load(level + rows, mask=real, other=1.0)
        b2 = tl.load(level + 2 * rows, mask=real, other=1.0)
        b3 = tl.load(level + 3 * rows, mask=real, other=1.0)
        quad = QUADS + j * 4
        a0, a1, a2, a3 = _nearest_point(
            b0 - _times_quad(quad, g0, g1, g2, g3) * inverse,
            b1 - _times_quad(quad + 4, g0, g1, g2, g3) * inverse,
            b2 - _times_quad(quad + 8, g0, g1, g2, g3) * inverse,
            b3 - _times_quad(quad + 12, g0, g1, g2, g3) * inverse,
            tl.load(own),
            tl.load(own + columns + 1),
            tl.load(own + 2 * columns + 2),
            tl.load(own + 3 * columns + 3),
            POINTS,
            NEIGHBOURS,
        )
        d0, d1, d2, d3 = (a0 - b0) * scale, (a1 - b1) * scale, (a2 - b2) * scale, (a3 - b3) * scale
        # The nearest point is so by the diagonal alone.
        gain = (2 * g0 + _times_quad(own, d0, d1, d2, d3)) * d0
        gain += (2 * g1 + _times_quad(own + columns, d0, d1, d2, d3)) * d1
        gain += (2 * g2 + _times_quad(own + 2 * columns, d0, d1, d2, d3)) * d2
        gain += (2 * g3 + _times_quad(own + 3 * columns, d0, d1, d2, d3)) * d3
        gains = gain < 0
        d0, d1 = tl.where(gains, d0, 0.0), tl.where(gains, d1, 0.0)
        d2, d3 = tl.where(gains, d2, 0.0), tl.where(gains, d3, 0.0)
        moved = real & gains
        tl.store(level, a0, mask=moved)
        tl.store(level + rows, a1, mask=moved)
        tl.store(level + 2 * rows, a2, mask=moved)
        tl.store(level + 3 * rows, a3, mask=moved)
        change = CHANGES + (row * 0 + j - first) * rows + row
        tl.store(change, d0, mask=real)
        tl.store(change + rows, d1, mask=real)
        tl.store(change + 2 * rows, d2, mask=real)
        tl.store(change + 3 * rows, d3, mask=real)
        line = HESSIAN + j * columns + at
        pull += tl.load(line, mask=inside, other=0.0)[:, None] * d0[None, :]
        pull += tl.load(line + columns, mask=inside, other=0.0)[:, None] * d1[None, :]
        pull += tl.load(line + 2 * columns, mask=inside, other=0.0)[:, None] * d2[None, :]
        pull += tl.load(line + 3 * columns, mask=inside, other=0.0)[:, None] * d3[None, :]
