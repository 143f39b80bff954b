"""The Triton kernels against the same in torch's operators: on a GPU if there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.domain.methods import Scheme
from tests.numerics import plain_rounding
from workers.methods.sign_round import RoundedWeights, signed_step
from workers.numerics.affine import GroupRange
from workers.numerics.backends.rounding import rounding_operators
from workers.numerics.backends.rounding.rounding_operators import GridSettings

kernels = pytest.importorskip("workers.numerics.backends.rounding.rounding_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (1, 5, 16, 32, 48, 64, 100, 128)


class ByKernels:
    """`RoundedWeights` whose every pass is a kernel's."""

    def __init__(self, weights: RoundedWeights) -> None:
        self._of = weights
        self._settings = weights._settings
        self.faults = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def write(self, out: Tensor) -> None:
        kernels.write(self._of.state, self._settings, w_hat=out)

    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        given = {"gradient": gradient, "rate": rate, "faults": self.faults, "limits": (0.0, 1.0), "w_hat": out}
        kernels.step(self._of.state, self._settings, **given)

    def keep(self, better: Tensor) -> None:
        kernels.keep(self._of.state, self._settings, better=better)


def pair(
    seed: int, rows: int, width: int, bits: int, symmetric: bool, magnitude: float, dtype: torch.dtype
) -> tuple[RoundedWeights, RoundedWeights, ByKernels]:
    torch.manual_seed(seed)
    weight = (torch.randn(rows, width * 3) * 10**magnitude).to(dtype).to(DEVICE)
    weight[0] = 0
    scheme = Scheme(bits=bits, group_size=width, symmetric=symmetric)
    eager, other = (RoundedWeights({"w": weight}, scheme, width, torch.bfloat16) for _ in range(2))
    eager._kernels = rounding_operators  # also on a GPU
    return eager, other, ByKernels(other)


CASES = {
    "seed": st.integers(0, 10**6),
    "rows": st.integers(1, 9),
    "width": st.sampled_from(WIDTHS),
    "bits": st.integers(2, 8),
    "symmetric": st.booleans(),
    "magnitude": st.floats(-8, 6),
    "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
}


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(**CASES)
def test_weights_and_kept_results_equal_the_reference(
    seed: int, rows: int, width: int, bits: int, symmetric: bool, magnitude: float, dtype: torch.dtype
) -> None:
    eager, other, fused = pair(seed, rows, width, bits, symmetric, magnitude, dtype)
    for weights in (eager, other):
        torch.manual_seed(seed + 1)
        weights.state.offset.uniform_(-0.5, 0.5)
        weights.state.alpha.uniform_(0, 1)
        weights.state.beta.uniform_(0, 1)
    hats = [torch.full_like(eager.state.weight, float("nan")) for _ in range(2)]
    yes = torch.tensor(True, device=DEVICE)
    eager.write(hats[0])
    eager.keep(yes)
    fused.write(hats[1])
    fused.keep(yes)
    assert torch.equal(*hats)
    for ours, theirs in zip(eager.results().values(), other.results().values(), strict=True):
        assert torch.equal(ours.affine.codes, theirs.affine.codes)
        assert torch.equal(ours.affine.scale, theirs.affine.scale)
        assert (ours.affine.zero_point is None) == symmetric
        if ours.affine.zero_point is not None and theirs.affine.zero_point is not None:
            assert torch.equal(ours.affine.zero_point, theirs.affine.zero_point)


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(**CASES)
def test_steps_equal_the_reference(
    seed: int, rows: int, width: int, bits: int, symmetric: bool, magnitude: float, dtype: torch.dtype
) -> None:
    """To the bit, but where the gradient of alpha or beta is so near 0 that the order of a sum decides its sign."""
    eager, other, fused = pair(seed, rows, width, bits, symmetric, magnitude, dtype)
    hats = [torch.full_like(eager.state.weight, torch.nan) for _ in range(2)]
    for count in range(3):
        gradient = torch.randn_like(eager.state.weight)
        rate = torch.tensor(0.05 / (count + 1), device=DEVICE)
        plain = signed_step(other.state, gradient, rate, eager._scheme, (0.0, 1.0))
        eager.step(gradient, rate, hats[0])
        fused.step(gradient, rate, hats[1])
        near = (eager.state.alpha != other.state.alpha) | (eager.state.beta != other.state.beta)
        assert int(near.sum()) <= 1 + len(near) // 50
        for name, stepped in zip(("offset", "alpha", "beta"), plain, strict=True):
            ours, theirs = getattr(eager.state, name), getattr(other.state, name)
            assert torch.equal(ours[~near], theirs[~near])
            assert torch.equal(stepped[~near], theirs[~near])
            theirs.copy_(ours)
        assert torch.equal(hats[0][~near], hats[1][~near])
    assert int(fused.faults) == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_offsets_counted_in_sixteen_bits_take_the_same_steps(symmetric: bool) -> None:
    steps, rate = 9, 0.1
    _, other, fused = pair(3, 6, 32, 3, symmetric, 0.0, torch.float32)
    _, counted, fused_counted = pair(3, 6, 32, 3, symmetric, 0.0, torch.float32)
    unit = kernels.offset_unit(steps, rate)
    assert unit is not None
    zeros = torch.zeros_like(counted.state.offset, dtype=torch.int16)
    counted.state = replace(counted.state, offset=zeros, unit=unit)
    hats = [torch.empty_like(other.state.weight) for _ in range(2)]
    for step in range(steps):
        gradient = torch.randn_like(other.state.weight)
        now = torch.tensor(rate * (1 - step / steps), device=DEVICE)
        fused.step(gradient, now, hats[0])
        fused_counted.step(gradient, now, hats[1])
    assert int(counted.state.offset.abs().max()) > steps
    torch.testing.assert_close(counted.state.offset * unit, other.state.offset, rtol=0, atol=1e-6)
    assert float((hats[0] == hats[1]).float().mean()) > 0.99


