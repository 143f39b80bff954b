"""Compiled loops of a decoder block against the same in torch's operators in fp64, forward and backward."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from workers.numerics.backends import block_loops, block_operators
from workers.numerics.loops import threads

Calls = Callable[[object, Sequence[Tensor]], Sequence[Tensor]]
BATCH, LENGTH, WIDTH, HEAD = 3, 7, 48, 16
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, params=[1, 1 << 17])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads, and one."""
    monkeypatch.setattr(threads, "PART", request.param)


def norm(kernels: object, given: Sequence[Tensor], **kind: object) -> Sequence[Tensor]:
    return (kernels.rms_norm(given[0], given[1], 1e-5, **kind),)  # type: ignore[attr-defined]


def offset_norm(kernels: object, given: Sequence[Tensor]) -> Sequence[Tensor]:
    return norm(kernels, given, offset=1.0, rounds_twice=False)


def added_norm(kernels: object, given: Sequence[Tensor]) -> Sequence[Tensor]:
    return kernels.add_rms_norm(given[0], given[2], given[1], 1e-5)  # type: ignore[attr-defined, no-any-return]


def gated(kernels: object, given: Sequence[Tensor]) -> Sequence[Tensor]:
    return (kernels.silu_mul(given[0], given[2]),)  # type: ignore[attr-defined]


def turned(kernels: object, given: Sequence[Tensor]) -> Sequence[Tensor]:
    heads = given[0].view(BATCH, LENGTH, -1, HEAD)
    angles = torch.arange(LENGTH * HEAD // 2).view(1, LENGTH, -1).repeat(1, 1, 2).double()
    cos, sin = (turn(angles).to(heads.dtype) for turn in (torch.cos, torch.sin))
    return kernels.apply_rope(heads, counts=(1, 1, 1), cos=cos, sin=sin)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("call", [norm, offset_norm, added_norm, gated, turned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_in_fp64(call: Calls, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = ((BATCH, LENGTH, WIDTH), (WIDTH,), (BATCH, LENGTH, WIDTH))
    drawn = [(torch.randn(size, generator=generator) * 3).to(dtype) for size in sizes]
    found, expected = (_both_ways(call, kernels, drawn, of) for kernels, of in _sides(dtype))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        scale = float(other.abs().max())
        assert float((one.double() - other).abs().max()) <= TOLERANCE[dtype] * scale


def _sides(dtype: torch.dtype) -> tuple[tuple[object, torch.dtype], ...]:
    return (block_loops, dtype), (block_operators, torch.float64)


def _both_ways(call: Calls, kernels: object, drawn: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    given = [each.to(dtype, copy=True).requires_grad_(number != 1) for number, each in enumerate(drawn)]
    outputs = call(kernels, given)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator).to(drawn[0].dtype).to(dtype) for each in outputs]
    torch.autograd.backward(list(outputs), weights)
    return [*(each.detach() for each in outputs), *(each.grad for each in given if each.grad is not None)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_operators(parts: int, dtype: torch.dtype) -> None:
    """They round where these do: all but the order of the sum is the same."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(5, LENGTH, WIDTH, generator=generator).to(dtype)
    outputs = [torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype) for _ in range(parts)]
    index = torch.tensor([4, 0, 2])
    found, expected = (k.square_error(outputs, targets, index, 0.5, 2.0) for k in (block_loops, block_operators))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert torch.equal(found[1], expected[1])


def test_the_loops_exponential_is_exact_to_the_last_bits() -> None:
    x = torch.linspace(-20, 20, 10_001).bfloat16().float()
    found = block_loops.silu_mul(x, torch.ones_like(x))
    torch.testing.assert_close(found.double(), torch.nn.functional.silu(x.double()), rtol=5e-7, atol=1e-12)


def test_bfloat16_roundings_are_those_of_operators() -> None:
    """In nearly all numbers: sums and the exponential may differ in a last bit, which rounding can show."""
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(size, generator=generator)).bfloat16() for size in ((64, 9, WIDTH), (WIDTH,), (64, 9, WIDTH))]
    for call in (norm, added_norm, gated):
        sides = (_both_ways(call, kernels, drawn, torch.bfloat16) for kernels in (block_loops, block_operators))
        for one, other in zip(*sides, strict=True):
            assert float((one != other).double().mean()) < 2e-3
