"""Rounding a whole matrix to nearest with searched scales: embeddings and heads, which no method tunes.

Of each group's range the full one and shrunk ones are tried, of either sign where it is symmetric, and the one with the
least error is taken, columns weighted by the second moments of what the matrix multiplies:

    least over ranges of  sum_j m_j (w_hat_j - w_j)^2         m = 1 where nothing is known of the inputs

A row of an embedding is looked up, not multiplied: its error is that of its numbers, so m = 1. Schemes of
floating-point elements have the scales of `workers.numerics.floats.float_grids`, and llama.cpp's types are searched by
`workers.numerics.blocks.search`, with the same m.
"""

import torch
from torch import Tensor

from app.domain.methods import Form, Scheme
from workers.numerics.affine import GroupRange, affine_grid, affine_weight, grouped, round_to_grid
from workers.numerics.backend import rounding_kernels
from workers.numerics.backends.rounding.rounding_operators import GridSettings
from workers.numerics.blocks.search import search_blocks
from workers.numerics.floats import float_grids
from workers.numerics.quantized import AffineWeight, QuantizedWeight

PART = 1 << 24
"""Elements that are searched at once: some tensors of them in fp32 are held."""


@torch.no_grad()
def quantize_matrix(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor | None = None
) -> QuantizedWeight:
    """A matrix (out, in) of any float dtype in `scheme`, whose groups divide its columns.

    moments   m, fp32 (in,)
    """
    if scheme.form is Form.FLOAT:
        return float_grids.quantize(weight, scheme, scale_dtype)
    if scheme.form is Form.BLOCKS:
        return search_blocks(weight, scheme, moments)
    weights = torch.ones(weight.shape[1], device=weight.device) if moments is None else moments.float()
    rows = max(1, PART // weight.shape[1])
    parts = [_rounded(part, scheme, scale_dtype, weights) for part in torch.split(weight, rows)]
    codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return AffineWeight(codes, scale, torch.cat(zeros) if zeros else None, scheme, weight.dtype)


def _rounded(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor) -> AffineWeight:
    width, kernels = scheme.width(weight.shape[1]), rounding_kernels(weight.device, weight.dtype)
    groups, settings = weight.reshape(-1, width).contiguous(), GridSettings.of(scheme, scale_dtype)
    low, high = kernels.search_range(groups, moments.view(-1, width), settings, scale_dtype)
    shape = (weight.shape[0], -1)
    grid = affine_grid(GroupRange(low.view(shape), high.view(shape)), scheme, scale_dtype)
    codes, _ = round_to_grid(grouped(weight.to(low.dtype), scheme.group_size), grid)
    return affine_weight(codes, grid, scheme, scale_dtype, weight.dtype)
