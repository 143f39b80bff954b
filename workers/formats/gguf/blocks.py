"""GGML's quantized blocks of 32 weights: which affine schemes they hold exactly, and the bytes.

    type  bytes of a block                             weight           holds
    Q4_0  d fp16, 16 of nibbles                        d*(q - 8)        symmetric, 2 to 4 bits
    Q5_0  d fp16, 4 of fifth bits, 16 of nibbles       d*(q - 16)       symmetric, 5 bits
    Q8_0  d fp16, 32 of int8                           d*q              symmetric, 6 to 8 bits
    Q4_1  d fp16, m fp16, 16 of nibbles                d*q + m          asymmetric, 2 to 4 bits
    Q5_1  d fp16, m fp16, 4 of fifth bits, 16          d*q + m          asymmetric, 5 bits

A group of a multiple of 32 columns repeats its d = scale and m = -scale*zero_point in each of its blocks. Symmetric
codes move from the middle of their own range to that of the type, so that codes and scale are exact. An offset is
rounded to fp16 once; the distance that this moves weights is reported. In a block, byte j of the nibbles has weight j
in its lower half and weight j + 16 in its upper one, and fifth bits are one little-endian word, weight 0 lowest.

There is no type for asymmetric 6 to 8 bits, or for groups that are no multiple of 32. Weights in a type by its name
have their bytes already (`workers.formats.gguf.block_bytes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from app.domain.methods import Scheme
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from workers.formats.gguf.block_bytes import decode, encode
from workers.formats.stored_linear import StoredLinear
from workers.numerics.quantized import AffineWeight, BlockWeight, LinearResult

BLOCK = 32
MIDDLE = {Kind.Q4_0: 8, Kind.Q5_0: 16, Kind.Q8_0: 0}
"""The code that stands for 0 in the symmetric types."""


@dataclass(frozen=True)
class Packed:
    """A linear's rows in a type's bytes.

    kind          number of the type, which the package gguf need not know
    data          uint8 (out, bytes per row)
    offset_error  the most by which rounding an offset moves a group's weights, in steps of its scale; 0 if symmetric
    """

    kind: int
    data: Tensor
    offset_error: float


def block_kind(scheme: Scheme) -> Kind | None:
    """The type that holds weights of this scheme exactly; None if there is none."""
    if scheme.symmetric:
        return Kind.Q4_0 if scheme.bits <= 4 else Kind.Q5_0 if scheme.bits == 5 else Kind.Q8_0
    return Kind.Q4_1 if scheme.bits <= 4 else Kind.Q5_1 if scheme.bits == 5 else None


def pack(name: str, weight: AffineWeight | BlockWeight) -> Packed:
    """The weight in the type of its scheme, or in the one that it is in.

    Raises:
        FormatCannotHold: no type holds the scheme, the groups do not divide into blocks, or the scale is not fp16.
        ValueError: a code does not fit into the scheme's bits; packed, it would be another one.
    """
    if isinstance(weight, BlockWeight):
        return Packed(weight.kind.number, encode(weight), 0.0)
    kind = block_kind(weight.scheme)
    if kind is None or weight.group_size % BLOCK:
        raise FormatCannotHold(
            f"gguf has no type for {weight.scheme}", field=name, hint="see GET /v1/formats for what it holds"
        )
    if weight.scale.dtype != torch.float16:
        raise FormatCannotHold(
            f"gguf stores scales as torch.float16; these are {weight.scale.dtype}, and rounding them would change the "
            "weights",
            field=name,
            value=str(weight.scale.dtype),
            hint="quantize again with this format among the job's formats",
        )
    if weight.codes.numel() and int(weight.codes.max()) >> weight.scheme.bits:
        raise ValueError(f"code {int(weight.codes.max())} does not fit into {weight.scheme.bits} bits")
    scale = _of_blocks(weight, weight.scale)
    codes = weight.codes.view(weight.shape[0], -1, BLOCK)
    if kind in MIDDLE:
        codes = codes.to(torch.int16) - 2 ** (weight.scheme.bits - 1) + MIDDLE[kind]
        parts = [_bytes(scale), *_code_parts(codes, kind)]
        return Packed(kind, torch.cat(parts, -1).flatten(1), 0.0)
    exact, rounded = _offset(weight), _stored_offset(name, weight)
    moved = ((rounded.float() - exact).abs() / weight.scale.float().abs()).max()
    parts = [_bytes(scale), _bytes(_of_blocks(weight, rounded)), *_code_parts(codes.to(torch.int16), kind)]
    return Packed(kind, torch.cat(parts, -1).flatten(1), float(moved))


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The bytes of the linear `name` as one tensor; refuses what `pack` does."""
    weight = result.weight
    return {f"{name}.weight": pack(name, weight if isinstance(weight, BlockWeight) else result.affine).data}


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The inverse of `compress`, by `unpack`.

    Raises:
        CorruptCheckpoint: no type holds the scheme, or the tensor is missing.
    """
    kind, data = block_kind(stored.scheme), tensors.get(f"{name}.weight")
    if data is not None and stored.scheme.blocks is not None:
        return LinearResult(decode(data, stored.scheme, stored.torch_dtype))
    if kind is None or data is None:
        raise CorruptCheckpoint(f"there are no blocks of {stored.scheme}", field=name)
    return LinearResult(unpack(data, kind, stored.scheme, stored.torch_dtype))


def held(name: str, weight: AffineWeight) -> AffineWeight:
    """The weight with the numbers that `pack` stores of it: where it is asymmetric, one fp16 offset per group.

    Raises:
        FormatCannotHold: an offset does not fit fp16.
    """
    if weight.scheme.symmetric:
        return weight
    return replace(weight, zero_point=None, offset=_stored_offset(name, weight))


def unpack(data: Tensor, kind: Kind, scheme: Scheme, dtype: torch.dtype) -> AffineWeight:
    """The inverse of `pack` for weights without a fractional offset; uint8 (out, bytes per row)."""
    symmetric, five = kind in MIDDLE, kind in (Kind.Q5_0, Kind.Q5_1)
    head = 2 if symmetric else 4
    blocks = data.view(len(data), -1, head + (BLOCK if kind is Kind.Q8_0 else BLOCK // 2 + (4 if five else 0)))
    every = slice(None, None, scheme.width(blocks.shape[1] * BLOCK) // BLOCK)
    scale = blocks[..., :2].contiguous().view(torch.float16)[:, every, 0].contiguous()
    codes = _codes(blocks[..., head:], kind)
    if symmetric:
        codes = codes - MIDDLE[kind] + 2 ** (scheme.bits - 1)
        return AffineWeight(codes.to(torch.uint8).flatten(1), scale, None, scheme, dtype)
    offset = blocks[..., 2:4].contiguous().view(torch.float16)[:, every, 0]
    zero = (-offset.float() / scale.float()).round().to(torch.uint8)
    return AffineWeight(codes.to(torch.uint8).flatten(1), scale, zero, scheme, dtype)


def _offset(weight: AffineWeight) -> Tensor:
    """The unrounded m, fp32 (out, groups)."""
    if weight.offset is not None:
        return weight.offset.float()
    assert weight.zero_point is not None  # noqa: S101 - for the type checker: asymmetric, and no offset
    return -weight.scale.float() * weight.zero_point.float()


def _stored_offset(name: str, weight: AffineWeight) -> Tensor:
    """The stored m, fp16 (out, groups)."""
    rounded = _offset(weight).to(torch.float16)
    if not torch.isfinite(rounded).all():
        raise FormatCannotHold("an offset is beyond what fp16 holds", field=name, hint="use a symmetric scheme")
    return rounded


def _of_blocks(weight: AffineWeight, of_groups: Tensor) -> Tensor:
    """Numbers per group as numbers per block, (out, blocks)."""
    return of_groups.repeat_interleave(weight.group_size // BLOCK, 1)


def _bytes(numbers: Tensor) -> Tensor:
    """fp16 (out, blocks) as uint8 (out, blocks, 2); GGUF is little-endian, as are the machines that torch runs on."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


def _code_parts(codes: Tensor, kind: Kind) -> list[Tensor]:
    """Codes of a type's own range, int16 (out, blocks, 32), as its bytes."""
    if kind is Kind.Q8_0:
        return [codes.to(torch.int8).view(torch.uint8)]
    low, high = codes.to(torch.uint8).chunk(2, -1)
    nibbles = (low & 15) | (high & 15) << 4
    if kind in (Kind.Q4_0, Kind.Q4_1):
        return [nibbles]
    fifth = (codes.to(torch.uint8) >> 4).view(*codes.shape[:2], 4, 8)
    return [(fifth << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8), nibbles]


def _codes(parts: Tensor, kind: Kind) -> Tensor:
    """The inverse of `_code_parts`, int16 (out, blocks, 32)."""
    if kind is Kind.Q8_0:
        return parts.contiguous().view(torch.int8).to(torch.int16)
    nibbles = parts[..., -BLOCK // 2 :]
    codes = torch.cat([nibbles & 15, nibbles >> 4], -1).to(torch.int16)
    if kind in (Kind.Q4_0, Kind.Q4_1):
        return codes
    fifth = (parts[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return codes + (fifth.flatten(-2).to(torch.int16) << 4)
