"""Backward products in FP8: errors within their bound in fp64, so that signs turn only where little is left."""

import pytest
import torch
from torch import Tensor

from workers.numerics import backend
from workers.numerics.eight_bits import cast_kernels
from workers.numerics.eight_bits.backward import backward, pays, serves, warm_ups
from workers.numerics.eight_bits.casts import EightBits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, OUT, IN = 512, 48, 64
UNIT = 1 / 16
"""The most that rounding to E4M3 errs by, relative to a number that is not too small for it."""


def factors(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dy (tokens, out), x (tokens, in) and W (out, in); "outliers" has a few tokens a hundred times as large, as the
    first one of a sequence is in language models."""
    generator = torch.Generator().manual_seed(0)
    g, x, w = (torch.randn(shape, generator=generator) for shape in ((TOKENS, OUT), (TOKENS, IN), (OUT, IN)))
    x = x + torch.randn(TOKENS, 1, generator=generator) * torch.randn(IN, generator=generator)
    if kind == "outliers":
        g[::128] *= 100
        x[::128] *= 100
    return (1e-7 * g).to(DEVICE, dtype), x.to(DEVICE, dtype), w.to(DEVICE, dtype)


def bound(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that FP8's a^T b (k, m), (k, n) may err by, fp64: by its factors' roundings and its own."""
    a, b = a.double().abs(), b.double().abs()
    smallest = [t.amax() * 2.0**-10 / 448 for t in (a, b)]  # half of the smallest step, 2^-9
    rounded = [UNIT * t + s for t, s in zip((a, b), smallest, strict=True)]
    sums = rounded[0].T @ b + a.T @ rounded[1] + rounded[0].T @ rounded[1]
    return sums + 2 * torch.finfo(dtype).eps * (a.T @ b)


@pytest.mark.parametrize("kind", ["even", "outliers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_err_within_their_bound(kind: str, dtype: torch.dtype) -> None:
    g, x, w = factors(kind, dtype)
    gradient = torch.empty_like(w)
    by_x = backward(g, x, w, gradient, adds=False, by_input=True)
    assert by_x is not None
    exact, exact_by_x = g.double().T @ x.double(), g.double() @ w.double()
    assert ((gradient.double() - exact).abs() <= bound(g, x, dtype)).all()
    assert ((by_x.double() - exact_by_x).abs() <= bound(g.T, w, dtype)).all()


@pytest.mark.parametrize("kind", ["even", "outliers"])
def test_signs_turn_only_where_little_is_left(kind: str) -> None:
    g, x, w = factors(kind)
    gradient = torch.empty_like(w)
    backward(g, x, w, gradient, adds=False, by_input=False)
    exact = g.double().T @ x.double()
    turned = gradient.sign() != exact.sign()
    weight = exact.abs()
    assert float((turned * weight).sum() / weight.sum()) < 0.003
    # Independent roundings: four hundredths of what independent tokens sum up to.
    spread = (g.double().square().T @ x.double().square()).sqrt()
    assert float(((gradient.double() - exact) / spread).square().mean().sqrt()) < 0.045
    assert (weight[turned] < 4 * 0.045 * spread[turned]).all()


def test_gradients_add_up() -> None:
    g, x, w = factors("even", torch.float32)
    once, twice = torch.empty_like(w), torch.empty_like(w)
    backward(g, x, w, once, adds=False, by_input=False)
    backward(g, x, w, twice, adds=False, by_input=False)
    backward(g, x, w, twice, adds=True, by_input=False)
    torch.testing.assert_close(twice, 2 * once)


def test_what_nobody_asks_for_is_not_made() -> None:
    g, x, w = factors("even")
    assert backward(g, x, w, None, adds=False, by_input=False) is None
    gradient = torch.zeros_like(w)
    by_x = backward(g, x, w, gradient, adds=False, by_input=True)
    assert gradient.any()
    alone = backward(g, x, w, None, adds=False, by_input=True)
    assert by_x is not None
    assert alone is not None
    assert torch.equal(by_x, alone)


def test_shapes_that_products_exist_for() -> None:
    assert serves((48, 64))
    assert not serves((48, 63))
    assert not pays(torch.device("cpu"), torch.bfloat16, (4096, 4096))


def test_warm_ups_cast_as_backward_passes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def recorded(x: Tensor, *, lying: bool, turned: bool) -> EightBits:
        seen.append((lying, turned))
        return cast_kernels.cast(x, lying=lying, turned=turned)

    monkeypatch.setattr(backend, "cast_to_eight_bits", lambda *_: recorded)
    g, x, w = factors("even")
    backward(g, x, w, torch.empty_like(w), adds=False, by_input=True)
    backward(g, x, w, torch.empty_like(w), adds=False, by_input=False)
    of_passes = set(seen)
    seen.clear()
    for call in warm_ups(torch.device(DEVICE), torch.bfloat16):
        call()
    assert set(seen) == of_passes
