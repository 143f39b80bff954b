"""Triton kernels that round matrices to FP8 (E4M3) with one scale each, as they lie and transposed.

    m = max|x|,    e = round_E4M3(448 x / m),    x ~ (m / 448) e

The largest value comes to the largest of the format, so that nothing is clamped, and what is not a number stays that.
A GPU multiplies FP8 matrices only where the dimension that is summed over is the inner one of both, so that a product
that sums over rows (tokens, or outputs of a weight) needs its factors transposed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 448.0
"""Of E4M3."""
SMALLEST_MAXIMUM = 1e-30
"""In place of the largest magnitude where it is smaller, so that a matrix of zeros has a scale."""
TILE_ROWS, TILE_COLUMNS = 128, 64
"""Of a matrix of 16 bits: 128 bytes of a row are read, and as many of a transposed row written, at a time."""
MAXIMUM_ELEMENTS = 8192


def cast(x: Tensor, *, rows: bool, columns: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """x (rows, columns), contiguous, in E4M3 as it lies, and transposed (columns, rows); and its scale, fp32 ()."""
    maximum = torch.zeros((), dtype=torch.float32, device=x.device)
    _maximum[(triton.cdiv(x.numel(), MAXIMUM_ELEMENTS),)](x, maximum, x.numel(), BLOCK=MAXIMUM_ELEMENTS, num_warps=8)
    maximum.clamp_(min=SMALLEST_MAXIMUM)
    count, width = x.shape
    lying = torch.empty(count, width, dtype=torch.float8_e4m3fn, device=x.device) if rows else None
    turned = torch.empty(width, count, dtype=torch.float8_e4m3fn, device=x.device) if columns else None
    _cast[(triton.cdiv(count, TILE_ROWS), triton.cdiv(width, TILE_COLUMNS))](
        x,
        maximum,
        x if lying is None else lying,
        x if turned is None else turned,
        count,
        width,
        ROWS=rows,
        COLUMNS=columns,
        TILE_ROWS=TILE_ROWS,
        TILE_COLUMNS=TILE_COLUMNS,
        num_warps=4,
    )
    return lying, turned, maximum / LARGEST


@triton.jit
def _maximum(x, maximum, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitude among BLOCK elements, into `maximum` if it is larger; NaN is passed over."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32)
    tl.atomic_max(maximum, tl.max(tl.abs(values), axis=0))


@triton.jit
def _cast(  # type: ignore[no-untyped-def]
    x,
    maximum,
    lying,
    turned,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (values * (448.0 / tl.load(maximum))).to(tl.float8e4nv)
    if ROWS:
        tl.store(lying + row * columns + column, rounded, mask=inside)
    if COLUMNS:
        tl.store(tl.trans(turned + column * rows + row), tl.trans(rounded), mask=tl.trans(inside))
