"""The best approximations of matrices by ones of low rank, plain or weighted by rows and columns, as two factors.

    E ~ L R,    L = U sqrt(S)  (out, rank),   R = sqrt(S) V^T  (rank, in),   U S V^T the leading part of E's SVD

Matrices of one shape are computed as one batch (.., out, in). Below, E has no more rows n than columns; else it is
transposed.

Exact for n <= 256: the eigenvectors of E E^T in fp64; S_i = ||u_i^T E|| avoids square roots of eigenvalues. A singular
value below 1e-8 of the largest is noise in that.

Larger matrices: subspace iteration from random directions (Halko, Martinsson & Tropp, arXiv:0909.4061, algorithm 4.4)
with k = rank + 16 of them, in which powers of G = E E^T are replaced by Chebyshev polynomials of it (Saad,
doi:10.1007/BF01396221; Zhou, Saad, Tiago & Chelikowsky, doi:10.1016/j.jcp.2006.03.017): quantization leaves singular
values that fall slowly, of which powers tell the last wanted one from the first unwanted one badly. A round:

    theta, U     Ritz values and vectors of G in the space at hand (theirs of algorithm 5.3), theta_k the least one
    locked       u_i with theta_i >= 4 theta_k and ||G u_i - theta_i u_i|| <= theta_k/10: they stay as they are
    U_j+1        = 2 (2 G'/theta_k - 1) U_j - U_j-1,    U_1 = (2 G'/theta_k - 1) U_0       G': G beside the locked ones
    degree       most j <= 12 for which T_j of the largest Ritz value that is not locked stays below 1e6
    space        U_degree and the locked ones, orthonormal by two Cholesky factors of their products in fp64, the second
                 one within the Ritz values' own problem

Values up to theta_k stay within [-1, 1] while larger ones grow by T_j, so that a direction x theta_k gains
(x + sqrt(x^2 - x))^(2j) / 2 on them: at x = 1.1 and degree 6 a factor of 20 where powers have 1.8. Three rounds of new
matrices, one of matrices near the last ones (`FollowedFactors`); seeded, the same on every device. What is k wide on
both sides is solved on the host, in fp64: there an eigenvalue problem of 80 takes a quarter of the time that a GPU's
library needs for it, which solves those of a batch one after another.

Error, against the least one by fp64 eigenvectors, measured on what 2, 3 and 4 bits leave of SmolLM2-135M's linears at
rank 64: within 3e-5 after three rounds, within 1e-4 of the next iterates; of 400 x 960 random matrices with a column of
a thousand times the others' size, within 1e-5.

Weighted (LQ-LoRA, Guo et al., arXiv:2311.12023, section 3.3): for weights F ~ u v^T of rank one, with
D_r = diag(sqrt(u)) and D_c = diag(sqrt(v)),

    min || sqrt(F) * (E - L R) ||_F  =  min || D_r E D_c - (D_r L)(R D_c) ||_F

so that the factors of D_r E D_c, taken back by D_r^-1 and D_c^-1, are exact where F is of rank one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import acosh

import torch
from torch import Tensor

EXACT_UP_TO = 256
BESIDES, FOLLOWED_BESIDES = 16, 8
"""Directions besides the rank: of rounds, and of passes."""
ROUNDS = 3
"""Of new matrices; of followed ones there is one."""
MOST_DEGREE = 12
GROWTH = 1e6
"""Of a direction within a round at most: what single precision still tells apart from it."""
LOCKED_FROM, LOCKED_RESIDUAL = 4.0, 0.1
"""Ritz value and residual of a locked direction, by the least Ritz value."""
SMALLEST_WEIGHT = 1e-6
"""Least weight, as a share of the largest: rows and columns without any weight would be divided by 0."""


@torch.no_grad()
def best_factors(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """L (.., out, k) and R (.., k, in), k = min(rank, out, in), in the dtype of `matrix` (.., out, in): fp32, fp64."""
    return _on_wide(matrix, lambda wide: _factors(_leading(wide, rank, seed)[..., : min(rank, wide.shape[-2])], wide))


@torch.no_grad()
def weighted_factors(matrix: Tensor, rank: int, rows: Tensor, columns: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Best factors with the weights sqrt(u) = `rows` (.., out) and sqrt(v) = `columns` (.., in), none negative, not all
    0."""
    by_row, by_column = _divisors(rows, columns)
    left, right = best_factors(by_row * matrix * by_column, rank, seed)
    return left / by_row, right / by_column


