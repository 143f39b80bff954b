"""The common representation: N methods produce it, M formats consume it, and no method knows a format.

    AffineWeight    W_hat = scale * (codes - zero_point)      one scale a group of consecutive input columns

`codes` are unsigned, 0 .. 2^bits - 1. A symmetric weight has the constant zero point 2^(bits-1), which is not stored;
its scale may be negative, so that the larger side of a group's range may take the extra code (SignRound's full range).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from app.domain.methods import PER_CHANNEL, Scheme

Number = float | Tensor
"""A number, or one that the device still computes: reading it waits for the device."""


@dataclass(frozen=True)
class AffineWeight:
    """A linear's weight as integer codes with a scale, and a zero point unless symmetric, for each group.

    codes       uint8, (out, in)
    scale       scale_dtype (fp16, bf16 or fp32), (out, groups)
    zero_point  uint8, (out, groups); None if symmetric
    dtype       of the dequantized weight
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns a group; the number of inputs where the scheme says per channel."""
        return self.codes.shape[1] if self.scheme.group_size == PER_CHANNEL else self.scheme.group_size

    def dequantize(self) -> Tensor:
        """W_hat in `dtype`, (out, in): product in fp32, one rounding."""
        zero = 2.0 ** (self.scheme.bits - 1) if self.zero_point is None else self.zero_point.float().unsqueeze(-1)
        steps = self.codes.float().view(self.shape[0], -1, self.group_size) - zero
        return (steps * self.scale.float().unsqueeze(-1)).view(self.shape).to(self.dtype)

    def to(self, device: torch.device | str) -> "AffineWeight":
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return AffineWeight(self.codes.to(device), self.scale.to(device), zero, self.scheme, self.dtype)

    def split(self, rows: Sequence[int]) -> tuple["AffineWeight", ...]:
        """Weights of so many outputs each, one after another."""
        parts, first = [], 0
        for count in rows:
            part = slice(first, first := first + count)
            zero = None if self.zero_point is None else self.zero_point[part]
            parts.append(replace(self, codes=self.codes[part], scale=self.scale[part], zero_point=zero))
        return tuple(parts)

    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points, packed."""
        groups = self.scale.numel()
        zero = 0 if self.zero_point is None else groups * self.scheme.bits
        return self.codes.numel() * self.scheme.bits + groups * self.scale.element_size() * 8 + zero


@dataclass(frozen=True)
class Scaling:
    """Scales that moved between a linear and its neighbours: its weight stands for W * columns / rows.

    rows     s of the outputs, fp32 or fp64 (out, 1), or 1
    columns  s of the inputs, fp32 or fp64 (in,), or 1
    """

    rows: Tensor | float = 1.0
    columns: Tensor | float = 1.0

    def apply(self, weight: Tensor) -> Tensor:
        """W (out, in) with the scales in it."""
        return weight * self.columns / self.rows

    def undo(self, weight: Tensor) -> Tensor:
        """The W of a weight with the scales in it, in the scales' dtype if there are any."""
        moved = isinstance(self.rows, Tensor) or isinstance(self.columns, Tensor)
        return weight * self.rows / self.columns if moved else weight


@dataclass(frozen=True)
class LinearResult:
    """What a method makes of one linear."""

    weight: AffineWeight
    scaling: Scaling = Scaling()


@dataclass(frozen=True)
class BlockResult:
    """What a method makes of one block: a result for each linear by its name inside the block, and its losses.

    Losses are mean squared errors of the block's output on the method's held-out sequences; None for methods
    that do not look at it.

    parameters  others that change with the linears (norms, biases) by name inside the block, in the model's dtype
    counters    what happened how often, for the report
    """

    linears: dict[str, LinearResult]
    loss_initial: Number | None = None
    loss: Number | None = None
    counters: dict[str, Number] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
