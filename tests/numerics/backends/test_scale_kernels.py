"""Scales and divergence: the eager formulas against autograd, the Triton kernels against the eager formulas."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics import group_scales
from workers.numerics.backends import place_operators
from workers.numerics.backends.place_operators import Places
from workers.numerics.divergence import divergence, squared_distance
from workers.numerics.group_scales import add_scale_gradient, dequantize_groups
from workers.numerics.quantized import AffineWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PHASES = (Phase.explicit, Phase.generate)
GROUPS = {
    "seed": st.integers(0, 10**6),
    "count": st.integers(1, 70),
    "width": st.sampled_from((1, 5, 16, 64, 100, 128)),
    "bits": st.integers(2, 8),
    "symmetric": st.booleans(),
    "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
}


def groups(seed: int, count: int, width: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | int]:
    """Codes, scales and zero points."""
    torch.manual_seed(seed)
    codes = torch.randint(2**bits, (count, width), dtype=torch.uint8, device=DEVICE)
    scale = torch.randn(count, device=DEVICE).to(torch.bfloat16).float()
    zero: Tensor | int = 2 ** (bits - 1)
    return codes, scale, zero if symmetric else torch.randint(2**bits, (count,), dtype=torch.uint8, device=DEVICE)


@pytest.fixture(scope="module")
def kernels() -> object:
    pytest.importorskip("triton")
    return importlib.import_module("workers.numerics.backends.scale_kernels")


@settings(max_examples=15, deadline=None, phases=PHASES)
@given(**GROUPS)
def test_weights_are_those_of_the_stored_form(
    seed: int, count: int, width: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    codes, scale, zero = groups(seed, count, width, bits, symmetric)
    out = torch.empty(count, width, dtype=dtype, device=DEVICE)
    dequantize_groups(codes, scale, zero, out)
    stored = AffineWeight(
        codes=codes,
        scale=scale.unsqueeze(-1),
        zero_point=zero.unsqueeze(-1) if isinstance(zero, Tensor) else None,
        scheme=Scheme(bits=bits, group_size=-1, symmetric=symmetric),
        dtype=dtype,
    )
    assert torch.equal(out, stored.dequantize())


@settings(max_examples=15, deadline=None, phases=PHASES)
@given(**GROUPS)
def test_kernels_equal_the_eager_formulas(
    kernels: object, seed: int, count: int, width: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    codes, scale, zero = groups(seed, count, width, bits, symmetric)
    out, expected = (torch.empty(count, width, dtype=dtype, device=DEVICE) for _ in range(2))
    kernels.dequantize(codes, scale, zero, out)  # type: ignore[attr-defined]
    by_hand(dequantize_groups, codes, scale, zero, expected)
    # The interpreter cuts off where a GPU rounds to bf16.
    tolerance = 2**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=0)
    gradient = torch.randn(count, width, device=DEVICE).to(dtype)
    sums = torch.randn(count, device=DEVICE)
    wanted = sums.clone()
    kernels.add_scale_gradient(gradient, codes, zero, sums)  # type: ignore[attr-defined]
    by_hand(add_scale_gradient, gradient, codes, zero, wanted)
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=2**bits * 1e-5)


def by_hand(function: object, *arguments: object) -> None:
    """The eager formula, also on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_scales, "scale_kernels", lambda *_: None)
        function(*arguments)  # type: ignore[operator]


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, _, zero = groups(3, 50, 16, 3, False)
    gradient, sums = torch.randn(50, 16, device=DEVICE), torch.zeros(50, device=DEVICE)
    monkeypatch.setattr(group_scales, "CACHED_ELEMENTS", chunk)
    by_hand(add_scale_gradient, gradient, codes, zero, sums)
    assert isinstance(zero, Tensor)
    torch.testing.assert_close(sums, (gradient * (codes.float() - zero.float().unsqueeze(-1))).sum(-1))


