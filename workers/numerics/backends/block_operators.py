"""Operations between the matrix products of a decoder block on a CPU, in few torch operators, forward and backward.

The functions are those of `workers.numerics.backends.block_kernels`, which has the formulas, with the same arguments;
any floating dtype. On a CPU an operator is a pass through memory in two threads, so their number decides the time, and
that none of them leaves the vector units' fast path, as truth values and temporary copies do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workers.numerics.causal_attention import attend

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
    """The norm over the last dimension of x (..., width), times weight (width,) plus `offset`.

    rounds_twice   before the product with the weight, too
    """
    if offset or not rounds_twice:
        weight = weight.to(_wide(x)) + offset
    y: Tensor = _RMSNorm.apply(x, weight, eps, rounds_twice)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + update and the norm of h, all (..., width); weight (width,)."""
    h, y = _AddRMSNorm.apply(x, update, weight, eps)  # type: ignore[no-untyped-call]
    return h, y


def silu_mul(*gate_up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; the two as two tensors (..., width) or packed in one, (..., 2 width)."""
    y: Tensor = _SiluMul.apply(*gate_up)  # type: ignore[no-untyped-call]
    return y


def gelu_mul(*gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with gelu's tanh form; the arguments of `silu_mul`."""
    gate, up = _halves(gate_up)
    return nn.functional.gelu(gate, approximate="tanh") * up


def apply_rope(*heads: Tensor, counts: Sequence[int], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned by their positions, and values as they are, each (batch, length, its heads, width).

    heads    queries, keys and values like that, or packed in one tensor (batch, length, sum of counts, width)
    counts   heads of queries, keys and values
    cos, sin (batch, length, width), or (1, length, width) where positions are the same; equal in both halves
    """
    query, key, value = _Turn.apply(cos, sin, tuple(counts), *heads)  # type: ignore[no-untyped-call]
    return query, key, value


@torch.no_grad()
def square_error(
    parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float
) -> tuple[Tensor, Tensor]:
    """share * mean((y - targets[index])^2) in fp32 or wider, and `scaled` times its gradient by y in y's dtype.

    parts   one or two tensors (batch, ...) whose sum is y      targets (sequences, ...)      index (batch,)
    Not for autograd. The difference is rounded as y is; squares and their sum are not.
    """
    error = _errors(parts, targets, index)
    loss = _lengths(error).square().sum() * (share / error.numel())
    return loss, error.mul_(2 * share * scaled / error.numel())


def error_gradient(parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float) -> Tensor:
    """The gradient of `square_error` alone."""
    error = _errors(parts, targets, index)
    return error.mul_(2 * share * scaled / error.numel())


def _errors(parts: Sequence[Tensor], targets: Tensor, index: Tensor) -> Tensor:
    """y - targets[index], rounded as y is, new."""
    targets = targets.index_select(0, index)
    return parts[0] - targets if len(parts) == 1 else (parts[0] + parts[1]).sub_(targets)


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """source[index], contiguous; source (sequences, ...)."""
    return source.index_select(0, index)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rounds_twice: bool) -> Tensor:
        y, inverse = _normed(x, weight, eps, rounds_twice=rounds_twice)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _norm_backward(gradients[0], *ctx.saved_tensors), None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        h = x + update
        y, inverse = _normed(h, weight, eps)
        ctx.save_for_backward(h, weight, inverse)
        return h, y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_h = _norm_backward(gradients[1], *ctx.saved_tensors).add_(gradients[0])
        return d_h, d_h, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *gate_up: Tensor) -> Tensor:
        gate, up = _halves(gate_up)
        activated = nn.functional.silu(gate)
        ctx.save_for_backward(*gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *gate_up, activated = ctx.saved_tensors
        d_gate_up = tuple(torch.empty_like(t) for t in gate_up)
        (gate, up), (d_gate, d_up) = _halves(gate_up), _halves(d_gate_up)
        torch.mul(gradients[0], activated, out=d_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=d_gate)
        return d_gate_up


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, counts: tuple[int, int, int], *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.counts, ctx.packed = counts, len(heads) == 1
        parts = torch.split(heads[0], list(counts), dim=2) if ctx.packed else heads
        return torch.split(_turned(parts, counts, cos, sin), list(counts), dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        d_heads = _turned(gradients, ctx.counts, cos, -sin)
        return None, None, None, *((d_heads,) if ctx.packed else torch.split(d_heads, list(ctx.counts), dim=2))


def _lengths(rows: Tensor) -> Tensor:
    """Euclidean lengths of the last dimension, which stays with size 1; fp32 or wider."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=_wide(rows))
    return lengths


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _normed(x: Tensor, weight: Tensor, eps: float, *, rounds_twice: bool = True) -> tuple[Tensor, Tensor]:
    """The norm of x, and 1/sqrt(mean square + eps), fp32 or wider (..., 1)."""
    inverse = _lengths(x).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normal = x.to(inverse.dtype, copy=True).mul_(inverse)
    if rounds_twice:
        normal = normal.to(x.dtype)
    return normal.to(weight.dtype).mul_(weight).to(x.dtype), inverse


def _norm_backward(d_y: Tensor, h: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by h."""
    d_normal = (d_y * weight).to(inverse.dtype)
    normal = h.to(inverse.dtype, copy=True).mul_(inverse)
    along = torch.linalg.vecdot(d_normal, normal).unsqueeze(-1).div_(-h.shape[-1])
    return normal.mul_(along).add_(d_normal).mul_(inverse).to(h.dtype)


def _turned(parts: Sequence[Tensor], counts: tuple[int, int, int], cos: Tensor, sin: Tensor) -> Tensor:
    """Queries, keys and values, packed: (batch, length, sum of counts, width)."""
    batch, length, _, width = parts[0].shape
    packed = torch.empty(batch, length, sum(counts), width, dtype=parts[0].dtype)
    query, key, value = torch.split(packed, list(counts), dim=2)
    half = width // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    for x, y in zip(parts, (query, key), strict=False):
        (a, b), (first, second) = torch.split(x, half, -1), torch.split(y, half, -1)
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=second).addcmul_(a, sin)
    value.copy_(parts[2])
    return packed


def _halves(gate_up: Sequence[Tensor]) -> Sequence[Tensor]:
    return gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=-1)
