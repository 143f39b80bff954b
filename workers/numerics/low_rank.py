"""The best approximation of a matrix by one of low rank, plain or weighted by rows and columns, as two factors.

    E ~ L R,    L = U sqrt(S)  (out, rank),   R = sqrt(S) V^T  (rank, in),   U S V^T the leading part of E's SVD

Exact for the smaller side N <= 2,048: the eigenvectors of E E^T (or E^T E) in fp64, which cost N^2 * max(out, in) while
a full SVD costs about twenty times as much; S_i = ||u_i^T E|| avoids square roots of eigenvalues. A singular value
below 1e-8 of the largest is noise in that.

Larger matrices: randomized subspace iteration (Halko, Martinsson & Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1) with
32 directions besides the rank and 4 passes; seeded, the same on every device. Residuals of quantization have
singular values that fall slowly, the hard case: on the residual of NF3 its norm was 0.3% above the least one.

Weighted (LQ-LoRA, Guo et al., arXiv:2311.12023, section 3.3): for weights F ~ u v^T of rank one, with
D_r = diag(sqrt(u)) and D_c = diag(sqrt(v)),

    min || sqrt(F) * (E - L R) ||_F  =  min || D_r E D_c - (D_r L)(R D_c) ||_F

so that the factors of D_r E D_c, taken back by D_r^-1 and D_c^-1, are exact where F is of rank one.

Matrices that change a little from one to the next (`FollowedFactors`): an orthogonal iteration from the last one's
leading directions, one pass E E^T U each, in place of a decomposition. For a fixed E a pass never raises the error,
since tr(U^T E E^T U) never falls.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EXACT_UP_TO = 2048
OVERSAMPLED = 32
PASSES = 4
FOLLOWED_BESIDES = 8
"""Directions besides the rank that are followed from one matrix to the next."""
SMALLEST_WEIGHT = 1e-6
"""Least weight, as a share of the largest: rows and columns without any weight would be divided by 0."""


@torch.no_grad()
def best_factors(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """L (out, k) and R (k, in) for k = min(rank, out, in), in the dtype of `matrix` (out, in), fp32 or fp64."""
    return _on_wide(matrix, lambda wide: _factors(_directions(wide, min(rank, len(wide)), seed), wide))


@torch.no_grad()
def weighted_factors(matrix: Tensor, rank: int, rows: Tensor, columns: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Best factors with the weights sqrt(u) = `rows` (out,) and sqrt(v) = `columns` (in,), none negative, not all 0."""
    by_row, by_column = _divisors(rows, columns)
    left, right = best_factors(by_row * matrix * by_column, rank, seed)
    return left / by_row, right / by_column


class FollowedFactors:
    """Weighted factors of one matrix after another, each near the last; the first are those of `weighted_factors`.

    The last matrix's leading directions are kept, (smaller side, rank + `FOLLOWED_BESIDES`), orthonormal.
    """

    def __init__(self, rank: int, rows: Tensor, columns: Tensor, seed: int = 0) -> None:
        self._rank, self._seed = rank, seed
        self._by_row, self._by_column = _divisors(rows, columns)
        self._directions: Tensor | None = None

    @torch.no_grad()
    def of(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """L (out, k) and R (k, in) for k = min(rank, out, in), nearly the best ones."""
        left, right = _on_wide(self._by_row * matrix * self._by_column, self._follow)
        return left / self._by_row, right / self._by_column

    def _follow(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        count = min(self._rank + FOLLOWED_BESIDES, len(wide))
        if self._directions is None or count == len(wide):
            self._directions = _directions(wide, count, self._seed).to(wide.dtype)
        else:
            self._directions = _sorted(torch.linalg.qr(wide @ (wide.T @ self._directions)).Q, wide)
        return _factors(self._directions[:, : self._rank], wide)


def _on_wide(matrix: Tensor, factors: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The factors of a matrix by a function of one that is no taller than wide."""
    if matrix.shape[0] <= matrix.shape[1]:
        return factors(matrix)
    right, left = factors(matrix.T)
    return left.T, right.T


def _divisors(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """D_r (out, 1) and D_c (in,), without zeros."""
    by_row = rows.clamp(min=SMALLEST_WEIGHT * float(rows.max())).unsqueeze(1)
    return by_row, columns.clamp(min=SMALLEST_WEIGHT * float(columns.max()))


def _directions(matrix: Tensor, count: int, seed: int) -> Tensor:
    """Left singular vectors (out, count), the leading first, of a matrix that is no taller than wide."""
    if len(matrix) > EXACT_UP_TO:
        return _leading_directions(matrix, count, seed)
    wide = matrix.double()
    directions: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -count:].flip(1)
    return directions


def _factors(u: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U sqrt(S) and sqrt(S) V^T in the dtype of `matrix`, from U, which has the dtype of small computations."""
    projected = u.T @ matrix.to(u.dtype)
    root = torch.linalg.vector_norm(projected, dim=1).sqrt()
    # A direction with a singular value of 0 gets zeros on both sides.
    inverse = torch.where(root > 0, 1 / root, 0)
    return (u * root).to(matrix.dtype), (projected * inverse.unsqueeze(1)).to(matrix.dtype)


def _leading_directions(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Approximate left singular vectors (out, rank), orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    columns = min(rank + OVERSAMPLED, len(matrix))
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(PASSES):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return _sorted(basis, matrix)[:, :rank]


def _sorted(basis: Tensor, matrix: Tensor) -> Tensor:
    """The singular directions of the matrix within the space of `basis`, the leading first."""
    small = (basis.T @ matrix).double()
    turned: Tensor = basis @ torch.linalg.eigh(small @ small.T).eigenvectors.flip(1).to(matrix.dtype)
    return turned
