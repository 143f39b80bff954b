"""Weights as functions of their scales alone: the product, and the gradient of the scales.

With q the codes, z the zero points and s the scale of a group of G columns:

    w_hat = s*(q - z)                 in fp32, rounded once: the bits of `AffineWeight.dequantize`
    dL/ds = sum_group D*(q - z)       D = dL/dw_hat

Both read codes as they are stored, one byte each, and need no copy of the weight in fp32. Of floating-point codes the
values L, which fit into e4m3, take the place of q - z.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from workers.numerics.backend import scale_kernels

CACHED_ELEMENTS = 131_072
"""Elements of a chunk on a CPU: a few fp32 tensors of this size fit the second-level cache."""
CHUNK_ELEMENTS = CACHED_ELEMENTS << 8


def dequantize_groups(codes: Tensor, scale: Tensor, zero: Tensor | int, out: Tensor) -> None:
    """Writes scale*(codes - zero) to `out`.

    codes (groups, G) uint8; scale (groups,) fp32 or fp64; zero (groups,) uint8, or one number for all; out (groups, G).
    """
    kernels = scale_kernels(out.device, out.dtype)
    if kernels is not None:
        kernels.dequantize(codes, scale, zero, out)
        return
    for rows in _chunks(codes):
        out[rows] = _steps(codes[rows], _of(zero, rows), torch.float32).mul_(scale[rows].float().unsqueeze(-1))


def add_scale_gradient(gradient: Tensor, codes: Tensor, zero: Tensor | int, out: Tensor) -> None:
    """Adds each group's sum of gradient*(codes - zero) to `out` (groups,), fp32 or fp64; gradient (groups, G)."""
    kernels = scale_kernels(gradient.device, gradient.dtype)
    if kernels is not None:
        kernels.add_scale_gradient(gradient, codes, zero, out)
        return
    for rows in _chunks(codes):
        out[rows] += _steps(codes[rows], _of(zero, rows), out.dtype).mul_(gradient[rows]).sum(-1)


def dequantize_levels(levels: Tensor, scale: Tensor, out: Tensor) -> None:
    """Writes scale*levels to `out`: levels (groups, G) e4m3; scale (groups,) fp32; out (groups, G)."""
    for rows in _chunks(levels):
        out[rows] = levels[rows].float().mul_(scale[rows].unsqueeze(-1))


def add_level_gradient(gradient: Tensor, levels: Tensor, out: Tensor) -> None:
    """Adds each group's sum of gradient*levels to `out` (groups,), fp32 or fp64; gradient (groups, G)."""
    for rows in _chunks(levels):
        out[rows] += levels[rows].to(out.dtype).mul_(gradient[rows]).sum(-1)


def _steps(codes: Tensor, zero: Tensor | int, dtype: torch.dtype) -> Tensor:
    """q - z"""
    return codes.to(dtype).sub_(zero if isinstance(zero, int) else zero.to(dtype).unsqueeze(-1))


def _of(zero: Tensor | int, rows: slice) -> Tensor | int:
    return zero if isinstance(zero, int) else zero[rows]


def _chunks(codes: Tensor) -> Iterator[slice]:
    size = max(1, (CHUNK_ELEMENTS if codes.is_cuda else CACHED_ELEMENTS) // codes.shape[1])
    return (slice(start, start + size) for start in range(0, len(codes), size))
