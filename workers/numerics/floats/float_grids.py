"""Quantization to the schemes of floating-point elements: scales from groups' largest magnitudes, codes to nearest.

With a the largest magnitude of a group (of columns, or of a block of rows and columns) and M the largest value of the
element (448 for e4m3, 6 for e2m1):

    float scales    s = a / M, rounded to the formats' dtype
    e4m3 scales     G = 448 * 6 / max a over the tensor;  stored = e4m3(G * a / 6);  s = stored / G       (NVFP4)
    e8m0 scales     s = 2^e, e = floor(log2 a) - log2 of M's power of two, one more where a / 2^floor(log2 a) >= 1.75
    w_hat = s * E(w / s)

E rounds to the element (`workers.numerics.floats.elements`). The rule for exponents is that of compressed-tensors
0.20: maxima of up to 7/8 of the next power of two are clipped rather than the resolution halved.

`searched` takes, of the scales that can be stored near those, the one with the least weighted squared error of each
group: 13 codes of e4m3 around the usual one (factors of about 0.7 to 2: more than that gains nothing, and 1.5 is "four
over six", arXiv:2512.02010), or the two exponents that a maximum lies between. Scales of FP8 and INT8 stay: a search
buys nothing there.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import WHOLE, Element, NamedScheme, ScaleType
from workers.numerics.affine import SMALLEST_SCALE
from workers.numerics.floats.elements import LARGEST, encode, rounded
from workers.numerics.quantized import FloatWeight
from workers.numerics.row_parts import CACHED, row_parts

E4M3_MAX, E2M1_MAX = 448.0, 6.0
SMALLEST_E4M3 = 2.0**-9
CODES_TRIED = (0, -4, -3, -2, -1, *range(1, 9))
"""Distances from the usual scale's code, that one first: it stays where another is no better."""
LARGEST_CODE = 126

Cost = Callable[[Tensor], Tensor]
"""Errors of some rows' groups (rows, groups, G) -> the cost of each (rows, groups)."""


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


def exponents(amax: Tensor, element: Element) -> Tensor:
    """E8M0 exponents plus 127 of groups' largest magnitudes, uint8."""
    mantissa, _ = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    return (floor_exponents(amax, element).int() + (mantissa >= 0.875)).clamp(0, 254).to(torch.uint8)


def floor_exponents(amax: Tensor, element: Element) -> Tensor:
    """The same by floor alone, as the specification has it."""
    _, exponent = torch.frexp(amax)
    largest = 2 if LARGEST[element] == E2M1_MAX else 8
    stored = torch.where(amax > 0, exponent - 1 - largest + 127, torch.zeros_like(exponent))
    return stored.clamp(0, 254).to(torch.uint8)


@torch.no_grad()
def quantize(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, global_amax: Tensor | None = None
) -> FloatWeight:
    """Round a weight (out, in) of any float dtype to a scheme of a floating-point element.

    global_amax   largest magnitude of all linears that a runtime joins with this one; None: of this one alone
    """
    return encoded(weight, usual_grid(weight, scheme, scale_dtype, global_amax))


def usual_grid(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, global_amax: Tensor | None = None
) -> FloatWeight:
    """The scales of the module docstring's formulas, with codes that do not matter yet."""
    row = scheme.row
    assert row is not None  # noqa: S101 - for the type checker
    amax = group_amax(weight, scheme)
    divisor = None
    if row.scale is ScaleType.E8M0:
        scale = exponents(amax, row.element)
    elif row.scale is ScaleType.E4M3:
        divisor = global_scale_of(amax.max() if global_amax is None else global_amax)
        scale = (amax / E2M1_MAX * divisor).clamp(SMALLEST_E4M3, E4M3_MAX).to(torch.float8_e4m3fn)
    else:
        if row.rows == WHOLE and global_amax is not None:
            amax = global_amax.float().view(1, 1)
        scale = (amax / LARGEST[row.element]).clamp(min=SMALLEST_SCALE[scale_dtype]).to(scale_dtype)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    return FloatWeight(codes, scale, scheme, weight.dtype, divisor)


