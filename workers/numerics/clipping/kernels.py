"""Triton kernels of clipped groups: two passes over a block's weights in place of thirty in eager code.

For every group of G columns (formulas: `workers.numerics.clipping.clipped_groups`), in fp32, a pass makes any of

    SLOPE  dL/ds of the present scale for D = dL/dw_hat, and the step counted
    WRITE  w_hat of the present logits
    KEEP   codes, scale and zero point stored where a flag on the device says so

and a step is SLOPE, then both logits of each group moved by AdamW (`workers.numerics.adamw`), then WRITE. AdamW's step
is a kernel of its own, of a thread a group: beside the weights every thread of a group would repeat what there is to
do once, more instructions than those for the weights themselves. Bytes per weight of a step, bf16 weights: w 2 + 2,
D 2, w_hat 2. Divisions and roundings are those of IEEE, so that codes equal the operators' for the same logits; sums
over a group, and what exponentials make of a logit, may differ in the last bits.

The interpreter runs the same code on a CPU (TRITON_INTERPRET=1); there the tests compare it with torch's operators.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.numerics.adamw import BETAS, EPSILON, AdamW
from workers.numerics.backends.rounding.rounding_kernels import STORED, _codes, _grid, _programs, _stored
from workers.numerics.backends.rounding.rounding_operators import GridSettings
from workers.numerics.clipping.state import ClippedState

SECOND = tl.constexpr(BETAS[1])
REST_OF_FIRST, REST_OF_SECOND = tl.constexpr(1 - BETAS[0]), tl.constexpr(1 - BETAS[1])
LOG_OF_FIRST, LOG_OF_SECOND = tl.constexpr(math.log(BETAS[0])), tl.constexpr(math.log(BETAS[1]))
SMALLEST = tl.constexpr(EPSILON)

MOVED = 128
"""Groups whose logits a program moves: one a thread."""


def write(state: ClippedState, settings: GridSettings, w_hat: Tensor) -> None:
    """Writes w_hat (count, G) of the present logits."""
    _launch(state, settings, w_hat=w_hat)


def step(
    state: ClippedState,
    settings: GridSettings,
    *,
    gradient: Tensor,
    rate: Tensor,
    decay: float,
    faults: Tensor,
    w_hat: Tensor,
) -> None:
    """A step of AdamW for dL/dw_hat (count, G), and w_hat of the new logits.

    Adds the number of groups with NaN gradients to `faults`, int64.
    """
    _launch(state, settings, gradient=gradient)
    count = len(state.low)
    _move[(triton.cdiv(count, MOVED),)](
        state.slope,
        state.low,
        state.high,
        state.logits,
        state.optimizer.mean,
        state.optimizer.square,
        state.optimizer.count,
        rate,
        faults,
        count,
        decay,
        BITS=settings.bits,
        SYMMETRIC=settings.symmetric,
        MOVED=MOVED,
        num_warps=4,
    )
    _launch(state, settings, w_hat=w_hat)


def keep(state: ClippedState, settings: GridSettings, better: Tensor) -> None:
    """Stores the present codes and grids, if `better`."""
    _launch(state, settings, better=better)


def warm_ups(
    width: int, settings: GridSettings, dtype: torch.dtype, scale_dtype: torch.dtype, device: torch.device
) -> list[Callable[[], object]]:
    """A launch of each kernel on a few groups, which compiles them for groups of this width."""
    weight = torch.ones(16, width, dtype=dtype, device=device)
    one, codes = torch.ones(16, device=device), torch.zeros_like(weight, dtype=torch.uint8)
    logits = torch.ones(2, 16, device=device)
    stored = (codes, one.to(scale_dtype), codes[:, 0].contiguous())
    state = ClippedState(weight, None, -one, one, logits, AdamW.of(logits), torch.empty_like(one), *stored)
    faults = torch.zeros((), dtype=torch.int64, device=device)
    out, better = torch.empty_like(weight), torch.ones((), dtype=torch.bool, device=device)
    return [
        partial(write, state, settings, out),
        partial(step, state, settings, gradient=weight, rate=one[0], decay=0.0, faults=faults, w_hat=out),
        partial(keep, state, settings, better),
    ]


def _launch(
    state: ClippedState,
    settings: GridSettings,
    *,
    w_hat: Tensor | None = None,
    gradient: Tensor | None = None,
    better: Tensor | None = None,
) -> None:
    count, width = state.weight.shape
    programs, sizes = _programs(count, width)
    unused = state.weight
    _clip_groups[programs](
        state.weight,
        unused if state.offset is None else state.offset,
        state.low,
        state.high,
        state.logits,
        state.slope,
        state.optimizer.count,
        state.codes,
        state.scale,
        state.zero,
        unused if w_hat is None else w_hat,
        unused if gradient is None else gradient,
        unused if better is None else better,
        count,
        width,
        settings.smallest,
        BITS=settings.bits,
        SYMMETRIC=settings.symmetric,
        STORED_AS=STORED[state.scale.dtype],
        OFFSETS=state.offset is not None,
        SLOPE=gradient is not None,
        WRITE=w_hat is not None,
        KEEP=better is not None,
        **sizes,
    )


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return tl.div_rn(x * 0.0 + 1.0, 1.0 + tl.exp(-x))


@triton.jit
def adamw(AT, MEAN, SQUARE, parameter, gradient, real, rate, decay, done):  # type: ignore[no-untyped-def]
    """The parameter after a step, the moments at AT stored; what is not finite in the gradient counts as 0.

    done   steps with this one
    """
    g = tl.where(tl.abs(gradient) < float("inf"), gradient, 0.0)
    mean = tl.load(MEAN + AT, mask=real, other=0.0)
    mean += REST_OF_FIRST * (g - mean)
    square = tl.load(SQUARE + AT, mask=real, other=0.0) * SECOND + REST_OF_SECOND * g * g
    tl.store(MEAN + AT, mean, mask=real)
    tl.store(SQUARE + AT, square, mask=real)
    mean = tl.div_rn(mean, mean * 0.0 + (1 - tl.exp(done * LOG_OF_FIRST)))
    square = tl.div_rn(square, square * 0.0 + (1 - tl.exp(done * LOG_OF_SECOND)))
    parameter -= parameter * (rate * decay)
    return parameter - rate * tl.div_rn(mean, tl.sqrt_rn(square) + SMALLEST)


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    BY_SCALE,
    LOW,
    HIGH,
    LOGITS,
    MEAN,
    SQUARE,
    COUNT,
    RATE,
    FAULTS,
    count,
    decay,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MOVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * MOVED + tl.arange(0, MOVED)
    real = row < count
    by_scale = tl.load(BY_SCALE + row, mask=real, other=0.0)
    low = tl.load(LOW + row, mask=real, other=-1.0)
    high = tl.load(HIGH + row, mask=real, other=1.0)
    lower = tl.load(LOGITS + row, mask=real, other=0.0)
    upper = tl.load(LOGITS + count + row, mask=real, other=0.0)
    alpha, beta = _sigmoid(lower), _sigmoid(upper)
    if SYMMETRIC:
        low_wins = beta * high < -alpha * low
        lowest = -(2.0 ** (BITS - 1))
        by_lower = by_scale * tl.where(low_wins, low / lowest, 0.0)
        by_upper = by_scale * tl.where(low_wins, 0.0, high / lowest)
    else:
        by_lower = -by_scale * low / (2.0**BITS - 1)
        by_upper = by_scale * high / (2.0**BITS - 1)
    by_lower *= alpha * (1 - alpha)
    by_upper *= beta * (1 - beta)
    unknown = (by_lower != by_lower) | (by_upper != by_upper)  # noqa: PLR0124 - NaN alone differs
    number = tl.sum(unknown.to(tl.int64), 0)
    if number > 0:  # programs that add nothing to one number wait for one another
        tl.atomic_add(FAULTS, number)
    rate, done = tl.load(RATE), tl.load(COUNT)
    lower = adamw(row, MEAN, SQUARE, lower, by_lower, real, rate, decay, done)
    upper = adamw(count + row, MEAN, SQUARE, upper, by_upper, real, rate, decay, done)
    tl.store(LOGITS + row, lower, mask=real)
    tl.store(LOGITS + count + row, upper, mask=real)


@triton.jit
def _clip_groups(  # type: ignore[no-untyped-def]
    WEIGHT,
    OFFSET,
    LOW,
    HIGH,
    LOGITS,
    BY_SCALE,
    COUNT,
    CODES,
    SCALE,
    ZERO,
    HAT,
    GRADIENT,
    BETTER,
    count,
    width,
    smallest,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED_AS: tl.constexpr,
    OFFSETS: tl.constexpr,
    SLOPE: tl.constexpr,
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
    offset = weight * 0.0
    if OFFSETS:
        offset = tl.load(OFFSET + at, mask=real, other=0.0)
    low = tl.load(LOW + row, mask=real_row, other=-1.0)
    high = tl.load(HIGH + row, mask=real_row, other=1.0)
    alpha = _sigmoid(tl.load(LOGITS + row, mask=real_row, other=0.0))
    beta = _sigmoid(tl.load(LOGITS + count + row, mask=real_row, other=0.0))
    scale, zero = _grid(low, high, alpha, beta, smallest, BITS, SYMMETRIC, STORED_AS)
    unclamped, codes = _codes(weight, offset, scale, zero, BITS, SYMMETRIC)
    if SLOPE:
        d = tl.load(GRADIENT + at, mask=real, other=0.0).to(tl.float32)
        inside = d * tl.where(unclamped == codes, 1.0, 0.0)
        by_scale = tl.sum(d * (codes - zero[:, None]), 1) - tl.div_rn(tl.sum(inside * weight, 1), scale)
        tl.store(BY_SCALE + row, by_scale, mask=real_row)
        if tl.program_id(0) == 0:  # in this pass nobody reads it
            tl.store(COUNT, tl.load(COUNT) + 1)
    if WRITE:
        w_hat = _stored((codes - zero[:, None]) * scale[:, None], HAT.dtype.element_ty)
        tl.store(HAT + at, w_hat.to(HAT.dtype.element_ty), mask=real)
    if KEEP:
        lowest = -(2.0 ** (BITS - 1)) if SYMMETRIC else 0.0
        tl.store(CODES + at, (codes - lowest).to(tl.uint8), mask=real)
        tl.store(SCALE + row, scale.to(STORED_AS), mask=real_row)
        tl.store(ZERO + row, zero.to(tl.uint8), mask=real_row)
