"""The representation's own arithmetic: one rounding, corrections at full strength, every stored bit counted."""

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.normal_float import DoubleQuantization, quantize
from workers.numerics.quantized import AffineWeight, LinearResult, LowRank, Scaling, StoredBits

SCHEME = Scheme(bits=4, group_size=16, symmetric=False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_offset(dtype: torch.dtype) -> AffineWeight:
    """Random codes of groups with a fractional offset in place of a zero point."""
    codes = torch.randint(0, 16, (24, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scale, offset = normal(24, 4).abs().bfloat16() * 0.1, normal(24, 4, seed=2)
    return AffineWeight(codes, scale, None, SCHEME, dtype, offset)


def test_a_zero_point_is_an_offset() -> None:
    codes = torch.randint(0, 16, (24, 64), dtype=torch.uint8)
    zero, scale = torch.randint(0, 16, (24, 4), dtype=torch.uint8), normal(24, 4)
    by_zero = AffineWeight(codes, scale, zero, SCHEME, torch.float32).dequantize()
    by_offset = AffineWeight(codes, scale, None, SCHEME, torch.float32, -scale * zero).dequantize()
    assert torch.allclose(by_zero, by_offset, rtol=0, atol=16 * float(scale.abs().max()) * 2e-7)
    assert not torch.equal(by_zero, torch.zeros_like(by_zero))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_is_added_before_the_one_rounding(dtype: torch.dtype) -> None:
    weight = with_offset(dtype)
    assert weight.offset is not None
    scale, offset = (t.double().repeat_interleave(16, 1) for t in (weight.scale, weight.offset))
    exact = weight.codes.double() * scale + offset
    assert (weight.dequantize().double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert torch.equal(weight.to("cpu").dequantize(), weight.dequantize())
    assert weight.stored_bits() == StoredBits(codes=4 * 24 * 64, scales=(16 + 32) * 24 * 4)


@pytest.mark.parametrize(("alpha", "rank"), [(16.0, 64), (8.0, 8), (1.0, 4), (64.0, 16)])
def test_a_product_is_applied_at_full_strength_whatever_alpha(alpha: float, rank: int) -> None:
    left, right = normal(48, rank), normal(rank, 64, seed=1)
    low_rank = LowRank.of_product(left, right, alpha, torch.float32)
    assert (low_rank.rank, low_rank.alpha) == (rank, alpha)
    exact = left.double() @ right.double()
    assert (low_rank.product().double() - exact).abs().max() < 1e-6 * exact.abs().max() * rank**0.5
    theirs = (alpha / rank) * low_rank.b.double() @ low_rank.a.double()  # peft's formula
    assert torch.allclose(low_rank.product().double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_result_is_the_rounded_weight_plus_the_product_rounded_once() -> None:
    weight = quantize(normal(48, 64), Scheme(bits=3, group_size=32, symmetric=True), torch.bfloat16, torch.bfloat16)
    low_rank = LowRank.of_product(normal(48, 4), normal(4, 64, seed=3), 2.0, torch.bfloat16)
    result = LinearResult(weight, low_rank)
    assert torch.equal(LinearResult(weight).dequantize(), weight.dequantize())
    found = result.dequantize()
    assert found.dtype == torch.bfloat16
    exact = weight.dequantize().double() + 0.5 * low_rank.b.double() @ low_rank.a.double()
    assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    merged = weight.dequantize()
    merged += low_rank.product()  # what peft does with an adapter in fp32
    assert torch.equal(found, merged)


def test_every_part_of_a_result_is_counted_once() -> None:
    weight = quantize(
        normal(48, 64),
        Scheme(bits=2, group_size=16, symmetric=True),
        DoubleQuantization(4, torch.float16, 64),
        torch.float32,
    )
    low_rank = LowRank.of_product(normal(48, 4), normal(4, 64), 4.0, torch.bfloat16)
    bits = LinearResult(weight, low_rank).stored_bits()
    groups = 48 * 4
    assert bits == StoredBits(
        codes=2 * 48 * 64, scales=4 * groups + 16 * groups // 64 + 32, codebooks=4 * 32, adapters=16 * 4 * (48 + 64)
    )
    assert bits.total == bits.codes + bits.scales + bits.codebooks + bits.adapters
    assert bits + StoredBits(codes=1, adapters=2) == StoredBits(
        bits.codes + 1, bits.scales, bits.codebooks, bits.adapters + 2
    )


def everything() -> LinearResult:
    """A result with every part that one may have."""
    low_rank = LowRank.of_product(normal(24, 4), normal(4, 64, seed=3), 3.0, torch.float32)
    scaling = Scaling(rows=normal(24, 1).abs() + 0.5, columns=normal(64).abs() + 0.5)
    return LinearResult(with_offset(torch.float32), low_rank, scaling)


def test_on_another_device_nothing_is_missing() -> None:
    result = everything()
    moved = result.to("cpu")
    assert torch.equal(moved.dequantize(), result.dequantize())
    assert moved.low_rank is not None
    assert moved.low_rank.alpha == 3.0
    assert moved.scaling is result.scaling
    assert result.to("meta").weight.codes.device.type == "meta"
    double = quantize(normal(24, 64), SCHEME, DoubleQuantization(4, torch.float16, 8), torch.float32)
    assert torch.equal(double.to("cpu").dequantize(), double.dequantize())


def test_weights_of_some_outputs_are_those_rows() -> None:
    codes = torch.randint(0, 16, (24, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    zero = torch.randint(0, 16, (24, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for weight in (
        with_offset(torch.float32),
        AffineWeight(codes, normal(24, 4), zero, SCHEME, torch.float32),
        AffineWeight(codes, normal(24, 4), None, SCHEME, torch.float32),
    ):
        parts = weight.split([5, 1, 18])
        assert [part.shape[0] for part in parts] == [5, 1, 18]
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())


def test_zero_points_are_counted_at_the_width_of_codes() -> None:
    codes, zero = torch.zeros(24, 64, dtype=torch.uint8), torch.zeros(24, 4, dtype=torch.uint8)
    found = AffineWeight(codes, normal(24, 4).half(), zero, SCHEME, torch.float32).stored_bits()
    assert found == StoredBits(codes=4 * 24 * 64, scales=(16 + 4) * 24 * 4)


def test_scales_that_moved_are_taken_back() -> None:
    scaling, weight = everything().scaling, normal(24, 64, seed=5)
    assert isinstance(scaling.rows, Tensor)
    assert isinstance(scaling.columns, Tensor)
    torch.testing.assert_close(scaling.apply(weight), weight * scaling.columns / scaling.rows)
    torch.testing.assert_close(scaling.undo(scaling.apply(weight)), weight)
    assert Scaling().undo(weight) is weight


def test_the_constant_zero_point_is_mid_range() -> None:
    for bits in (2, 3, 4, 8):
        codes = torch.tensor([[0, 2 ** (bits - 1), 2**bits - 1]], dtype=torch.uint8)
        scheme = Scheme(bits=bits, group_size=-1, symmetric=True)
        found = AffineWeight(codes, torch.tensor([[0.5]]), None, scheme, torch.float32).dequantize()
        assert found.tolist() == [[-(2 ** (bits - 2)), 0, (2 ** (bits - 1) - 1) / 2]]
