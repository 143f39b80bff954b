"""Triton kernels of the fake quantizer: one pass over a block's weights in place of twenty in eager code.

`round_weights` computes, for every group of G columns (formulas: `workers.methods.sign_round`), any of

    STEP   V, alpha, beta moved by the signs of their gradients for D = dL/dw_hat
    WRITE  w_hat of the (new) parameters
    KEEP   codes, scale and zero point stored where a flag on the device says so

in fp32, reading each weight once. Bytes per weight for STEP and WRITE together, bf16 weights: w 2, V 4 + 4, D 2,
w_hat 2. Divisions and roundings are those of IEEE (nearest, ties to even), so that codes equal the eager reference's;
sums over a group may differ in the last bits, which can flip the sign of a gradient next to zero. A NaN in D changes
nothing and is counted, since comparisons would hide it.

V may be counted in 16 bits: with T steps and lr_t = lr*(1 - t/T) every step is a whole multiple of lr/T, and V of at
most T*(T + 1)/2 of them (`offset_unit`). That is exact where a sum in fp32 rounds, and saves 4 of the 14 bytes.

The interpreter runs the same code on a CPU (TRITON_INTERPRET=1); there the tests compare it with the reference.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.numerics.affine import ASYMMETRIC_FACTORS, SMALLEST_FACTOR, SYMMETRIC_FACTORS
from workers.numerics.backends.rounding.rounding_operators import GridSettings, Groups

PROGRAM_ELEMENTS = 1024
"""Weights that a program handles; at least one group. Eight per thread: more take so many registers that too few
programs run at once to hide the memory's latency."""

TO_NEAREST = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds an fp32 below 2^22 to the nearest integer, ties to even."""

LARGEST_COUNT = 2**15 - 1

STORED = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def offset_unit(steps: int, learning_rate: float) -> float | None:
    """Unit of which V is a multiple after `steps` steps of a rate that decays to 0; None if 16 bits cannot count it."""
    return learning_rate / steps if 0 < steps * (steps + 1) // 2 <= LARGEST_COUNT else None


def write(groups: Groups, settings: GridSettings, w_hat: Tensor) -> None:
    """Writes w_hat of the present parameters."""
    _launch(groups, settings, w_hat=w_hat)


def step(
    groups: Groups,
    settings: GridSettings,
    *,
    gradient: Tensor,
    rate: Tensor,
    faults: Tensor,
    limits: tuple[float, float],
    w_hat: Tensor,
) -> None:
    """Updates V, alpha and beta, the latter within `limits`; writes w_hat of the new parameters.

    Adds the number of groups with NaN gradients to `faults`.
    """
    _launch(groups, settings, gradient=gradient, rate=rate, faults=faults, limits=limits, w_hat=w_hat)


def keep(groups: Groups, settings: GridSettings, better: Tensor) -> None:
    """Stores the present result in codes, scale and zero, if `better`."""
    _launch(groups, settings, better=better)


def search_range(
    weight: Tensor, second_moments: Tensor, settings: GridSettings, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`workers.numerics.backends.rounding.rounding_operators.search_range` in one pass: low and high, fp32 (groups,).

    weight           (groups, G), contiguous
    second_moments   fp32 (columns // G, G), of the linear's input columns; its rows of groups repeat in this order
    """
    count, width = weight.shape
    low, high = (torch.empty(count, dtype=torch.float32, device=weight.device) for _ in range(2))
    programs, sizes = _programs(count, width)
    _search_range[programs](
        weight,
        second_moments,
        low,
        high,
        count,
        width,
        len(second_moments),
        settings.smallest,
        BITS=settings.bits,
        SYMMETRIC=settings.symmetric,
        STORED_AS=STORED[scale_dtype],
        FACTORS=SYMMETRIC_FACTORS if settings.symmetric else ASYMMETRIC_FACTORS,
        SHRINK=1 - SMALLEST_FACTOR,
        **sizes,
    )
    return low, high


