"""Triton kernels of the fake quantizer on floating-point grids: one pass over a block's weights.

`_round_floats` computes any of STEP (V moved by the signs of its gradients), WRITE (w_hat) and KEEP (codes stored where
a flag on the device says so), in fp32; formulas are in
`workers.numerics.backends.rounding.float_rounding_operators`, whose functions these are. Divisions and roundings are
those of IEEE, so that codes equal the plain ones.

The interpreter runs the same code on a CPU (TRITON_INTERPRET=1); there the tests compare it with the plain one.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.domain.methods.named_schemes import Element
from workers.numerics.backends.rounding.float_rounding_operators import LIMIT, FloatGroups
from workers.numerics.backends.rounding.rounding_kernels import TO_NEAREST, _sign, _stored
from workers.numerics.floats.elements import LAST_INDEX, SIGN

PROGRAM_ELEMENTS = 1024


def write(groups: FloatGroups, element: Element, w_hat: Tensor) -> None:
    """Writes w_hat of the present V."""
    _launch(groups, element, w_hat=w_hat)


def step(
    groups: FloatGroups, element: Element, *, gradient: Tensor, rate: Tensor, faults: Tensor, w_hat: Tensor
) -> None:
    """Updates V and writes w_hat of the new one. Adds the number of NaN gradients to `faults`; they move nothing."""
    _launch(groups, element, gradient=gradient, rate=rate, faults=faults, w_hat=w_hat)


def keep(groups: FloatGroups, element: Element, better: Tensor) -> None:
    """Stores the present codes, if `better`."""
    _launch(groups, element, better=better)


def warm_ups(width: int, element: Element, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """A launch of each kernel on a few groups, which compiles them."""
    weight = torch.ones(16, width, dtype=dtype, device=device)
    one, codes = torch.ones(16, device=device), torch.zeros_like(weight, dtype=torch.uint8)
    groups = FloatGroups(weight, torch.zeros_like(weight, dtype=torch.float32), one, codes)
    better, faults = torch.ones((), dtype=torch.bool, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    out = torch.empty_like(weight)
    return [
        partial(write, groups, element, out),
        partial(step, groups, element, gradient=weight, rate=one[0], faults=faults, w_hat=out),
        partial(keep, groups, element, better),
    ]


def _launch(
    groups: FloatGroups,
    element: Element,
    *,
    w_hat: Tensor | None = None,
    gradient: Tensor | None = None,
    rate: Tensor | None = None,
    faults: Tensor | None = None,
    better: Tensor | None = None,
) -> None:
    count, unused = groups.weight.numel(), groups.weight
    _round_floats[(triton.cdiv(count, PROGRAM_ELEMENTS),)](
        groups.weight,
        groups.offset,
        groups.factor,
        groups.codes,
        unused if w_hat is None else w_hat,
        unused if gradient is None else gradient,
        unused if rate is None else rate,
        unused if faults is None else faults,
        unused if better is None else better,
        count,
        groups.weight.shape[1],
        LIMIT,
        FP4=element is Element.E2M1,
        LAST=LAST_INDEX[element],
        SIGN_BIT=SIGN if element is Element.E2M1 else 0x80,
        STEP=gradient is not None,
        WRITE=w_hat is not None,
        KEEP=better is not None,
        BLOCK=PROGRAM_ELEMENTS,
        num_warps=4,
    )


@triton.jit
def _power(exponent):  # type: ignore[no-untyped-def]
    """2^exponent, fp32, of whole numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _unclamped(weight, offset, factor, FP4: tl.constexpr):  # type: ignore[no-untyped-def]
    """round(u(w / s) + V)."""
    in_steps = tl.div_rn(weight, factor)
    magnitude = tl.abs(in_steps)
    if FP4:
        index = tl.minimum(tl.minimum(2 * magnitude, magnitude + 2), magnitude / 2 + 4)
    else:
        exponent = ((magnitude.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        exponent = tl.minimum(tl.maximum(exponent, -6), 126)
        index = 8 * ((exponent + 6).to(tl.float32) + magnitude * _power(-exponent))
    index = tl.where(in_steps < 0, -index, index) + offset
    index = tl.minimum(tl.maximum(index, -4194304.0), 4194303.0)
    return (index + TO_NEAREST) - TO_NEAREST


@triton.jit
def _value(index, FP4: tl.constexpr):  # type: ignore[no-untyped-def]
    """L of whole indices."""
    magnitude = tl.abs(index)
    if FP4:
        value = tl.maximum(tl.maximum(magnitude / 2, magnitude - 2), 2 * magnitude - 8)
    else:
        above = tl.maximum(magnitude.to(tl.int32) >> 3, 1) - 1
        value = (magnitude / 8 - above.to(tl.float32)) * _power(above - 6)
    return tl.where(index < 0, -value, value)


@triton.jit
def _round_floats(  # type: ignore[no-untyped-def]
    WEIGHT,
    OFFSET,
    FACTOR,
    CODES,
    HAT,
    GRADIENT,
    RATE,
    FAULTS,
    BETTER,
    count,
    width,
    limit,
    FP4: tl.constexpr,
    LAST: tl.constexpr,
    SIGN_BIT: tl.constexpr,
    STEP: tl.constexpr,
    WRITE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if KEEP and tl.load(BETTER) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    weight = tl.load(WEIGHT + at, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(OFFSET + at, mask=real, other=0.0)
    factor = tl.load(FACTOR + at // width, mask=real, other=1.0)
    unclamped = _unclamped(weight, offset, factor, FP4)
    if STEP:
        d = tl.load(GRADIENT + at, mask=real, other=0.0).to(tl.float32)
        d = tl.where(tl.abs(unclamped) <= LAST, d, d * 0.0)
        number = tl.sum((d != d).to(tl.int32), 0)  # noqa: PLR0124 - NaN alone differs
        if number > 0:  # thousands of programs that add nothing to one number wait for one another
            tl.atomic_add(FAULTS, number)
        offset = tl.minimum(tl.maximum(offset - tl.load(RATE) * _sign(d), -limit), limit)
        tl.store(OFFSET + at, offset, mask=real)
        unclamped = _unclamped(weight, offset, factor, FP4)
    index = tl.minimum(tl.maximum(unclamped, -LAST * 1.0), LAST * 1.0)
    if WRITE:
        w_hat = _stored(_value(index, FP4) * factor, HAT.dtype.element_ty)
        tl.store(HAT + at, w_hat.to(HAT.dtype.element_ty), mask=real)
    if KEEP:
        code = tl.abs(index).to(tl.int32)
        tl.store(CODES + at, tl.where(index < 0, code | SIGN_BIT, code).to(tl.uint8), mask=real)
