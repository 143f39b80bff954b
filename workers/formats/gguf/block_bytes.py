"""The bytes of llama.cpp's block types: a table of where each bit of a weight's codes and scales lies.

Types are lists of fields, one after the other. A field of bits takes a tensor of small numbers of each block, (..., k,
l), and stores k of them in each of its bytes, `width` bits of each from the bit `shift` on, the first one lowest. What
is stored otherwise than as it stands in `BlockWeight` is a tensor made of it first: pairs of codes of six bits, signs
and points of IQ3_S's lattice, codes of eight bits as signed bytes. Read in llama.cpp v0.5.0 (`ggml-common.h`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from app.domain.methods.block_types import BlockType
from bitwright.errors import CorruptCheckpoint
from workers.numerics.blocks.levels import QUAD, cells_of, lattice, point_numbers
from workers.numerics.quantized import BlockWeight

Numbers = dict[str, Tensor]
"""Of each block, (blocks, count): fp16 scales, small integers of everything else."""


@dataclass(frozen=True)
class Bits:
    """A field of a block.

    of      name of the numbers
    shape   of a block's, the last two as above
    """

    of: str
    shape: tuple[int, ...]
    width: int
    shift: int = 0

    @property
    def bytes(self) -> int:
        """Its bytes in a block."""
        return prod(self.shape) // self.shape[-2]

    def stored(self, numbers: Tensor) -> Tensor:
        """uint8 (blocks, bytes) of numbers (blocks, count)."""
        parts = ((numbers.view(-1, *self.shape) >> self.shift) & ((1 << self.width) - 1)).to(torch.uint8)
        octets, *others = parts.unbind(-2)
        for place, part in enumerate(others, start=1):
            octets = octets | (part << self.width * place)
        return octets.reshape(len(parts), -1)

    def read(self, data: Tensor) -> Tensor:
        """The share of the numbers (blocks, count), int32, that uint8 (blocks, bytes) hold."""
        places = self.width * torch.arange(self.shape[-2], dtype=torch.int32).view(-1, 1)
        octets = data.int().view(-1, *self.shape[:-2], 1, self.shape[-1])
        parts: Tensor = ((octets >> places) & ((1 << self.width) - 1)) << self.shift
        return parts.flatten(1)


SCALE, MINIMUM = "scale", "minimum"
_NIBBLES, _TWO_BITS, _FIFTH = Bits("codes", (2, 16), 4), Bits("codes", (2, 4, 32), 2), Bits("codes", (4, 8, 1), 1, 4)
_SIX = Bits("six", (1, 12), 8)
_PAIRS = Bits("codes", (4, 2, 32), 4)

LAYOUTS: Mapping[SchemeName, tuple[str | Bits, ...]] = {
    SchemeName.Q4_0: (SCALE, _NIBBLES),
    SchemeName.Q4_1: (SCALE, MINIMUM, _NIBBLES),
    SchemeName.Q5_0: (SCALE, _FIFTH, _NIBBLES),
    SchemeName.Q5_1: (SCALE, MINIMUM, _FIFTH, _NIBBLES),
    SchemeName.Q8_0: (SCALE, Bits("signed", (1, 32), 8)),
    SchemeName.Q2_0: (SCALE, Bits("codes", (16, 4, 1), 2)),
    SchemeName.Q2_K: (Bits("both", (2, 16), 4), _TWO_BITS, SCALE, MINIMUM),
    SchemeName.Q3_K: (
        Bits("codes", (8, 32), 1, 2),
        _TWO_BITS,
        Bits("scale_codes", (2, 8), 4),
        Bits("scale_codes", (4, 4), 2, 4),
        SCALE,
    ),
    SchemeName.Q4_K: (SCALE, MINIMUM, _SIX, _PAIRS),
    SchemeName.Q5_K: (SCALE, MINIMUM, _SIX, Bits("codes", (8, 32), 1, 4), _PAIRS),
    SchemeName.Q6_K: (
        Bits("codes", (2, 2, 64), 4),
        Bits("codes", (2, 4, 32), 2, 4),
        Bits("signed_scales", (1, 16), 8),
        SCALE,
    ),
    SchemeName.IQ4_NL: (SCALE, _NIBBLES),
    SchemeName.IQ4_XS: (
        SCALE,
        Bits("scale_codes", (2, 4, 1), 2, 4),
        Bits("scale_codes", (4, 2, 1), 4),
        Bits("codes", (8, 2, 16), 4),
    ),
    SchemeName.IQ3_S: (
        SCALE,
        Bits("points", (1, 64), 8),
        Bits("points", (8, 8, 1), 1, 8),
        Bits("signs", (32, 8, 1), 1),
        Bits("scale_codes", (4, 2, 1), 4),
    ),
}


def encode(weight: BlockWeight) -> Tensor:
    """The rows of a weight as a file has them, uint8 (out, bytes of a row)."""
    kind, rows = weight.kind, weight.shape[0]
    assert weight.scheme.name is not None  # noqa: S101 - for the type checker
    numbers = _derived(_by_block(weight), kind)
    fields = [
        numbers[field].contiguous().view(torch.uint8) if isinstance(field, str) else field.stored(numbers[field.of])
        for field in LAYOUTS[weight.scheme.name]
    ]
    return torch.cat(fields, 1).view(rows, -1)


def decode(data: Tensor, scheme: Scheme, dtype: torch.dtype) -> BlockWeight:
    """The inverse of `encode`, of uint8 (out, bytes of a row).

    Raises:
        CorruptCheckpoint: rows are not whole blocks of the scheme's type.
    """
    kind, rows = scheme.blocks, len(data)
    if kind is None or scheme.name is None or data.ndim != 2 or data.shape[1] % kind.size:
        raise CorruptCheckpoint(f"rows of {tuple(data.shape)[1:]} bytes are no blocks of {scheme.name}")
    blocks, numbers, first = data.reshape(-1, kind.size), Numbers(), 0
    for field in LAYOUTS[scheme.name]:
        name, size = (field, 2) if isinstance(field, str) else (field.of, field.bytes)
        octets = blocks[:, first : first + size].contiguous()
        first += size
        own = octets.view(torch.float16) if isinstance(field, str) else field.read(octets)
        numbers[name] = numbers[name] | own if name in numbers else own
    numbers = _undone(numbers, kind)

    def in_rows(name: str) -> Tensor | None:
        return None if name not in numbers else numbers[name].to(torch.uint8).view(rows, -1)

    codes, scale = in_rows("codes"), numbers[SCALE].view(rows, -1)
    assert codes is not None  # noqa: S101 - for the type checker: every type has some
    minimum = None if MINIMUM not in numbers else numbers[MINIMUM].view(rows, -1)
    return BlockWeight(codes, scale, scheme, dtype, in_rows("scale_codes"), minimum, in_rows("minimum_codes"))


def _by_block(weight: BlockWeight) -> Numbers:
    blocks = weight.codes.numel() // weight.kind.weights
    parts = {name: getattr(weight, name) for name in ("codes", SCALE, MINIMUM, "scale_codes", "minimum_codes")}
    return {name: tensor.reshape(blocks, -1) for name, tensor in parts.items() if tensor is not None}


SIGN = 128
"""Of codes of eight bits, which are signed bytes in a file."""


def _derived(numbers: Numbers, kind: BlockType) -> Numbers:
    """The numbers with those that they are stored as."""
    codes, scales = numbers["codes"], numbers.get("scale_codes")
    made = dict(numbers)
    if not kind.uniform and kind.scales is not None and kind.scales.step == 2:
        signs, points = _points_of(codes.int(), len(kind.levels))
        made |= {"signs": signs, "points": points}
    if kind.code_bits == 8:
        made["signed"] = codes ^ SIGN
    if scales is not None:
        made["signed_scales"] = scales ^ SIGN
        if "minimum_codes" in numbers:
            both = torch.cat([scales, numbers["minimum_codes"]], 1)
            made |= {"both": both, "six": _six(both.int()) if both.shape[1] == 16 else both}
    return made


def _undone(numbers: Numbers, kind: BlockType) -> Numbers:
    """The inverse of `_derived`."""
    found = dict(numbers)
    if "points" in numbers:
        found["codes"] = _codes_of_points(numbers["signs"], numbers["points"], len(kind.levels))
    if "signed" in numbers:
        found["codes"] = numbers["signed"] ^ SIGN
    if "signed_scales" in numbers:
        found["scale_codes"] = numbers["signed_scales"] ^ SIGN
    both = _both(numbers["six"]) if "six" in numbers else numbers.get("both")
    if both is not None:
        found["scale_codes"], found["minimum_codes"] = both.chunk(2, 1)
    return found


def _six(both: Tensor) -> Tensor:
    """Codes of six bits of 8 factors and 8 offsets, (blocks, 16), in 12 bytes.

    The last four of each have their low four bits together in the last bytes, and the high two above the first four.
    """
    first, last = both.view(-1, 2, 2, 4).unbind(2)
    return torch.cat([(first | last >> 4 << 6).flatten(1), (last[:, 0] & 15) | (last[:, 1] & 15) << 4], 1)


def _both(six: Tensor) -> Tensor:
    """The inverse of `_six`."""
    head, tail = six[:, :8].view(-1, 2, 4), six[:, 8:]
    last = torch.stack([tail & 15, tail >> 4], 1) | head >> 6 << 4
    return torch.stack([head & 63, last], 2).flatten(1)


def _points_of(codes: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Signs (blocks, weights), set where negative, and numbers of points (blocks, weights / 4) of IQ3_S's codes.

    Raises:
        ValueError: four codes are no point of the lattice.
    """
    negative = codes < levels // 2
    magnitudes = (codes * 2 - levels + 1).abs().float()
    points = point_numbers(codes.device)[cells_of(magnitudes.view(len(codes), -1, QUAD))]
    if (points < 0).any():
        raise ValueError("four codes of IQ3_S are no point of its lattice")
    return negative.to(torch.uint8), points


def _codes_of_points(signs: Tensor, points: Tensor, levels: int) -> Tensor:
    magnitudes = lattice(points.device)[points.long()].flatten(1)
    return ((torch.where(signs > 0, -magnitudes, magnitudes) + levels - 1) / 2).int()
