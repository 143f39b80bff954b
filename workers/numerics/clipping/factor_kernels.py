"""Triton kernels of low-rank factors: of all linears of a block at once, in place of a dozen operators for each.

    step           dL/dA = c B^T D and dL/dB = c D A^T for D = dL/dW_hat, and AdamW's step by them
    add_products   w_hat = w_hat + c B A

with A and B rounded to the model's dtype as they are stored, products of such numbers summed in fp32, and c the
strength of a linear. Weights of all linears lie one after another in one flat tensor, A and B of each in another.

A launch has a program for every tile of every linear: its place, in a table on the device, is the only thing that
differs between linears. The interpreter runs the same code on a CPU (TRITON_INTERPRET=1).
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.numerics.adamw import AdamW
from workers.numerics.backends.rounding.rounding_kernels import _stored
from workers.numerics.clipping.factor_places import ALIGNED, TILE, FactorPlaces
from workers.numerics.clipping.kernels import adamw


def step(
    places: FactorPlaces,
    factors: Tensor,
    rounded: Tensor,
    optimizer: AdamW,
    *,
    gradient: Tensor,
    rate: Tensor,
    share: float,
    decay: float,
    faults: Tensor,
    last_fault: Tensor,
) -> None:
    """A step of AdamW at `share` times the rate for D, flat; `rounded`, the factors as they act, follow.

    faults       int64 (), grows by one if a gradient holds NaN
    last_fault   int64 (), the last step in which one did
    """
    optimizer.count.add_(1)
    _factor_step[(len(places.gradients),)](
        places.gradients,
        places.strength,
        gradient,
        factors,
        rounded,
        optimizer.mean,
        optimizer.square,
        optimizer.count,
        rate,
        share,
        decay,
        faults,
        last_fault,
        ALIGN=ALIGNED if places.aligned else 1,
        TILE=TILE,
    )
    rounded.copy_(factors)


def add_products(places: FactorPlaces, rounded: Tensor, w_hat: Tensor) -> None:
    """Adds c B A to `w_hat`, flat, in its dtype."""
    strength, align = places.strength[len(places.gradients) :], ALIGNED if places.aligned else 1
    _add_products[(len(places.products),)](places.products, strength, rounded, w_hat, ALIGN=align, TILE=TILE)


def warm_ups(dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """A launch of each kernel on one tile, which compiles them for linears whose sizes are multiples of `ALIGNED`."""
    weight = torch.zeros(TILE * TILE, dtype=dtype, device=device)
    places = FactorPlaces.of([(TILE, TILE)], [TILE], 1.0, device)
    factors = torch.zeros(2 * TILE * TILE, device=device)
    rounded, faults = factors.to(dtype), torch.zeros(2, dtype=torch.int64, device=device)
    return [
        partial(
            step,
            places,
            factors,
            rounded,
            AdamW.of(factors),
            gradient=weight,
            rate=factors[0],
            share=1.0,
            decay=0.0,
            faults=faults[0],
            last_fault=faults[1],
        ),
        partial(add_products, places, rounded, weight),
    ]


@triton.jit
def _number(PLACE, index: tl.constexpr, MULTIPLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number of a table's row, a multiple of MULTIPLE."""
    return tl.multiple_of(tl.load(PLACE + index), MULTIPLE)


