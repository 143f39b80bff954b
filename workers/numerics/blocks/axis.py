"""A block type's levels as whole numbers in their order, which are its codes, and weights as places between them.

    u(y)   place of a number y = (w - o) / f: the k-th level is at k, and between two of them it is linear

Of a place x the code is round(x); levels of a lattice (IQ3_S) are taken four at a time: the point of it that is nearest
to where four places round to. Of places that are nearer than 1/2 to their codes, both are those codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain.methods.block_types import ODD_LEVELS, BlockType
from workers.numerics.blocks.levels import level_table, nearest_levels, place_of

BOX = 0.49
"""The farthest that a place starts from its code."""


@dataclass(frozen=True)
class BlockAxis:
    """The axis of a type."""

    kind: BlockType

    @property
    def low(self) -> int:
        """The smallest code."""
        return 0

    @property
    def high(self) -> int:
        """The largest one."""
        return len(self.kind.levels) - 1

    def place(self, scaled: Tensor) -> Tensor:
        """u of weights less their offset over their factor, a new tensor."""
        if self.kind.uniform:
            return scaled - self.kind.levels[0]
        return (scaled + ODD_LEVELS[-1]) / 2 if self.kind.levels == ODD_LEVELS else place_of(scaled, self.kind)

    def rounded(self, place: Tensor) -> Tensor:
        """Codes of places (..., columns), as floating-point numbers, a new tensor."""
        if self.kind.levels == ODD_LEVELS:
            near = place.round().mul_(2).sub_(ODD_LEVELS[-1])
            return nearest_levels(near, self.kind).add_(ODD_LEVELS[-1]).div_(2)
        return place.round().clamp_(0, self.high)

    def value(self, index: Tensor) -> Tensor:
        """Levels of codes, in their dtype, a new tensor."""
        if self.kind.uniform:
            return index + self.kind.levels[0]
        if self.kind.levels == ODD_LEVELS:
            return index * 2 - ODD_LEVELS[-1]
        table = level_table(self.kind, index.device).to(index.dtype)
        return table.index_select(0, index.flatten().int()).view(index.shape)

    def index(self, codes: Tensor) -> Tensor:
        """Stored codes as floating-point numbers, fp32."""
        return codes.float()

    def code(self, index: Tensor) -> Tensor:
        """Codes as they are stored, uint8."""
        return index.to(torch.uint8)


def start_of(axis: BlockAxis, weight: Tensor, codes: Tensor, factor: Tensor, offset: Tensor | None) -> Tensor:
    """Places of weights (sub-blocks, columns), each at most BOX from the code that it has, in the factors' dtype.

    codes   uint8, the same shape; factor, offset (sub-blocks,), fp32 or fp64
    """
    numbers = weight.to(factor.dtype)
    numbers = numbers if offset is None else numbers - offset.unsqueeze(1)
    scaled = numbers * torch.where(factor == 0, 0.0, 1 / factor).unsqueeze(1)
    index = axis.index(codes).to(scaled.dtype)
    return axis.place(scaled).clamp_(index - BOX, index + BOX)
