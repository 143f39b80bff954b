"""Conformance of formats at the edges of numbers: each group stays what it is, or the format refuses it by name."""

from collections.abc import Iterator
from dataclasses import replace

import gguf
import pytest
import torch
from torch import Tensor

from app.domain.formats import FORMATS, ExportFormat, FormatInfo, LowRankRule, Offsets, ScaleDtype
from app.domain.methods import Form
from bitwright.errors import FormatCannotHold
from tests.conformance.test_formats import INVERTIBLE, through
from tests.formats.examples import Made, assert_same, random_result, scheme
from workers.formats import merged
from workers.formats.gguf.blocks import pack
from workers.formats.registry import format_of, held
from workers.numerics.normal_float import codebook
from workers.numerics.quantized import AffineWeight, CodebookWeight, LinearResult, LowRank

GROUP, ROWS = 32, 32
BF16, F16 = torch.bfloat16, torch.float16
LARGEST = {BF16: 2.0**100, F16: 2.0**7}
"""Scales whose product with every zero point of 8 bits is a number of the dtype."""
SMALLEST = {BF16: 2.0**-126, F16: 2.0**-24}
"""The last one is a subnormal number."""


def edge_weight(bits: int, symmetric: bool, dtype: torch.dtype) -> AffineWeight:
    """Rows of five groups: zeros, one sign each, both ends of the range with a negative scale, the largest scale."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    ramp = (torch.arange(GROUP) % 2**bits).to(torch.uint8)
    ends = torch.tensor([0, top] * (GROUP // 2), dtype=torch.uint8)
    groups = [
        (torch.full((GROUP,), middle, dtype=torch.uint8), SMALLEST[dtype], middle),
        (ramp, 0.25, 0),
        (ramp, 0.25, top),
        (ends, -SMALLEST[dtype], middle),
        (ends, LARGEST[dtype], top),
    ]
    codes = torch.cat([codes for codes, _, _ in groups]).repeat(ROWS, 1)
    scale = torch.tensor([scale for _, scale, _ in groups]).to(dtype).repeat(ROWS, 1)
    zero = torch.tensor([zero for _, _, zero in groups], dtype=torch.uint8).repeat(ROWS, 1)
    return AffineWeight(codes, scale, None if symmetric else zero, scheme(bits, GROUP, symmetric), dtype)


def by_hand(weight: AffineWeight) -> Tensor:
    """scale * (codes - zero_point) in fp64, before any rounding."""
    columns = torch.arange(weight.shape[1]) // GROUP
    zero = weight.zero_point
    centre = torch.full_like(weight.scale, 2 ** (weight.scheme.bits - 1), dtype=torch.float64)
    centre = centre if zero is None else zero.double()
    return weight.scale.double()[:, columns] * (weight.codes.double() - centre[:, columns])


def edges(info: FormatInfo) -> Iterator[LinearResult]:
    """Every result of edge groups that the table allows the format."""
    factors = None
    if info.low_rank is LowRankRule.IS:
        a, b = torch.zeros(2, 5 * GROUP, dtype=BF16), torch.zeros(ROWS, 2, dtype=BF16)
        b[0, 0], a[1, 3], b[2, 1] = 2.0**100, -(2.0**-126), 1.0
        factors = LowRank(a, b, 16.0)
    for dtype in (F16,) if info.scales in (ScaleDtype.FLOAT16, ScaleDtype.COMMON) else (BF16, F16):
        for symmetric in info.symmetries if Form.AFFINE in info.kinds else ():
            for bits in info.bits if symmetric or info.asymmetric_bits is None else info.asymmetric_bits:
                yield LinearResult(edge_weight(bits, symmetric, dtype), factors)
        if Form.CODEBOOK in info.kinds:
            affine = edge_weight(4, True, dtype)
            absmax = affine.scale.abs().clone()
            absmax[:, 0] = 0
            yield LinearResult(CodebookWeight(affine.codes, codebook(4), absmax, affine.scheme, dtype), factors)


@pytest.mark.parametrize("export_format", INVERTIBLE)
def test_edge_groups_come_back_bit_for_bit(export_format: ExportFormat) -> None:
    results = list(edges(FORMATS[export_format]))
    assert len(results) >= (11 if export_format in (ExportFormat.NATIVE, ExportFormat.COMPRESSED_TENSORS) else 2)
    for result in results:
        assert_same(through(export_format, result), result)


@pytest.mark.parametrize("export_format", [name for name, info in FORMATS.items() if info.dense])
def test_a_dense_format_has_the_numbers_of_edge_groups(export_format: ExportFormat) -> None:
    assert export_format is ExportFormat.MERGED, "another one needs its function here"
    for result in edges(FORMATS[export_format]):
        stored = merged.compress("x", result)["x.weight"]
        if isinstance(result.weight, AffineWeight):
            exact = by_hand(result.weight)
            assert torch.equal(stored, exact.to(stored.dtype))
            assert (stored[:, :GROUP] == 0).all()
        else:
            assert (stored[:, :GROUP] == 0).all()
        assert torch.isfinite(stored).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_ggmls_own_numbers_of_edge_groups_are_exact(bits: int) -> None:
    weight = edge_weight(bits, False, F16)
    packed = pack("x", weight)
    theirs = torch.from_numpy(gguf.quants.dequantize(packed.data.numpy(), packed.kind))
    assert torch.equal(theirs.double(), by_hand(weight))
    assert packed.offset_error == 0


OFFSET = Made(scheme(4, GROUP, False), offset=True)


@pytest.mark.parametrize("export_format", FORMATS)
@pytest.mark.parametrize("bad", [65520.0, -70000.0, 1e6, float("inf"), float("-inf"), float("nan")])
def test_one_offset_beyond_fp16_is_refused_where_offsets_are_fp16(export_format: ExportFormat, bad: float) -> None:
    weight = random_result((8, 4 * GROUP), OFFSET, F16).affine
    assert weight.offset is not None
    offset = weight.offset.clone()
    offset[5, 2] = bad
    spoiled = replace(weight, offset=offset)
    if FORMATS[export_format].offsets not in (Offsets.FLOAT16, Offsets.MODEL):
        assert held(export_format, "model.x", spoiled) is spoiled
        return
    compress = format_of(export_format).compress
    assert compress is not None
    for store in (
        lambda: held(export_format, "model.x", spoiled),
        lambda: compress("model.x", LinearResult(spoiled)),
    ):
        with pytest.raises(FormatCannotHold, match=r"beyond what (fp16|torch\.float16) holds") as caught:
            store()
        assert caught.value.field == "model.x"


@pytest.mark.parametrize("export_format", [name for name, info in FORMATS.items() if info.offsets is Offsets.FLOAT16])
def test_a_zero_point_whose_offset_is_beyond_fp16_is_refused(export_format: ExportFormat) -> None:
    weight = random_result((2, 2 * GROUP), scheme(4, GROUP, False), F16).affine
    assert weight.zero_point is not None
    scale, zero = weight.scale.clone(), weight.zero_point.clone()
    scale[1, 1], zero[1, 1] = 6000.0, 10
    fits = replace(weight, scale=scale.clone(), zero_point=zero)
    stored = held(export_format, "x", fits)
    assert stored.zero_point is None
    assert stored.offset is not None
    assert (stored.offset.dtype, float(stored.offset[1, 1])) == (F16, -60000.0)
    scale[1, 1] = 6600.0
    for store in (held, lambda _, *of: pack(*of)):
        with pytest.raises(FormatCannotHold, match="beyond what fp16 holds"):
            store(export_format, "x", replace(weight, scale=scale, zero_point=zero))


def test_the_last_offset_that_rounds_into_fp16_is_held() -> None:
    weight = random_result((1, GROUP), OFFSET, F16).affine
    stored = held(ExportFormat.GGUF, "x", replace(weight, offset=torch.tensor([[65519.0]])))
    assert stored.offset is not None
    assert stored.offset.tolist() == [[65504.0]]


@pytest.mark.parametrize("export_format", FORMATS)
def test_a_symmetric_weight_is_held_as_it_is(export_format: ExportFormat) -> None:
    weight = edge_weight(4, True, F16)
    assert held(export_format, "x", weight) is weight


@pytest.mark.parametrize("part", ["codes", "zero_point"])
@pytest.mark.parametrize(
    ("export_format", "bits"),
    [
        (name, bits)
        for name in INVERTIBLE
        for bits in (2, 4, 5)
        if Form.AFFINE in name.info.kinds and name.info.holds(scheme(bits, GROUP, False))
    ],
)
def test_a_number_beyond_its_bits_never_changes_another_one(export_format: ExportFormat, part: str, bits: int) -> None:
    """As a round after the clamp would make it: refused, or kept as it is; never wrapped, never in its neighbour."""
    (result,) = (
        each
        for each in edges(FORMATS[export_format])
        if each.weight.dtype is F16 and each.weight.scheme == scheme(bits, GROUP, False)
    )
    weight = result.affine
    numbers = getattr(weight, part).clone()
    numbers[1, 1] = 2**bits
    spoiled = replace(result, weight=replace(weight, **{part: numbers}))
    try:
        back = through(export_format, spoiled)
    except ValueError as error:
        assert f"does not fit into {bits} bits" in str(error)  # noqa: PT017 - one of two good ends
        return
    assert_same(back, spoiled)
    assert (export_format, part) not in {
        (ExportFormat.NATIVE, "codes"),
        (ExportFormat.COMPRESSED_TENSORS, "codes"),
        (ExportFormat.GGUF, "codes"),
        (ExportFormat.GPTQ_V2, "codes"),
        (ExportFormat.AWQ, "codes"),
        (ExportFormat.MLX, "codes"),
    }
