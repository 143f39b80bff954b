"""Triton kernels of end-to-end scale tuning and of distances between outputs.

Formulas are in `workers.numerics.group_scales`, `.divergence` and `.backends.place_operators`.

    dequantize          reads 1 byte per code, writes w_hat
    add_scale_gradient  reads D and 1 byte per code, writes one number per group
    squared_distance    reads both tensors once
    divergence          reads both logits twice and writes the gradient over the teacher's: no fp32 copy of either
    move_places         reads x, D, m and v once, writes x, m and v
    dequantize_places   reads x, writes w_hat
    add_place_gradient  reads D and x, adds D to what codes have had and one number to each group

Each program owns its groups or its token, so the order of every sum is fixed. Arithmetic is fp32. The
interpreter runs the same code on a CPU (TRITON_INTERPRET=1); there the tests compare it with the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.numerics.backends.place_operators import Places

PROGRAM_ELEMENTS = 4096
"""Weights that a program handles; at least one group."""
VOCABULARY_ELEMENTS = 4096
"""Logits of a token that are read at once."""
MOVED_ELEMENTS = 1024
"""Places that a program moves."""
TO_NEAREST = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds an fp32 below 2^22 to the nearest integer, ties to even."""


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | int, out: Tensor) -> None:
    """Writes scale*(codes - zero) to `out`; scale fp32."""
    grid, sizes = _programs(codes)
    _dequantize[grid](codes, scale, *_zero(codes, zero), out, *codes.shape, **sizes)


def add_scale_gradient(gradient: Tensor, codes: Tensor, zero: Tensor | int, out: Tensor) -> None:
    """Adds the sum over each group of gradient*(codes - zero) to `out`, fp32."""
    grid, sizes = _programs(codes)
    _add_scale_gradient[grid](gradient, codes, *_zero(codes, zero), out, *codes.shape, **sizes)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of each token, fp32 (tokens,); the gradient by the student's logits takes the place of `teacher`."""
    tokens, vocabulary = student.shape
    each = torch.empty(tokens, dtype=torch.float32, device=student.device)
    block = min(VOCABULARY_ELEMENTS, triton.next_power_of_2(vocabulary))
    _divergence[(tokens,)](student, teacher, each, vocabulary, BLOCK=block, num_warps=8)
    return each


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """Sum of squared differences of two contiguous tensors, fp64 (): in fp32 within a program."""
    count = one.numel()
    sums = torch.empty(triton.cdiv(count, PROGRAM_ELEMENTS), dtype=torch.float32, device=one.device)
    _squared_distance[(len(sums),)](one, other, sums, count, BLOCK=PROGRAM_ELEMENTS, num_warps=8)
    return sums.sum(dtype=torch.float64)


def move_places(places: Places, pace: Tensor, unbiased: Tensor, betas: tuple[float, float]) -> None:
    """`workers.numerics.backends.place_operators.move_places`; x is fp32, and v has a number for each place."""
    count = places.place.numel()
    _move_places[(triton.cdiv(count, MOVED_ELEMENTS),)](
        places.place,
        places.gradient,
        places.mean,
        places.square,
        pace,
        unbiased,
        *(1 - beta for beta in betas),
        places.tiny,
        places.low - places.box,
        places.high + places.box,
        count,
        BLOCK=MOVED_ELEMENTS,
    )


def dequantize_places(places: Places, scale: Tensor, zero: Tensor | int, out: Tensor) -> None:
    """Writes scale*(value - zero) to `out`; scale fp32."""
    grid, sizes = _programs(places.place)
    kind = {"FP4": places.fp4, **sizes}
    _dequantize_places[grid](
        places.place,
        scale,
        *_zero(places.place, zero),
        out,
        float(places.low),
        float(places.high),
        *places.place.shape,
        **kind,
    )


def add_place_gradient(
    gradient: Tensor, places: Places, rows: slice, zero: Tensor | int, sign: Tensor, out: Tensor
) -> None:
    """Adds sums over groups of gradient*(value - zero) to `out`, and gradient*sign to what codes have had."""
    place, had = places.place[rows], places.gradient[rows]
    grid, sizes = _programs(place)
    _add_place_gradient[grid](
        gradient,
        place,
        sign,
        *_zero(place, zero),
        had,
        out,
        float(places.low),
        float(places.high),
        *place.shape,
        **sizes,
    )