def warm_ups(
    columns: int,
    width: int,
    settings: GridSettings,
    *,
    dtypes: tuple[torch.dtype, torch.dtype],
    counted: bool,
    device: torch.device,
) -> list[Callable[[], object]]:
    """A launch of each kernel on a few rows, which compiles the kernels for a linear of so many columns.

    dtypes   of weights and of stored scales      counted   whether V is in 16 bits
    """
    weight = torch.ones(16 * columns // width, width, dtype=dtypes[0], device=device)
    one, codes = torch.ones(len(weight), device=device), torch.zeros_like(weight, dtype=torch.uint8)
    offset = torch.zeros_like(weight, dtype=torch.int16 if counted else torch.float32)
    groups = Groups(weight, offset, -one, one, one, one.clone(), codes, one.to(dtypes[1]), codes[:, 0].contiguous())
    second_moments = torch.ones(columns // width, width, device=device)
    better, faults = torch.ones((), dtype=torch.bool, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    return [
        partial(write, groups, settings, torch.empty_like(weight)),
        partial(
            step,
            groups,
            settings,
            gradient=weight,
            rate=one[0],
            faults=faults,
            limits=(0.5, 1.5),
            w_hat=torch.empty_like(weight),
        ),
        partial(keep, groups, settings, better),
        partial(search_range, weight, second_moments, settings, dtypes[1]),
    ]


def _programs(count: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """A launch grid over `count` groups, and the number and padded width of the groups of a program."""
    padded = triton.next_power_of_2(width)
    rows = max(1, PROGRAM_ELEMENTS // padded)
    warps = min(16, max(4, padded // 256))
    return (triton.cdiv(count, rows),), {"ROWS": rows, "WIDTH": padded, "num_warps": warps}


def _launch(
    groups: Groups,
    settings: GridSettings,
    *,
    w_hat: Tensor | None = None,
    gradient: Tensor | None = None,
    rate: Tensor | None = None,
    faults: Tensor | None = None,
    better: Tensor | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    count, width = groups.weight.shape
    programs, sizes = _programs(count, width)
    unused = groups.weight
    _round_weights[programs](
        groups.weight,
        groups.offset,
        groups.low,
        groups.high,
        groups.alpha,
        groups.beta,
        groups.codes,
        groups.scale,
        groups.zero,
        unused if w_hat is None else w_hat,
        unused if gradient is None else gradient,
        unused if rate is None else rate,
        unused if faults is None else faults,
        unused if better is None else better,
        count,
        width,
        settings.smallest,
        groups.unit,
        *limits,
        BITS=settings.bits,
        SYMMETRIC=settings.symmetric,
        STORED_AS=STORED[groups.scale.dtype],
        STEP=gradient is not None,
        WRITE=w_hat is not None,
        KEEP=better is not None,
        **sizes,
    )


@triton.jit
def _sign(x):  # type: ignore[no-untyped-def]
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _stored(x, STORED_AS: tl.constexpr):  # type: ignore[no-untyped-def]
    """An fp32 rounded to STORED_AS, as fp32; by its bits for bf16, which the interpreter truncates."""
    if tl.bfloat16 == STORED_AS:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        x = x.to(STORED_AS).to(tl.float32)
    return x


@triton.jit
def _grid(low, high, alpha, beta, smallest, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STORED_AS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale, rounded as it is stored, and zero point (0 where symmetric)."""
    low, high = low * alpha, high * beta
    if SYMMETRIC:
        scale = tl.where(-low > high, -low, -high) / (2.0 ** (BITS - 1))
        scale = tl.where(scale < 0, tl.minimum(scale, -smallest), tl.maximum(scale, smallest))
        scale = _stored(scale, STORED_AS)
        zero = scale * 0.0
    else:
        scale = tl.maximum(tl.div_rn(high - low, low * 0.0 + (2.0**BITS - 1)), smallest)
        scale = _stored(scale, STORED_AS)
        zero = (tl.div_rn(-low, scale) + TO_NEAREST) - TO_NEAREST
        zero = tl.minimum(tl.maximum(zero, 0.0), 2.0**BITS - 1)
    return scale, zero


@triton.jit
def _codes(weight, offset, scale, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """q before and after clamping, in the grid's own range."""
    lowest = -(2.0 ** (BITS - 1)) if SYMMETRIC else 0.0
    highest = 2.0 ** (BITS - 1) - 1 if SYMMETRIC else 2.0**BITS - 1
    unclamped = tl.div_rn(weight, scale[:, None] + weight * 0.0) + offset
    unclamped = tl.minimum(tl.maximum(unclamped, -4194304.0), 4194303.0)
    unclamped = ((unclamped + TO_NEAREST) - TO_NEAREST) + zero[:, None]
    return unclamped, tl.minimum(tl.maximum(unclamped, lowest), highest)


@triton.jit
def _round_weights(  # type: ignore[no-untyped-def]
    WEIGHT,
    OFFSET,
    LOW,
    HIGH,
    ALPHA,
    BETA,
    CODES,
    SCALE,
    ZERO,
    HAT,
    GRADIENT,
    RATE,
    FAULTS,
    BETTER,
    count,
    width,
    smallest,
    unit,
    least,
    most,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED_AS: tl.constexpr,
    STEP: tl.constexpr,
    WRITE: tl.constexpr,
    KEEP: tl.constexpr,
):
    if KEEP and tl.load(BETTER) == 0:
        return
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real_row = row < count
    real = real_row[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    weight = tl.load(WEIGHT + at, mask=real, other=0.0).to(tl.float32)
    counted = tl.load(OFFSET + at, mask=real, other=0).to(tl.float32)
    offset = counted * unit
    low = tl.load(LOW + row, mask=real_row, other=-1.0)
    high = tl.load(HIGH + row, mask=real_row, other=1.0)
    alpha = tl.load(ALPHA + row, mask=real_row, other=1.0)
    beta = tl.load(BETA + row, mask=real_row, other=1.0)
    scale, zero = _grid(low, high, alpha, beta, smallest, BITS, SYMMETRIC, STORED_AS)
    unclamped, codes = _codes(weight, offset, scale, zero, BITS, SYMMETRIC)
    if STEP:
        rate = tl.load(RATE)
        d = tl.load(GRADIENT + at, mask=real, other=0.0).to(tl.float32)
        d_inside = tl.where(unclamped == codes, d, 0.0)
        steps = codes - zero[:, None]
        d_scale = tl.sum(d * steps, 1) - tl.div_rn(tl.sum(d_inside * weight, 1), scale)
        if SYMMETRIC:
            low_wins = beta * high < -alpha * low
            lowest = -(2.0 ** (BITS - 1))
            d_alpha = d_scale * tl.where(low_wins, low / lowest, 0.0)
            d_beta = d_scale * tl.where(low_wins, 0.0, high / lowest)
        else:
            d_zero = -scale * (tl.sum(d, 1) - tl.sum(d_inside, 1))
            d_scale += d_zero * alpha * low / (scale * scale)
            d_alpha = -d_zero * low / scale - d_scale * low / (2.0**BITS - 1)
            d_beta = d_scale * high / (2.0**BITS - 1)
        number = tl.sum((d_scale != d_scale).to(tl.int32), 0)  # noqa: PLR0124 - NaN alone differs
        if number > 0:  # thousands of programs that add nothing to one number wait for one another
            tl.atomic_add(FAULTS, number)
        moves = rate
        if OFFSET.dtype.element_ty == tl.int16:
            moves = (rate / unit + TO_NEAREST) - TO_NEAREST
        counted -= moves * _sign(d_inside * scale[:, None])
        offset = counted * unit
        alpha = tl.minimum(tl.maximum(alpha - rate * _sign(d_alpha), least), most)
        beta = tl.minimum(tl.maximum(beta - rate * _sign(d_beta), least), most)
        tl.store(OFFSET + at, counted.to(OFFSET.dtype.element_ty), mask=real)
        tl.store(ALPHA + row, alpha, mask=real_row)
        tl.store(BETA + row, beta, mask=real_row)
        scale, zero = _grid(low, high, alpha, beta, smallest, BITS, SYMMETRIC, STORED_AS)
        unclamped, codes = _codes(weight, offset, scale, zero, BITS, SYMMETRIC)
    if WRITE:
        w_hat = _stored((codes - zero[:, None]) * scale[:, None], HAT.dtype.element_ty)
        tl.store(HAT + at, w_hat.to(HAT.dtype.element_ty), mask=real)
    if KEEP:
        lowest = -(2.0 ** (BITS - 1)) if SYMMETRIC else 0.0
        tl.store(CODES + at, (codes - lowest).to(tl.uint8), mask=real)
        tl.store(SCALE + row, scale.to(STORED_AS), mask=real_row)
        tl.store(ZERO + row, zero.to(tl.uint8), mask=real_row)


@triton.jit
def _search_range(  # type: ignore[no-untyped-def]
    WEIGHT,
    MOMENTS,
    LOW,
    HIGH,
    count,
    width,
    groups_a_row,
    smallest,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED_AS: tl.constexpr,
    FACTORS: tl.constexpr,
    SHRINK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real_row = row < count
    real = real_row[:, None] & (column < width)[None, :]
    weight = tl.load(WEIGHT + row[:, None] * width + column[None, :], mask=real, other=0.0).to(tl.float32)
    moment_row = (row % groups_a_row)[:, None] * width
    second_moments = tl.load(MOMENTS + moment_row + column[None, :], mask=real, other=0.0)
    full_low = tl.minimum(tl.min(weight, 1), 0.0)
    full_high = tl.maximum(tl.max(weight, 1), 0.0)
    best_low, best_high = full_low, full_high
    least = full_low * 0.0 + float("inf")
    one = full_low * 0.0 + 1.0
    low_wins = full_high < -full_low
    widest = tl.maximum(-full_low, full_high)
    tries = 2 * FACTORS if SYMMETRIC else FACTORS * FACTORS
    for i in range(tries):
        if SYMMETRIC:
            reach = widest * (1 - SHRINK * (i // 2) / (FACTORS - 1))
            by_low = low_wins == (i % 2 == 0)
            low = tl.where(by_low, -reach, 0.0)
            high = tl.where(by_low, 0.0, reach)
        else:
            low = full_low * (1 - SHRINK * (i // FACTORS) / (FACTORS - 1))
            high = full_high * (1 - SHRINK * (i % FACTORS) / (FACTORS - 1))
        scale, zero = _grid(low, high, one, one, smallest, BITS, SYMMETRIC, STORED_AS)
        _free, codes = _codes(weight, weight * 0.0, scale, zero, BITS, SYMMETRIC)
        error = (codes - zero[:, None]) * scale[:, None] - weight
        total = tl.sum(error * error * second_moments, 1)
        better = total < least
        least = tl.where(better, total, least)
        best_low = tl.where(better, low, best_low)
        best_high = tl.where(better, high, best_high)
    tl.store(LOW + row, best_low, mask=real_row)
    tl.store(HIGH + row, best_high, mask=real_row)
