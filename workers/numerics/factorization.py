"""Low-rank factors by a randomized singular value decomposition, plain or weighted by rows and columns.

Randomized (Halko, Martinsson and Tropp, arXiv:0909.4061): with Omega (n, R + p) Gaussian, the range of A Omega,
sharpened by power iterations, holds almost all of A's best approximation of rank R; the SVD of the small projection
gives it.

Weighted (LQ-LoRA, arXiv:2311.12023, section 3.3): for weights F ~ u v^T of rank one, with D_r = diag(sqrt(u)) and
D_c = diag(sqrt(v)),

    min || sqrt(F) * (A - L1 L2) ||_F  =  min || D_r A D_c - (D_r L1)(L2 D_c) ||_F
    D_r A D_c ~ U S V^T        L1 = D_r^-1 U sqrt(S)        L2 = sqrt(S) V^T D_c^-1

which is exact where F is of rank one.
"""

import torch
from torch import Tensor

OVERSAMPLING = 10
POWER_ITERATIONS = 2
SMALLEST_WEIGHT = 1e-6
"""Of the largest: rows and columns without any weight would be divided by 0."""


def low_rank_factors(
    matrix: Tensor, rank: int, seed: int, rows: Tensor | None = None, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L1 (out, rank) and L2 (rank, in) whose product is nearest to a matrix (out, in), fp32 or fp64.

    rows, columns   sqrt(u) (out,) and sqrt(v) (in,), at least 0; None: all are 1
    A rank above both dimensions' gives zeros behind what there is.
    """
    left = torch.ones_like(matrix[:, 0]) if rows is None else rows.clamp(min=SMALLEST_WEIGHT * float(rows.max()))
    right = torch.ones_like(matrix[0]) if columns is None else columns.clamp(min=SMALLEST_WEIGHT * float(columns.max()))
    u, s, v = randomized_svd(left[:, None] * matrix * right, rank, seed)
    root = s.sqrt()
    missing = rank - len(s)
    first = torch.nn.functional.pad(u * root / left[:, None], (0, missing))
    return first, torch.nn.functional.pad(root[:, None] * v / right, (0, 0, 0, missing))


def randomized_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, R), S (R,) and V^T (R, n) of a matrix (m, n); R at most the smaller dimension, and exact close to it."""
    width = rank + OVERSAMPLING
    if width >= min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    # Drawn on the host, so that devices agree.
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ omega).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], v[:rank]
