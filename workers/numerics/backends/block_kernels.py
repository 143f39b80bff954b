"""Triton kernels for the operations between the matrix products of a decoder block, forward and backward.

Each is one pass over its activations where eager code makes several, and an autograd function so that autograd still
drives the block. Weights of norms are not trained here, so none gets a gradient. Arithmetic is fp32; results are
rounded to the activations' dtype where transformers rounds them.

    rms_norm      y = w * round(x / sqrt(mean(x^2) + eps)); Gemma's has 1 + w, and rounds the product alone
    add_rms_norm  h = round(x + u), and the norm of h
    silu_mul      y = round(silu(g)) * u
    gelu_mul      y = round(gelu(g)) * u, gelu by tanh
    apply_rope          (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head of queries or keys
    square_error  L = share * mean((y - t[index])^2) and dL/dy, y given as a tensor or as two that add up to it
    take_rows     x[index], rows of any size
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_ELEMENTS = 4096
"""Elements that a program handles in row-wise kernels; at least one row."""
COLUMN_ELEMENTS = 2048
"""Most elements of one row that a program handles in elementwise kernels."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_twice: bool = True) -> Tensor:
    """The norm over the last dimension of x (..., width), times weight (width,) plus `offset`.

    rounds_twice   before the product with the weight, too
    """
    y: Tensor = _RMSNorm.apply(x, weight, eps, offset, rounds_twice)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + update and the norm of h, all (..., width); weight (width,)."""
    h, y = _AddRMSNorm.apply(x, update, weight, eps)  # type: ignore[no-untyped-call]
    return h, y


def silu_mul(*gate_up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; the two as two tensors (..., width) or packed in one, (..., 2 width)."""
    y: Tensor = _ActivationMul.apply("silu", *gate_up)  # type: ignore[no-untyped-call]
    return y