@torch.no_grad()
def searched(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    global_amax: Tensor | None = None,
    second_moments: Tensor | None = None,
    cost: Cost | None = None,
) -> FloatWeight:
    """The same with the best of the scales near the usual ones, and codes to nearest.

    second_moments   of the input columns, (in,), which weigh squared errors; None: all count alike
    cost             of groups' errors in their place
    """
    return encoded(weight, searched_grid(weight, scheme, scale_dtype, global_amax, second_moments, cost))


@torch.no_grad()
def searched_grid(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    global_amax: Tensor | None = None,
    second_moments: Tensor | None = None,
    cost: Cost | None = None,
) -> FloatWeight:
    """The scales of `searched`, with codes that do not matter yet."""
    grid, row = usual_grid(weight, scheme, scale_dtype, global_amax), scheme.row
    assert row is not None  # noqa: S101 - for the type checker
    if row.scale is ScaleType.FLOAT:
        return grid
    width = grid.group_size
    cost = cost or _square_cost(second_moments, width)
    amax, scale = group_amax(weight, scheme), torch.empty_like(grid.scale.view(torch.uint8))
    for rows in row_parts(weight.shape[0], weight.shape[1], weight.device, CACHED):
        groups = weight[rows].to(torch.promote_types(weight.dtype, torch.float32)).view(-1, amax.shape[1], width)
        best = least = None
        for stored in _stored_candidates(grid.scale[rows], amax[rows], row):
            factor = factor_of(stored, grid.global_scale).to(groups.dtype).unsqueeze(-1)
            total = cost((rounded(groups / factor, row.element) * factor).sub_(groups))
            if best is None or least is None:
                best, least = stored.clone(), total
            else:
                better = total < least
                least, best = torch.where(better, total, least), torch.where(better, stored, best)
        if best is not None:
            scale[rows] = best
    found = scale if row.scale is ScaleType.E8M0 else scale.view(torch.float8_e4m3fn)
    return FloatWeight(grid.codes, found, scheme, weight.dtype, grid.global_scale)


def factor_of(stored: Tensor, global_scale: Tensor | None) -> Tensor:
    """Factors, fp32, of stored scales as bytes: of e4m3 beside a global scale, or exponents plus 127."""
    if global_scale is None:
        return torch.exp2(stored.float() - 127)
    return stored.view(torch.float8_e4m3fn).float() / global_scale


def _square_cost(second_moments: Tensor | None, width: int) -> Cost:
    weights = None if second_moments is None else second_moments.view(-1, width)

    def cost(error: Tensor) -> Tensor:
        squares = error.square()
        return squares.sum(-1) if weights is None else (squares * weights.to(squares.dtype)).sum(-1)

    return cost


def _stored_candidates(usual: Tensor, amax: Tensor, row: NamedScheme) -> Iterator[Tensor]:
    """Bytes of stored scales to try, the usual ones first."""
    if row.scale is ScaleType.E8M0:
        lower = floor_exponents(amax, row.element)
        yield usual
        yield torch.where(usual == lower, (lower.int() + 1).clamp(max=254).to(torch.uint8), lower)
        return
    code = usual.contiguous().view(torch.uint8).int()
    for distance in CODES_TRIED:
        yield (code + distance).clamp(1, LARGEST_CODE).to(torch.uint8)


def encoded(weight: Tensor, grid: FloatWeight) -> FloatWeight:
    """The weight (out, in) rounded to nearest with the scales of `grid`, whose codes do not matter."""
    row = grid.scheme.row
    assert row is not None  # noqa: S101 - for the type checker
    factor = grid.row_factor().repeat_interleave(grid.group_size, 1)[:, : weight.shape[1]]
    codes = encode(weight.float() / factor, row.element)
    return FloatWeight(codes, grid.scale, grid.scheme, weight.dtype, grid.global_scale, grid.input_amax)
