"""Triton kernels for what lies between the matrix products of a decoder block, forward and backward.

Each is one pass over its activations where eager code makes several, and an autograd function so that autograd still
drives the block. Weights of norms are not trained here, so none gets a gradient. Arithmetic is fp32; results are
rounded to the activations' dtype where transformers rounds them.

    rms_norm     y = w * round(x / sqrt(mean(x^2) + eps))
    silu_mul     y = round(silu(g)) * u
    rotate       (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head
    mean_square  L = mean((y - t[index])^2), with dL/dy made in the same pass
    take_rows    x[index], rows of any size
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_ELEMENTS = 4096
"""Elements that a program handles in row-wise kernels; at least one row."""
FLAT_ELEMENTS = 2048


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of the last dimension of x (..., width); weight (width,)."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    y: Tensor = _SiluMul.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (batch, length, heads, width) by angles (length, width), equal in both halves."""
    y: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def mean_square(output: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """mean((output - targets[index])^2) in fp32; output (batch, ...), targets (samples, ...), index (batch,)."""
    loss: Tensor = _MeanSquare.apply(output, targets, index)  # type: ignore[no-untyped-call]
    return loss


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """source[index], contiguous; source (samples, ...)."""
    rows = torch.empty(len(index), *source.shape[1:], dtype=source.dtype, device=source.device)
    size = source[0].numel()
    _take_rows[(len(index), triton.cdiv(size, ROW_ELEMENTS))](source, index, rows, size, BLOCK=ROW_ELEMENTS)
    return rows


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, width = torch.empty_like(x), x.shape[-1]
        inverse = torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
        grid, sizes = _rows(len(inverse), width)
        _rms_norm[grid](x, weight, y, inverse, len(inverse), width, eps, **sizes)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        d_x = torch.empty_like(x)
        grid, sizes = _rows(len(inverse), x.shape[-1])
        _rms_norm_backward[grid](gradients[0].contiguous(), x, weight, inverse, d_x, len(inverse), x.shape[-1], **sizes)
        return d_x, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _silu_mul[_flat(y)](gate, up, y, y.numel(), BLOCK=FLAT_ELEMENTS)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        d_y = gradients[0].contiguous()
        _silu_mul_backward[_flat(d_y)](d_y, gate, up, d_gate, d_up, d_y.numel(), BLOCK=FLAT_ELEMENTS)
        return d_gate, d_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(gradients[0], *ctx.saved_tensors, backward=True), None, None


class _MeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        output = output.contiguous()
        row, gradient = output[0].numel(), torch.empty_like(output)
        parts = triton.cdiv(row, ROW_ELEMENTS)
        sums = torch.empty(len(output), parts, dtype=torch.float32, device=output.device)
        _mean_square[(len(output), parts)](
            output, targets, index, gradient, sums, row, 1.0 / output.numel(), BLOCK=ROW_ELEMENTS
        )
        ctx.save_for_backward(gradient)
        return sums.sum() / output.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0]), None, None


def _rows(count: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    padded = triton.next_power_of_2(width)
    rows = max(1, ROW_ELEMENTS // padded)
    return (triton.cdiv(count, rows),), {"ROWS": rows, "WIDTH": padded, "num_warps": 8 if padded > ROW_ELEMENTS else 4}


def _flat(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), FLAT_ELEMENTS),)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    batch, length, heads, width = x.shape
    y = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
    sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(width // 2)}
    _rotate[(batch * length,)](x, cos, sin, y, *x.stride(), length, heads, width // 2, BACKWARD=backward, **sizes)
    return y


@triton.jit
def _rms_norm(X, W, Y, INVERSE, count, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real = (row < count)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    normal = (x * inverse[:, None]).to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + at, (normal * w[None, :]).to(Y.dtype.element_ty), mask=real)
    tl.store(INVERSE + row, inverse, mask=row < count)


@triton.jit
def _rms_norm_backward(DY, X, W, INVERSE, DX, count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real = (row < count)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32)
    inverse = tl.load(INVERSE + row, mask=row < count, other=0.0)[:, None]
    normal = tl.load(X + at, mask=real, other=0.0).to(tl.float32) * inverse
    d_normal = tl.load(DY + at, mask=real, other=0.0).to(tl.float32) * w[None, :]
    along = (tl.sum(d_normal * normal, 1) / width)[:, None]
    tl.store(DX + at, (inverse * (d_normal - normal * along)).to(DX.dtype.element_ty), mask=real)


@triton.jit
def _silu_mul(GATE, UP, Y, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(GATE + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(UP + at, mask=at < count, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + at, (silu * u).to(Y.dtype.element_ty), mask=at < count)


@triton.jit
def _silu_mul_backward(DY, GATE, UP, DGATE, DUP, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(DY + at, mask=at < count, other=0.0).to(tl.float32)
    g = tl.load(GATE + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(UP + at, mask=at < count, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    silu = g * sigmoid
    tl.store(DUP + at, (d * silu).to(DUP.dtype.element_ty), mask=at < count)
    d_gate = d * u * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(DGATE + at, d_gate.to(DGATE.dtype.element_ty), mask=at < count)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    X,
    COS,
    SIN,
    Y,
    per_batch,
    per_token,
    per_head,
    per_column,
    length,
    heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = token % length
    head = tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    real = (head < heads)[:, None] & (column < half)[None, :]
    source = (token // length) * per_batch + position * per_token + head[:, None] * per_head
    source += column[None, :] * per_column
    target = token * heads * half * 2 + head[:, None] * half * 2 + column[None, :]
    cos = tl.load(COS + position * half * 2 + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + position * half * 2 + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        sin = -sin
    a = tl.load(X + source, mask=real, other=0.0).to(tl.float32)
    b = tl.load(X + source + half * per_column, mask=real, other=0.0).to(tl.float32)
    tl.store(Y + target, (a * cos - b * sin).to(Y.dtype.element_ty), mask=real)
    tl.store(Y + target + half, (b * cos + a * sin).to(Y.dtype.element_ty), mask=real)


@triton.jit
def _mean_square(Y, TARGETS, INDEX, GRADIENT, SUMS, row, share, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < row
    y = tl.load(Y + sample * row + column, mask=real, other=0.0).to(tl.float32)
    t = tl.load(TARGETS + tl.load(INDEX + sample) * row + column, mask=real, other=0.0).to(tl.float32)
    error = y - t
    tl.store(GRADIENT + sample * row + column, (2.0 * share * error).to(GRADIENT.dtype.element_ty), mask=real)
    tl.store(SUMS + sample * tl.num_programs(1) + tl.program_id(1), tl.sum(error * error, 0))


@triton.jit
def _take_rows(SOURCE, INDEX, ROWS, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(SOURCE + tl.load(INDEX + row) * size + column, mask=column < size, other=0.0)
    tl.store(ROWS + row * size + column, value, mask=column < size)
