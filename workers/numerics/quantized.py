"""The common representation: N methods produce it, M formats consume it, and no method knows a format.

    AffineWeight    W_hat = scale * (codes - zero_point)      one scale per group of consecutive input columns
                    W_hat = scale * codes + offset            the same with a fractional offset per group
    CodebookWeight  W_hat = absmax * codebook[codes]          one absmax per group; it may be quantized itself
    FloatWeight     W_hat = factor * value(codes)             codes of FP8 or FP4, one factor per group or block
    BlockWeight     W_hat = factor * level(codes) + offset    llama.cpp's types: codes of factors and offsets, too
    LowRank         (alpha / rank) * b @ a                    added to one of the above

A linear represents W_hat, or W_hat plus its low-rank product. `codes` are unsigned, 0 .. 2^bits - 1. A symmetric
affine weight has the constant zero point 2^(bits-1), which is not stored; its scale may be negative, so that the larger
side of a group's range may take the extra code (SignRound's full range).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from app.domain.methods import Form, Scheme
from app.domain.methods.block_types import BlockType
from app.domain.methods.named_schemes import WHOLE
from workers.numerics.blocks.levels import level_table
from workers.numerics.floats.elements import element_table
from workers.numerics.row_parts import in_row_parts

Number = float | Tensor
"""A number, or one that the device still computes: reading it waits for the device."""


@dataclass(frozen=True)
class StoredBits:
    """Bits that a result takes, packed, by content.

    scales    per group: scale and zero point or offset, or absmax with all its levels
    adapters  low-rank factors
    """

    codes: int = 0
    scales: int = 0
    codebooks: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, content.name) for content in fields(self))

    def __add__(self, other: "StoredBits") -> "StoredBits":
        return StoredBits(*(getattr(self, content.name) + getattr(other, content.name) for content in fields(self)))


@dataclass(frozen=True)
class AffineWeight:
    """A linear's weight as integer codes with a scale per group, and a zero point or offset unless symmetric.

    codes       uint8, (out, in)
    scale       scale_dtype (fp16, bf16 or fp32), (out, groups)
    zero_point  uint8, (out, groups); None if symmetric, or if there is an offset
    dtype       of the dequantized weight
    offset      floating point, (out, groups), in place of a zero point, from a merged adapter
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    dtype: torch.dtype
    offset: Tensor | None = None
    form: ClassVar[Form] = Form.AFFINE

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns per group; the number of inputs where the scheme says per channel."""
        return self.scheme.width(self.codes.shape[1])

    def dequantize(self) -> Tensor:
        """W_hat in `dtype`, (out, in): product (and sum with an offset) in fp32, one rounding."""
        return in_row_parts(self.codes, self._dequantized)

    def _dequantized(self, rows: slice) -> Tensor:
        codes = self.codes[rows].float()
        shape, codes = codes.shape, codes.view(codes.shape[0], -1, self.group_size)
        scale = self.scale[rows].float().unsqueeze(-1)
        if self.offset is not None:
            return (codes * scale + self.offset[rows].float().unsqueeze(-1)).view(shape).to(self.dtype)
        zero = 2.0 ** (self.scheme.bits - 1) if self.zero_point is None else self.zero_point[rows].float().unsqueeze(-1)
        return ((codes - zero) * scale).view(shape).to(self.dtype)

    def to(self, device: torch.device | str) -> "AffineWeight":
        zero, offset = (None if tensor is None else tensor.to(device) for tensor in (self.zero_point, self.offset))
        return AffineWeight(self.codes.to(device), self.scale.to(device), zero, self.scheme, self.dtype, offset)

    def split(self, rows: Sequence[int]) -> tuple["AffineWeight", ...]:
        """Weights with the given numbers of consecutive outputs."""
        parts, first = [], 0
        for count in rows:
            outputs = slice(first, first := first + count)
            zero, offset = (None if rest is None else rest[outputs] for rest in (self.zero_point, self.offset))
            parts.append(
                replace(self, codes=self.codes[outputs], scale=self.scale[outputs], zero_point=zero, offset=offset)
            )
        return tuple(parts)

    def stored_bits(self) -> StoredBits:
        """Bits of codes, scales and zero points or offsets."""
        zero = 0 if self.zero_point is None else self.zero_point.numel() * self.scheme.bits
        offset = 0 if self.offset is None else _bits(self.offset)
        return StoredBits(codes=self.codes.numel() * self.scheme.bits, scales=_bits(self.scale) + zero + offset)


@dataclass(frozen=True)
class QuantizedAbsmax:
    """The absmax of each group in a second level of codes: a_hat = offset + scale * codes / (2^bits - 1).

    codes       uint8, (out, groups)
    scale       fp16, bf16 or fp32, (superblocks,): one for `superblock` consecutive groups, row after row; the last
                may have fewer
    offset      fp32, (): one for the whole linear
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    superblock: int

    def dequantize(self) -> Tensor:
        """a_hat, fp32 (out, groups)."""
        scale: Tensor = self.scale.float().repeat_interleave(self.superblock)
        scale = scale[: self.codes.numel()].view(self.codes.shape)
        # By the reciprocal: dividing by a number gives other last bits on a GPU than on a CPU.
        return self.codes.float() * scale * (1 / ((1 << self.bits) - 1)) + self.offset

    def to(self, device: torch.device | str) -> "QuantizedAbsmax":
        codes, scale, offset = (tensor.to(device) for tensor in (self.codes, self.scale, self.offset))
        return QuantizedAbsmax(codes, scale, offset, self.bits, self.superblock)


