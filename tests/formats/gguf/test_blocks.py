"""GGML's blocks against the gguf package: the same numbers, and back to the same codes."""

from dataclasses import replace
from itertools import product

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.formats import FORMATS, ExportFormat
from app.domain.methods import Scheme
from bitwright.errors import FormatCannotHold
from tests.formats.examples import Made, assert_same, random_result, scheme
from workers.formats.gguf import file
from workers.formats.gguf.blocks import BLOCK, MIDDLE, block_kind, held, pack, unpack
from workers.numerics.quantized import AffineWeight

INFO = FORMATS[ExportFormat.GGUF]
HELD = [
    scheme(bits, group, symmetric)
    for bits, group, symmetric in product(range(2, 9), (32, 96, -1), (True, False))
    if symmetric or bits in (INFO.asymmetric_bits or ())
]
EXPECTED = {
    True: {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"},
    False: {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"},
}


def test_each_scheme_has_its_type_and_the_table_knows_the_rest() -> None:
    for bits, symmetric in product(range(2, 9), (True, False)):
        kind = block_kind(scheme(bits, 32, symmetric))
        assert (kind.name if kind else None) == EXPECTED[symmetric].get(bits)
        assert (kind is not None) == (symmetric or bits in (INFO.asymmetric_bits or ()))


@given(st.sampled_from(HELD), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**31))
@settings(deadline=None, max_examples=120)
def test_blocks_hold_codes_and_scales_exactly(of: Scheme, rows: int, groups: int, seed: int) -> None:
    columns = 32 * groups if of.group_size == -1 else of.group_size * groups
    weight = random_result((rows, columns), of, torch.float16, seed).affine
    packed = pack("x", weight)
    assert_same(unpack(packed.data, packed.kind, of, torch.float16), weight)
    theirs = torch.from_numpy(gguf.quants.dequantize(packed.data.numpy(), packed.kind))
    ours = replace(weight, dtype=torch.float32).dequantize()
    if packed.kind in MIDDLE:
        assert torch.equal(theirs, ours)
        assert packed.offset_error == 0
    else:
        step = weight.scale.float().abs().repeat_interleave(weight.group_size, 1)
        assert ((theirs - ours).abs() <= (packed.offset_error + 1e-5) * step).all()
        assert packed.offset_error <= 2**-11 * (2**of.bits - 1)  # half an fp16 unit of the largest zero point


def test_bytes_of_a_block_are_those_of_ggml() -> None:
    """Q5_0 by hand: weight 0 in the lower half of byte 0, weight 17 in the upper half of byte 1."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 17] = 21, 30
    weight = random_result((1, 32), scheme(5, 32, True), torch.float16).affine
    data = pack("x", replace(weight, codes=codes, scale=torch.tensor([[1.0]]).half())).data[0].tolist()
    assert data[:2] == [0x00, 0x3C]
    assert data[2:6] == [0b1, 0, 0b10, 0]
    assert data[6:] == [5, 0xE0, *([0] * 14)]


def test_a_fractional_offset_is_rounded_once_and_told() -> None:
    weight = random_result((8, 64), Made(scheme(4, 32, False), offset=True), torch.float16).affine
    packed = pack("x", weight)
    assert packed.kind is Kind.Q4_1
    assert weight.offset is not None
    moved = (weight.offset.half().float() - weight.offset).abs() / weight.scale.float().abs()
    assert packed.offset_error == pytest.approx(float(moved.max()))
    theirs = torch.from_numpy(gguf.quants.dequantize(packed.data.numpy(), packed.kind))
    ours = replace(weight, dtype=torch.float32).dequantize()
    assert (theirs - ours).abs().max() <= float((weight.offset.half().float() - weight.offset).abs().max()) + 1e-6


@pytest.mark.parametrize(
    ("of", "dtype", "words"),
    [
        (scheme(6, 32, False), torch.float16, "no type for"),
        (scheme(4, 16, True), torch.float16, "no type for"),
        (scheme(4, 32, True), torch.bfloat16, r"scales as torch\.float16; these are torch\.bfloat16"),
    ],
)
def test_what_would_have_to_change_is_refused(of: Scheme, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(FormatCannotHold, match=words):
        pack("x", random_result((4, 64), of, dtype).affine)


def test_the_tables_of_types_are_those_of_ggml() -> None:
    assert BLOCK == 32
    assert {kind.name: code for kind, code in MIDDLE.items()} == {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}
    assert {str(dtype).removeprefix("torch."): kind.name for dtype, kind in file.PLAIN.items()} == {
        "bfloat16": "BF16",
        "float16": "F16",
        "float32": "F32",
        "float64": "F64",
    }
    assert {kind: (row.size, row.weights, row.file_type) for kind, row in file.TYPES.items()} == {
        2: (18, 32, 2),
        3: (20, 32, 3),
        6: (22, 32, 8),
        7: (24, 32, 9),
        8: (34, 32, 7),
        10: (84, 256, 10),
        11: (110, 256, 12),
        12: (144, 256, 15),
        13: (176, 256, 17),
        14: (210, 256, 18),
        20: (18, 32, 25),
        21: (110, 256, 26),
        23: (136, 256, 30),
        42: (18, 64, 41),
    }


def test_bytes_of_a_block_with_an_offset_are_those_of_ggml() -> None:
    """Q5_1 by hand: d, m = -d * zero point, the fifth bits, the nibbles; weight 31 in the upper half of byte 15."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 8], codes[0, 31] = 17, 14
    weight = AffineWeight(
        codes, torch.tensor([[0.5]]).half(), torch.tensor([[3]], dtype=torch.uint8), scheme(5, 32, False), torch.float16
    )
    data = pack("x", weight).data[0].tolist()
    assert data[:4] == [0x00, 0x38, 0x00, 0xBE]
    assert data[4:8] == [0, 1, 0, 0]
    assert data[8:] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xE0]


def test_the_largest_move_of_an_offset_is_told() -> None:
    """In steps of its own group's scale, whatever the scale's sign."""
    weight = random_result((2, 64), Made(scheme(4, 32, False), offset=True), torch.float16).affine
    offset = torch.tensor([[1.0, 0.0], [0.0, 2049.0]])  # 2049 becomes 2048
    scale = torch.tensor([[1.0, 1.0], [1.0, -4.0]]).half()
    assert pack("x", replace(weight, offset=offset, scale=scale)).offset_error == 0.25


def test_what_is_held_is_what_is_packed() -> None:
    weight = random_result((8, 64), scheme(4, 32, False), torch.float16).affine
    assert weight.zero_point is not None
    stored = held("x", weight)
    assert stored.offset is not None
    exact = -weight.scale.double() * weight.zero_point.double()
    assert torch.equal(stored.offset, exact.to(torch.float16))
    packed = pack("x", weight)
    theirs = torch.from_numpy(gguf.quants.dequantize(packed.data.numpy(), packed.kind))
    columns = torch.arange(64) // 32
    ours = stored.codes.double() * stored.scale.double()[:, columns] + stored.offset.double()[:, columns]
    assert torch.allclose(theirs.double(), ours, rtol=1e-6, atol=1e-9)


def test_groups_that_are_no_whole_number_of_blocks_are_refused() -> None:
    for group, columns in ((16, 64), (48, 96), (-1, 48)):
        with pytest.raises(FormatCannotHold, match="no type for"):
            pack("x", random_result((4, columns), scheme(4, group, True), torch.float16).affine)
