"""NormalFloat against its definition: published values, nearest codes by brute force in fp64, bits by the formula."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.normal_float import (
    NF4,
    AbsmaxFormat,
    DoubleQuantization,
    bits_per_weight,
    codebook,
    nearest_codes,
    quantiles,
    quantize,
    quantize_absmax,
    squared_errors,
)
from workers.numerics.quantized import QuantizedAbsmax
from workers.numerics.row_parts import CACHED

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DOUBLE = DoubleQuantization(8, F32, 256)
# As bitsandbytes tells them (functional.get_4bit_type and its kernels).
BITSANDBYTES_NF4 = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""


def scheme(bits: int, group_size: int) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_nf4_is_the_table_of_bitsandbytes() -> None:
    published = [float(value) for value in BITSANDBYTES_NF4.split()]
    assert list(NF4) == published
    assert codebook(4).tolist() == published
    assert quantiles(4) == pytest.approx(published, abs=1.1e-7)


@pytest.mark.parametrize(
    ("bits", "values"),
    [
        (2, [-1, 0, 0.337915, 1]),
        (3, [-1, -0.478629, -0.217142, 0, 0.160930, 0.337915, 0.562617, 1]),
    ],
)
def test_narrower_codebooks_follow_the_same_construction(bits: int, values: list[float]) -> None:
    assert codebook(bits).tolist() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_codebook_is_ascending_and_has_both_ends_and_zero(bits: int) -> None:
    values = codebook(bits)
    assert len(values) == 2**bits
    assert bool((values.diff() > 0).all())
    assert values[[0, -1, 2 ** (bits - 1) - 1]].tolist() == [-1, 1, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(seed=st.integers(0, 2**31), group=st.sampled_from([1, 8, 32, -1]), double=st.booleans())
@settings(deadline=None, max_examples=20)
def test_no_code_is_nearer_than_the_one_taken(bits: int, seed: int, group: int, double: bool) -> None:
    weight = normal(5, 64, seed=seed) * 0.02
    absmax: AbsmaxFormat = DoubleQuantization(4, BF16, 3) if double else F16
    found = quantize(weight, scheme(bits, group), absmax, F32)
    used = found.absmax.dequantize() if isinstance(found.absmax, QuantizedAbsmax) else found.absmax
    levels = codebook(bits).double() * used.double()[..., None, None]
    distances = (weight.double().view(*used.shape, -1, 1) - levels).abs()
    taken = distances.gather(-1, found.codes.long().view(*used.shape, -1, 1)).squeeze(-1)
    assert bool((taken <= distances.amin(-1) + 1e-7 * used.unsqueeze(-1)).all())


def test_a_midpoint_goes_down_and_what_is_outside_to_the_ends() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    values = torch.tensor([-3.0, -0.5, -0.499, 0.25, 0.2501, 0.75, 0.76, 9.0])
    assert nearest_codes(values, levels).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_largest_of_a_group_comes_back_and_zeros_stay_zero() -> None:
    weight = normal(6, 64)
    weight[2, 16:32] = 0
    found = quantize(weight, scheme(4, 16), F32, F32)
    back, groups = found.dequantize().view(-1, 16), weight.view(-1, 16)
    largest = groups.abs().argmax(-1, keepdim=True)
    assert torch.equal(back.gather(-1, largest), groups.gather(-1, largest))
    assert bool((found.dequantize()[2, 16:32] == 0).all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_dequantizing_is_one_rounding_of_the_product(dtype: torch.dtype) -> None:
    found = quantize(normal(8, 64), scheme(3, 32), BF16, dtype)
    assert isinstance(found.absmax, Tensor)
    exact = codebook(3)[found.codes.long()] * found.absmax.float().repeat_interleave(32, 1)
    assert torch.equal(found.dequantize(), exact.to(dtype))
    assert found.dequantize().dtype == dtype


def brute_absmax(absmax: Tensor, to: DoubleQuantization) -> Tensor:
    """a_hat in fp64, one superblock after the other."""
    flat, top = absmax.double().flatten(), 2**to.bits - 1
    offset = flat.min()
    parts = []
    for part in torch.split(flat - offset, to.superblock):
        largest = part.max().to(to.dtype).double()
        codes = (part / largest * top).round().clamp(0, top) if largest > 0 else torch.zeros_like(part)
        parts.append(offset + codes * largest / top)
    return torch.cat(parts).view(absmax.shape)


@pytest.mark.parametrize(
    ("bits", "dtype", "superblock"), [*product((2, 3, 4, 8), (BF16, F16, F32), (16, 64)), (8, F32, 256)]
)
def test_maxima_are_quantized_as_the_formula_says(bits: int, dtype: torch.dtype, superblock: int) -> None:
    to = DoubleQuantization(bits, dtype, superblock)
    absmax = normal(9, 37, seed=3).abs() * 0.05 + 0.01  # 333 groups: the last superblock is short
    found = quantize_absmax(absmax, to)
    assert found.codes.shape == absmax.shape
    assert len(found.scale) == -(-333 // superblock)
    assert torch.allclose(found.dequantize().double(), brute_absmax(absmax, to), rtol=3e-7, atol=1e-9)
    rounding = {BF16: 2**-8, F16: 2**-11, F32: 0}[dtype] + 1e-6
    step = found.scale.double().max() / (2**bits - 1)
    assert float((found.dequantize() - absmax).abs().max()) <= float(step) * (0.5 + rounding * 2**bits)


def test_equal_maxima_take_the_offset_alone() -> None:
    found = quantize_absmax(torch.full((4, 8), 0.125), DoubleQuantization(4, F16, 16))
    assert bool((found.codes == 0).all())
    assert torch.equal(found.dequantize(), torch.full((4, 8), 0.125))


def test_codes_are_found_with_the_maxima_that_ship() -> None:
    """With two bits for the maxima they are far off, and codes found with the exact ones would be worse."""
    weight = normal(64, 64)
    coarse = quantize(weight, scheme(4, 16), DoubleQuantization(2, F32, 64), F32)
    exact = quantize(weight, scheme(4, 16), F32, F32)
    assert isinstance(coarse.absmax, QuantizedAbsmax)
    blind = codebook(4)[exact.codes.long()] * coarse.absmax.dequantize().repeat_interleave(16, 1)
    assert (coarse.dequantize() - weight).norm() < 0.97 * (blind - weight).norm()


@pytest.mark.parametrize(
    ("bits", "group", "absmax", "expected"),
    [
        (4, 64, DOUBLE, 4.126953),
        (3, 64, DOUBLE, 3.126953),
        (2, 64, DoubleQuantization(2, BF16, 256), 2.032227),
        (8, 16, DoubleQuantization(8, F32, 16), 8.625),
        (4, 64, F32, 4.5),
    ],
)
def test_bits_of_the_published_configurations(bits: int, group: int, absmax: AbsmaxFormat, expected: float) -> None:
    assert bits_per_weight(bits, group, absmax) == pytest.approx(expected, abs=5e-7)


def test_the_grid_lies_between_its_published_ends() -> None:
    grid = [
        bits_per_weight(b0, group, DoubleQuantization(b1, dtype, superblock))
        for b0, b1, dtype, group, superblock in product(
            (2, 3, 4, 8), (2, 3, 4, 8), (BF16, F16, F32), (16, 32, 64), (16, 64, 256)
        )
    ]
    assert len(grid) == 432
    assert min(grid) == pytest.approx(2.032227, abs=5e-7)
    assert max(grid) == 8.625


@pytest.mark.parametrize("absmax", [DOUBLE, DoubleQuantization(3, BF16, 16), F16])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 64)])
def test_stored_bits_are_the_formula_and_what_it_leaves_out(bits: int, group: int, absmax: AbsmaxFormat) -> None:
    found = quantize(normal(128, 2048), scheme(bits, group), absmax, BF16).stored_bits()
    offset = 32 if isinstance(absmax, DoubleQuantization) else 0
    assert found.codes == bits * 128 * 2048
    assert found.codebooks == 32 * 2**bits
    assert found.codes + found.scales - offset == bits_per_weight(bits, group, absmax) * 128 * 2048


def test_double_precision_weights_are_rounded_in_double_precision() -> None:
    weight = normal(8, 64, dtype=torch.float64)
    single, double = (quantize(w, scheme(4, 32), F32, torch.float64) for w in (weight.float(), weight))
    assert torch.equal(single.codes, double.codes)
    assert double.dequantize().dtype == torch.float64


def test_nf4_is_closer_to_normal_weights_than_an_even_grid() -> None:
    """The purpose of the codebook: less squared error on normal weights at the same storage."""
    from workers.methods.rtn import quantize_weight

    weight = normal(256, 512)
    ours = quantize(weight, scheme(4, 64), F32, F32).dequantize()
    even = quantize_weight(weight, scheme(4, 64), F32).dequantize()
    assert (ours - weight).square().mean() < 0.95 * (even - weight).square().mean()


@pytest.mark.parametrize("stacked", [1, CACHED])
def test_errors_of_many_configurations_are_those_of_each(stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rounding with each of them; also cut into parts, with a last superblock that is not full, and zeros."""
    monkeypatch.setattr("workers.numerics.normal_float.CACHED", stacked)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator) * torch.rand(24, 1, generator=generator)
    weight[3] = 0
    rows, columns = torch.rand(24, generator=generator), torch.rand(96, generator=generator)
    choices = [
        (Scheme(bits=bits, group_size=group, symmetric=True), DoubleQuantization(level, dtype, superblock))
        for bits, group, level, dtype, superblock in product(
            (4, 2, 8), (16, 96), (2, 8), (torch.bfloat16, torch.float32), (7, 256)
        )
    ]
    found = squared_errors(weight, choices, rows, columns)
    for (scheme, level), error in zip(choices, found.tolist(), strict=True):
        rounded = quantize(weight, scheme, level, torch.float32).dequantize()
        exact = (rows[:, None] * (weight - rounded) * columns).double().square().sum()
        assert error == pytest.approx(float(exact), rel=1e-6)