@triton.jit
def _factor_step(  # type: ignore[no-untyped-def]
    PLACES,
    STRENGTH,
    GRADIENT,
    FACTORS,
    ROUNDED,
    MEAN,
    SQUARE,
    COUNT,
    RATE,
    share,
    decay,
    FAULTS,
    LAST_FAULT,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    place = PLACES + tl.program_id(0) * 9
    weight_at, a_at, b_at = _number(place, 0, ALIGN), _number(place, 1, ALIGN), _number(place, 2, ALIGN)
    out, columns, rank = _number(place, 3, ALIGN), _number(place, 4, ALIGN), _number(place, 5, ALIGN)
    block, first_rank = _number(place, 6, TILE), _number(place, 7, TILE)
    part = tl.arange(0, TILE)
    ranks = first_rank + part
    real_rank = ranks < rank
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    if tl.load(place + 8) == 0:
        # (rows, ranks) of B: D's rows times A's, over all columns.
        rows = block + part
        for start in range(0, columns, TILE):
            inner = start + part
            real_inner = inner < columns
            d = tl.load(
                GRADIENT + weight_at + rows[:, None] * columns + inner[None, :],
                mask=(rows < out)[:, None] & real_inner[None, :],
                other=0.0,
            )
            a = tl.load(
                ROUNDED + a_at + ranks[None, :] * columns + inner[:, None],
                mask=real_rank[None, :] & real_inner[:, None],
                other=0.0,
            )
            total = tl.dot(d, a, total, input_precision="ieee")
        at = b_at + rows[:, None] * rank + ranks[None, :]
        real = (rows < out)[:, None] & real_rank[None, :]
    else:
        # (columns, ranks), A's transposed: D's columns times B's, over all rows.
        own = block + part
        for start in range(0, out, TILE):
            inner = start + part
            real_inner = inner < out
            d = tl.load(
                GRADIENT + weight_at + inner[None, :] * columns + own[:, None],
                mask=real_inner[None, :] & (own < columns)[:, None],
                other=0.0,
            )
            b = tl.load(
                ROUNDED + b_at + inner[:, None] * rank + ranks[None, :],
                mask=real_inner[:, None] & real_rank[None, :],
                other=0.0,
            )
            total = tl.dot(d, b, total, input_precision="ieee")
        at = a_at + ranks[None, :] * columns + own[:, None]
        real = (own < columns)[:, None] & real_rank[None, :]
    total *= tl.load(STRENGTH + tl.program_id(0))
    done = tl.load(COUNT)
    if tl.sum(tl.sum(tl.where(total != total, 1, 0), 1), 0) > 0:  # noqa: PLR0124 - NaN alone differs
        step = done.to(tl.int64)
        if tl.atomic_xchg(LAST_FAULT, step) != step:
            tl.atomic_add(FAULTS, step * 0 + 1)
    factor = tl.load(FACTORS + at, mask=real, other=0.0)
    factor = adamw(at, MEAN, SQUARE, factor, total, real, tl.load(RATE) * share, decay, done)
    tl.store(FACTORS + at, factor, mask=real)


@triton.jit
def _add_products(PLACES, STRENGTH, ROUNDED, HAT, ALIGN: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = PLACES + tl.program_id(0) * 9
    weight_at, a_at, b_at = _number(place, 0, ALIGN), _number(place, 1, ALIGN), _number(place, 2, ALIGN)
    out, columns, rank = _number(place, 3, ALIGN), _number(place, 4, ALIGN), _number(place, 5, ALIGN)
    part = tl.arange(0, TILE)
    rows, own = _number(place, 6, TILE) + part, _number(place, 7, TILE) + part
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, rank, TILE):
        ranks = start + part
        real_rank = ranks < rank
        b = tl.load(
            ROUNDED + b_at + rows[:, None] * rank + ranks[None, :],
            mask=(rows < out)[:, None] & real_rank[None, :],
            other=0.0,
        )
        a = tl.load(
            ROUNDED + a_at + ranks[:, None] * columns + own[None, :],
            mask=real_rank[:, None] & (own < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(b, a, total, input_precision="ieee")
    real = (rows < out)[:, None] & (own < columns)[None, :]
    at = weight_at + rows[:, None] * columns + own[None, :]
    w_hat = tl.load(HAT + at, mask=real, other=0.0).to(tl.float32)
    w_hat = _stored(w_hat + tl.load(STRENGTH + tl.program_id(0)) * total, HAT.dtype.element_ty)
    tl.store(HAT + at, w_hat.to(HAT.dtype.element_ty), mask=real)
