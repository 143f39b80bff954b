"""The affine formulas against a brute force on single groups, and the properties that every method relies on."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.methods import Scheme
from workers.methods.rtn import quantize_weight
from workers.numerics.affine import (
    ASYMMETRIC_FACTORS,
    SYMMETRIC_FACTORS,
    Grid,
    GroupRange,
    affine_grid,
    affine_weight,
    grouped,
    range_factors,
    round_to_grid,
)

SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product(range(2, 9), (16, 32, -1), (True, False))
]


def nearest_code(value: float, scale: float, zero: int, low: int, high: int) -> int:
    """Round half to even, by the definition."""
    return min(max(round(value / scale) + zero, low), high)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_the_formula_on_each_weight(scheme: Scheme) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 64)
    result = quantize_weight(weight, scheme, torch.float32)
    size = 64 if scheme.group_size == -1 else scheme.group_size
    for row, column in itertools.product(range(3), range(64)):
        group = weight[row, column // size * size : (column // size + 1) * size]
        low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
        scale = float(result.scale[row, column // size])
        if scheme.symmetric:
            levels = 2 ** (scheme.bits - 1)
            assert scale == pytest.approx(-low / levels if -low > high else -high / levels, rel=1e-6)
            code = nearest_code(float(weight[row, column]), scale, 0, -levels, levels - 1) + levels
        else:
            top = 2**scheme.bits - 1
            assert scale == pytest.approx((high - low) / top, rel=1e-6)
            zero = min(max(round(-low / scale), 0), top)
            assert result.zero_point is not None
            assert int(result.zero_point[row, column // size]) == zero
            code = nearest_code(float(weight[row, column]), scale, zero, 0, top)
        assert int(result.codes[row, column]) == code


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scheme=st.sampled_from(SCHEMES),
    magnitude=st.floats(-6, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_error_is_at_most_half_a_step(seed: int, scheme: Scheme, magnitude: float, dtype: torch.dtype) -> None:
    """Inside the range; at the clipped end of the symmetric grid, one step."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 64, generator=generator) * 10**magnitude
    if dtype == torch.float16:
        weight = weight.clamp(-6e4, 6e4)
    result = quantize_weight(weight, scheme, dtype)
    assert torch.isfinite(result.scale).all()
    assert int(result.codes.max()) < 2**scheme.bits
    if magnitude < -2 and dtype == torch.float16:
        return  # the scale's floor is larger than a step there
    step = result.scale.float().abs().repeat_interleave(result.group_size, dim=1)
    slack = {torch.float32: 1e-4, torch.float16: 2e-1, torch.bfloat16: 1.1}[dtype]
    error = (result.dequantize() - weight).abs()
    assert bool((error <= step * (1.0 + slack)).all())


def test_a_zero_group_stays_zero_and_finite() -> None:
    weight = torch.zeros(2, 32)
    for scheme, dtype in itertools.product(SCHEMES[:4], (torch.float16, torch.bfloat16, torch.float32)):
        if scheme.group_size in (16, 32):
            assert torch.equal(quantize_weight(weight, scheme, dtype).dequantize(), weight)


def test_the_larger_side_takes_the_extra_code() -> None:
    scheme = Scheme(bits=4, group_size=4, symmetric=True)
    weight = torch.tensor([[8.0, -1, 2, 3], [-8.0, 1, 2, 3]])
    result = quantize_weight(weight, scheme, torch.float32)
    assert result.scale.tolist() == [[-1.0], [1.0]]
    assert torch.equal(result.dequantize(), weight)


def test_scales_are_rounded_before_codes_are_chosen() -> None:
    """Codes chosen for the stored scale are never worse than codes chosen for the exact one."""
    torch.manual_seed(1)
    weight = torch.randn(32, 64)
    scheme = Scheme(bits=8, group_size=64, symmetric=False)
    stored = quantize_weight(weight, scheme, torch.bfloat16)
    exact = quantize_weight(weight, scheme, torch.float32)
    mixed = type(stored)(exact.codes, stored.scale, exact.zero_point, scheme, torch.float32)
    assert (stored.dequantize() - weight).norm() < (mixed.dequantize() - weight).norm()


