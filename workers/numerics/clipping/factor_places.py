"""Places of low-rank factors' tiles, which a kernel for all linears of a block reads from a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64
"""Rows, columns and ranks that a program computes at once."""
ALIGNED = 16


@dataclass(frozen=True)
class FactorPlaces:
    """Tables of the tiles of some linears, on the device.

    gradients   int64 (tiles, 9): place of W, of A and of B, out, in, rank; first row of B or column of A, first rank,
                and 0 for B, 1 for A
    products    the same for tiles of W: first row and first column
    strength    fp32, c of each tile of `gradients` and then of `products`
    aligned     whether all places and sizes are multiples of `ALIGNED`, so that several numbers are read at once
    """

    gradients: Tensor
    products: Tensor
    strength: Tensor
    aligned: bool

    @classmethod
    def of(
        cls, shapes: Sequence[tuple[int, int]], ranks: Sequence[int], alpha: float, device: torch.device
    ) -> "FactorPlaces":
        """Tables for linears (out, in) one after another, and their factors A (rank, in), B (out, rank) likewise."""
        gradients, products, strengths = list[list[int]](), list[list[int]](), (list[float](), list[float]())
        at = first = 0
        for (out, columns), rank in zip(shapes, ranks, strict=True):
            place = [at, first, first + rank * columns, out, columns, rank]
            sides = [(block, side) for side, size in enumerate((out, columns)) for block in range(0, size, TILE)]
            own = [[*place, block, part, side] for block, side in sides for part in range(0, rank, TILE)]
            tiles = [[*place, row, column, 0] for row in range(0, out, TILE) for column in range(0, columns, TILE)]
            for table, strength, rows in zip((gradients, products), strengths, (own, tiles), strict=True):
                table.extend(rows)
                strength.extend([alpha / rank] * len(rows))
            at, first = at + out * columns, first + rank * (out + columns)
        aligned = not any(size % ALIGNED for shape in shapes for size in shape) and not any(r % ALIGNED for r in ranks)
        each = torch.tensor([*strengths[0], *strengths[1]], dtype=torch.float32).to(device)
        return cls(_table(gradients, device), _table(products, device), each, aligned)


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(device)
