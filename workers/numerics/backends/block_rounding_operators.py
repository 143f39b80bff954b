"""The fake quantizer of SignRound on llama.cpp's block types, in torch's operators, for any device and dtype.

With L_k the levels of the type, u the piecewise linear map that takes L_k to k, f and o the factor and offset of a
sub-block:

    q = clamp(round(u((w - o) / f) + V)),   w_hat = f * L_q + o,    m = [q was not clamped],    D = dL/dw_hat
    dL/dV = f * (L_{q+1} - L_q) * D * m                  of which only the sign is used: that of f may be negative

The levels of a lattice (IQ3_S) are taken four at a time, so that no weight has a q of its own:

    w_hat = f * P((w - o) / f + 2 V) + o                 P: the nearest point, 2 the distance of its levels

P passes gradients straight through. Sub-blocks move too, where their factors and offsets are codes themselves:

    f = d * (first + step * k),   k = round of the start's, times alpha;     o = -dmin * round of the start's, times beta
    dL/df = sum over a sub-block of D * (L_q - m * (w - o) / f),             dL/do = sum of D * (1 - m)

d and dmin are fp16 numbers and stay. All of it is exact in fp32 as llama.cpp decodes it, but for the last sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from app.domain.methods.block_types import ODD_LEVELS, BlockType, SmallIntegers
from workers.numerics.backends.rounding_operators import CACHED_ELEMENTS, CHUNK_ELEMENTS
from workers.numerics.blocks.levels import codes_of, level_table, nearest_levels, place_of

LIMIT = 0.5
"""Of V."""
LATTICE_LIMIT = 1.0
"""Of V on a lattice, whose points are further apart than its levels."""
FACTOR_LIMITS = (0.5, 1.5)
"""Of alpha and beta."""


@dataclass(frozen=True)
class BlockGroups:
    """The tensors of the quantizer, all contiguous: (sub-blocks, columns) or (sub-blocks,).

    weight        the model's dtype
    offset        V, fp32, or fp64 for fp64 weights
    scale         d, fp32 or fp64;  numbers: the start's first + step * k, or 1 where there are no codes
    minimum       -dmin, or the offset itself;  minimum_numbers: the start's codes, or 1; empty where there is no offset
    alpha, beta   fp32 or fp64
    importance    of the squared errors that decide between points of a lattice; empty elsewhere
    codes, scale_codes, minimum_codes    uint8, kept
    """

    weight: Tensor
    offset: Tensor
    scale: Tensor
    numbers: Tensor
    minimum: Tensor
    minimum_numbers: Tensor
    alpha: Tensor
    beta: Tensor
    importance: Tensor
    codes: Tensor
    scale_codes: Tensor
    minimum_codes: Tensor

    def tensors(self) -> dict[str, Any]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class _Grid:
    """Factors, their inverses (0 where a factor is 0), and offsets of sub-blocks, (sub-blocks, 1)."""

    factor: Tensor
    inverse: Tensor
    shift: Tensor | None

    @classmethod
    def of(cls, groups: BlockGroups, kind: BlockType) -> "_Grid":
        """The grid of the present alpha and beta."""
        factor = groups.scale * _number(scale_codes(groups, kind), kind.scales)
        shift = groups.minimum * _number(minimum_codes(groups, kind), kind.minimums) if kind.offset else None
        inverse = torch.where(factor == 0, 0.0, 1 / factor)
        return cls(factor.unsqueeze(1), inverse.unsqueeze(1), None if shift is None else shift.unsqueeze(1))

    def rows(self, rows: slice) -> "_Grid":
        return _Grid(self.factor[rows], self.inverse[rows], None if self.shift is None else self.shift[rows])


def scale_codes(groups: BlockGroups, kind: BlockType) -> Tensor:
    """k of the present alpha, as floating-point numbers."""
    return _codes(groups.numbers, groups.alpha, kind.scales)


def minimum_codes(groups: BlockGroups, kind: BlockType) -> Tensor:
    """The same of offsets and beta."""
    return _codes(groups.minimum_numbers, groups.beta, kind.minimums)


def _codes(start: Tensor, factor: Tensor, integers: SmallIntegers | None) -> Tensor:
    if integers is None:
        return start
    return ((start * factor - integers.first) / integers.step).round_().clamp_(0, integers.largest)


def _number(codes: Tensor, integers: SmallIntegers | None) -> Tensor:
    return codes if integers is None else codes * integers.step + integers.first


def write(groups: BlockGroups, kind: BlockType, w_hat: Tensor) -> None:
    """Writes w_hat of the present parameters."""
    grid, w_hat = _Grid.of(groups, kind), w_hat.view(groups.weight.shape)
    for rows in _chunks(groups.weight):
        part = grid.rows(rows)
        levels = _rounded(groups, kind, rows, part).levels.mul_(part.factor)
        w_hat[rows] = levels if part.shift is None else levels.add_(part.shift)


def step(
    groups: BlockGroups,
    kind: BlockType,
    *,
    gradient: Tensor,
    rate: Tensor,
    faults: Tensor,
    pace: float,
    w_hat: Tensor,
) -> None:
    """Updates V, and alpha and beta by `pace` times the rate; writes w_hat of the new parameters.

    Adds the number of NaN gradients to `faults`; they move nothing.
    """
    grid, gradient = _Grid.of(groups, kind), gradient.view(groups.weight.shape)
    by_factor, by_shift = torch.empty_like(groups.alpha), torch.empty_like(groups.alpha)
    limit = LATTICE_LIMIT if kind.levels == ODD_LEVELS else LIMIT
    for rows in _chunks(groups.weight):
        part = grid.rows(rows)
        found = _rounded(groups, kind, rows, part)
        d = gradient[rows].to(found.levels.dtype)
        faults += d.isnan().sum(dtype=faults.dtype)
        d = d.nan_to_num(0.0, 0.0, 0.0)
        inside = d * found.inside
        if pace:
            torch.sum(d * found.levels - inside * found.numbers, 1, out=by_factor[rows])
            torch.sum(d - inside, 1, out=by_shift[rows])
        move = inside.sign_().mul_(part.factor.sign() * rate)
        groups.offset[rows].sub_(move).clamp_(-limit, limit)
    if pace and kind.scales is not None:
        _move(groups.alpha, by_factor * groups.scale * groups.numbers, rate * pace)
    if pace and kind.minimums is not None:
        _move(groups.beta, by_shift * groups.minimum * groups.minimum_numbers, rate * pace)
    write(groups, kind, w_hat)


def _move(factor: Tensor, gradient: Tensor, rate: Tensor) -> None:
    factor.sub_(gradient.sign_().mul_(rate)).clamp_(*FACTOR_LIMITS)


def keep(groups: BlockGroups, kind: BlockType, better: Tensor) -> None:
    """Stores the present codes of weights, factors and offsets, if `better`."""
    if not better.is_cuda and not better:
        return
    grid = _Grid.of(groups, kind)
    _overwrite(groups.scale_codes, scale_codes(groups, kind), better)
    if kind.offset:
        _overwrite(groups.minimum_codes, minimum_codes(groups, kind), better)
    for rows in _chunks(groups.weight):
        levels = _rounded(groups, kind, rows, grid.rows(rows)).levels
        _overwrite(groups.codes[rows], codes_of(levels, kind), better)


def _overwrite(kept: Tensor, value: Tensor, better: Tensor) -> None:
    kept.copy_(torch.where(better, value.to(kept.dtype), kept) if better.is_cuda else value)


@dataclass(frozen=True)
class _Rounded:
    """Of a chunk, (sub-blocks, columns): numbers (w - o) / f, levels, and m, a truth value."""

    numbers: Tensor
    levels: Tensor
    inside: Tensor


def _rounded(groups: BlockGroups, kind: BlockType, rows: slice, grid: _Grid) -> _Rounded:
    numbers = groups.weight[rows].to(groups.offset.dtype)
    numbers = (numbers if grid.shift is None else numbers - grid.shift) * grid.inverse
    offset = groups.offset[rows]
    if kind.uniform:
        free = (numbers + offset).round_()
        levels = free.clamp(kind.levels[0], kind.levels[-1])
        return _Rounded(numbers, levels, levels == free)
    if kind.levels == ODD_LEVELS:
        free = torch.add(numbers, offset, alpha=2)
        levels = nearest_levels(free, kind, groups.importance[rows])
        return _Rounded(numbers, levels, free.abs() <= kind.levels[-1] + 1)
    free = place_of(numbers, kind).add_(offset).round_()
    index = free.clamp(0, len(kind.levels) - 1)
    table = level_table(kind, numbers.device).to(numbers.dtype)
    levels = table.index_select(0, index.flatten().int()).view(index.shape)
    return _Rounded(numbers, levels, index == free)


def _chunks(weight: Tensor) -> Iterator[slice]:
    count, width = weight.shape
    size = max(1, (CHUNK_ELEMENTS if weight.is_cuda else CACHED_ELEMENTS) // width)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
