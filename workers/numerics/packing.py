"""Dense bit packing: code i of a row takes the bits [i * bits, (i + 1) * bits) of that row's stream, lowest bit first.

Eight codes fill exactly `bits` bytes, so a row is packed in steps of eight codes and no bit is wasted; a code may
straddle two bytes. Read as little-endian words, the same stream is what compressed-tensors stores as int32.
"""

import sys
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from workers.numerics.row_parts import in_row_parts


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack each row: uint8 (rows, count) -> uint8 (rows, packed_bytes(count, bits)).

    Raises:
        ValueError: a code does not fit into `bits` bits; packed, it would spill into its neighbour.
    """
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    return in_row_parts(codes, lambda rows: _packed(codes[rows], bits))


def _packed(codes: Tensor, bits: int) -> Tensor:
    rows, count = codes.shape
    lanes = pad(codes, (0, -count % 8)) if count % 8 else codes.contiguous()
    words = _Words.of(bits)
    folded = words.of_bytes(lanes.reshape(-1, words.codes))
    width = 8
    while width < 8 * words.codes:
        have = bits * width // 8
        kept = folded & _fields(words.codes, 2 * width, have, 0)
        folded = kept.bitwise_or_((folded >> width - have).bitwise_and_(_fields(words.codes, 2 * width, have, have)))
        width *= 2
    stream = words.to_bytes(folded).view(rows, lanes.shape[1] // words.codes * words.bytes)
    need = packed_bytes(count, bits)
    return stream if stream.shape[1] == need else stream[:, :need].contiguous()


def unpack_bytes(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bytes`: uint8 (rows, at least packed_bytes(count, bits)) -> uint8 (rows, count)."""
    words = _Words.of(bits)
    rows, need = len(stream), -(-count // words.codes) * words.bytes
    stream = stream[:, :need] if stream.shape[1] >= need else pad(stream, (0, need - stream.shape[1]))
    spread = words.of_bytes(stream.reshape(-1, words.bytes))
    width = 8 * words.codes
    while width > 8:
        half, have = width // 2, bits * width // 16
        low = spread & _fields(words.codes, width, have, 0)
        spread = low.bitwise_or_((spread << half - have).bitwise_and_(_fields(words.codes, width, have, half)))
        width = half
    codes = _octets(spread).view(rows, need // words.bytes * words.codes)
    return codes if codes.shape[1] == count else codes[:, :count].contiguous()


@dataclass(frozen=True)
class _Words:
    """Integers that codes are packed in, as many in each as fill whole bytes: first in a byte each, then side by side.

    Two halves of every field come together at a time, which is a handful of operations on whole words.
    """

    codes: int
    bytes: int

    @classmethod
    def of(cls, bits: int) -> "_Words":
        codes = 8 // gcd(bits, 8)
        return cls(codes, codes * bits // 8)

    @property
    def _dtype(self) -> torch.dtype:
        return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.codes]

    def of_bytes(self, octets: Tensor) -> Tensor:
        """A word for each row of uint8 (words, at most `codes`), the first one lowest."""
        if octets.shape[1] == 1:
            return octets.flatten().to(self._dtype, copy=True)
        if octets.shape[1] < self.codes or octets.storage_offset() % self.codes:
            octets = pad(octets, (0, self.codes - octets.shape[1])).clone()
        return (octets if sys.byteorder == "little" else octets.flip(1)).flatten().view(self._dtype)

    def to_bytes(self, words: Tensor) -> Tensor:
        """The lowest `bytes` of each word, one after the other."""
        if self.bytes == 1:
            return words.to(torch.uint8)
        return _octets(words).view(-1, self.codes)[:, : self.bytes].flatten()


def _octets(words: Tensor) -> Tensor:
    """All bytes of words, lowest first."""
    size = words.element_size()
    octets = words.view(torch.uint8)
    return octets if sys.byteorder == "little" else octets.view(-1, size).flip(1).flatten()


def _fields(octets: int, every: int, bits: int, start: int) -> int:
    """A mask for a word of so many bytes: `bits` bits from `start` on, once in `every` bits."""
    return sum(((1 << bits) - 1) << start + place for place in range(0, 8 * octets, every))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack each row into little-endian words: uint8 (rows, count) -> int32 (rows, ceil(count * bits / 32))."""
    stream = pack_bytes(codes, bits)
    return _as_words(pad(stream, (0, -stream.shape[1] % 4)))


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_words`: int32 (rows, words) -> uint8 (rows, count)."""
    return unpack_bytes(_as_bytes(words), bits, count)


# Flat tensors are viewed as another dtype: a matrix of one row or column counts as contiguous whatever its strides,
# and the view refuses some of them. The flips are for big-endian hosts.


def _as_words(stream: Tensor) -> Tensor:
    octets = stream.flatten()
    if sys.byteorder == "big":
        octets = octets.view(-1, 4).flip(1).flatten()
    return octets.view(torch.int32).view(len(stream), -1)


def _as_bytes(words: Tensor) -> Tensor:
    octets = words.flatten().view(torch.uint8)
    if sys.byteorder == "big":
        octets = octets.view(-1, 4).flip(1).flatten()
    return octets.view(len(words), -1)
