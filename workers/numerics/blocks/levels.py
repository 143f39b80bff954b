"""Levels of llama.cpp's block types: the table that codes index, the level nearest to a number, and what to scale by.

Uneven levels are found between their midpoints. IQ3_S has its magnitudes four by four from a lattice of 512 points
(the table of the package gguf), its signs apart.
"""

from functools import cache

import torch
from gguf.quants import IQ3_S as LATTICE
from torch import Tensor

from app.domain.methods.block_types import ODD_LEVELS, BlockType

QUAD = 4
"""Weights of a point of the lattice."""
NEIGHBOURS = 8
"""Points of the lattice that are looked at from where four magnitudes lie."""
STEPS = len(ODD_LEVELS) // 2
"""Magnitudes of the lattice: 1, 3, .. 15."""


@cache
def level_table(kind: BlockType, device: torch.device) -> Tensor:
    """The level of every code, fp32 (levels,)."""
    return torch.tensor(kind.levels, dtype=torch.float32, device=device)


def nearest_levels(numbers: Tensor, kind: BlockType, weights: Tensor | None = None) -> Tensor:
    """The level nearest to each number, fp32, the same shape (..., columns); ties go to even numbers.

    weights   of the squared errors, the same shape: where four numbers have one level together; None: all alike
    """
    if kind.uniform:
        return numbers.round().clamp_(kind.levels[0], kind.levels[-1])
    if kind.levels == ODD_LEVELS:
        return _on_lattice(numbers, weights)
    # All middles are multiples of a half: the levels stand in a table of the halves.
    first, table = levels_by_halves(kind, numbers.device)
    # A NaN becomes some integer, which is brought into the table.
    halves = (numbers * 2).floor_().sub_(first).clamp_(0, len(table) - 1).int().clamp_(0, len(table) - 1)
    return table.index_select(0, halves.flatten()).view(numbers.shape)


def inverse(numbers: Tensor) -> Tensor:
    """1 / numbers, and 0 where they are 0."""
    return torch.where(numbers == 0, 0.0, 1 / numbers)


def codes_of(levels: Tensor, kind: BlockType) -> Tensor:
    """Codes of levels, uint8."""
    if kind.uniform:
        return (levels - kind.levels[0]).to(torch.uint8)
    first, codes = _codes_by_halves(kind, levels.device)
    halves = (levels * 2).sub_(first).clamp_(0, len(codes) - 1).int().clamp_(0, len(codes) - 1)  # of NaN, too
    return codes.index_select(0, halves.flatten()).view(levels.shape)


def place_of(numbers: Tensor, kind: BlockType) -> Tensor:
    """Places of numbers among uneven levels, real: the k-th level is at k, and between two of them it is linear."""
    table = level_table(kind, numbers.device).to(numbers.dtype)
    first, whole = _by_whole_numbers(kind, numbers.device)
    at = numbers.floor().sub_(first).clamp_(0, len(whole) - 1).int().clamp_(0, len(whole) - 1)
    below = whole.index_select(0, at.flatten())
    low, high = (table.index_select(0, index).view(numbers.shape) for index in (below, below + 1))
    return ((numbers - low) / (high - low)).add_(below.view(numbers.shape))


@cache
def _by_whole_numbers(kind: BlockType, device: torch.device) -> tuple[int, Tensor]:
    """A first whole number, and for it and each that follows the last code whose level is no higher, int32.

    The last level has the code before: there is none after it.
    """
    first, last = kind.levels[0], kind.levels[-1]
    inner = torch.tensor(kind.levels[1:-1], device=device)
    codes = torch.bucketize(torch.arange(first, last + 1, device=device), inner, right=True)
    return first, codes.int()


@cache
def lattice(device: torch.device) -> Tensor:
    """The points of the lattice, fp32 (512, 4)."""
    LATTICE.init_grid()
    return torch.from_numpy(LATTICE.grid.reshape(-1, QUAD).copy()).to(device)


@cache
def point_numbers(device: torch.device) -> Tensor:
    """Number of the lattice's point of four magnitudes' indices (`_cell`), int16 (4096,); -1: there is none."""
    numbers = torch.full((STEPS**QUAD,), -1, dtype=torch.int16, device=device)
    points = lattice(device)
    numbers[cells_of(points)] = torch.arange(len(points), dtype=torch.int16, device=device)
    return numbers


def cells_of(magnitudes: Tensor) -> Tensor:
    """The indices of four magnitudes as one number, int64 (...,), of fp32 (..., 4); each to the nearest odd one."""
    index = ((magnitudes - 1) / 2).round_().clamp_(0, STEPS - 1)
    places = STEPS ** torch.arange(QUAD, dtype=torch.float32, device=magnitudes.device)
    cells: Tensor = (index @ places).long()
    return cells.clamp_(0, STEPS**QUAD - 1)  # NaN, too


@cache
def _middles(kind: BlockType, device: torch.device) -> Tensor:
    table = level_table(kind, device)
    return (table[1:] + table[:-1]) / 2


@cache
def levels_by_halves(kind: BlockType, device: torch.device) -> tuple[int, Tensor]:
    """A first number of halves, and the level nearest to what follows each, up to the next: fp32."""
    first, last = 2 * kind.levels[0], 2 * kind.levels[-1]
    middles, table = _middles(kind, device), level_table(kind, device)
    halves = torch.arange(first, last + 1, device=device) / 2
    return first, table[torch.bucketize(halves, middles, right=True)]


@cache
def _codes_by_halves(kind: BlockType, device: torch.device) -> tuple[int, Tensor]:
    """A first number of halves, and the code of the level that each is, uint8."""
    first, levels = levels_by_halves(kind, device)
    return first, torch.bucketize(levels, _middles(kind, device)).to(torch.uint8)


@cache
def neighbours(device: torch.device) -> Tensor:
    """The points nearest to each cell's middle, nearest first, fp32 (4096, NEIGHBOURS, 4)."""
    places = torch.arange(STEPS**QUAD, device=device)
    middles = torch.stack([places // STEPS**digit % STEPS * 2 + 1 for digit in range(QUAD)], -1).float()
    points = lattice(device)
    order = torch.cdist(middles, points).argsort(dim=1, stable=True)[:, :NEIGHBOURS]
    return points[order]


def _on_lattice(numbers: Tensor, weights: Tensor | None) -> Tensor:
    magnitudes = numbers.abs().float().view(-1, QUAD)
    points = neighbours(numbers.device)
    if weights is None:
        found = points[:, 0][cells_of(magnitudes)]
    else:
        near = points[cells_of(magnitudes)]
        errors = ((near - magnitudes.unsqueeze(1)).square_() * weights.reshape(-1, 1, QUAD)).sum(-1)
        best = errors.argmin(1).view(-1, 1, 1).expand(-1, 1, QUAD)
        found = near.gather(1, best).squeeze(1)
    return torch.where(numbers < 0, -1.0, 1.0) * found.view(numbers.shape)
