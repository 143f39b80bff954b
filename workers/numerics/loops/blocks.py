"""Loops of what lies between a decoder block's matrix products; `workers.numerics.backends.block_loops` calls them.

Arrays are (tokens, width) unless it is said; each loop takes tokens `first` to `end`. Numbers are rounded wherever
torch's operators would round them.

A loop with sums calls nothing that adds up and is called by no other loop: of a function that several loops call, the
linker takes one of several compilations, whose sums may be in another order.
"""

from typing import Any

import numpy as np

from workers.numerics.loops.compiled import adding_loop, loop
from workers.numerics.loops.numbers import rounded, stored, wide

LOG2_E = np.float32(1.44269504088896341)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
LEAST, MOST = np.float32(-87.0), np.float32(88.0)


@loop
def exponential(x: Any) -> Any:
    """e^x in fp32 within two units of the last place, of x within -87 and 88; a polynomial, which vector units take."""
    x = min(max(x, LEAST), MOST)
    n = np.rint(x * LOG2_E)
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@adding_loop
def squares(first: int, end: int, x: Any, total: Any) -> None:
    """total (tokens,): sums of squares"""
    for i in range(first, end):
        of_token = np.float32(0)
        for j in range(x.shape[1]):
            of_token += wide(x[i, j]) * wide(x[i, j])
        total[i] = of_token


@loop
def norm(first: int, end: int, x: Any, weight: Any, eps: Any, twice: Any, total: Any, y: Any, inverse: Any) -> None:
    """y = x / sqrt(mean square + eps) * weight, rounded before that product, too, if `twice`; inverse (tokens,).

    total   of `squares`
    """
    width = x.shape[1]
    for i in range(first, end):
        by = np.float32(1) / np.sqrt(total[i] / np.float32(width) + eps)
        inverse[i] = by
        if twice:
            for j in range(width):
                y[i, j] = stored(rounded(wide(x[i, j]) * by, x) * wide(weight[j]), y)
        else:
            for j in range(width):
                y[i, j] = stored(wide(x[i, j]) * by * wide(weight[j]), y)


@loop
def add(first: int, end: int, x: Any, update: Any, h: Any) -> None:
    """h = x + update"""
    for i in range(first, end):
        for j in range(x.shape[1]):
            h[i, j] = stored(wide(x[i, j]) + wide(update[i, j]), h)


@adding_loop
def along(first: int, end: int, d_y: Any, h: Any, weight: Any, total: Any) -> None:
    """total (tokens,): sums of d_y * weight, rounded, times h"""
    for i in range(first, end):
        of_token = np.float32(0)
        for j in range(h.shape[1]):
            of_token += rounded(wide(d_y[i, j]) * wide(weight[j]), d_y) * wide(h[i, j])
        total[i] = of_token


@loop
def norm_backward(
    first: int, end: int, d_y: Any, h: Any, weight: Any, inverse: Any, total: Any, adds: Any, more: Any, d_h: Any
) -> None:
    """The gradient by h of `norm`, rounded; plus `more`, rounded again, if `adds`. total: of `along`"""
    width = h.shape[1]
    for i in range(first, end):
        by = inverse[i]
        back = -(total[i] * by) / np.float32(width)
        for j in range(width):
            by_normal = rounded(wide(d_y[i, j]) * wide(weight[j]), d_y)
            value = (wide(h[i, j]) * by * back + by_normal) * by
            if adds:
                value = rounded(value, d_h) + wide(more[i, j])
            d_h[i, j] = stored(value, d_h)


@loop
def silu_mul(first: int, end: int, gate: Any, up: Any, y: Any) -> None:
    """y = silu(gate) * up, with silu rounded"""
    for i in range(first, end):
        for j in range(gate.shape[1]):
            g = wide(gate[i, j])
            y[i, j] = stored(rounded(g / (np.float32(1) + exponential(-g)), y) * wide(up[i, j]), y)


@loop
def silu_mul_backward(first: int, end: int, d_y: Any, gate: Any, up: Any, d_gate: Any, d_up: Any) -> None:
    """The gradients by gate and up of `silu_mul`."""
    one = np.float32(1)
    for i in range(first, end):
        for j in range(gate.shape[1]):
            g, d = wide(gate[i, j]), wide(d_y[i, j])
            share = one / (one + exponential(-g))
            d_up[i, j] = stored(d * rounded(g * share, d_y), d_up)
            d_gate[i, j] = stored(rounded(d * wide(up[i, j]), d_y) * share * (one + g * (one - share)), d_gate)


@loop
def turn(first: int, end: int, x: Any, turned: int, cos: Any, sin: Any, back: Any, y: Any) -> None:
    """x (tokens, heads, width) with its first `turned` heads turned by their token's angles, or `back`, in y.

    cos, sin (positions, width), equal in both halves; tokens take their rows in turn
    """
    half = x.shape[2] // 2
    for i in range(first, end):
        at = i % cos.shape[0]
        for h in range(turned):
            for j in range(half):
                a, b, c, s = wide(x[i, h, j]), wide(x[i, h, j + half]), wide(cos[at, j]), wide(sin[at, j])
                s = -s if back else s
                y[i, h, j] = stored(rounded(a * c, y) - b * s, y)
                y[i, h, j + half] = stored(rounded(b * c, y) + a * s, y)
        for h in range(turned, x.shape[1]):
            for j in range(2 * half):
                y[i, h, j] = x[i, h, j]


@loop
def errors(
    first: int, end: int, part: Any, other: Any, two: Any, targets: Any, index: Any, length: int, error: Any
) -> None:
    """error = y - targets; y = part, or part + other if `two`.

    Tokens are `length` for each sequence; index: sequences' places in targets (all tokens, width)
    """
    for i in range(first, end):
        at = index[i // length] * length + i % length
        for j in range(part.shape[1]):
            y = wide(part[i, j])
            if two:
                y = rounded(y + wide(other[i, j]), part)
            error[i, j] = stored(y - wide(targets[at, j]), error)


@loop
def scale(first: int, end: int, x: Any, factor: Any) -> None:
    """x = x * factor"""
    for i in range(first, end):
        for j in range(x.shape[1]):
            x[i, j] = stored(wide(x[i, j]) * factor, x)
