"""Affine quantization of grouped weights: ranges, scales, zero points and codes, as one set of formulas.

A weight (out, in) is viewed in groups of G consecutive columns, (out, in/G, G). With b bits, lo = min(group, 0),
hi = max(group, 0) and range factors alpha, beta in [0, 1] (1 for round to nearest):

    symmetric    Q = 2^(b-1);  a = -alpha*lo;  c = beta*hi
                 s = a/Q if a > c else -c/Q          the larger side takes code -Q, so s may be negative
                 q = clamp(round(w/s + v), -Q, Q-1)  w_hat = s*q          stored as q + Q
    asymmetric   s = (beta*hi - alpha*lo) / (2^b - 1)
                 z = clamp(round(-alpha*lo/s), 0, 2^b - 1)
                 q = clamp(round(w/s + v) + z, 0, 2^b - 1)                w_hat = s*(q - z)

v is a rounding offset (0 for round to nearest). Scales are rounded to the dtype that stores them before any code is
computed, so that the optimized numbers are the shipped ones. The full-range symmetric form follows AutoRound
(arXiv:2309.05516 and its code); a zero range keeps a tiny positive scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.schemes import group_width
from workers.numerics.quantized import AffineWeight

SMALLEST_SCALE = {torch.float16: 1e-5, torch.bfloat16: 1e-10, torch.float32: 1e-10, torch.float64: 1e-10}
"""Least |scale| by dtype: small enough not to matter, large enough that w/scale stays finite."""


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """(out, in) as (out, in/G, G); -1 is one group per row. The view shares memory."""
    return weight.reshape(weight.shape[0], -1, group_width(group_size, weight.shape[1]))


@dataclass(frozen=True)
class GroupRange:
    """lo = min(group, 0) and hi = max(group, 0), fp32 or wider, (out, groups)."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "GroupRange":
        """The range of a grouped weight, (out, groups, G)."""
        return cls(weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0))

    def rows(self, rows: slice) -> "GroupRange":
        return GroupRange(self.low[rows], self.high[rows])


@dataclass(frozen=True)
class Grid:
    """Grid of the codes: w_hat = scale*(q - zero), q in [lowest, highest]; `zero` is None if it is 0 (symmetric).

    scale     working dtype, already rounded to the storage dtype (`store_scale`), (out, groups)
    zero      the same dtype, whole numbers, (out, groups)
    lowest    at the least -2^(b-1) if symmetric, else 0
    highest   at the most 2^(b-1) - 1 if symmetric, else 2^b - 1; a method may leave codes at either end out
    """

    scale: Tensor
    zero: Tensor | None
    lowest: int
    highest: int

    def rows(self, rows: slice) -> "Grid":
        return Grid(self.scale[rows], None if self.zero is None else self.zero[rows], self.lowest, self.highest)


def affine_grid(
    ranges: GroupRange,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    alpha: Tensor | float = 1.0,
    beta: Tensor | float = 1.0,
) -> Grid:
    """The grid of the module docstring's formulas for range factors alpha and beta, (out, groups) or numbers."""
    low, high = ranges.low * alpha, ranges.high * beta
    if scheme.symmetric:
        levels = 2 ** (scheme.bits - 1)
        scale = torch.where(-low > high, -low, -high) / levels
        return Grid(store_scale(scale, scale_dtype), None, -levels, levels - 1)
    top = 2**scheme.bits - 1
    scale = store_scale((high - low) / top, scale_dtype)
    return Grid(scale, (-low / scale).round().clamp(0, top), 0, top)


def store_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """`scale` rounded to `scale_dtype`, kept away from 0 with its sign, in its own dtype."""
    floor = SMALLEST_SCALE[scale_dtype]
    away = torch.where(scale < 0, scale.clamp(max=-floor), scale.clamp(min=floor))
    return away.to(scale_dtype).to(scale.dtype)


def round_to_grid(weight: Tensor, grid: Grid, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes q of a grouped weight (out, groups, G), and the same before clamping; `offset` is v."""
    unclamped = weight / grid.scale.unsqueeze(-1)
    if offset is not None:
        unclamped = unclamped + offset
    unclamped = unclamped.round()
    if grid.zero is not None:
        unclamped += grid.zero.unsqueeze(-1)
    return unclamped.clamp(grid.lowest, grid.highest), unclamped


SMALLEST_FACTOR = 0.4
SYMMETRIC_FACTORS, ASYMMETRIC_FACTORS = 31, 11
"""Range factors tried from 1 down to the smallest: for each sign of the scale, and for each side of the range."""


def range_factors(count: int) -> list[float]:
    """Evenly spaced factors from 1 to `SMALLEST_FACTOR`."""
    return [1 - (1 - SMALLEST_FACTOR) * i / (count - 1) for i in range(count)]


def affine_weight(
    codes: Tensor, grid: Grid, scheme: Scheme, scale_dtype: torch.dtype, dtype: torch.dtype
) -> AffineWeight:
    """The stored form of grouped codes q of the grid: q + 2^(b-1) if it is symmetric, else q, whatever its range.

    Raises:
        ValueError: the grid is not the scheme's: it has zero points and should not or the other way around, or codes
            that b bits do not hold.
    """
    middle = 2 ** (scheme.bits - 1) if scheme.symmetric else 0
    if scheme.symmetric != (grid.zero is None) or grid.lowest + middle < 0 or grid.highest + middle >= 2**scheme.bits:
        zeros = "without" if grid.zero is None else "with"
        raise ValueError(f"{scheme} does not hold codes {grid.lowest} to {grid.highest} {zeros} zero points")
    unsigned = (codes + middle).to(torch.uint8).flatten(1)
    zero = None if grid.zero is None else grid.zero.to(torch.uint8)
    return AffineWeight(unsigned, grid.scale.to(scale_dtype), zero, scheme, dtype)
