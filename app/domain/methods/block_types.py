"""GGML's block types as rows of data: what llama.cpp's files store of a weight, and what it stands for.

    w = factor * level(code) + offset          one factor, and one offset or none, for each sub-block of a row
    factor = d * (first + step * scale code)   offset = -(dmin * minimum code)          d and dmin: fp16, of the block
    factor = d                                 offset = m                               where there is no second level

Numbers of llama.cpp v0.5.0 (`ggml-common.h`, `dequantize_row_*` of `ggml-quants.c`) and of the package gguf 0.19. With
d, dmin and m of 11 significant bits and integers of at most 8, everything but the sum with an offset is exact in fp32.
"""

from dataclasses import dataclass
from math import ceil, log2


@dataclass(frozen=True)
class SmallIntegers:
    """Unsigned codes of so many bits that stand for first + step * code."""

    bits: int
    first: int = 0
    step: int = 1

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class BlockType:
    """The facts of a type.

    number     of the type in a file (`ggml_type`)
    file_type  number of a file that is mostly of this type (`llama_ftype`)
    weights    consecutive ones of a row that make a block
    columns    of them that share a factor: a sub-block
    size       bytes of a block
    levels     the numbers that codes stand for, ascending
    scales     codes of the sub-blocks' factors; None: a block has one factor
    offset     whether sub-blocks have an offset
    minimums   codes of the offsets; None: a block has one
    fallback   name of the type for rows that are not whole blocks; None: there is none
    """

    number: int
    file_type: int
    weights: int
    columns: int
    size: int
    levels: tuple[int, ...]
    scales: SmallIntegers | None = None
    offset: bool = False
    minimums: SmallIntegers | None = None
    fallback: str | None = None

    @property
    def code_bits(self) -> int:
        """Bits that hold any code by itself."""
        return ceil(log2(len(self.levels)))

    @property
    def uniform(self) -> bool:
        """True if levels are consecutive integers."""
        return self.levels == tuple(range(self.levels[0], self.levels[-1] + 1))

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight with all that is stored beside its code."""
        return self.size * 8 / self.weights


def _whole(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
ODD_LEVELS = tuple(range(-15, 16, 2))
_SIX = SmallIntegers(6)

Q4_0 = BlockType(2, 2, 32, 32, 18, _whole(-8, 7))
Q4_1 = BlockType(3, 3, 32, 32, 20, _whole(0, 15), offset=True)
Q5_0 = BlockType(6, 8, 32, 32, 22, _whole(-16, 15))
Q5_1 = BlockType(7, 9, 32, 32, 24, _whole(0, 31), offset=True)
Q8_0 = BlockType(8, 7, 32, 32, 34, _whole(-128, 127))
Q2_0 = BlockType(42, 41, 64, 64, 18, _whole(-1, 2), fallback="q4_0")
Q2_K = BlockType(
    10, 10, 256, 16, 84, _whole(0, 3), SmallIntegers(4), offset=True, minimums=SmallIntegers(4), fallback="q4_0"
)
Q3_K = BlockType(11, 12, 256, 16, 110, _whole(-4, 3), SmallIntegers(6, -32), fallback="q4_0")
Q4_K = BlockType(12, 15, 256, 32, 144, _whole(0, 15), _SIX, offset=True, minimums=_SIX, fallback="q5_0")
Q5_K = BlockType(13, 17, 256, 32, 176, _whole(0, 31), _SIX, offset=True, minimums=_SIX, fallback="q5_1")
Q6_K = BlockType(14, 18, 256, 16, 210, _whole(-32, 31), SmallIntegers(8, -128), fallback="q8_0")
IQ4_NL = BlockType(20, 25, 32, 32, 18, IQ4_LEVELS)
IQ4_XS = BlockType(23, 30, 256, 32, 136, IQ4_LEVELS, SmallIntegers(6, -32), fallback="iq4_nl")
IQ3_S = BlockType(21, 26, 256, 32, 110, ODD_LEVELS, SmallIntegers(4, 1, 2), fallback="iq4_nl")
"""Magnitudes of four consecutive weights together are one of 512 points of a lattice, so that codes of 4 bits are
stored in 3.25."""
