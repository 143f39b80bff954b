"""Searched scales of whole matrices, against every range tried by the formula in fp64."""

import itertools

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from workers.methods.rtn import round_to_scheme
from workers.numerics import searched_matrix
from workers.numerics.quantized import AffineWeight
from workers.numerics.searched_matrix import quantize_matrix

FACTORS = {True: [1 - 0.6 * i / 30 for i in range(31)], False: [1 - 0.6 * i / 10 for i in range(11)]}
"""The ranges that are tried, of their full width."""


def weights(rows: int = 6, columns: int = 64) -> Tensor:
    """With heavy tails, where a shrunk range is worth its clipped numbers."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)).pow(3)


def least_error(group: Tensor, moments: Tensor, bits: int, symmetric: bool) -> float:
    """The least weighted squared error of a group over all ranges, fp64."""
    low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
    errors = []
    if symmetric:
        levels = 2 ** (bits - 1)
        for factor, sign in itertools.product(FACTORS[True], (1, -1)):
            scale = sign * max(-low, high) * factor / levels
            codes = (group / scale).round().clamp(-levels, levels - 1)
            errors.append(float(((codes * scale - group).square() * moments).sum()))
    else:
        top = 2**bits - 1
        for alpha, beta in itertools.product(FACTORS[False], repeat=2):
            scale = (high * beta - low * alpha) / top
            zero = min(max(round(-low * alpha / scale), 0), top)
            codes = ((group / scale).round() + zero).clamp(0, top)
            errors.append(float((((codes - zero) * scale - group).square() * moments).sum()))
    return min(errors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_range_that_is_tried_is_better(bits: int, symmetric: bool, weighted: bool) -> None:
    weight, scheme = weights(), Scheme(bits=bits, group_size=16, symmetric=symmetric)
    moments = torch.logspace(-2, 2, 64) if weighted else torch.ones(64)
    found = quantize_matrix(weight, scheme, torch.float32, moments if weighted else None).dequantize()
    errors = ((found - weight).double().square() * moments.double()).view(6, 4, 16).sum(-1)
    for row, group in itertools.product(range(6), range(4)):
        columns = slice(16 * group, 16 * group + 16)
        least = least_error(weight[row, columns].double(), moments[columns].double(), bits, symmetric)
        assert float(errors[row, group]) == pytest.approx(least, rel=1e-4)


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = weights(10).bfloat16(), Scheme(bits=3, group_size=32, symmetric=False)
    whole = quantize_matrix(weight, scheme, torch.bfloat16)
    monkeypatch.setattr(searched_matrix, "PART", 3 * 64)
    parts = quantize_matrix(weight, scheme, torch.bfloat16)
    assert isinstance(whole, AffineWeight)
    assert isinstance(parts, AffineWeight)
    assert whole.zero_point is not None
    assert parts.zero_point is not None
    for one, other in ((whole.codes, parts.codes), (whole.scale, parts.scale), (whole.zero_point, parts.zero_point)):
        assert torch.equal(one, other)


def test_it_is_nearer_than_full_ranges() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))
    scheme = Scheme(bits=2, group_size=-1, symmetric=True)
    searched, plain = (make(weight, scheme, torch.float32).dequantize() for make in (quantize_matrix, round_to_scheme))
    assert float((searched - weight).square().sum()) < 0.9 * float((plain - weight).square().sum())


def test_number_formats_keep_their_dtype_and_shape() -> None:
    found = quantize_matrix(weights().bfloat16(), Scheme.named(SchemeName.NVFP4A16), torch.bfloat16)
    assert found.scheme.name is SchemeName.NVFP4A16
    assert found.dequantize().dtype == torch.bfloat16