class FollowedFactors:
    """Weighted factors of one batch of matrices after another, each near the last.

    The first are those of `weighted_factors`; the leading directions of the last ones are kept, orthonormal.

    rounds      of the first batch: one leaves up to 2e-3 of its error, which the next ones make up for
    by_powers   whether a following batch takes one pass E E^T U instead of a round: less work, and enough where the
                wanted singular values stand out, as of W - Q while Q is made of W - L R
    """

    def __init__(
        self,
        rank: int,
        rows: Tensor,
        columns: Tensor,
        seed: int = 0,
        *,
        rounds: int = ROUNDS,
        by_powers: bool = False,
    ) -> None:
        self._rank, self._seed, self._rounds, self._by_powers = rank, seed, rounds, by_powers
        self._by_row, self._by_column = _divisors(rows, columns)
        self._directions: Tensor | None = None

    @torch.no_grad()
    def of(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """L (.., out, k) and R (.., k, in), k = min(rank, out, in), nearly the best ones of `matrix` (.., out, in)."""
        left, right = _on_wide(self._by_row * matrix * self._by_column, self._follow)
        return left / self._by_row, right / self._by_column

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with some matrices of the batch alone."""
        index = torch.tensor(places, dtype=torch.int64, device=self._by_row.device)
        self._by_row, self._by_column = self._by_row[index], self._by_column[index]
        self._directions = None if self._directions is None else self._directions[index]

    def _follow(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        if self._directions is None or _is_exact(wide, self._rank):
            self._directions = _leading(wide, self._rank, self._seed, self._rounds)
        elif self._by_powers:
            leading = self._directions[..., : self._rank + FOLLOWED_BESIDES]
            self._directions = _sorted(_images(wide, leading), wide)
        else:
            self._directions = _round(wide, _Ritz.near(self._directions, wide)).vectors
        return _factors(self._directions[..., : min(self._rank, wide.shape[-2])], wide)


def _on_wide(matrix: Tensor, factors: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The factors of matrices by a function of ones that are no taller than wide."""
    if matrix.shape[-2] <= matrix.shape[-1]:
        return factors(matrix)
    right, left = factors(matrix.mT)
    return left.mT, right.mT


def _divisors(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """D_r (.., out, 1) and D_c (.., 1, in), without zeros."""
    by_row, by_column = (sides.clamp(min=SMALLEST_WEIGHT * sides.amax(-1, keepdim=True)) for sides in (rows, columns))
    return by_row.unsqueeze(-1), by_column.unsqueeze(-2)


def _factors(u: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U sqrt(S) and sqrt(S) V^T in the dtype of `matrix`; U is in it too, or wider where the matrix is small."""
    u = u if matrix.shape[-2] <= EXACT_UP_TO else u.to(matrix.dtype)
    projected = u.mT @ matrix.to(u.dtype)
    root = torch.linalg.vector_norm(projected, dim=-1).sqrt()
    # A direction with a singular value of 0 gets zeros on both sides.
    inverse = torch.where(root > 0, 1 / root, 0)
    return (u * root.unsqueeze(-2)).to(matrix.dtype), (projected * inverse.unsqueeze(-1)).to(matrix.dtype)


def _is_exact(wide: Tensor, rank: int) -> bool:
    return wide.shape[-2] <= max(EXACT_UP_TO, rank + BESIDES)


def _leading(wide: Tensor, rank: int, seed: int, rounds: int = ROUNDS) -> Tensor:
    """Left singular vectors (.., n, k), fp64, the leading first, at least as many as the rank where there are."""
    if _is_exact(wide, rank):
        wide = wide.double()
        vectors: Tensor = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -rank:].flip(-1)
        return vectors
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(wide.shape[-1], rank + BESIDES, generator=generator).to(wide)
    found = _Ritz.within(_images(wide, _conditioned(wide @ start)), wide)
    for _ in range(rounds):
        found = _round(wide, found)
    return found.vectors


def _images(wide: Tensor, directions: Tensor) -> Tensor:
    """E E^T times directions (.., n, k), in the dtype of E."""
    return wide @ (wide.mT @ directions.to(wide.dtype))


@dataclass(frozen=True)
class _Ritz:
    """The Rayleigh-Ritz approximation of the eigenvectors of G = E E^T within a space of k directions, fp64.

    vectors   (.., n, k), orthonormal, the leading first
    values    (.., k)
    images    G times the vectors
    """

    vectors: Tensor
    values: Tensor
    images: Tensor

    @classmethod
    def within(cls, directions: Tensor, wide: Tensor) -> "_Ritz":
        """Of the space of directions (.., n, k)."""
        basis = _conditioned(directions)
        images = _images(wide, basis).double()
        values, turn = _ritz_values(basis.mT @ basis, basis.mT @ images)
        return cls(basis @ turn, values, images @ turn)

    @classmethod
    def near(cls, vectors: Tensor, wide: Tensor) -> "_Ritz":
        """Those of a matrix near this one, with their quotients by this one: nearly its own, and no decomposition."""
        images = _images(wide, vectors).double()
        return cls(vectors, (vectors * images).sum(-2), images)


def _round(wide: Tensor, last: _Ritz) -> _Ritz:
    """One round of the module docstring."""
    least = torch.maximum(
        last.values.amin(-1, keepdim=True), torch.finfo(wide.dtype).eps * last.values.amax(-1, keepdim=True)
    )
    least = torch.where(least > 0, least, 1)  # of a matrix of zeros
    residuals = torch.linalg.vector_norm(last.images - last.vectors * last.values.unsqueeze(-2), dim=-2)
    locked = (last.values >= LOCKED_FROM * least) & (residuals <= LOCKED_RESIDUAL * least)
    largest = torch.where(locked, 0, last.values).amax(-1, keepdim=True)
    growth = (2 * largest / least - 1).clamp(min=1 + 1e-9)
    degrees = (acosh(GROWTH) / growth.acosh()).floor().clamp(1, MOST_DEGREE).unsqueeze(-1)
    held, free = locked.unsqueeze(-2), ~locked.unsqueeze(-2)
    kept, kept_images = ((x * held).to(wide.dtype) for x in (last.vectors, last.images * (2 / least).unsqueeze(-1)))
    scaled = wide * (2 / least).sqrt().unsqueeze(-1).to(wide.dtype)
    before = (last.vectors * free).to(wide.dtype)
    by_scaled = (last.images * free * (2 / least).unsqueeze(-1)).to(wide.dtype)
    now = by_scaled - kept @ (kept_images.mT @ before) - before
    lowest, highest = (int(x) for x in torch.stack([degrees.min(), degrees.max()]).tolist())
    for degree in range(2, highest + 1):
        images = scaled @ (scaled.mT @ now) - kept @ (kept_images.mT @ now)
        after = torch.sub(2 * (images - now), before)
        if degree > lowest:
            goes_on = degrees >= degree
            before, now = torch.where(goes_on, now, before), torch.where(goes_on, after, now)
        else:
            before, now = now, after
    return _Ritz.within(now + kept, wide)


def _sorted(directions: Tensor, wide: Tensor) -> Tensor:
    """The Ritz vectors of E E^T within the space of directions (.., n, k), fp64, the leading first."""
    basis = _conditioned(directions)
    small = (basis.to(wide.dtype).mT @ wide).double()
    vectors: Tensor = basis @ _ritz_values(basis.mT @ basis, small @ small.mT)[1]
    return vectors


def _conditioned(directions: Tensor) -> Tensor:
    """A basis of the space of directions (.., n, k), fp64, orthonormal but for what one Cholesky factor leaves."""
    basis: Tensor = directions.double()
    basis = basis / torch.linalg.vector_norm(basis, dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    products = basis.mT @ basis
    turned: Tensor = basis @ _inverse_root(products.cpu()).mT.to(basis.device)
    return turned


def _ritz_values(products: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values (.., k), the largest first, and the Ritz vectors' coordinates (.., k, k) in a basis V.

    products    V^T V, fp64                projected   V^T G V
    """
    inverse, small = _inverse_root(products.cpu()), projected.cpu()
    values, turn = torch.linalg.eigh(inverse @ ((small + small.mT) / 2) @ inverse.mT)
    return values.flip(-1).to(products.device), (inverse.mT @ turn.flip(-1)).to(products.device)


def _inverse_root(products: Tensor) -> Tensor:
    """L^-1 of products L L^T of directions (.., k, k).

    What is added to their diagonal keeps it positive where directions depend on each other.
    """
    products.diagonal(dim1=-2, dim2=-1).add_(1e-14 * products.shape[-1])
    root = torch.linalg.cholesky_ex(products).L
    identity = torch.eye(products.shape[-1], dtype=products.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)
    return inverse
