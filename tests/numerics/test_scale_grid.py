"""Scales in another dtype, against exact fractions."""

import math
from fractions import Fraction

import pytest
import torch

from tests.formats.examples import random_result, scheme
from workers.numerics.scale_grid import largest_error, rescaled

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def test_every_bf16_number_from_2_to_the_minus_17_on_is_one_of_fp16() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    finite = every[torch.isfinite(every)]
    small = (finite.float().abs() < 2**-17) & (finite != 0)
    large = finite.float().abs() > 65504
    assert largest_error(finite[~small & ~large], finite[~small & ~large].half()) == 0
    assert largest_error(torch.tensor([2.0**-18 * 1.9921875]), torch.tensor([2.0**-18 * 1.9921875]).half()) > 0
    assert largest_error(finite[large], finite[large].half()) == math.inf


@pytest.mark.parametrize(
    ("number", "dtype"), [(0.1, BF16), (0.3, F16), (1e-6, F16), (3e-8, F16), (1.00390625, BF16), (-0.7, BF16)]
)
def test_an_error_is_relative_to_the_scale_or_the_smallest_normal_number(number: float, dtype: torch.dtype) -> None:
    exact = torch.tensor([number, 1.0])
    rounded = exact.to(dtype)
    of = Fraction(exact[0].item())
    least = Fraction(2) ** (-14 if dtype is F16 else -126)
    expected = abs(Fraction(rounded[0].item()) - of) / max(abs(of), least)
    assert largest_error(exact, rounded) == pytest.approx(float(expected), rel=1e-12)


def test_a_weight_keeps_all_but_its_scales() -> None:
    weight = random_result((32, 64), scheme(4, 32, False), F32).affine
    rounded, error = rescaled(weight, F16)
    assert 0 < error <= 2**-11
    assert torch.equal(rounded.scale, weight.scale.half())
    assert rounded.codes is weight.codes
    assert rounded.zero_point is weight.zero_point
    assert rounded.dtype is F32
    assert rescaled(rounded, F16) == (rounded, 0.0)
    wide, exact = rescaled(rounded, F32)
    assert exact == 0
    assert torch.equal(wide.scale, rounded.scale.float())
