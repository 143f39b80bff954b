"""Low-rank factors against the exact decomposition, plain and weighted."""

import pytest
import torch
from torch import Tensor

from workers.numerics.factorization import low_rank_factors, randomized_svd


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """With singular values that fall slowly, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, 48, generator=generator, dtype=torch.float64) for size in (rows, columns))
    return (a * torch.linspace(3, 0.1, 48, dtype=torch.float64)) @ b.T / 48


def test_the_randomized_decomposition_is_nearly_the_exact_one_and_repeats() -> None:
    a = matrix(96, 128)
    u, s, v = randomized_svd(a, 8, seed=3)
    exact = torch.linalg.svdvals(a)
    assert s == pytest.approx(exact[:8], rel=5e-3)
    assert (a - u * s @ v).norm() == pytest.approx(float(exact[8:].norm()), rel=1e-3)
    assert all(torch.equal(x, y) for x, y in zip((u, s, v), randomized_svd(a, 8, seed=3), strict=True))


def test_weighted_factors_are_the_optimum_where_the_weights_are_of_rank_one() -> None:
    """Against Eckart and Young on the scaled matrix, and against a descent that knows all of F."""
    a, generator = matrix(40, 24), torch.Generator().manual_seed(1)
    rows, columns = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.05 for size in a.shape)
    left, right = low_rank_factors(a, 5, 0, rows, columns)
    error = float((rows[:, None] * (a - left @ right) * columns).norm())
    optimum = float(torch.linalg.svdvals(rows[:, None] * a * columns)[5:].norm())
    assert error == pytest.approx(optimum, rel=1e-6)
    plain = list(low_rank_factors(a, 5, 0))
    assert error < 0.98 * float((rows[:, None] * (a - plain[0] @ plain[1]) * columns).norm())
    assert error <= float(alternating(a, rows.outer(columns).square(), 5)) * (1 + 1e-6)


def alternating(a: Tensor, weights: Tensor, rank: int) -> Tensor:
    """|| sqrt(F) (A - L1 L2) || by alternating weighted least squares, each row and column solved for itself."""
    right = torch.randn(rank, a.shape[1], generator=torch.Generator().manual_seed(2), dtype=a.dtype)
    for _ in range(60):
        left = torch.stack([solve(right.T, row, w) for row, w in zip(a, weights, strict=True)])
        right = torch.stack([solve(left, column, w) for column, w in zip(a.T, weights.T, strict=True)]).T
    error: Tensor = (weights.sqrt() * (a - left @ right)).norm()
    return error


def solve(basis: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    root = weights.sqrt()
    found: Tensor = torch.linalg.lstsq(basis * root[:, None], values * root).solution
    return found


def test_rows_without_weight_and_ranks_beyond_the_matrix_stay_finite() -> None:
    a = matrix(12, 20)
    rows, columns = torch.ones(12, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    rows[3], columns[5] = 0, 0
    left, right = low_rank_factors(a, 16, 0, rows, columns)
    assert left.shape == (12, 16)
    assert right.shape == (16, 20)
    assert left.isfinite().all()
    assert (left @ right)[:3, :5] == pytest.approx(a[:3, :5], abs=1e-8)
