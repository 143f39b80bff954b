"""Best factors against the full SVD in fp64, which is the optimum (Eckart and Young)."""

import pytest
import torch
from torch import Tensor

from workers.numerics import low_rank
from workers.numerics.low_rank import FollowedFactors, best_factors, weighted_factors


def matrix(rows: int, columns: int) -> Tensor:
    """Singular values that fall slowly, as those of what quantization leaves."""
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rest(e: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    left, right = factors
    return float((e - left @ right).norm())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_small_matrices_get_the_optimum(shape: tuple[int, int]) -> None:
    e = matrix(*shape)
    u, s, v = torch.linalg.svd(e, full_matrices=False)
    for rank in (1, 7, 24):
        left, right = best_factors(e, rank)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert torch.allclose(left @ right, best, atol=1e-10)
        assert torch.allclose(left.norm(dim=0), right.norm(dim=1)), "the singular values are shared"
        assert torch.allclose(left.norm(dim=0).square(), s[:rank])


def test_single_precision_loses_no_more_than_its_rounding() -> None:
    e = matrix(40, 64)
    exact, single = rest(e, best_factors(e, 8)), rest(e, tuple(f.double() for f in best_factors(e.float(), 8)))  # type: ignore[arg-type]
    assert single == pytest.approx(exact, rel=1e-6)


def test_a_rank_above_the_smaller_side_is_cut_to_it_and_leaves_nothing() -> None:
    left, right = best_factors(matrix(6, 20), 64)
    assert left.shape == (6, 6)
    assert torch.allclose(left @ right, matrix(6, 20))


def test_where_nothing_is_left_factors_are_zero_and_finite() -> None:
    e = matrix(16, 3) @ matrix(3, 20)
    for e_, most in ((torch.zeros(4, 6), 0.0), (e, 1e-6)):
        left, right = best_factors(e_, 5)
        assert left.isfinite().all()
        assert right.isfinite().all()
        assert rest(e_, (left, right)) <= most


def test_large_matrices_come_near_the_optimum_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    e = matrix(96, 160)
    optimum = rest(e, best_factors(e, 16))
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 32)
    found = best_factors(e, 16, seed=3)
    assert optimum < rest(e, found) < (1 + 1e-4) * optimum
    assert all(torch.equal(a, b) for a, b in zip(found, best_factors(e, 16, seed=3), strict=True))
    left, right = best_factors(e.T.contiguous(), 16, seed=3)
    assert left.shape == (160, 16)
    assert rest(e.T, (left, right)) < (1 + 1e-4) * optimum


def test_weighted_factors_are_the_optimum_where_the_weights_are_of_rank_one() -> None:
    """Against Eckart and Young on the scaled matrix, and against a descent that knows all of F."""
    e, generator = matrix(40, 24), torch.Generator().manual_seed(1)
    rows, columns = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.05 for size in e.shape)
    left, right = weighted_factors(e, 5, rows, columns)
    error = float((rows[:, None] * (e - left @ right) * columns).norm())
    optimum = float(torch.linalg.svdvals(rows[:, None] * e * columns)[5:].norm())
    assert error == pytest.approx(optimum, rel=1e-6)
    plain = best_factors(e, 5)
    assert error < 0.98 * float((rows[:, None] * (e - plain[0] @ plain[1]) * columns).norm())
    assert error <= alternating(e, rows.outer(columns).square(), 5) * (1 + 1e-6)


def alternating(e: Tensor, weights: Tensor, rank: int) -> float:
    """|| sqrt(F) (E - L R) || by alternating weighted least squares, each row and column solved for itself."""
    right = torch.randn(rank, e.shape[1], generator=torch.Generator().manual_seed(2), dtype=e.dtype)
    for _ in range(60):
        left = torch.stack([solve(right.T, row, w) for row, w in zip(e, weights, strict=True)])
        right = torch.stack([solve(left, column, w) for column, w in zip(e.T, weights.T, strict=True)]).T
    return float((weights.sqrt() * (e - left @ right)).norm())


