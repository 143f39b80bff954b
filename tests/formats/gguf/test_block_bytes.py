"""llama.cpp's block types against the decoders of the package gguf, bit for bit, and back to the same bytes."""

from dataclasses import replace

import gguf
import pytest
import torch
from torch import Tensor

from app.domain.methods import BLOCK_SCHEMES, Scheme, SchemeName
from bitwright.errors import CorruptCheckpoint
from workers.formats.gguf.block_bytes import decode, encode
from workers.numerics.blocks.search import search_blocks
from workers.numerics.quantized import BlockWeight

NUMBERS = {
    **{"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13},
    **{"q6_k": 14, "iq4_nl": 20, "iq3_s": 21, "iq4_xs": 23, "q2_0": 42},
}
every_type = pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))


def random_blocks(name: SchemeName, rows: int = 64, seed: int = 0) -> BlockWeight:
    """Every byte alike likely, but for scales, which are finite, of both signs and spread over nine decades."""
    scheme, generator = Scheme.named(name), torch.Generator().manual_seed(seed)
    assert scheme.blocks is not None
    data = torch.randint(0, 256, (rows, 2 * scheme.blocks.size), dtype=torch.uint8, generator=generator)
    weight = decode(data, scheme, torch.float32)
    wide = torch.exp2(torch.randint(-22, 9, weight.scale.shape, generator=generator).float())
    scale = (torch.randn(weight.scale.shape, generator=generator) * wide).half()
    return replace(weight, scale=scale, minimum=None if weight.minimum is None else scale.flip(0))


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def plain_q2_0(data: Tensor) -> Tensor:
    """By hand, for the one type that the package does not know: d * (c - 1), four codes in a byte, the first lowest."""
    rows = []
    for row in data.tolist():
        weights: list[float] = []
        for first in range(0, len(row), 18):
            block = row[first : first + 18]
            (scale,) = torch.tensor(block[:2], dtype=torch.uint8).view(torch.float16).tolist()
            weights += [scale * ((block[2 + place // 4] >> 2 * (place % 4) & 3) - 1) for place in range(64)]
        rows.append(weights)
    return torch.tensor(rows)


def decoded(name: SchemeName, data: Tensor) -> Tensor:
    if name == "q2_0":
        return plain_q2_0(data)
    kind = gguf.GGMLQuantizationType(NUMBERS[name])
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind).copy())


@every_type
def test_sizes_and_numbers_are_ggml_s(name: SchemeName) -> None:
    kind = Scheme.named(name).blocks
    assert kind is not None
    assert kind.number == NUMBERS[name]
    if name != "q2_0":
        assert (kind.weights, kind.size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.number)]
        assert gguf.GGMLQuantizationType(kind.number).name.lower() == name


@every_type
def test_random_blocks_are_the_numbers_of_the_decoder_and_come_back(name: SchemeName) -> None:
    weight = random_blocks(name)
    data = encode(weight)
    assert same_bits(weight.dequantize(), decoded(name, data))
    assert torch.equal(encode(decode(data, weight.scheme, torch.float32)), data)


EXTREMES = {
    "zero": torch.zeros(3, 512),
    "constant": torch.full((3, 512), 0.37),
    "huge": torch.randn(3, 512, generator=torch.Generator().manual_seed(1)) * 1e30,
    "largest": torch.randn(3, 512, generator=torch.Generator().manual_seed(1)) * 3e4,
    "tiny": torch.randn(3, 512, generator=torch.Generator().manual_seed(2)) * 1e-6,
    "least": torch.randn(3, 512, generator=torch.Generator().manual_seed(2)) * 1e-41,
    "one": torch.eye(3, 512),
    "above": torch.rand(3, 512, generator=torch.Generator().manual_seed(3)) + 5,
}


@pytest.mark.parametrize("case", EXTREMES)
@every_type
def test_searched_blocks_of_extreme_weights_are_finite_and_the_decoder_s(name: SchemeName, case: str) -> None:
    weight = search_blocks(EXTREMES[case], Scheme.named(name))
    data = encode(weight)
    theirs = decoded(name, data)
    assert torch.isfinite(theirs).all()
    assert same_bits(weight.dequantize(), theirs)
    again = decode(data, weight.scheme, torch.float32)
    assert torch.equal(encode(again), data)
    if case == "zero":
        assert not theirs.any()


def test_bytes_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(CorruptCheckpoint, match="no blocks of q4_k"):
        decode(torch.zeros(2, 143, dtype=torch.uint8), Scheme.named(SchemeName.Q4_K), torch.float32)


def test_codes_beside_the_lattice_are_refused() -> None:
    weight = random_blocks(SchemeName.IQ3_S, 1)
    codes = weight.codes.clone()
    codes[0, :4] = torch.tensor([15, 0, 15, 0])  # magnitudes 15 15 15 15, which the lattice has not
    with pytest.raises(ValueError, match="no point of its lattice"):
        encode(replace(weight, codes=codes))


def test_a_block_by_hand() -> None:
    """Q4_K, from ggml-common.h: d, dmin, twelve bytes of codes of six bits, nibbles of 32 weights and the next 32."""
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 0], codes[0, 32], codes[0, 255] = 5, 9, 14
    scales, minimums = torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(1, 8, dtype=torch.uint8)
    scales[0, 0], scales[0, 1], scales[0, 7], minimums[0, 0], minimums[0, 7] = 63, 21, 0b110101, 7, 0b101100
    d, dmin = torch.tensor([[0.5]]).half(), torch.tensor([[0.25]]).half()
    scheme = Scheme.named(SchemeName.Q4_K)
    weight = BlockWeight(codes, d, scheme, torch.float32, scales, dmin, minimums)
    data = encode(weight)[0].tolist()
    assert data[:4] == [0x00, 0x38, 0x00, 0x34]
    assert data[4:8] == [63, 21, 0, 0b11 << 6]
    assert data[8:12] == [7, 0, 0, 0b10 << 6]
    assert data[12:16] == [0, 0, 0, 0b0101 | 0b1100 << 4]
    assert data[16] == 5 | 9 << 4
    assert data[143] == 14 << 4
    found = weight.dequantize()[0]
    assert found[0] == 0.5 * 63 * 5 - 0.25 * 7
    assert found[32] == 0.5 * 21 * 9
    assert found[255] == 0.5 * 53 * 14 - 0.25 * 44
