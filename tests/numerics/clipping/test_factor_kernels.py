"""Kernels of low-rank factors against the formulas in fp64: on a GPU if there is one, else in Triton's interpreter."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from workers.numerics.adamw import AdamW
from workers.numerics.clipping.factor_places import FactorPlaces

kernels = pytest.importorskip("workers.numerics.clipping.factor_kernels")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALIGNED = [(64, 128), (96, 64)], [16, 80]
ODD = [(50, 40), (3, 70), (130, 9)], [5, 3, 9]
RATE, SHARE, DECAY, ALPHA = 0.02, 0.5, 0.1, 16.0
every_kind = pytest.mark.parametrize(("shapes", "ranks"), [ALIGNED, ODD], ids=["aligned", "odd"])


class Problem:
    """Factors, their copies in fp64, and what the kernels need."""

    def __init__(self, shapes: list[tuple[int, int]], ranks: list[int], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shapes, self.ranks = shapes, ranks
        size = sum(rank * (out + columns) for (out, columns), rank in zip(shapes, ranks, strict=True))
        self.weights = sum(out * columns for out, columns in shapes)
        self.factors = torch.randn(size).to(DEVICE)
        self.rounded = self.factors.to(dtype, copy=True)
        self.optimizer = AdamW.of(self.factors)
        self.places = FactorPlaces.of(shapes, ranks, ALPHA, DEVICE)
        self.faults, self.last = torch.zeros(2, dtype=torch.int64, device=DEVICE).unbind()

    def step(self, gradient: Tensor) -> None:
        given = {"gradient": gradient, "rate": torch.tensor(RATE, device=DEVICE), "share": SHARE, "decay": DECAY}
        faults = {"faults": self.faults, "last_fault": self.last}
        kernels.step(self.places, self.factors, self.rounded, self.optimizer, **given, **faults)

    def pairs(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        sizes = [
            rank * size for (out, columns), rank in zip(self.shapes, self.ranks, strict=True) for size in (columns, out)
        ]
        ends = pairwise(accumulate(sizes, initial=0))
        parts = [flat[start:end] for start, end in ends]
        return [
            (a.view(rank, columns), b.view(out, rank))
            for a, b, (out, columns), rank in zip(parts[::2], parts[1::2], self.shapes, self.ranks, strict=True)
        ]

    def split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([out * columns for out, columns in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@every_kind
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16], ids=str)
def test_steps_are_torch_s_adamw_by_the_formulas_in_fp64(
    shapes: list[tuple[int, int]], ranks: list[int], dtype: torch.dtype
) -> None:
    problem = Problem(shapes, ranks, dtype)
    expected = problem.factors.double().requires_grad_()
    optimizer = torch.optim.AdamW([expected], lr=RATE * SHARE, weight_decay=DECAY, eps=1e-15)
    for _ in range(3):
        d = torch.randn(problem.weights).to(DEVICE, dtype)
        by_factors = []
        acting = problem.pairs(problem.rounded.double())
        for (a, b), own, rank in zip(acting, problem.split(d.double()), ranks, strict=True):
            by_factors += [(ALPHA / rank) * part for part in (b.T @ own, own @ a.T)]
        expected.grad = torch.cat([part.flatten() for part in by_factors])
        optimizer.step()
        problem.step(d)
        torch.testing.assert_close(problem.factors.double(), expected.detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(problem.rounded, problem.factors.to(dtype))
    assert int(problem.faults) == 0


@every_kind
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16], ids=str)
def test_products_are_added_in_one_rounding(
    shapes: list[tuple[int, int]], ranks: list[int], dtype: torch.dtype
) -> None:
    problem = Problem(shapes, ranks, dtype)
    before = torch.randn(problem.weights).to(DEVICE, dtype)
    found = before.clone()
    kernels.add_products(problem.places, problem.rounded, found)
    pairs = problem.pairs(problem.rounded.double())
    for own, base, (a, b), rank in zip(problem.split(found), problem.split(before), pairs, ranks, strict=True):
        expected = base.double() + (ALPHA / rank) * (b @ a)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(own.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_step_with_nan_counts_once_however_many_tiles_hold_it() -> None:
    problem = Problem(*ALIGNED, torch.float32)
    d = torch.randn(problem.weights).to(DEVICE)
    problem.step(d)
    before = problem.factors.clone()
    bad = torch.full_like(d, math.nan)
    problem.step(bad)
    assert int(problem.faults) == 1
    assert bool(problem.factors.isfinite().all())
    assert not torch.equal(problem.factors, before), "the mean of earlier gradients and the decay still move them"
    problem.step(d)
    problem.step(bad)
    assert int(problem.faults) == 2


def test_warm_ups_compile_what_jobs_launch() -> None:
    for call in kernels.warm_ups(torch.float16, DEVICE):
        call()