def test_what_sixteen_bits_cannot_count_is_not_counted() -> None:
    assert kernels.offset_unit(255, 1.0) == 1 / 255
    assert kernels.offset_unit(256, 1.0) is None
    assert kernels.offset_unit(0, 1.0) is None


def test_nothing_is_kept_unless_better() -> None:
    _, other, fused = pair(0, 4, 32, 4, False, 0.0, torch.float32)
    fused.keep(torch.tensor(False, device=DEVICE))
    assert not other.state.codes.any()
    fused.keep(torch.tensor(True, device=DEVICE))
    assert other.state.codes.any()


def test_nan_in_a_gradient_is_counted_and_moves_nothing() -> None:
    _, other, fused = pair(0, 4, 32, 4, True, 0.0, torch.float32)
    gradient = torch.randn_like(other.state.weight)
    gradient[3, 7] = float("nan")
    fused.step(gradient, torch.tensor(0.1, device=DEVICE), torch.empty_like(gradient))
    assert int(fused.faults) == 1
    assert float(other.state.offset[3, 7]) == 0.0
    assert bool((other.state.offset[4] != 0).any())
    assert not other.state.offset.isnan().any()


@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(**CASES)
def test_searched_ranges_equal_the_reference(
    seed: int, rows: int, width: int, bits: int, symmetric: bool, magnitude: float, dtype: torch.dtype
) -> None:
    """As good to the last bits of a sum; two candidates that close may be taken for each other."""
    torch.manual_seed(seed)
    weight = (torch.randn(rows, width * 2) * 10**magnitude).to(dtype).to(DEVICE)
    moments = torch.rand(2, width, device=DEVICE) * 10
    scheme = Scheme(bits=bits, group_size=width, symmetric=symmetric)
    groups = weight.view(-1, width)
    repeated = moments.repeat(rows, 1)
    eager = plain_rounding.search_range(groups.float(), repeated, scheme, torch.bfloat16)
    low, high = kernels.search_range(groups, moments, GridSettings.of(scheme, torch.bfloat16), torch.bfloat16)
    errors = [
        plain_rounding.rounding_error(groups.float(), repeated, ranges, scheme, torch.bfloat16)
        for ranges in (eager, GroupRange(low, high), GroupRange.of(groups.float()))
    ]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-4, atol=0)
    assert bool((errors[0] <= errors[2] * (1 + 1e-5)).all())


@pytest.mark.parametrize("counted", [True, False])
def test_warm_ups_launch_every_kernel(counted: bool) -> None:
    """The output of a launch shows that it ran; that no kernel is compiled later is seen on a GPU (test_cuda)."""
    dtypes, grid = (torch.bfloat16, torch.bfloat16), GridSettings(4, True, 1e-10)
    calls = kernels.warm_ups(96, 32, grid, dtypes=dtypes, counted=counted, device=torch.device(DEVICE))
    assert len(calls) == 4
    low, high = [call() for call in calls][-1]
    assert low.shape == high.shape == (48,)