def gelu_mul(*gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with gelu's tanh form; the arguments of `silu_mul`."""
    y: Tensor = _ActivationMul.apply("gelu", *gate_up)  # type: ignore[no-untyped-call]
    return y


def apply_rope(*heads: Tensor, counts: Sequence[int], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned by their positions, and values as they are, each (batch, length, its heads, width).

    heads    queries, keys and values like that, or packed in one tensor (batch, length, sum of counts, width)
    counts   heads of queries, keys and values
    cos, sin (batch, length, width), or (1, length, width) where positions are the same; equal in both halves
    """
    query, key, value = _Turn.apply(cos, sin, tuple(counts), *heads)  # type: ignore[no-untyped-call]
    return query, key, value


def square_error(
    parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float
) -> tuple[Tensor, Tensor]:
    """share * mean((y - targets[index])^2) in fp32, and `scaled` times its gradient by y in y's dtype.

    parts   one or two tensors (batch, ...) whose sum is y      targets (sequences, ...)      index (batch,)
    Not for autograd.
    """
    sums, gradient = _errors(parts, targets, index, share, scaled)
    return sums.sum() * (share / gradient.numel()), gradient


def error_gradient(parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float) -> Tensor:
    """The gradient of `square_error` alone."""
    return _errors(parts, targets, index, share, scaled)[1]


def _errors(
    parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float
) -> tuple[Tensor, Tensor]:
    """Squares, summed by program, and `scaled` times the gradient of `share` times their mean."""
    first, last = parts[0].contiguous(), parts[-1].contiguous()
    row, gradient = first[0].numel(), torch.empty_like(first)
    sums = torch.empty(len(first), triton.cdiv(row, ROW_ELEMENTS), dtype=torch.float32, device=first.device)
    factor = share / first.numel() * 2 * scaled
    _square_error[tuple(sums.shape)](
        first, last, targets, index, gradient, sums, row, factor, ADDED=len(parts) > 1, BLOCK=ROW_ELEMENTS
    )
    return sums, gradient


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """source[index], contiguous; source (sequences, ...)."""
    rows = torch.empty(len(index), *source.shape[1:], dtype=source.dtype, device=source.device)
    size = source[0].numel()
    _take_rows[(len(index), triton.cdiv(size, ROW_ELEMENTS))](source, index, rows, size, BLOCK=ROW_ELEMENTS)
    return rows


def warm_ups(
    sizes: tuple[int, int], heads: Sequence[int], head_width: int, dtype: torch.dtype, device: torch.device
) -> list[Callable[[], object]]:
    """Calls on a few tokens, forward and backward, which compile the kernels for blocks of these sizes.

    sizes   of hidden states and of the MLP's inside      heads   of queries, keys and values
    """

    def hidden(*shape: int) -> Tensor:
        return torch.ones(2, 16, *shape, dtype=dtype, device=device, requires_grad=True)

    width, inner = sizes
    weight, index = torch.ones(width, dtype=dtype, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    angles = {name: torch.ones(16, head_width, dtype=dtype, device=device) for name in ("cos", "sin")}

    def both_ways(function: Callable[[], Any]) -> None:
        outputs = function()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    def at_the_end() -> None:
        rows = take_rows(hidden(width).detach(), index)
        square_error([rows, rows], rows, index, 1.0, 1.0)

    return [
        lambda: rms_norm(hidden(width).detach(), weight, 1e-5),
        lambda: both_ways(lambda: add_rms_norm(hidden(width), hidden(width), weight, 1e-5)),
        lambda: both_ways(lambda: silu_mul(hidden(2 * inner))),
        lambda: both_ways(lambda: apply_rope(hidden(sum(heads), head_width), counts=heads, **angles)),
        at_the_end,
    ]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds_twice: bool) -> Tensor:
        x = x.contiguous()
        y, inverse = _normed(x, None, x, weight, eps, offset=offset, rounds_twice=rounds_twice)
        ctx.offset = offset
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _norm_backward(gradients[0], None, *ctx.saved_tensors, offset=ctx.offset), None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
        y, inverse = _normed(x.contiguous(), update.contiguous(), h, weight, eps)
        ctx.save_for_backward(h, weight, inverse)
        return h, y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_h = _norm_backward(gradients[1], gradients[0], *ctx.saved_tensors)
        return d_h, d_h, None, None


class _ActivationMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: str, *gate_up: Tensor) -> Tensor:
        gate_up = tuple(t.contiguous() for t in gate_up)
        ctx.save_for_backward(*gate_up)
        ctx.gelu = activation == "gelu"
        gate, up = _halves(gate_up)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grid, sizes = _columns(gate)
        _activation_mul[grid](gate, up, y, gate.stride(-2), gate.shape[-1], GELU=ctx.gelu, **sizes)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate_up = ctx.saved_tensors  # once: where blocks are recomputed, a second access fails
        d_gate_up = tuple(torch.empty_like(t) for t in gate_up)
        (gate, up), (d_gate, d_up) = _halves(gate_up), _halves(d_gate_up)
        grid, sizes = _columns(gate)
        d_y, places = gradients[0].contiguous(), (gate.stride(-2), gate.shape[-1])
        _activation_mul_backward[grid](d_y, gate, up, d_gate, d_up, *places, GELU=ctx.gelu, **sizes)
        return None, *d_gate_up


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, counts: tuple[int, int, int], *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.counts, ctx.packed = counts, len(heads) == 1
        parts = torch.split(heads[0], list(counts), dim=2) if ctx.packed else heads
        return torch.split(_turned(parts, counts, cos, sin, backward=False), list(counts), dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        d_heads = _turned(gradients, ctx.counts, *ctx.saved_tensors, backward=True)
        return None, None, None, *((d_heads,) if ctx.packed else torch.split(d_heads, list(ctx.counts), dim=2))


def _normed(
    x: Tensor,
    update: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_twice: bool = True,
) -> tuple[Tensor, Tensor]:
    """The norm of x, or of h <- x + update, and 1/sqrt(mean square + eps), fp32 (rows,)."""
    y, width = torch.empty_like(x), x.shape[-1]
    inverse = torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
    grid, sizes = _rows(len(inverse), width)
    added = update is not None
    places, kind = (len(inverse), width, eps, offset), {"ADDED": added, "ROUNDS_TWICE": rounds_twice}
    _rms_norm[grid](x, update if added else x, h, weight, y, inverse, *places, **kind, **sizes)
    return y, inverse


def _norm_backward(
    d_y: Tensor, d_h: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor, *, offset: float = 0.0
) -> Tensor:
    """The gradient by h: `d_h` plus the gradient through the norm."""
    gradient, d_y = torch.empty_like(h), d_y.contiguous()
    grid, sizes = _rows(len(inverse), h.shape[-1])
    added = d_h is not None
    also = d_y if d_h is None else d_h.contiguous()
    places = (len(inverse), h.shape[-1], offset)
    _rms_norm_backward[grid](d_y, also, h, weight, inverse, gradient, *places, ADDED=added, **sizes)
    return gradient


def _turned(
    parts: Sequence[Tensor], counts: tuple[int, int, int], cos: Tensor, sin: Tensor, *, backward: bool
) -> Tensor:
    """Queries, keys and values, packed: (batch, length, sum of counts, width)."""
    parts = [heads if heads.stride(-1) == 1 else heads.contiguous() for heads in parts]
    batch, length, _, width = parts[0].shape
    packed = torch.empty(batch, length, sum(counts), width, dtype=parts[0].dtype, device=parts[0].device)
    strides = [stride for heads in parts for stride in heads.stride()[:3]]
    sizes = {"QUERIES": triton.next_power_of_2(counts[0]), "KEYS": triton.next_power_of_2(max(counts[1:]))}
    half = {"HALF": triton.next_power_of_2(width // 2), "BACKWARD": backward}
    cos, sin = cos.contiguous(), sin.contiguous()
    angles = cos.numel() // width
    _turn[(batch * length,)](*parts, packed, cos, sin, *strides, length, angles, *counts, width // 2, **sizes, **half)
    return packed


def _halves(gate_up: Sequence[Tensor]) -> Sequence[Tensor]:
    return gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=-1)


def _rows(count: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    padded = triton.next_power_of_2(width)
    rows = max(1, ROW_ELEMENTS // padded)
    return (triton.cdiv(count, rows),), {"ROWS": rows, "WIDTH": padded, "num_warps": 8 if padded > ROW_ELEMENTS else 4}


def _columns(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """A grid over rows and pieces of columns; pieces divide the width if a large power of two does."""
    width = x.shape[-1]
    even = width & -width
    block = min(COLUMN_ELEMENTS, even if even >= 256 else triton.next_power_of_2(width))
    return (x.numel() // width, triton.cdiv(width, block)), {"BLOCK": block, "num_warps": max(1, min(4, block // 256))}


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    X,
    UPDATE,
    H,
    W,
    Y,
    INVERSE,
    count,
    width,
    eps,
    offset,
    ADDED: tl.constexpr,
    ROUNDS_TWICE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real = (row < count)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(UPDATE + at, mask=real, other=0.0).to(tl.float32)
        x = x.to(H.dtype.element_ty).to(tl.float32)
        tl.store(H + at, x.to(H.dtype.element_ty), mask=real)
    w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32) + offset
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    normal = x * inverse[:, None]
    if ROUNDS_TWICE:
        normal = normal.to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + at, (normal * w[None, :]).to(Y.dtype.element_ty), mask=real)
    tl.store(INVERSE + row, inverse, mask=row < count)


@triton.jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    DY, DH, H, W, INVERSE, D, count, width, offset, ADDED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real = (row < count)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32) + offset
    inverse = tl.load(INVERSE + row, mask=row < count, other=0.0)[:, None]
    normal = tl.load(H + at, mask=real, other=0.0).to(tl.float32) * inverse
    d_normal = tl.load(DY + at, mask=real, other=0.0).to(tl.float32) * w[None, :]
    along = (tl.sum(d_normal * normal, 1) / width)[:, None]
    d = inverse * (d_normal - normal * along)
    if ADDED:
        d += tl.load(DH + at, mask=real, other=0.0).to(tl.float32)
    tl.store(D + at, d.to(D.dtype.element_ty), mask=real)


@triton.jit
def _gelu_tanh(g):  # type: ignore[no-untyped-def]
    """tanh(sqrt(2 / pi) (g + 0.044715 g^3)); gelu(g) = g (1 + it) / 2."""
    inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
    away = tl.exp(-2.0 * tl.abs(inner))  # at most 1
    size = (1.0 - away) / (1.0 + away)
    return tl.where(inner < 0, -size, size)


@triton.jit
def _activation_mul(GATE, UP, Y, per_row, width, GELU: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    g = tl.load(GATE + row * per_row + column, mask=real, other=0.0).to(tl.float32)
    u = tl.load(UP + row * per_row + column, mask=real, other=0.0).to(tl.float32)
    if GELU:  # noqa: SIM108 - a constant of the compiler chooses
        activated = 0.5 * g * (1.0 + _gelu_tanh(g))
    else:
        activated = g / (1.0 + tl.exp(-g))
    activated = activated.to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + row * width + column, (activated * u).to(Y.dtype.element_ty), mask=real)


@triton.jit
def _activation_mul_backward(  # type: ignore[no-untyped-def]
    DY, GATE, UP, DGATE, DUP, per_row, width, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    d = tl.load(DY + row * width + column, mask=real, other=0.0).to(tl.float32)
    g = tl.load(GATE + row * per_row + column, mask=real, other=0.0).to(tl.float32)
    u = tl.load(UP + row * per_row + column, mask=real, other=0.0).to(tl.float32)
    if GELU:
        t = _gelu_tanh(g)
        activated = 0.5 * g * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        activated = g * sigmoid
        slope = sigmoid + activated * (1.0 - sigmoid)
    tl.store(DUP + row * per_row + column, (d * activated).to(DUP.dtype.element_ty), mask=real)
    d_gate = d * u * slope
    tl.store(DGATE + row * per_row + column, d_gate.to(DGATE.dtype.element_ty), mask=real)


@triton.jit
def _turn_heads(  # type: ignore[no-untyped-def]
    SOURCE, TARGET, cos, sin, per_head, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr
):
    """The heads of one token: from SOURCE, `per_head` apart, to TARGET, one after another."""
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    real = (head < heads) & (column < half)
    a = tl.load(SOURCE + head * per_head + column, mask=real, other=0.0).to(tl.float32)
    b = tl.load(SOURCE + head * per_head + column + half, mask=real, other=0.0).to(tl.float32)
    first, second = a, b
    if not STILL:
        first, second = a * cos - b * sin, b * cos + a * sin
    at = head * half * 2 + column
    tl.store(TARGET + at, first.to(TARGET.dtype.element_ty), mask=real)
    tl.store(TARGET + at + half, second.to(TARGET.dtype.element_ty), mask=real)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    Q,
    K,
    V,
    PACKED,
    COS,
    SIN,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    length,
    angles,
    queries,
    keys,
    values,
    half,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    column = tl.arange(0, HALF)
    angle = token % angles * half * 2 + column
    cos = tl.load(COS + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        sin = -sin
    target = PACKED + token * (queries + keys + values) * half * 2
    _turn_heads(Q + batch * q_batch + position * q_token, target, cos, sin, q_head, queries, half, QUERIES, HALF, False)
    target += queries * half * 2
    _turn_heads(K + batch * k_batch + position * k_token, target, cos, sin, k_head, keys, half, KEYS, HALF, False)
    target += keys * half * 2
    _turn_heads(V + batch * v_batch + position * v_token, target, cos, sin, v_head, values, half, KEYS, HALF, True)


@triton.jit
def _square_error(  # type: ignore[no-untyped-def]
    FIRST, LAST, TARGETS, INDEX, GRADIENT, SUMS, row, factor, ADDED: tl.constexpr, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < row
    at = sequence * row + column
    y = tl.load(FIRST + at, mask=real, other=0.0).to(tl.float32)
    if ADDED:
        y += tl.load(LAST + at, mask=real, other=0.0).to(tl.float32)
        y = y.to(GRADIENT.dtype.element_ty).to(tl.float32)
    t = tl.load(TARGETS + tl.load(INDEX + sequence) * row + column, mask=real, other=0.0).to(tl.float32)
    error = y - t
    tl.store(GRADIENT + at, (factor * error).to(GRADIENT.dtype.element_ty), mask=real)
    tl.store(SUMS + sequence * tl.num_programs(1) + tl.program_id(1), tl.sum(error * error, 0))


@triton.jit
def _take_rows(SOURCE, INDEX, ROWS, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(SOURCE + tl.load(INDEX + row) * size + column, mask=column < size, other=0.0)
    tl.store(ROWS + row * size + column, value, mask=column < size)
