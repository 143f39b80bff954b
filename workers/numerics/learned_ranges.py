"""Ranges that are learned: groups in cache-sized chunks, gradients of a grid by its range, and the kept result.

With D = dL/dw_hat and m = [q was not clamped], rounding of w/s passing gradients straight through and that of z none:

    dL/ds = sum_group D*((q - z) - m*w/s)
    symmetric   only the side that sets s learns: ds/dalpha = -lo/Q if -alpha*lo > beta*hi, else ds/dbeta = -hi/Q
    asymmetric  s = (beta*hi - alpha*lo)/(2^b - 1)

Symbols are those of `workers.numerics.affine`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.affine import Grid, GroupRange, round_to_grid
from workers.numerics.quantized import AffineWeight, LinearResult

CACHED_ELEMENTS = 524_288
"""Elements of a chunk: as fp32 they about fill two cores' second-level caches."""


def chunks(groups: Tensor) -> Iterator[slice]:
    """Slices of groups (count, G): as many as stay in a CPU's cache through a chain of operations, or fit a GPU."""
    count, width = groups.shape
    size = max(1, (CACHED_ELEMENTS << 6 if groups.is_cuda else CACHED_ELEMENTS) // width)
    return (slice(start, start + size) for start in range(0, count, size))


def working_dtype(weight: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 weights."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def steps(codes: Tensor, grid: Grid) -> Tensor:
    """q - z of grouped codes."""
    return codes if grid.zero is None else codes - grid.zero.unsqueeze(-1)


def range_gradients(
    d: Tensor, weight: Tensor, ranges: GroupRange, alpha: Tensor, beta: Tensor, grid: Grid, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dL/dalpha and dL/dbeta, (groups,), for D = `d` (groups, G) and the grid of these ranges and factors.

    offset  v of `round_to_grid`
    """
    codes, unclamped = round_to_grid(weight, grid, offset)
    d_scale = (d * steps(codes, grid)).sum(-1) - (d * (codes == unclamped) * weight).sum(-1) / grid.scale
    if grid.zero is not None:
        return -d_scale * ranges.low / grid.highest, d_scale * ranges.high / grid.highest
    low_wins = -alpha * ranges.low > beta * ranges.high
    d_alpha = d_scale * torch.where(low_wins, ranges.low / grid.lowest, 0)
    return d_alpha, d_scale * torch.where(low_wins, 0, ranges.high / grid.lowest)


@dataclass(frozen=True)
class Kept:
    """The kept result: stored codes (groups, G) uint8, scale (groups,) and zero point (groups,) uint8."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def empty(cls, groups: Tensor, scale_dtype: torch.dtype) -> "Kept":
        """Room for the result of some groups, (count, G)."""
        return cls(
            codes=torch.zeros_like(groups, dtype=torch.uint8),
            scale=torch.zeros_like(groups[:, 0], dtype=scale_dtype),
            zero_point=torch.zeros_like(groups[:, 0], dtype=torch.uint8),
        )

    def overwrite(self, groups: slice, codes: Tensor, grid: Grid, better: Tensor) -> None:
        """Keeps q of some groups and their grid if `better`, a truth value on the device."""
        _overwrite(self.codes[groups], codes - grid.lowest, better)
        _overwrite(self.scale[groups], grid.scale, better)
        if grid.zero is not None:
            _overwrite(self.zero_point[groups], grid.zero, better)

    def results(
        self, shapes: Mapping[str, tuple[int, int]], scheme: Scheme, dtype: torch.dtype
    ) -> dict[str, LinearResult]:
        """The weights of linears that lie one after another, in copies."""
        results, first = {}, 0
        for name, shape in shapes.items():
            groups = slice(first, first := first + math.prod(shape) // self.codes.shape[1])
            zero = None if scheme.symmetric else self.zero_point[groups].reshape(shape[0], -1).clone()
            codes = self.codes[groups].reshape(shape).clone()
            scale = self.scale[groups].reshape(shape[0], -1).clone()
            results[name] = LinearResult(AffineWeight(codes, scale, zero, scheme, dtype))
        return results


def _overwrite(kept: Tensor, value: Tensor, better: Tensor) -> None:
    kept.copy_(torch.where(better, value.to(kept.dtype), kept))
