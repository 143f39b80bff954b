"""Quantized weights as training holds them: codes packed in memory, W_hat computed in one pass over them.

    affine      w_hat = scale * (code - zero)       or scale * code + offset
    codebook    w_hat = absmax * codebook[code]         FP8 and FP4 too, with a table of their values
    blocks      one of these three, with the exact factor and offset of each sub-block

Codes of up to 2 bits lie four in a byte, up to 4 bits two, wider ones one; the first in the lowest bits. Arithmetic is
that of `workers.numerics.quantized`: fp32, rounded once. On a GPU one kernel unpacks, scales and rounds
(`workers.numerics.backends.unpack_kernels`); elsewhere torch does, for tests.
"""

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from workers.numerics.backend import unpack_kernels
from workers.numerics.blocks.levels import level_table
from workers.numerics.floats.elements import element_table
from workers.numerics.quantized import (
    AffineWeight,
    BlockWeight,
    CodebookWeight,
    FloatWeight,
    QuantizedAbsmax,
    QuantizedWeight,
)

Kind = Literal["middle", "zero", "offset", "codebook"]


@dataclass(frozen=True)
class PackedWeight:
    """A weight (out, in), row after row.

    packed     uint8 (ceil(out * in / codes per byte),)
    width      bits that a code takes here: 2, 4 or 8
    group_size consecutive columns that share a scale
    scale      of each group, (out, groups), or in codes of its own
    other      zero points uint8 or offsets (out, groups), or the codebook fp32; None with the constant zero point
    middle     that constant
    """

    packed: Tensor
    width: int
    shape: tuple[int, int]
    group_size: int
    kind: Kind
    scale: Tensor | QuantizedAbsmax
    other: Tensor | None
    middle: float

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "PackedWeight":
        """The packed weight, on the same device."""
        width = next(width for width in (2, 4, 8) if weight.scheme.code_bits <= width)
        packed, middle = _pack(weight.codes, width), 2.0 ** (weight.scheme.bits - 1)
        kind: Kind = "codebook"
        scale: Tensor | QuantizedAbsmax
        other: Tensor | None
        if isinstance(weight, BlockWeight):
            return cls._of_blocks(weight, packed, width)
        if isinstance(weight, FloatWeight):
            return cls._of_float(weight, packed, width)
        if isinstance(weight, CodebookWeight):
            scale, other = weight.absmax, weight.codebook.contiguous()
        else:
            kind, other = _zero(weight)
            scale = weight.scale
        return cls(packed, width, weight.shape, weight.group_size, kind, scale, other, middle)

    @classmethod
    def _of_float(cls, weight: FloatWeight, packed: Tensor, width: int) -> "PackedWeight":
        """The codes as indices into a table of all values; groups that are not whole are cut into smaller ones."""
        columns, factor = weight.shape[1], weight.row_factor()
        size = gcd(columns, weight.group_size)
        whole = factor.repeat_interleave(weight.group_size // size, 1)[:, : columns // size].contiguous()
        table = element_table(weight.scheme, packed.device)
        return cls(packed, width, weight.shape, size, "codebook", whole, table, 0.0)

    @classmethod
    def _of_blocks(cls, weight: BlockWeight, packed: Tensor, width: int) -> "PackedWeight":
        """The exact factors and offsets of the sub-blocks; levels are codes less a constant, or a table."""
        offset, first = weight.offset(), weight.kind.levels[0]
        table = None if weight.kind.uniform else level_table(weight.kind, packed.device)
        if offset is not None and (first or table is not None):
            raise ValueError(f"{weight.scheme} has an offset beside levels that are not its codes")
        kind: Kind = "middle" if table is None and offset is None else "codebook" if offset is None else "offset"
        other = table if offset is None else offset
        return cls(packed, width, weight.shape, weight.group_size, kind, weight.factor(), other, float(-first))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W_hat, (out, in)."""
        scale = self.scale if isinstance(self.scale, Tensor) else self.scale.dequantize()
        kernels = unpack_kernels(self.packed.device, dtype)
        if kernels is not None:
            out = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
            kernels.unpack(
                self.packed,
                scale,
                self.other,
                out,
                kind=self.kind,
                width=self.width,
                group_size=self.group_size,
                middle=self.middle,
            )
            return out
        codes = _unpack(self.packed, self.width, self.shape).view(self.shape[0], -1, self.group_size)
        return self._scaled(codes, scale.float().unsqueeze(-1)).view(self.shape).to(dtype)

    def _scaled(self, codes: Tensor, scale: Tensor) -> Tensor:
        if self.other is None:
            return (codes.float() - self.middle) * scale
        if self.kind == "codebook":
            return self.other[codes.int()] * scale
        other = self.other.float().unsqueeze(-1)
        return codes.float() * scale + other if self.kind == "offset" else (codes.float() - other) * scale


def _zero(weight: AffineWeight) -> tuple[Kind, Tensor | None]:
    if weight.offset is not None:
        return "offset", weight.offset.contiguous()
    return ("middle", None) if weight.zero_point is None else ("zero", weight.zero_point.contiguous())


def _pack(codes: Tensor, width: int) -> Tensor:
    """uint8 codes, flat, several per byte."""
    each = 8 // width
    flat = torch.nn.functional.pad(codes.flatten(), (0, -codes.numel() % each)).view(-1, each)
    packed = flat[:, 0].clone()
    for index in range(1, each):
        packed |= flat[:, index] << (index * width)
    return packed


def _unpack(packed: Tensor, width: int, shape: tuple[int, int]) -> Tensor:
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**width - 1)
    return codes.flatten()[: shape[0] * shape[1]].view(shape)