def solve(basis: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    root = weights.sqrt()
    found: Tensor = torch.linalg.lstsq(basis * root[:, None], values * root).solution
    return found


def test_rows_and_columns_without_weight_stay_finite() -> None:
    e = matrix(12, 20)
    rows, columns = torch.ones(12, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    rows[3], columns[5] = 0, 0
    left, right = weighted_factors(e, 12, rows, columns)
    assert left.isfinite().all()
    assert right.isfinite().all()
    assert (left @ right)[:3, :5] == pytest.approx(e[:3, :5], abs=1e-8)


@pytest.mark.parametrize("shape", [(120, 160), (160, 120)])
@pytest.mark.parametrize(("weighted", "by_powers"), [(False, False), (True, False), (True, True)])
def test_followed_factors_begin_as_new_ones_and_come_to_the_optimum_of_a_matrix_that_stays(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, *, weighted: bool, by_powers: bool
) -> None:
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 32)
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rows, columns = (torch.rand(2, n, generator=generator, dtype=torch.float64) + 0.1 for n in shape)
    if not weighted:
        rows, columns = torch.ones_like(rows), torch.ones_like(columns)
    follow = FollowedFactors(6, rows, columns, by_powers=by_powers)
    left, right = follow.of(first)
    torch.testing.assert_close(left @ right, torch.matmul(*weighted_factors(first, 6, rows, columns)))
    optimum = torch.linalg.svdvals(rows[..., None] * second * columns[:, None])[:, 6:].norm(dim=-1)
    above = []
    for _ in range(60 if by_powers else 8):
        left, right = follow.of(second)
        error = (rows[..., None] * (second - left @ right) * columns[:, None]).norm(dim=(-2, -1))
        above.append(float((error / optimum).max()) - 1)
    assert above[0] > 1e-9, "one round is not enough for another matrix"
    assert -1e-12 < above[-1] < (1e-6 if by_powers else 1e-10)
    follow.keep([1])
    alone = torch.matmul(*follow.of(second[1:]))
    torch.testing.assert_close(alone[0], (left @ right)[1], rtol=1e-6, atol=1e-6)


def test_a_batch_has_the_factors_of_each_of_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one has a direction of a thousand times the others' size, of another rank or of zeros."""
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 32)
    e = torch.stack([matrix(96, 160) for _ in range(4)])
    e[1, :, 3] *= 1000
    e[2] = matrix(96, 5) @ matrix(5, 160)
    e[3] = 0
    left, right = best_factors(e, 8, seed=2)
    for found, one in zip(left @ right, e, strict=True):
        optimum = float(torch.linalg.svdvals(one)[8:].norm())
        assert rest(one, best_factors(one, 8, seed=2)) == pytest.approx(float((one - found).norm()), rel=1e-3, abs=1e-5)
        assert float((one - found).norm()) <= optimum * (1 + 1e-3) + 1e-5 * float(one.norm())


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["flat", "falling", "steep", "outliers"])
def test_factors_of_large_matrices_are_within_a_ten_thousandth_of_the_optimum(spectrum: str) -> None:
    """Of matrices in fp32 against the singular values in fp64, at the sizes of real linears."""
    generator = torch.Generator().manual_seed(7)
    e = torch.randn(576, 1536, generator=generator)
    steps = torch.arange(1, 577) / 64
    e *= {"flat": torch.ones(576), "falling": 1 / steps, "steep": (-steps).exp(), "outliers": torch.ones(576)}[
        spectrum
    ][:, None]
    if spectrum == "outliers":
        e[:, [5, 700]] *= 1000
    optimum = float(torch.linalg.svdvals(e.double())[64:].norm())
    left, right = best_factors(e, 64)
    assert rest(e.double(), (left.double(), right.double())) <= optimum * (1 + 1e-4)


def test_where_all_directions_are_followed_factors_are_exact() -> None:
    ones = torch.ones(10), torch.ones(12)
    follow = FollowedFactors(4, *ones)
    for seed in range(3):
        matrix = torch.randn(10, 12, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(torch.matmul(*follow.of(matrix)), torch.matmul(*weighted_factors(matrix, 4, *ones)))


def test_another_seed_draws_other_directions_of_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 32)
    e, ones = matrix(96, 160), (torch.ones(96, dtype=torch.float64), torch.ones(160, dtype=torch.float64))
    for factors in (
        lambda seed: best_factors(e, 8, seed),
        lambda seed: weighted_factors(e, 8, *ones, seed),
        lambda seed: FollowedFactors(8, *ones, seed).of(e),
    ):
        first, again, other = (torch.matmul(*factors(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_single_precision_keeps_singular_values_a_millionth_of_the_largest() -> None:
    """Squares of them are lost in fp32 sums: the decomposition has to be wider than what it decomposes."""
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(n, 20, generator=generator, dtype=torch.float64)).Q for n in (20, 48))
    e = ((u * torch.logspace(0, -6, 20, dtype=torch.float64)) @ v.T).float()
    for found, exact in ((e, e.double()), (e.T.contiguous(), e.T.double())):
        left, right = best_factors(found, 20)
        s = torch.linalg.svdvals(exact)
        assert (left.double().norm(dim=0).square() / s).tolist() == pytest.approx([1.0] * 20, rel=1e-3)
        assert (right.double().norm(dim=1).square() / s).tolist() == pytest.approx([1.0] * 20, rel=1e-3)


def test_a_row_s_weight_counts_at_least_a_millionth_of_the_largest() -> None:
    e = matrix(12, 20)
    rows, columns = torch.ones(12, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    rows[3], columns[5] = 0, 0
    floored = rows.clamp(min=1e-6), columns.clamp(min=1e-6)
    for got, wanted in zip(weighted_factors(e, 4, rows, columns), weighted_factors(e, 4, *floored), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    other = weighted_factors(e, 4, rows.clamp(min=1e-3), columns.clamp(min=1e-3))
    assert not torch.allclose(torch.matmul(*weighted_factors(e, 4, rows, columns)), torch.matmul(*other))


def test_sizes_of_the_decompositions_are_those_that_were_measured() -> None:
    sizes = (low_rank.EXACT_UP_TO, low_rank.BESIDES, low_rank.FOLLOWED_BESIDES, low_rank.ROUNDS, low_rank.MOST_DEGREE)
    assert sizes == (256, 16, 8, 3, 12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_s_factors_are_as_near_the_optimum_and_repeat() -> None:
    """Of a batch, new and followed, twice bit for bit."""
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(3, 1536, 576, generator=generator) * torch.linspace(0.2, 3, 576)
    second = first + 0.1 * torch.randn(3, 1536, 576, generator=generator)
    optima = [torch.linalg.svdvals(e.double())[:, 64:].norm(dim=-1) for e in (first, second)]
    runs = []
    for _ in range(2):
        rows, columns = torch.ones(3, 1536, device="cuda"), torch.ones(3, 576, device="cuda")
        follow = FollowedFactors(64, rows, columns, seed=4)
        runs.append([torch.matmul(*follow.of(e.cuda())).cpu() for e in (first, second)])
    for e, optimum, product, again in zip((first, second), optima, *runs, strict=True):
        assert torch.equal(product, again)
        assert ((e - product).double().norm(dim=(-2, -1)) <= optimum * (1 + 1e-4)).all()
