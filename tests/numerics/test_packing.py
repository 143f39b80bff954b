"""Packing against an oracle that knows nothing of bytes: one Python integer a row."""

import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.numerics.packing import pack_bytes, pack_words, packed_bytes, unpack_bytes, unpack_words

BITS = st.integers(2, 8)


def oracle(codes: list[int], bits: int, size: int) -> list[int]:
    """The stream as bytes: code i is shifted to bit i * bits of one long number."""
    number = sum(code << (index * bits) for index, code in enumerate(codes))
    return list(number.to_bytes(size, "little"))


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits, rows, count = draw(BITS), draw(st.integers(1, 4)), draw(st.integers(1, 70))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.uint8), bits


@given(code_rows())
@settings(deadline=None)
def test_bytes_are_the_stream_of_the_oracle(drawn: tuple[torch.Tensor, int]) -> None:
    codes, bits = drawn
    size = -(-codes.shape[1] * bits // 8)
    stream = pack_bytes(codes, bits)
    assert stream.tolist() == [oracle(row, bits, size) for row in codes.tolist()]
    assert size == packed_bytes(codes.shape[1], bits)
    assert torch.equal(unpack_bytes(stream, bits, codes.shape[1]), codes)


@given(code_rows())
@settings(deadline=None)
def test_words_are_those_of_compressed_tensors(drawn: tuple[torch.Tensor, int]) -> None:
    codes, bits = drawn
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    words = pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)
    assert torch.equal(unpack_words(words, bits, codes.shape[1]), codes)


def test_no_bit_is_wasted() -> None:
    assert pack_bytes(torch.zeros(1, 4096, dtype=torch.uint8), 3).numel() == 4096 * 3 // 8


def test_three_bits_straddle_bytes() -> None:
    codes = torch.tensor([[0b001, 0b010, 0b111]], dtype=torch.uint8)
    assert pack_bytes(codes, 3).tolist() == [[0b11_010_001, 0b1]]


def test_rows_of_a_transposed_tensor() -> None:
    codes = torch.arange(24, dtype=torch.uint8).view(6, 4).T
    assert torch.equal(unpack_bytes(pack_bytes(codes, 5), 5, 6), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"code {2**bits} does not fit into {bits} bits"):
        pack_bytes(torch.tensor([[0, 2**bits]], dtype=torch.uint8), bits)


def test_words_of_a_big_endian_host_are_those_of_a_little_endian_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a word's first byte is its highest, so bytes are turned around within each word, whatever their number."""
    codes = torch.arange(48, dtype=torch.uint8).view(2, 24)
    plain = pack_words(codes, 8)
    monkeypatch.setattr(sys, "byteorder", "big")
    turned = pack_words(codes, 8)
    assert turned.flatten().view(torch.uint8).tolist() == [
        byte for word in plain.flatten().view(torch.uint8).view(-1, 4).tolist() for byte in reversed(word)
    ]
    assert torch.equal(unpack_words(turned, 8, 24), codes)
