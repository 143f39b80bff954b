"""Matrices in FP8: against a search among all values of the format, and Triton's kernels against torch's operators."""

import math

import pytest
import torch
from torch import Tensor

from workers.numerics.eight_bits import cast_kernels, casts
from workers.numerics.eight_bits.casts import EightBits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().nan_to_num(0).unique()
SHAPES = [(128, 64), (200, 112), (16, 272)]
"""Whole tiles, and parts of some in both dimensions."""


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers over ten powers of two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-5, 5, shape, generator=generator)
    return x.to(DEVICE, dtype)


def values_of(found: EightBits) -> tuple[Tensor, Tensor]:
    """What both sides stand for, fp64, the second turned back."""
    assert found.lying is not None
    assert found.turned is not None
    return found.lying.double(), found.turned.double().T


@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_becomes_the_nearest_value(shape: tuple[int, int]) -> None:
    x = matrix(shape, torch.float32)
    found = casts.cast(x, lying=True, turned=True)
    lying, turned = values_of(found)
    assert torch.equal(lying, turned)
    assert float(found.scale) == pytest.approx(float(x.abs().max()) / 448)
    distances = (x.double().unsqueeze(-1).cpu() / float(found.scale) - VALUES).abs().amin(-1)
    torch.testing.assert_close((x.double() / float(found.scale) - lying).abs().cpu(), distances, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_write_what_operators_write(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of values of the format, twice as large: Triton's interpreter rounds some others wrongly."""
    indices = torch.randint(len(VALUES), shape, generator=torch.Generator().manual_seed(0))
    x = (2 * VALUES[indices]).to(DEVICE, dtype)
    x[0, 0] = 896
    found, plain = (cast(x, lying=True, turned=True) for cast in (cast_kernels.cast, casts.cast))
    assert float(found.scale) == float(plain.scale) == 2
    for ours, theirs in zip(values_of(found), values_of(plain), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(2 * ours, x.double())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 6144)])
def test_the_kernels_round_as_operators_do(shape: tuple[int, int]) -> None:
    x = matrix(shape)
    found, plain = (cast(x, lying=True, turned=True) for cast in (cast_kernels.cast, casts.cast))
    for ours, theirs in zip(values_of(found), values_of(plain), strict=True):
        # The quotient of the scale may round otherwise.
        assert float((ours != theirs).double().mean()) < 1e-3


@pytest.mark.parametrize("cast", [casts.cast, cast_kernels.cast])
def test_each_side_is_made_only_if_asked_for(cast: casts.Cast) -> None:
    x = matrix((32, 48))
    both, lying, turned = (cast(x, lying=a, turned=b) for a, b in ((True, True), (True, False), (False, True)))
    assert lying.turned is None
    assert turned.lying is None
    for one, of_both in ((lying.lying, both.lying), (turned.turned, both.turned)):
        assert one is not None
        assert of_both is not None
        assert torch.equal(one.view(torch.uint8), of_both.view(torch.uint8))


@pytest.mark.parametrize("cast", [casts.cast, cast_kernels.cast])
def test_zeros_stay_zeros(cast: casts.Cast) -> None:
    lying, _ = values_of(cast(torch.zeros(32, 48, dtype=torch.bfloat16, device=DEVICE), lying=True, turned=True))
    assert not lying.any()


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_fault_stays_a_fault(fault: float, kernels: bool) -> None:
    x = matrix((32, 48))
    x[3, 5] = fault
    lying, turned = values_of((cast_kernels.cast if kernels else casts.cast)(x, lying=True, turned=True))
    assert lying[3, 5].isnan()
    assert turned[3, 5].isnan()
