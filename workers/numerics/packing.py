"""Dense bit packing: code i of a row takes the bits [i * bits, (i + 1) * bits) of that row's stream, lowest bit first.

Eight codes fill exactly `bits` bytes, so a row is packed in steps of eight codes and no bit is wasted; a code may
straddle two bytes. Read as little-endian words, the same stream is what compressed-tensors stores as int32.
"""

import sys

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
    lanes = pad(codes, (0, -count % 8)).reshape(rows, -1, 8)
    stream = codes.new_zeros(rows, lanes.shape[1], bits)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        stream[..., byte] |= lanes[..., lane] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= lanes[..., lane] >> (8 - shift)
    return stream.flatten(1)[:, : packed_bytes(count, bits)].clone(memory_format=torch.contiguous_format)


def unpack_bytes(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bytes`: uint8 (rows, at least packed_bytes(count, bits)) -> uint8 (rows, count)."""
    steps = -(-count // 8)
    stream = pad(stream[:, : steps * bits], (0, max(0, steps * bits - stream.shape[1]))).reshape(-1, steps, bits)
    lanes = stream.new_empty(len(stream), steps, 8)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        lanes[..., lane] = stream[..., byte] >> shift
        if shift + bits > 8:
            lanes[..., lane] |= stream[..., byte + 1] << (8 - shift)
    codes: Tensor = (lanes & (2**bits - 1)).flatten(1)[:, :count]
    return codes.contiguous()


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