@dataclass(frozen=True)
class CodebookWeight:
    """A linear's weight as indices into a codebook, with the largest magnitude of each group.

    codes     uint8, (out, in)
    codebook  fp32, (2^bits,), ascending, within [-1, 1]
    absmax    floating point (out, groups), or the same in codes of its own
    scheme    bits and group size; symmetric, since there is no zero point
    dtype     of the dequantized weight
    """

    codes: Tensor
    codebook: Tensor
    absmax: Tensor | QuantizedAbsmax
    scheme: Scheme
    dtype: torch.dtype
    form: ClassVar[Form] = Form.CODEBOOK

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns per group; the number of inputs where the scheme says per channel."""
        return self.scheme.width(self.codes.shape[1])

    def dequantize(self) -> Tensor:
        """W_hat in `dtype`, (out, in): product in fp32, one rounding."""
        absmax = self.absmax.float() if isinstance(self.absmax, Tensor) else self.absmax.dequantize()

        def dequantized(rows: slice) -> Tensor:
            codes = self.codes[rows]
            values = self.codebook.index_select(0, codes.flatten().int()).view(codes.shape[0], -1, self.group_size)
            return (values * absmax[rows].unsqueeze(-1)).view(codes.shape).to(self.dtype)

        return in_row_parts(self.codes, dequantized)

    def to(self, device: torch.device | str) -> "CodebookWeight":
        codes, codebook, absmax = self.codes.to(device), self.codebook.to(device), self.absmax.to(device)
        return CodebookWeight(codes, codebook, absmax, self.scheme, self.dtype)

    def stored_bits(self) -> StoredBits:
        """Bits of codes, of the absmax with all its levels, and of the codebook."""
        if isinstance(self.absmax, Tensor):
            scales = _bits(self.absmax)
        else:
            first = self.absmax.codes.numel() * self.absmax.bits
            scales = first + _bits(self.absmax.scale) + _bits(self.absmax.offset)
        codes = self.codes.numel() * self.scheme.bits
        return StoredBits(codes=codes, scales=scales, codebooks=_bits(self.codebook))


@dataclass(frozen=True)
class FloatWeight:
    """A linear's weight as codes of a small floating-point type, with a factor per group of columns or block.

        W_hat = factor * value(code)    factor = scale, 2^(scale - 127) or scale / global_scale

    codes         uint8, (out, in): the bits of e4m3; of e2m1 sign << 3 | index of the magnitude
    scale         (bands, groups): floating point, or fp8 e4m3 beside a global scale, or uint8 exponents plus 127
    scheme        one by name, of a floating-point element; bands are of `group_rows` rows
    dtype         of the dequantized weight
    global_scale  fp32, (1,): what a true scale is multiplied by before it is rounded to e4m3
    input_amax    fp32, (1,): largest magnitude of the inputs in calibration text, where the scheme is `calibrated`
    """

    codes: Tensor
    scale: Tensor
    scheme: Scheme
    dtype: torch.dtype
    global_scale: Tensor | None = None
    input_amax: Tensor | None = None
    form: ClassVar[Form] = Form.FLOAT

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns per group, of the last one perhaps fewer; the number of inputs where a group is a row."""
        return self.scheme.width(self.codes.shape[1])

    def factor(self) -> Tensor:
        """The factors, fp32 (bands, groups)."""
        if self.scale.dtype == torch.uint8:
            return torch.exp2(self.scale.float() - 127)
        return self.scale.float() if self.global_scale is None else self.scale.float() / self.global_scale

    def row_factor(self) -> Tensor:
        """The factors of every row, fp32 (out, groups)."""
        rows, factor = self.codes.shape[0], self.factor()
        band = rows if self.scheme.group_rows == WHOLE else self.scheme.group_rows
        return factor if band == 1 else factor.repeat_interleave(band, 0)[:rows]

    def dequantize(self) -> Tensor:
        """W_hat in `dtype`, (out, in): product in fp32, one rounding."""
        factor, table = self.row_factor(), element_table(self.scheme, self.codes.device)
        columns, width = self.codes.shape[1], self.group_size

        def dequantized(rows: slice) -> Tensor:
            values = table.index_select(0, self.codes[rows].flatten().int()).view(-1, columns)
            return (values * factor[rows].repeat_interleave(width, 1)[:, :columns]).to(self.dtype)

        return in_row_parts(self.codes, dequantized)

    def to(self, device: torch.device | str) -> "FloatWeight":
        """The weight with its tensors there."""
        rest = (None if tensor is None else tensor.to(device) for tensor in (self.global_scale, self.input_amax))
        return FloatWeight(self.codes.to(device), self.scale.to(device), self.scheme, self.dtype, *rest)

    def stored_bits(self) -> StoredBits:
        """Bits of codes and of all scales."""
        others = sum(_bits(tensor) for tensor in (self.global_scale, self.input_amax) if tensor is not None)
        return StoredBits(codes=self.codes.numel() * self.scheme.bits, scales=_bits(self.scale) + others)