def _programs(codes: Tensor) -> tuple[tuple[int], dict[str, int]]:
    padded = triton.next_power_of_2(codes.shape[1])
    groups = max(1, PROGRAM_ELEMENTS // padded)
    return (triton.cdiv(len(codes), groups),), {"GROUPS": groups, "WIDTH": padded}


def _zero(codes: Tensor, zero: Tensor | int) -> tuple[Tensor, int, bool]:
    """Zero points (any tensor if there are none), the one number for all, and whether there are zero points."""
    return (codes, zero, False) if isinstance(zero, int) else (zero, 0, True)


@triton.jit
def _steps(CODES, ZERO, middle, group, column, count, width, STORED_ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """q - z of some groups, 0 outside of them; their addresses; and the mask of real elements."""
    real = (group < count)[:, None] & (column < width)[None, :]
    at = group[:, None] * width + column[None, :]
    steps = tl.load(CODES + at, mask=real, other=0).to(tl.float32)
    if STORED_ZERO:
        steps -= tl.load(ZERO + group, mask=group < count, other=0).to(tl.float32)[:, None]
    else:
        steps -= middle
    return tl.where(real, steps, 0.0), at, real


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    CODES,
    SCALE,
    ZERO,
    middle,
    STORED_ZERO: tl.constexpr,
    OUT,
    count,
    width,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    steps, at, real = _steps(CODES, ZERO, middle, group, column, count, width, STORED_ZERO)
    scale = tl.load(SCALE + group, mask=group < count, other=0.0).to(tl.float32)
    tl.store(OUT + at, (steps * scale[:, None]).to(OUT.dtype.element_ty), mask=real)


@triton.jit
def _add_scale_gradient(  # type: ignore[no-untyped-def]
    D,
    CODES,
    ZERO,
    middle,
    STORED_ZERO: tl.constexpr,
    OUT,
    count,
    width,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    steps, at, real = _steps(CODES, ZERO, middle, group, column, count, width, STORED_ZERO)
    d = tl.load(D + at, mask=real, other=0.0).to(tl.float32)
    before = tl.load(OUT + group, mask=group < count, other=0.0)
    tl.store(OUT + group, before + tl.sum(d * steps, 1), mask=group < count)


@triton.jit
def _squared_distance(ONE, OTHER, SUMS, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    one = tl.load(ONE + at, mask=real, other=0.0).to(tl.float32)
    difference = one - tl.load(OTHER + at, mask=real, other=0.0).to(tl.float32)
    tl.store(SUMS + tl.program_id(0), tl.sum(difference * difference, 0))


@triton.jit
def _divergence(STUDENT, TEACHER, EACH, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    u_top = -float("inf")
    t_top = -float("inf")
    u_sum = 0.0
    t_sum = 0.0
    for first in range(0, vocabulary, BLOCK):
        real = first + column < vocabulary
        at = token * vocabulary + first + column
        u = tl.load(STUDENT + at, mask=real, other=-float("inf")).to(tl.float32)
        t = tl.load(TEACHER + at, mask=real, other=-float("inf")).to(tl.float32)
        u_next = tl.maximum(u_top, tl.max(u, 0))
        t_next = tl.maximum(t_top, tl.max(t, 0))
        u_sum = u_sum * tl.exp(u_top - u_next) + tl.sum(tl.exp(u - u_next), 0)
        t_sum = t_sum * tl.exp(t_top - t_next) + tl.sum(tl.exp(t - t_next), 0)
        u_top = u_next
        t_top = t_next
    u_total = u_top + tl.log(u_sum)
    t_total = t_top + tl.log(t_sum)
    each = 0.0
    for first in range(0, vocabulary, BLOCK):
        real = first + column < vocabulary
        at = token * vocabulary + first + column
        log_q = tl.where(real, tl.load(STUDENT + at, mask=real, other=0.0).to(tl.float32) - u_total, 0.0)
        log_p = tl.where(real, tl.load(TEACHER + at, mask=real, other=0.0).to(tl.float32) - t_total, 0.0)
        p = tl.exp(log_p)
        each += tl.sum(p * (log_p - log_q), 0)
        tl.store(TEACHER + at, (tl.exp(log_q) - p).to(TEACHER.dtype.element_ty), mask=real)
    tl.store(EACH + token, each)


@triton.jit
def _move_places(  # type: ignore[no-untyped-def]
    PLACE,
    D,
    MEAN,
    SQUARE,
    PACE,
    UNBIASED,
    new_mean,
    new_square,
    tiny,
    low,
    high,
    count,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    d = tl.load(D + at, mask=real, other=0.0).to(tl.float32)
    # NaN is not equal to itself, and infinities are not less than the largest number.
    d = tl.where(tl.abs(d) <= 3.4e38, d, 0.0)
    mean = tl.load(MEAN + at, mask=real, other=0.0).to(tl.float32)
    square = tl.load(SQUARE + at, mask=real, other=0.0).to(tl.float32)
    mean += new_mean * (d - mean)
    square = square * (1 - new_square) + new_square * d * d
    tl.store(MEAN + at, mean.to(MEAN.dtype.element_ty), mask=real)
    tl.store(SQUARE + at, square.to(SQUARE.dtype.element_ty), mask=real)
    step = mean * tl.load(PACE) / (tl.sqrt(square / tl.load(UNBIASED)) + tiny)
    place = tl.load(PLACE + at, mask=real, other=0.0) - step
    tl.store(PLACE + at, tl.minimum(tl.maximum(place, low), high), mask=real)


@triton.jit
def _indices(PLACE, group, column, count, width, low, high):  # type: ignore[no-untyped-def]
    """Whole indices of some groups' places; their addresses; and the mask of real elements."""
    real = (group < count)[:, None] & (column < width)[None, :]
    at = group[:, None] * width + column[None, :]
    place = tl.load(PLACE + at, mask=real, other=0.0).to(tl.float32)
    index = (place + TO_NEAREST) - TO_NEAREST
    return tl.minimum(tl.maximum(index, low), high), at, real


@triton.jit
def _dequantize_places(  # type: ignore[no-untyped-def]
    PLACE,
    SCALE,
    ZERO,
    middle,
    STORED_ZERO: tl.constexpr,
    OUT,
    low,
    high,
    count,
    width,
    FP4: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    value, at, real = _indices(PLACE, group, tl.arange(0, WIDTH), count, width, low, high)
    if FP4:  # convex: the largest of its three lines
        size = tl.abs(value)
        size = tl.maximum(tl.maximum(size * 0.5, size - 2), 2 * size - 8)
        value = tl.where(value < 0, -size, size)
    if STORED_ZERO:
        value -= tl.load(ZERO + group, mask=group < count, other=0).to(tl.float32)[:, None]
    else:
        value -= middle
    scale = tl.load(SCALE + group, mask=group < count, other=0.0).to(tl.float32)
    tl.store(OUT + at, (value * scale[:, None]).to(OUT.dtype.element_ty), mask=real)


@triton.jit
def _add_place_gradient(  # type: ignore[no-untyped-def]
    D,
    PLACE,
    SIGN,
    ZERO,
    middle,
    STORED_ZERO: tl.constexpr,
    HAD,
    OUT,
    low,
    high,
    count,
    width,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    owned = group < count
    value, at, real = _indices(PLACE, group, tl.arange(0, WIDTH), count, width, low, high)
    if STORED_ZERO:
        value -= tl.load(ZERO + group, mask=owned, other=0).to(tl.float32)[:, None]
    else:
        value -= middle
    d = tl.load(D + at, mask=real, other=0.0).to(tl.float32)
    sum_before = tl.load(OUT + group, mask=owned, other=0.0)
    tl.store(OUT + group, sum_before + tl.sum(tl.where(real, d * value, 0.0), 1), mask=owned)
    sign = tl.load(SIGN + group, mask=owned, other=0.0).to(tl.float32)[:, None]
    had = tl.load(HAD + at, mask=real, other=0.0).to(tl.float32)
    tl.store(HAD + at, (had + d * sign).to(HAD.dtype.element_ty), mask=real)