def test_a_gradient_that_is_no_number_is_seen(kernels: object) -> None:
    codes, _, zero = groups(1, 4, 16, 4, True)
    gradient = torch.zeros(4, 16, device=DEVICE)
    gradient[2, 3] = torch.nan
    sums = torch.zeros(4, device=DEVICE)
    kernels.add_scale_gradient(gradient, codes, zero, sums)  # type: ignore[attr-defined]
    assert sums.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divergence_and_its_gradient_are_autograds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher, student = (4 * torch.randn(7, 33, dtype=dtype) for _ in range(2))
    leaf = student.clone().requires_grad_()
    log_p, log_q = teacher.log_softmax(-1), leaf.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected.sum().backward()
    each, gradient = divergence(student, teacher)
    torch.testing.assert_close(each, expected.detach())
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("vocabulary", [5, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_divergence_kernel_equals_the_eager_formula(kernels: object, vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocabulary)
    teacher, student = ((6 * torch.randn(3, vocabulary)).to(DEVICE, dtype) for _ in range(2))
    student[1] -= 300
    teacher[2, 0], student[2, 1] = 40, torch.nan
    expected, gradient = divergence(student.cpu(), teacher.cpu())
    each = kernels.divergence(student, teacher)  # type: ignore[attr-defined]
    torch.testing.assert_close(each.cpu(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert expected.isnan().tolist() == [False, False, True]
    rtol, atol = (1e-2, 1e-5) if dtype == torch.bfloat16 else (1e-4, 1e-6)
    torch.testing.assert_close(teacher.cpu(), gradient, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_squared_distance_is_the_formula_in_fp64(kernels: object, count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(count)
    one, other = (torch.randn(count).to(DEVICE, dtype) for _ in range(2))
    expected = (one.double() - other.double()).square().sum()
    for found in (kernels.squared_distance(one, other), squared_distance(one.cpu(), other.cpu())):  # type: ignore[attr-defined]
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-6, atol=0)
    one[0] = torch.nan
    assert kernels.squared_distance(one, other).isnan()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tuned_scales_are_not_rounded_before_the_product_is(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    scale = torch.tensor([1 / 3, 0.7, -1 / 7, 1.0009])
    out = torch.empty(4, 64, dtype=dtype)
    dequantize_groups(codes, scale, 128, out)
    exact = (codes.double() - 128) * scale.double().unsqueeze(1)
    assert torch.equal(out, exact.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_divergence_of_half_precision_logits_is_that_of_the_same_numbers_in_fp64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((3 * torch.randn(6, 200, generator=generator)).to(dtype) for _ in range(2))
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (teacher, student))
    each, gradient = divergence(student, teacher)
    assert each.dtype == torch.float32
    torch.testing.assert_close(each.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), log_q.exp() - log_p.exp(), rtol=2**-7, atol=1e-6)


def places_of(seed: int, shape: tuple[int, int], fp4: bool, bits: int, dtype: torch.dtype) -> Places:
    """Places on and beyond a grid, some exactly between two codes, with what Adam keeps of them."""
    torch.manual_seed(seed)
    low, high = (-7, 7) if fp4 else (0, 2**bits - 1)
    place = (torch.rand(shape) * (high - low + 1) + low - 0.5).to(DEVICE)
    place = torch.where(torch.rand(shape, device=DEVICE) < 0.1, place.floor() + 0.5, place).clamp(
        low - 0.49, high + 0.49
    )
    gradient, mean = (torch.randn(shape).to(DEVICE, dtype) for _ in range(2))
    return Places(place, gradient, mean, torch.rand(shape).to(DEVICE, dtype), low, high, 0.49, 1e-12, fp4)


@settings(max_examples=12, deadline=None, phases=PHASES)
@given(fp4=st.booleans(), **GROUPS)
def test_kernels_of_places_equal_the_operators(
    kernels: Any, fp4: bool, seed: int, count: int, width: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    _, scale, zero = groups(seed, count, width, bits, symmetric)
    found, expected = (places_of(seed, (count, width), fp4, bits, dtype) for _ in range(2))
    # The interpreter cuts off where a GPU rounds to bf16.
    tolerance = 2**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2**-10 if dtype.itemsize == 2 else 1e-5
    out = [torch.empty(count, width, dtype=dtype, device=DEVICE) for _ in range(2)]
    kernels.dequantize_places(found, scale, zero, out[0])
    place_operators.dequantize_places(expected, scale, zero, out[1])
    torch.testing.assert_close(out[0], out[1], rtol=tolerance if dtype == torch.bfloat16 else 0, atol=0)
    if not fp4:
        rows, sums = slice(count // 3, count), [torch.randn(count - count // 3, device=DEVICE)] * 2
        sums = [tensor.clone() for tensor in sums]
        d, sign = torch.randn(count - rows.start, width).to(DEVICE, dtype), scale[rows].sign()
        own = zero[rows] if isinstance(zero, Tensor) else zero
        kernels.add_place_gradient(d.clone(), found, rows, own, sign, sums[0])
        place_operators.add_place_gradient(d.clone(), expected, rows, own, sign, sums[1])
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=2**bits * 1e-5)
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=tolerance, atol=tolerance)
    found.gradient.copy_(expected.gradient)
    for places in (found, expected):
        places.gradient[0, 0], places.gradient[-1, -1] = torch.nan, -torch.inf
    pace, unbiased = (torch.tensor(number, device=DEVICE) for number in (0.03, 0.6))
    kernels.move_places(found, pace, unbiased, (0.9, 0.95))
    place_operators.move_places(expected, pace, unbiased, (0.9, 0.95))
    for one, other in ((found.mean, expected.mean), (found.square, expected.square)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(found.place, expected.place, rtol=0, atol=1e-5)


def test_operators_of_places_are_the_formulas_in_fp64() -> None:
    scale, generator = torch.tensor([0.5, -0.25], dtype=torch.float64), torch.Generator().manual_seed(0)
    place = torch.tensor([[0.5, 1.5, 2.5, 3.4], [-0.4, 0.6, 2.49, 3.0]], dtype=torch.float64)
    gradient, mean = (torch.randn(2, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    square = torch.rand(2, 4, dtype=torch.float64, generator=generator)
    places = Places(place.clone(), gradient.clone(), mean.clone(), square.clone(), 0, 3, 0.49, 1e-12)
    out = torch.empty(2, 4)
    place_operators.dequantize_places(places, scale, 2, out)
    assert out.tolist() == [[-1.0, 0.0, 0.0, 0.5], [0.5, 0.25, 0.0, -0.25]]
    fp4 = replace(places, place=torch.tensor([[-7.4, -4.6, 6.0, 3.0]] * 2), low=-7, high=7, fp4=True)
    place_operators.dequantize_places(fp4, scale, 0, out)
    assert out.tolist() == [[-3.0, -1.5, 2.0, 0.75], [1.5, 0.75, -1.0, -0.375]]
    d, sums = torch.randn(1, 4, dtype=torch.float64, generator=generator), torch.ones(1, dtype=torch.float64)
    place_operators.add_place_gradient(d.clone(), places, slice(1, 2), 2, scale[1:].sign(), sums)
    torch.testing.assert_close(sums, 1 + (d * torch.tensor([-2, -1, 0, 1])).sum(1))
    torch.testing.assert_close(places.gradient, gradient - torch.cat([torch.zeros_like(d), d]))
    g = places.gradient.clone()
    place_operators.move_places(places, torch.tensor(0.1), torch.tensor(0.5), (0.9, 0.95))
    m, v = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g**2
    torch.testing.assert_close(
        places.place, (place - 0.1 * m / (v / 0.5).sqrt()).clamp(-0.49, 3.49), rtol=1e-6, atol=1e-6
    )