@dataclass(frozen=True)
class BlockWeight:
    """A linear's weight in a type of llama.cpp's (`app.domain.methods.block_types`), of blocks within rows.

        W_hat = factor * level(code) + offset     factor = scale * (first + step * scale_code)
                                                  offset = -(minimum * minimum_code), or minimum where it has no codes
    With codes of 8 bits at most beside fp16 all but the last sum is exact in fp32, on any device and in any order: the
    numbers are those that llama.cpp decodes.

    codes          uint8 (out, in), indices into the type's levels
    scale          fp16 (out, blocks)
    scale_codes    uint8 (out, sub-blocks); None: a block is not divided
    minimum        fp16 (out, blocks); None: the type has no offset
    minimum_codes  uint8 (out, sub-blocks)
    scheme         one by name
    dtype          of the dequantized weight
    """

    codes: Tensor
    scale: Tensor
    scheme: Scheme
    dtype: torch.dtype
    scale_codes: Tensor | None = None
    minimum: Tensor | None = None
    minimum_codes: Tensor | None = None
    form: ClassVar[Form] = Form.BLOCKS

    @property
    def kind(self) -> BlockType:
        """The facts of its type.

        Raises:
            ValueError: the scheme is no type of llama.cpp's.
        """
        if self.scheme.blocks is None:
            raise ValueError(f"{self.scheme} is no type of llama.cpp's")
        return self.scheme.blocks

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns of a sub-block."""
        return self.scheme.group_size

    def factor(self) -> Tensor:
        """The factors of the sub-blocks, exact, fp32 (out, sub-blocks)."""
        if self.scale_codes is None or self.kind.scales is None:
            return self.scale.float()
        numbers = self.scale_codes.float() * self.kind.scales.step + self.kind.scales.first
        return self._of_sub_blocks(self.scale) * numbers

    def offset(self) -> Tensor | None:
        """The offsets of the sub-blocks, exact, fp32 (out, sub-blocks); None: the type has none."""
        if self.minimum is None:
            return None
        if self.minimum_codes is None:
            return self.minimum.float()
        return -(self._of_sub_blocks(self.minimum) * self.minimum_codes.float())

    def _of_sub_blocks(self, of_blocks: Tensor) -> Tensor:
        return of_blocks.float().repeat_interleave(self.kind.weights // self.kind.columns, 1)

    def dequantize(self) -> Tensor:
        """W_hat in `dtype`, (out, in): product (and sum with an offset) in fp32, one rounding."""
        table, factor, offset = level_table(self.kind, self.codes.device), self.factor(), self.offset()

        def dequantized(rows: slice) -> Tensor:
            levels = table.index_select(0, self.codes[rows].flatten().int())
            weight = levels.view(-1, factor.shape[1], self.group_size) * factor[rows].unsqueeze(-1)
            weight = weight if offset is None else weight + offset[rows].unsqueeze(-1)
            return weight.view(-1, self.codes.shape[1]).to(self.dtype)

        return in_row_parts(self.codes, dequantized)

    def to(self, device: torch.device | str) -> "BlockWeight":
        """The weight with its tensors there."""
        rest = (self.scale_codes, self.minimum, self.minimum_codes)
        there = (None if tensor is None else tensor.to(device) for tensor in rest)
        return BlockWeight(self.codes.to(device), self.scale.to(device), self.scheme, self.dtype, *there)

    def stored_bits(self) -> StoredBits:
        """Bits of the blocks, as a file has them."""
        kind, levels = self.kind, ((self.scale_codes, self.kind.scales), (self.minimum_codes, self.kind.minimums))
        scales = _bits(self.scale) + (0 if self.minimum is None else _bits(self.minimum))
        scales += sum(codes.numel() * of.bits for codes, of in levels if codes is not None and of is not None)
        return StoredBits(codes=self.codes.numel() // kind.weights * kind.size * 8 - scales, scales=scales)


QuantizedWeight = AffineWeight | CodebookWeight | FloatWeight | BlockWeight


@dataclass(frozen=True)
class LowRank:
    """A correction of low rank: (alpha / rank) * b @ a is added to the quantized weight, as peft's LoRA does.

    a      (rank, in): peft's lora_A
    b      (out, rank): peft's lora_B, the same dtype
    alpha  peft's lora_alpha; the stored a and b already have its factor taken out, see `of_product`
    """

    a: Tensor
    b: Tensor
    alpha: float

    @classmethod
    def of_product(cls, left: Tensor, right: Tensor, alpha: float, dtype: torch.dtype) -> "LowRank":
        """The correction left @ right at full strength for every alpha: both factors are divided by sqrt(alpha/rank).

        left (out, rank), right (rank, in); rounded to `dtype` once, after the division.
        """
        root = (alpha / right.shape[0]) ** 0.5
        return cls((right / root).to(dtype), (left / root).to(dtype), alpha)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def product(self) -> Tensor:
        """(alpha / rank) * b @ a, fp32 (out, in)."""
        return (self.b.float() @ self.a.float()) * (self.alpha / self.rank)

    def to(self, device: torch.device | str) -> "LowRank":
        return LowRank(self.a.to(device), self.b.to(device), self.alpha)

    def stored_bits(self) -> StoredBits:
        """Bits of both factors."""
        return StoredBits(adapters=_bits(self.a) + _bits(self.b))


@dataclass(frozen=True)
class Scaling:
    """Scales that moved between a linear and its neighbours: its weight represents W * columns / rows.

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
    """Result of a method for one linear: its quantized weight, and a low-rank correction if the method has one."""

    weight: QuantizedWeight
    low_rank: LowRank | None = None
    scaling: Scaling = Scaling()

    @property
    def affine(self) -> AffineWeight:
        """The weight, which must be affine.

        Raises:
            TypeError: it is not.
        """
        if not isinstance(self.weight, AffineWeight):
            raise TypeError(f"the weight is a {type(self.weight).__name__}, not affine")
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight that the linear represents, (out, in) in the weight's dtype.

        With a correction the sum of the *rounded* W_hat and the product is rounded once more, as peft does
        when it merges the same adapter into a base that is loaded in that dtype.
        """
        base = self.weight.dequantize()
        return base if self.low_rank is None else (base.float() + self.low_rank.product()).to(base.dtype)

    def to(self, device: torch.device | str) -> "LinearResult":
        low_rank = None if self.low_rank is None else self.low_rank.to(device)
        return replace(self, weight=self.weight.to(device), low_rank=low_rank)

    def stored_bits(self) -> StoredBits:
        """Bits of the weight and of its correction."""
        bits = self.weight.stored_bits()
        return bits if self.low_rank is None else bits + self.low_rank.stored_bits()


def _bits(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() * 8
