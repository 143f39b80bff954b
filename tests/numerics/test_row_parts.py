"""Matrices computed some rows at a time: the same numbers, bit for bit, as at once."""

import pytest
import torch

from app.domain.methods import NormalFloatSpec, RTNSpec, Scheme
from workers.methods.normal_float import NormalFloat
from workers.methods.rtn import RTN
from workers.numerics import row_parts
from workers.numerics.packing import pack_bytes, pack_words, unpack_words
from workers.numerics.quantized import AffineWeight, CodebookWeight, LinearResult
from workers.numerics.row_parts import in_row_parts

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 6, 7, 8, 20])
def test_parts_cover_every_row_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_parts.PART == 16_777_216
    monkeypatch.setattr(row_parts, "PART", 35)
    matrix = torch.arange(rows * 5).view(rows, 5)
    assert torch.equal(in_row_parts(matrix, lambda part: matrix[part] * 2), matrix * 2)
    parts = list(row_parts.row_parts(rows, 5, CPU))
    assert [part.stop - part.start for part in parts] == [7] * (rows // 7) + ([rows % 7] if rows % 7 else [])
    assert list(row_parts.row_parts(rows, 5, torch.device("meta"))) == [slice(0, rows)], "a device takes all at once"


def test_a_row_wider_than_a_part_is_a_part() -> None:
    assert list(row_parts.row_parts(2, 1 << 25, CPU)) == [slice(0, 1), slice(1, 2)]


def results(weight: torch.Tensor) -> list[LinearResult]:
    scheme, wide = Scheme(bits=3, group_size=8, symmetric=False), Scheme(bits=4, group_size=16, symmetric=True)
    return [
        RTN().quantize_tensor(weight, scheme, weight.dtype, RTNSpec()),
        RTN().quantize_tensor(weight, wide, weight.dtype, RTNSpec()),
        NormalFloat().quantize_tensor(weight, wide, weight.dtype, NormalFloatSpec()),
        NormalFloat().quantize_tensor(weight, wide, weight.dtype, NormalFloatSpec(double_quantization=False)),
    ]


def test_codes_scales_and_weights_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = results(weight)
    dequantized = [result.dequantize() for result in whole]
    packed = [pack_words(result.weight.codes, 4) for result in whole]
    monkeypatch.setattr(row_parts, "PART", 48 * 5)
    for once, result, values, words in zip(whole, results(weight), dequantized, packed, strict=True):
        assert torch.equal(once.weight.codes, result.weight.codes)
        assert torch.equal(values, result.dequantize())
        assert torch.equal(words, pack_words(result.weight.codes, 4))
        assert torch.equal(unpack_words(words, 4, 48), result.weight.codes)
        if isinstance(once.weight, AffineWeight) and isinstance(result.weight, AffineWeight):
            assert torch.equal(once.weight.scale, result.weight.scale)
            assert (once.weight.zero_point is None) is (result.weight.zero_point is None)
        if isinstance(once.weight, CodebookWeight) and isinstance(once.weight.absmax, torch.Tensor):
            assert isinstance(result.weight, CodebookWeight)
            assert torch.equal(once.weight.absmax, result.weight.absmax)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit"):
        pack_bytes(torch.full((37, 48), 16, dtype=torch.uint8), 4)