def test_offset_moves_the_rounding() -> None:
    weight = torch.tensor([[0.4, 1.0, -1.0, 2.0]])
    w = grouped(weight, -1)
    to = affine_grid(GroupRange.of(w), Scheme(bits=3, group_size=-1, symmetric=True), torch.float32)
    plain, _ = round_to_grid(w, to)
    moved, _ = round_to_grid(w, to, torch.full_like(w, 0.5))
    assert math.isclose(float((moved - plain).abs().max()), 1.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_a_narrower_grid_are_stored_as_those_of_the_scheme(bits: int, symmetric: bool) -> None:
    """A method may leave codes at either end out: the stored zero point is the scheme's, not the grid's lowest code."""
    scheme = Scheme(bits=bits, group_size=-1, symmetric=symmetric)
    levels = 2 ** (bits - 1)
    lowest, highest = (1 - levels, levels - 1) if symmetric else (1, 2**bits - 2)
    zero = None if symmetric else torch.ones(1, 1)
    narrow = Grid(torch.tensor([[0.5]]), zero, lowest, highest)
    codes = torch.arange(lowest, highest + 1).float().view(1, 1, -1)
    stored = affine_weight(codes, narrow, scheme, torch.float32, torch.float32)
    assert torch.equal(stored.dequantize(), 0.5 * (codes - (0 if zero is None else 1)).flatten(1))


@pytest.mark.parametrize(
    ("symmetric", "zero", "lowest", "highest"),
    [(True, False, -8, 8), (True, False, -9, 7), (True, True, 0, 15), (False, False, -8, 7), (False, True, -1, 15)],
)
def test_a_grid_that_is_not_the_schemes_is_refused(symmetric: bool, zero: bool, lowest: int, highest: int) -> None:
    foreign = Grid(torch.ones(1, 1), torch.zeros(1, 1) if zero else None, lowest, highest)
    scheme = Scheme(bits=4, group_size=-1, symmetric=symmetric)
    with pytest.raises(ValueError, match=f"does not hold codes {lowest} to {highest}"):
        affine_weight(torch.zeros(1, 1, 4), foreign, scheme, torch.float32, torch.float32)


HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size == 16], ids=str)
def test_groups_of_one_sign_are_off_by_half_a_step_and_the_scale_s_rounding(
    scheme: Scheme, sign: int, dtype: torch.dtype
) -> None:
    """The end of a range is 2^bits - 1 steps from 0, and each is off by what the scale's dtype cannot hold."""
    weight = sign * (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 0.01)
    result = quantize_weight(weight, scheme, dtype)
    step = result.scale.float().abs().repeat_interleave(16, dim=1)
    steps = 0.5 + 2**scheme.bits * torch.finfo(dtype).eps / 2 + 1e-3
    assert bool(((result.dequantize() - weight).abs() <= steps * step).all())
    assert int(result.codes.max()) < 2**scheme.bits
    if result.zero_point is not None:
        assert int(result.zero_point.max()) == (0 if sign > 0 else 2**scheme.bits - 1)


def test_a_zero_point_that_rounds_beyond_the_last_code_is_the_last_code() -> None:
    """-lo/s is 255.9 where bf16 has made the scale smaller: 256 would be stored as 0."""
    scheme = Scheme(bits=8, group_size=-1, symmetric=False)
    for low in (-1.0039, -2.0078):
        weight = torch.linspace(low, low / 3, 64).unsqueeze(0) * 255 / 256
        scale = torch.tensor(-float(weight.min()) / 255).bfloat16()
        result = quantize_weight(weight, scheme, torch.bfloat16)
        assert result.zero_point is not None
        assert int(result.zero_point) == min(255, round(-float(weight.min()) / float(scale)))
        assert (result.dequantize() - weight).abs().max() <= 1.5 * float(scale)
    beyond = torch.rand(4096, 16, generator=torch.Generator().manual_seed(1)).neg()
    found = quantize_weight(beyond, scheme, torch.bfloat16)
    assert bool(((-beyond.amin(1) / found.scale.float().squeeze(1)).round() > 255).any()), "a test of such groups"
    assert found.zero_point is not None
    assert int(found.zero_point.min()) >= 254


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float16, 1e-5), (torch.bfloat16, 1e-10), (torch.float32, 1e-10)], ids=str
)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size == 16], ids=str)
def test_a_group_of_zeros_has_the_least_scale_that_its_dtype_divides_by(
    scheme: Scheme, dtype: torch.dtype, least: float
) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 16:] = torch.linspace(-1, 2, 16)
    result = quantize_weight(weight, scheme, dtype)
    expected = torch.tensor(least, dtype=dtype)
    assert float(expected) > 0
    assert torch.equal(result.scale.flatten()[:3], expected.expand(3))
    assert torch.equal(result.dequantize().flatten()[:48], torch.zeros(48))
    assert bool((weight / result.scale.float().repeat_interleave(16, dim=1)).isfinite().all())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_near_zero_keeps_its_sign(sign: int) -> None:
    """The larger side of a symmetric group decides the sign, however small the group is."""
    weight = torch.full((1, 16), -sign * 1e-30)
    result = quantize_weight(weight, Scheme(bits=4, group_size=16, symmetric=True), torch.float32)
    assert float(result.scale) == pytest.approx(sign * 1e-10)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size == 16], ids=str)
def test_a_group_that_is_not_finite_spoils_no_other(scheme: Scheme, value: float) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    broken = weight.clone()
    broken[1, 20] = value
    good, bad = (quantize_weight(w, scheme, torch.bfloat16).dequantize().view(3, 4, 16) for w in (weight, broken))
    assert not bool(bad[1, 1].isfinite().all()), "whoever looks at the result sees it"
    bad[1, 1] = good[1, 1]
    assert torch.equal(good, bad)


def test_ranges_are_searched_from_the_whole_down_to_two_fifths() -> None:
    assert range_factors(5) == pytest.approx([1.0, 0.85, 0.7, 0.55, 0.4])
    assert (SYMMETRIC_FACTORS, ASYMMETRIC_FACTORS) == (31, 11)
    assert range_factors(31)[1] == pytest.approx(0.98)
    assert range_factors(11)[1] == pytest.approx(0.94)
