"""Tuned rounding on floating-point grids: against autograd in fp64, and Triton's kernels against the plain steps."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from app.domain.methods.named_schemes import Element
from workers.numerics.backends.rounding import float_rounding_operators as plain
from workers.numerics.backends.rounding.float_rounding_operators import FloatGroups
from workers.numerics.floats.tuned_floats import tuned_floats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
SCHEMES = [Scheme.named(SchemeName(n)) for n in ("nvfp4a16", "mxfp4a16", "mxfp8a16", "fp8a16", "fp8-block")]


def values(scheme: Scheme) -> Tensor:
    """All of the element, ascending, fp64."""
    if scheme.bits == 4:
        return torch.cat([-E2M1.flip(0)[:-1], E2M1])
    every: Tensor = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().nan_to_num(0).unique()
    return every


def differentiable(weight: Tensor, factor: Tensor, v: Tensor, scheme: Scheme) -> Tensor:
    """w_hat with rounding straight through, by the table: between two values u is linear."""
    table = values(scheme)
    x = weight / factor
    below = (torch.searchsorted(table, x, right=True) - 1).clamp(0, len(table) - 2)
    u = below + (x - table[below]) / (table[below + 1] - table[below])
    q = (u + v).detach().round()
    inside = (q >= 0) & (q < len(table))
    q = q.clamp(0, len(table) - 1).long()
    step = (table.diff()[q.clamp(max=len(table) - 2)]) * inside
    w_hat: Tensor = factor * (table[q] + step * (v - v.detach()))
    return w_hat


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_steps_equal_signed_descent_by_autograd_in_fp64(scheme: Scheme) -> None:
    torch.manual_seed(2)
    weight = torch.randn(12, 64, dtype=torch.float64)
    inputs, target = torch.randn(20, 64, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    ours = tuned_floats({"only": weight}, scheme, torch.float32)
    factor = ours.state.factor.repeat_interleave(ours.state.weight.shape[1]).view_as(weight)
    v = torch.zeros_like(weight, requires_grad=True)
    w_hat = torch.empty_like(weight)
    ours.write(w_hat)
    for step in range(6):
        expected = differentiable(weight, factor, v, scheme)
        torch.testing.assert_close(w_hat, expected.detach(), rtol=1e-9, atol=1e-12)
        loss = ((inputs @ expected.T - target) ** 2).mean()
        by_weight, by_v = torch.autograd.grad(loss, (expected, v))
        rate = 0.12 * (1 - step / 6)
        ours.step(by_weight, torch.tensor(rate, dtype=torch.float64), w_hat)
        with torch.no_grad():
            v.sub_(rate * by_v.sign()).clamp_(-0.5, 0.5)
        torch.testing.assert_close(ours.state.offset.view_as(v), v.detach(), rtol=1e-12, atol=1e-12)
    ours.keep(torch.tensor(True))
    result = ours.results()["only"]
    assert torch.equal(result.dequantize(), w_hat.float().double())
    assert not torch.equal(result.weight.codes, tuned_floats({"only": weight}, scheme, torch.float32).state.codes)


def test_nan_moves_nothing_and_is_counted() -> None:
    ours = tuned_floats({"only": torch.randn(4, 32)}, SCHEMES[0], torch.float32)
    gradient = torch.zeros(4, 32)
    gradient[1, 3] = float("nan")
    ours.step(gradient, torch.tensor(0.25), torch.empty(4, 32))
    assert ours.faults() == 1
    assert not ours.state.offset.any()
    ours.restart()
    assert ours.faults() == 0


def groups(seed: int, element: Element, width: int, magnitude: float, dtype: torch.dtype) -> FloatGroups:
    torch.manual_seed(seed)
    weight = (torch.randn(37, width) * 10**magnitude).to(dtype)
    weight[0] = 0
    largest = 448 if element is Element.E4M3 else 6
    factor = (weight.float().abs().amax(1) / largest).clamp(min=1e-20) * torch.empty(37).uniform_(0.6, 1.5)
    offset, codes = torch.empty(37, width).uniform_(-0.5, 0.5), torch.zeros(37, width, dtype=torch.uint8)
    return FloatGroups(*(tensor.to(DEVICE) for tensor in (weight, offset, factor, codes)))


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    seed=st.integers(0, 10**6),
    element=st.sampled_from([Element.E2M1, Element.E4M3]),
    width=st.sampled_from([16, 32, 48, 100]),
    magnitude=st.floats(-6, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_kernels_give_the_bits_of_the_plain_steps(
    seed: int, element: Element, width: int, magnitude: float, dtype: torch.dtype
) -> None:
    kernels = pytest.importorskip("workers.numerics.backends.rounding.float_rounding_kernels")
    ours, other = (groups(seed, element, width, magnitude, dtype) for _ in range(2))
    gradient = torch.randn(37, width, device=DEVICE).to(dtype)
    gradient[2, 0] = float("nan")
    rate, yes = torch.tensor(0.125, device=DEVICE), torch.tensor(True, device=DEVICE)
    outs, faults = [], []
    for module, of in ((plain, ours), (kernels, other)):
        out, fault = torch.zeros_like(of.weight), torch.zeros(1, dtype=torch.int32, device=DEVICE)
        module.write(of, element, w_hat=out)
        first = out.clone()
        module.step(of, element, gradient=gradient, rate=rate, faults=fault, w_hat=out)
        module.keep(of, element, better=~yes)
        assert not of.codes.any()
        module.keep(of, element, better=yes)
        outs.append((first, out))
        faults.append(int(fault))
    assert faults == [1, 1]
    for one, two in zip(*outs, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(ours.offset, other.offset)
    assert torch.equal(ours.codes, other.codes)
