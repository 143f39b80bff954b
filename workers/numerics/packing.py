"""Dense bit packing: code i of a row takes the bits [i * bits, (i + 1) * bits) of that row's stream, lowest bit first.

Eight codes fill exactly `bits` bytes, so a row is packed in steps of eight codes and no bit is wasted; a code may
straddle two bytes. Read as little-endian words, the same stream is what compressed-tensors stores as int32.
"""

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack each row: uint8 (rows, count) -> uint8 (rows, packed_bytes(count, bits)).

    Raises:
        ValueError: a code does not fit into `bits` bits; packed, it would spill into its neighbour.
    """
    rows, count = codes.shape
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    lanes = pad(codes, (0, -count % 8)).unflatten(1, (-1, 8))
    stream = codes.new_zeros(rows, lanes.shape[1], bits)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        stream[..., byte] |= lanes[..., lane] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= lanes[..., lane] >> (8 - shift)
    return stream.flatten(1)[:, : packed_bytes(count, bits)].contiguous()


def unpack_bytes(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bytes`: uint8 (rows, at least packed_bytes(count, bits)) -> uint8 (rows, count)."""
    needed = -(-count // 8) * bits
    stream = pad(stream[:, :needed], (0, max(0, needed - stream.shape[1]))).unflatten(1, (-1, bits))
    lanes = stream.new_empty(*stream.shape[:2], 8)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        lanes[..., lane] = stream[..., byte] >> shift
        if shift + bits > 8:
            lanes[..., lane] |= stream[..., byte + 1] << (8 - shift)
    return (lanes & (2**bits - 1)).flatten(1)[:, :count].contiguous()


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack each row into little-endian words: uint8 (rows, count) -> int32 (rows, ceil(count * bits / 32))."""
    stream = pack_bytes(codes, bits)
    words = pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)
    return words if sys.byteorder == "little" else _swap(words)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_words`: int32 (rows, words) -> uint8 (rows, count)."""
    words = words.contiguous() if sys.byteorder == "little" else _swap(words)
    return unpack_bytes(words.view(torch.uint8), bits, count)


def _swap(words: Tensor) -> Tensor:
    """The bytes of each int32 in reverse order."""
    octets = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4)).flip(-1)
    return octets.flatten(1).contiguous().view(torch.int32)
