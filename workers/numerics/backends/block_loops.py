"""Operations between the matrix products of a decoder block in compiled loops, on a CPU, forward and backward.

Functions, arguments and roundings are those of `workers.numerics.backends.block_operators`, which computes what does
not lie here as loops read it: of other dtypes than fp32 and bf16, or packed otherwise.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.numerics.backends import block_operators
from workers.numerics.backends.block_operators import attend, gelu_mul, take_rows
from workers.numerics.loops import DTYPES
from workers.numerics.loops import blocks as loops
from workers.numerics.loops.numbers import array
from workers.numerics.loops.threads import over_rows

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "attend",
    "error_gradient",
    "gelu_mul",
    "rms_norm",
    "silu_mul",
    "square_error",
    "take_rows",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_twice: bool = True) -> Tensor:
    """`block_operators.rms_norm`"""
    if not _are_loops(x, weight):
        return block_operators.rms_norm(x, weight, eps, offset=offset, rounds_twice=rounds_twice)
    if offset or not rounds_twice:
        weight = weight.float() + offset
    y: Tensor = _RMSNorm.apply(x, weight, eps, rounds_twice)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`block_operators.add_rms_norm`"""
    if not _are_loops(x, update, weight):
        return block_operators.add_rms_norm(x, update, weight, eps)
    h, y = _AddRMSNorm.apply(x, update, weight, eps)  # type: ignore[no-untyped-call]
    return h, y


def silu_mul(*gate_up: Tensor) -> Tensor:
    """`block_operators.silu_mul`"""
    if len(gate_up) != 2 or not _are_loops(*gate_up):
        return block_operators.silu_mul(*gate_up)
    y: Tensor = _SiluMul.apply(*gate_up)  # type: ignore[no-untyped-call]
    return y


def apply_rope(*heads: Tensor, counts: Sequence[int], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`block_operators.apply_rope`"""
    if len(heads) != 1 or not _are_loops(*heads, cos, sin):
        return block_operators.apply_rope(*heads, counts=counts, cos=cos, sin=sin)
    query, key, value = _Turn.apply(cos, sin, tuple(counts), heads[0])  # type: ignore[no-untyped-call]
    return query, key, value


@torch.no_grad()
def square_error(
    parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float
) -> tuple[Tensor, Tensor]:
    """`block_operators.square_error`"""
    if not _are_loops(*parts, targets) or targets.dtype != parts[0].dtype:
        return block_operators.square_error(parts, targets, index, share, scaled)
    squares = torch.empty(parts[0].shape[:-1].numel())
    error = _errors(parts, targets, index, 2 * share * scaled, squares)
    return squares.sum() * (share / error.numel()), error


def error_gradient(parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float) -> Tensor:
    """`block_operators.error_gradient`"""
    if not _are_loops(*parts, targets) or targets.dtype != parts[0].dtype:
        return block_operators.error_gradient(parts, targets, index, share, scaled)
    return _errors(parts, targets, index, 2 * share * scaled, None)


def _errors(parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, squares: Tensor | None) -> Tensor:
    """`share` over the count of them times y - targets[index]; the differences' squares, summed by row."""
    part, error = parts[0], torch.empty_like(parts[0])
    given = _rows(part), _rows(parts[-1]), len(parts) == 2, _rows(targets), index.numpy(), part.shape[1]
    rows, factor = _rows(error), np.float32(share / part.numel())
    total = None if squares is None else array(squares)

    def compared(first: int, end: int) -> None:
        loops.errors(first, end, *given, rows)
        if total is not None:
            loops.squares(first, end, rows, total)
        loops.scale(first, end, rows, factor)

    _over(part, compared)
    return error


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rounds_twice: bool) -> Tensor:
        y, inverse = _normed(x, weight, eps, rounds_twice=rounds_twice)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _norm_backward(gradients[0], None, *ctx.saved_tensors), None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        h = torch.empty_like(x)
        given = _rows(x), _rows(update), _rows(h)
        _over(x, lambda first, end: loops.add(first, end, *given))
        y, inverse = _normed(h, weight, eps, rounds_twice=True)
        ctx.save_for_backward(h, weight, inverse)
        return h, y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_h = _norm_backward(gradients[1], gradients[0], *ctx.saved_tensors)
        return d_h, d_h, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        given = _rows(gate), _rows(up), _rows(y)
        _over(gate, lambda first, end: loops.silu_mul(first, end, *given))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        given = tuple(map(_rows, (gradients[0].contiguous(), gate, up, d_gate, d_up)))
        _over(gate, lambda first, end: loops.silu_mul_backward(first, end, *given))
        return d_gate, d_up


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, counts: tuple[int, int, int], heads: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.counts = counts
        return torch.split(_turned(heads, counts, cos, sin, back=False), list(counts), dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        d_heads = torch.cat(gradients, dim=2)
        return None, None, None, _turned(d_heads, ctx.counts, *ctx.saved_tensors, back=True)


def _are_loops(*tensors: Tensor) -> bool:
    return all(each.dtype in DTYPES and each.device.type == "cpu" and each.is_contiguous() for each in tensors)


def _rows(x: Tensor) -> Any:
    """(..., width) as an array (tokens, width)."""
    return array(x.view(-1, x.shape[-1]))


def _over(x: Tensor, loop: Any) -> None:
    over_rows(x.shape[:-1].numel(), x.shape[-1], loop)


def _normed(x: Tensor, weight: Tensor, eps: float, *, rounds_twice: bool) -> tuple[Tensor, Tensor]:
    """The norm of x, and 1/sqrt(mean square + eps), fp32 (tokens,)."""
    y, (inverse, total) = torch.empty_like(x), torch.empty(2, x.shape[:-1].numel())
    hidden, sums = _rows(x), array(total)
    given = hidden, array(weight), np.float32(eps), rounds_twice, sums, _rows(y), array(inverse)

    def normed(first: int, end: int) -> None:
        loops.squares(first, end, hidden, sums)
        loops.norm(first, end, *given)

    _over(x, normed)
    return y, inverse


def _norm_backward(d_y: Tensor, more: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by h, plus `more`."""
    d_h, d_y = torch.empty_like(h), d_y.contiguous()
    added = d_y if more is None else more.contiguous()
    of_norm, total = (_rows(d_y), _rows(h), array(weight)), array(torch.empty_like(inverse))
    rest = array(inverse), total, more is not None, _rows(added), _rows(d_h)

    def back(first: int, end: int) -> None:
        loops.along(first, end, *of_norm, total)
        loops.norm_backward(first, end, *of_norm, *rest)

    _over(h, back)
    return d_h


def _turned(heads: Tensor, counts: tuple[int, int, int], cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Queries, keys and values, packed: (batch, length, sum of counts, width)."""
    y = torch.empty_like(heads)
    x, out = (array(each.view(-1, *each.shape[2:])) for each in (heads, y))
    given = x, counts[0] + counts[1], _rows(cos), _rows(sin), back, out
    over_rows(len(x), x.shape[1] * x.shape[2], lambda first, end: loops.turn(first, end, *given))
    return y
