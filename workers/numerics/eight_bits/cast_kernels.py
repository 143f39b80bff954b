"""Triton kernels that round matrices to FP8: one pass for the largest magnitude, one that writes both ways.

The functions are those of `workers.numerics.eight_bits.casts`, which has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.numerics.eight_bits.casts import LARGEST, SMALLEST_MAXIMUM, EightBits

TILE_ROWS, TILE_COLUMNS = 128, 64
"""Of a matrix of 16 bits: 128 bytes of a row are read, and as many of a transposed row written, at a time."""
MAXIMUM_ELEMENTS = 8192
"""That a program finds the largest of."""


def cast(x: Tensor, *, lying: bool, turned: bool) -> EightBits:
    """x (rows, columns), contiguous, in bf16, fp16 or fp32."""
    rows, columns = x.shape
    largest = torch.full((), SMALLEST_MAXIMUM, dtype=torch.float32, device=x.device)
    _largest[(triton.cdiv(x.numel(), MAXIMUM_ELEMENTS),)](x, largest, x.numel(), BLOCK=MAXIMUM_ELEMENTS, num_warps=8)
    as_it_lies, transposed = (
        torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device) if asked else None
        for shape, asked in (((rows, columns), lying), ((columns, rows), turned))
    )
    _cast[(triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))](
        x,
        largest,
        x if as_it_lies is None else as_it_lies,
        x if transposed is None else transposed,
        rows,
        columns,
        LARGEST,
        LYING=lying,
        TURNED=turned,
        TILE_ROWS=TILE_ROWS,
        TILE_COLUMNS=TILE_COLUMNS,
        num_warps=4,
    )
    return EightBits(as_it_lies, transposed, largest / LARGEST)


@triton.jit
def _largest(x, largest, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Raises `largest` to the largest magnitude among BLOCK elements; NaN is passed over."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32)
    tl.atomic_max(largest, tl.max(tl.abs(values), axis=0))


@triton.jit
def _cast(  # type: ignore[no-untyped-def]
    x,
    largest,
    as_it_lies,
    transposed,
    rows,
    columns,
    LARGEST,
    LYING: tl.constexpr,
    TURNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (values * (LARGEST / tl.load(largest))).to(tl.float8e4nv)
    if LYING:
        tl.store(as_it_lies + row * columns + column, rounded, mask=inside)
    if TURNED:
        tl.store(tl.trans(transposed + column * rows + row), tl.trans(rounded), mask=tl.trans(inside))
