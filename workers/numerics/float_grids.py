"""Quantization to the schemes of floating-point elements: scales from groups' largest magnitudes, codes to nearest.

With a the largest magnitude of a group (of columns, or of a block of rows and columns) and M the largest value of the
element (448 for e4m3, 6 for e2m1):

    float scales    s = a / M, rounded to the formats' dtype
    e4m3 scales     G = 448 * 6 / max a over the tensor;  stored = e4m3(G * a / 6);  s = stored / G       (NVFP4)
    e8m0 scales     s = 2^e, e = floor(log2 a) - log2 of M's power of two, one more where a / 2^floor(log2 a) >= 1.75
    w_hat = s * E(w / s)

E rounds to the element (`workers.numerics.float_elements`). The rule for exponents is that of compressed-tensors
0.20: maxima of up to 7/8 of the next power of two are clipped rather than the resolution halved.
"""

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import WHOLE, NamedScheme, ScaleType
from workers.numerics.affine import SMALLEST_SCALE
from workers.numerics.float_elements import LARGEST, encode
from workers.numerics.quantized import FloatWeight

E4M3_MAX, E2M1_MAX = 448.0, 6.0
SMALLEST_E4M3 = 2.0**-9


def band_rows(row: NamedScheme, rows: int) -> int:
    """Rows that share a scale, of a weight with so many."""
    return rows if row.rows == WHOLE else row.rows


def group_amax(weight: Tensor, scheme: Scheme) -> Tensor:
    """Largest magnitude of every group or block of a weight (out, in), fp32 (bands, groups)."""
    assert scheme.row is not None  # noqa: S101 - for the type checker
    rows, columns = weight.shape
    band, width = band_rows(scheme.row, rows), scheme.width(columns)
    padded = torch.nn.functional.pad(weight.abs().float(), (0, -columns % width, 0, -rows % band))
    return padded.view(padded.shape[0] // band, band, -1, width).amax((1, 3))


def global_scale_of(amax: Tensor) -> Tensor:
    """G = 448 * 6 / amax, fp32 (1,), of the largest magnitude of a tensor, or of all that a runtime joins."""
    return (E4M3_MAX * E2M1_MAX / amax.float().clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1e30).reshape(1)


def exponents(amax: Tensor, row: NamedScheme) -> Tensor:
    """E8M0 exponents plus 127 of groups' largest magnitudes, uint8."""
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    up = (mantissa >= 0.875).int()
    largest = 2 if LARGEST[row.element] == E2M1_MAX else 8
    stored = torch.where(amax > 0, exponent - 1 + up - largest + 127, torch.zeros_like(exponent))
    return stored.clamp(0, 254).to(torch.uint8)


@torch.no_grad()
def quantize(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, global_amax: Tensor | None = None
) -> FloatWeight:
    """Round a weight (out, in) of any float dtype to a scheme of a floating-point element.

    global_amax   largest magnitude of all linears that a runtime joins with this one; None: of this one alone
    """
    row = scheme.row
    assert row is not None  # noqa: S101 - for the type checker
    amax = group_amax(weight, scheme)
    divisor = None
    if row.scale is ScaleType.E8M0:
        scale = exponents(amax, row)
    elif row.scale is ScaleType.E4M3:
        divisor = global_scale_of(amax.max() if global_amax is None else global_amax)
        scale = (amax / E2M1_MAX * divisor).clamp(SMALLEST_E4M3, E4M3_MAX).to(torch.float8_e4m3fn)
    else:
        scale = (amax / LARGEST[row.element]).clamp(min=SMALLEST_SCALE[scale_dtype]).to(scale_dtype)
    return encoded(
        weight, FloatWeight(weight.new_empty(weight.shape, dtype=torch.uint8), scale, scheme, weight.dtype, divisor)
    )


def encoded(weight: Tensor, grid: FloatWeight) -> FloatWeight:
    """The weight (out, in) rounded to nearest with the scales of `grid`, whose codes do not matter."""
    row = grid.scheme.row
    assert row is not None  # noqa: S101 - for the type checker
    factor = grid.row_factor().repeat_interleave(grid.group_size, 1)[:, : weight.shape[1]]
    codes = encode(weight.float() / factor, row.element)
    return FloatWeight(codes, grid.scale, grid.scheme, weight.dtype, grid.global_scale, grid.input_amax)
