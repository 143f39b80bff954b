"""Triton kernels of the fake quantizer on block types: one pass over a block's weights.

`_round_blocks` computes any of STEP (places moved by the signs of their gradients), WRITE (w_hat) and KEEP (codes
stored where a flag on the device says so), in fp32; formulas are in
`workers.numerics.backends.rounding.block_rounding_operators`, whose functions these are, with its bits.

The interpreter runs the same code on a CPU (TRITON_INTERPRET=1); there the tests compare it with the plain one.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.domain.methods.block_types import ODD_LEVELS, BlockType
from workers.numerics.backends.column_kernels import _to_whole
from workers.numerics.backends.rounding.block_rounding_operators import BlockGroups
from workers.numerics.backends.rounding.rounding_kernels import _sign, _stored
from workers.numerics.blocks.axis import BlockAxis
from workers.numerics.blocks.levels import QUAD, level_table, neighbours

PROGRAM_ELEMENTS = 1024


def write(groups: BlockGroups, axis: BlockAxis, w_hat: Tensor) -> None:
    """Writes w_hat of the present places."""
    _launch(groups, axis, w_hat=w_hat)


def step(
    groups: BlockGroups, axis: BlockAxis, *, gradient: Tensor, rate: Tensor, faults: Tensor, w_hat: Tensor
) -> None:
    """Updates x and writes w_hat of the new one. Adds the number of NaN gradients to `faults`; they move nothing."""
    _launch(groups, axis, gradient=gradient, rate=rate, faults=faults, w_hat=w_hat)


def keep(groups: BlockGroups, axis: BlockAxis, better: Tensor) -> None:
    """Stores the present codes, if `better`."""
    _launch(groups, axis, better=better)


def warm_ups(kind: BlockType, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """A launch of each kernel on a few sub-blocks, which compiles them for weights of this dtype."""
    axis, place = BlockAxis(kind), torch.ones(64, kind.columns, device=device)
    one, codes = torch.ones(64, device=device), torch.zeros_like(place, dtype=torch.uint8)
    groups = BlockGroups(place, place.clone(), one, one.clone() if kind.offset else one[:0], codes)
    better, faults = torch.ones((), dtype=torch.bool, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    out = torch.empty_like(place, dtype=dtype)
    return [
        partial(write, groups, axis, out),
        partial(step, groups, axis, gradient=out, rate=one[0], faults=faults, w_hat=out),
        partial(keep, groups, axis, better),
    ]


def _launch(
    groups: BlockGroups,
    axis: BlockAxis,
    *,
    w_hat: Tensor | None = None,
    gradient: Tensor | None = None,
    rate: Tensor | None = None,
    faults: Tensor | None = None,
    better: Tensor | None = None,
) -> None:
    count, unused, kind = groups.place.numel(), groups.place, axis.kind
    lattice = kind.levels == ODD_LEVELS
    _round_blocks[(triton.cdiv(count, PROGRAM_ELEMENTS),)](
        groups.place,
        groups.factor,
        groups.offset if groups.offset.numel() else unused,
        _points(unused.device) if lattice else level_table(kind, unused.device),
        groups.codes,
        unused if w_hat is None else w_hat,
        unused if gradient is None else gradient,
        unused if rate is None else rate,
        unused if faults is None else faults,
        unused if better is None else better,
        count,
        kind.columns,
        LOWEST=float(kind.levels[0]),
        HIGH=axis.high,
        UNIFORM=kind.uniform,
        LATTICE=lattice,
        OFFSET=groups.offset.numel() > 0,
        STEP=gradient is not None,
        WRITE=w_hat is not None,
        KEEP=better is not None,
        QUADS=PROGRAM_ELEMENTS // QUAD,
        num_warps=4,
    )


@cache
def _points(device: torch.device) -> Tensor:
    """The lattice's point that is nearest to each cell's middle, fp32 (4096, 4)."""
    return neighbours(device)[:, 0].contiguous()


@triton.jit
def _codes(place, TABLE, HIGH: tl.constexpr, LATTICE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of places (QUADS, 4)."""
    code = tl.minimum(tl.maximum(_to_whole(place), 0.0), HIGH * 1.0)
    if LATTICE:
        near = _to_whole(place) * 2 - 15
        index = tl.minimum(tl.maximum((tl.abs(near) - 1) / 2, 0.0), 7.0).to(tl.int32)
        digit = tl.arange(0, 4)[None, :]
        point = tl.load(TABLE + tl.sum(index << (3 * digit), 1)[:, None] * 4 + digit)
        code = (tl.where(near < 0, -point, point) + 15) / 2
    return code


@triton.jit
def _round_blocks(  # type: ignore[no-untyped-def]
    PLACE,
    FACTOR,
    OFFSETS,
    TABLE,
    CODES,
    HAT,
    GRADIENT,
    RATE,
    FAULTS,
    BETTER,
    count,
    width,
    LOWEST: tl.constexpr,
    HIGH: tl.constexpr,
    UNIFORM: tl.constexpr,
    LATTICE: tl.constexpr,
    OFFSET: tl.constexpr,
    STEP: tl.constexpr,
    WRITE: tl.constexpr,
    KEEP: tl.constexpr,
    QUADS: tl.constexpr,
):
    if KEEP and tl.load(BETTER) == 0:
        return
    quad = tl.program_id(0).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    at = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    real = at < count
    place = tl.load(PLACE + at, mask=real, other=0.0)
    factor = tl.load(FACTOR + at // width, mask=real, other=1.0)
    if STEP:
        d = tl.load(GRADIENT + at, mask=real, other=0.0).to(tl.float32)
        number = tl.sum(tl.sum((d != d).to(tl.int32), 1), 0)  # noqa: PLR0124 - NaN alone differs
        if number > 0:  # thousands of programs that add nothing to one number wait for one another
            tl.atomic_add(FAULTS, number)
        free = _to_whole(place)
        d = tl.where((free >= 0) & (free <= HIGH), d, 0.0)
        place = place - _sign(d) * (_sign(factor) * tl.load(RATE))
        tl.store(PLACE + at, place, mask=real)
    code = _codes(place, TABLE, HIGH, LATTICE)
    if WRITE:
        if UNIFORM:
            level = code + LOWEST
        elif LATTICE:
            level = code * 2 - 15
        else:
            level = tl.load(TABLE + code.to(tl.int32))
        w_hat = level * factor
        if OFFSET:
            w_hat = w_hat + tl.load(OFFSETS + at // width, mask=real, other=0.0)
        w_hat = _stored(w_hat, HAT.dtype.element_ty)
        tl.store(HAT + at, w_hat.to(HAT.dtype.element_ty), mask=real)
    if KEEP:
        tl.store(CODES + at, code.to(tl.uint8), mask=real)
