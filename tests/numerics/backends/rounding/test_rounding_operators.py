"""The fake quantizer on a CPU, in operators and in compiled loops, against its formulas written plainly."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.domain.methods import Scheme
from tests.numerics import plain_rounding
from workers.methods.sign_round import signed_step, start
from workers.numerics.affine import SMALLEST_SCALE, GroupRange
from workers.numerics.backend import loops_serve
from workers.numerics.backends.protocols import RoundingKernels
from workers.numerics.backends.rounding import rounding_loops, rounding_operators
from workers.numerics.backends.rounding.rounding_operators import GridSettings, Groups
from workers.numerics.loops import threads

CASES = {
    "seed": st.integers(0, 10**6),
    "rows": st.integers(1, 9),
    "width": st.sampled_from((1, 5, 16, 64, 100)),
    "bits": st.integers(2, 8),
    "symmetric": st.booleans(),
    "magnitude": st.floats(-8, 6),
    "dtype": st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    "loops": st.booleans(),
}
SCALE = torch.bfloat16


@pytest.fixture(autouse=True, params=[200, 1 << 19])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Few weights at once, and many: chunks of operators, parts of loops."""
    monkeypatch.setattr(rounding_operators, "CACHED_ELEMENTS", request.param)
    monkeypatch.setattr(threads, "PART", request.param)
    return int(request.param)


def kernels_of(weight: Tensor, *, loops: bool) -> RoundingKernels:
    return rounding_loops if loops and loops_serve(weight.device, weight.dtype) else rounding_operators


def random_groups(seed: int, rows: int, width: int, magnitude: float, dtype: torch.dtype) -> Groups:
    """Anywhere in the course of tuning; the first row of weights is 0."""
    torch.manual_seed(seed)
    weight = (torch.randn(rows, 3 * width, dtype=torch.float64) * 10**magnitude).to(dtype)
    weight[0] = 0
    weight = weight.view(-1, width)
    groups = start(weight, GroupRange.of(weight.to(torch.promote_types(dtype, torch.float32))), SCALE)
    groups.offset.uniform_(-0.5, 0.5)
    groups.alpha.uniform_(0, 1)
    groups.beta.uniform_(0, 1)
    return groups


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_weights_steps_and_results_are_the_formulas(
    seed: int, rows: int, width: int, bits: int, symmetric: bool, magnitude: float, dtype: torch.dtype, loops: bool
) -> None:
    groups = random_groups(seed, rows, width, magnitude, dtype)
    scheme = Scheme(bits=bits, group_size=width, symmetric=symmetric)
    grid = GridSettings.of(scheme, SCALE)
    w_hat, gradient = torch.empty_like(groups.weight), torch.randn_like(groups.weight)
    kernels = kernels_of(groups.weight, loops=loops)
    kernels.write(groups, grid, w_hat=w_hat)
    assert torch.equal(w_hat, plain_rounding.fake_quantized(groups, scheme))
    rate, faults = torch.tensor(0.05, dtype=groups.offset.dtype), torch.zeros(1, dtype=torch.int32)
    expected = signed_step(groups, gradient, rate, scheme, (0.25, 0.75))
    step: dict[str, Any] = {
        "gradient": gradient,
        "rate": rate,
        "faults": faults,
        "limits": (0.25, 0.75),
        "w_hat": w_hat,
    }
    kernels.step(groups, grid, **step)
    assert torch.equal(groups.offset, expected[0])
    assert torch.equal(groups.alpha, expected[1])
    assert torch.equal(groups.beta, expected[2])
    assert torch.equal(w_hat, plain_rounding.fake_quantized(groups, scheme))
    assert int(faults) == 0
    kernels.keep(groups, grid, better=torch.tensor(False))
    assert not groups.codes.any()
    kernels.keep(groups, grid, better=torch.tensor(True))
    zero = 2 ** (bits - 1) if symmetric else groups.zero.double().unsqueeze(-1)
    kept = (groups.codes.double() - zero) * groups.scale.double().unsqueeze(-1)
    assert torch.equal(kept.to(groups.offset.dtype).to(dtype), w_hat)


@pytest.mark.parametrize("kernels", [rounding_operators, rounding_loops])
def test_nan_in_a_gradient_is_counted_and_moves_nothing(kernels: RoundingKernels) -> None:
    groups = random_groups(0, 4, 64, 0.0, torch.bfloat16)
    gradient = torch.randn_like(groups.weight)
    gradient[3, 7] = float("nan")
    before, faults = groups.offset.clone(), torch.zeros(1, dtype=torch.int32)
    limits, w_hat = (0.0, 1.0), torch.empty_like(gradient)
    grid = GridSettings(4, True, SMALLEST_SCALE[SCALE])
    step: dict[str, Any] = {"gradient": gradient, "rate": torch.tensor(0.1), "faults": faults}
    step |= {"limits": limits, "w_hat": w_hat}
    kernels.step(groups, grid, **step)
    assert int(faults) == 1
    assert groups.offset[3, 7] == before[3, 7]
    assert bool((groups.offset[4] != before[4]).any())
    assert not any(tensor.isnan().any() for tensor in (groups.offset, groups.alpha, groups.beta, w_hat))


@settings(max_examples=20, deadline=None)
@given(**CASES)
def test_searched_ranges_have_the_least_error(
    seed: int, rows: int, width: int, bits: int, symmetric: bool, magnitude: float, dtype: torch.dtype, loops: bool
) -> None:
    """To the last bits of a sum; two candidates that close may be taken for each other."""
    weight = random_groups(seed, rows, width, magnitude, dtype).weight
    moments = torch.rand(3, width) * 10
    scheme = Scheme(bits=bits, group_size=width, symmetric=symmetric)
    given_moments = moments.clone()
    kernels = kernels_of(weight, loops=loops)
    found = kernels.search_range(weight, moments, GridSettings.of(scheme, SCALE), SCALE)
    assert torch.equal(moments, given_moments)
    wide = weight.to(torch.promote_types(dtype, torch.float32))
    repeated = moments.to(wide.dtype).repeat(rows, 1)
    best = plain_rounding.search_range(wide, repeated, scheme, SCALE)
    errors = [
        plain_rounding.rounding_error(wide, repeated, ranges, scheme, SCALE) for ranges in (GroupRange(*found), best)
    ]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)
