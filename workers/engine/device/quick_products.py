"""Linears of a module in fp32 products where 16-bit ones are slower, for passes without gradients.

Inputs, weights and outputs keep their dtype and their roundings: what is multiplied is the same, and sums are fp32
either way, in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workers.numerics.product_dtype import product_dtype

WIDENED_ELEMENTS = 1 << 20
"""Elements of a weight that are in fp32 at a time."""


@contextmanager
def quick_products(module: nn.Module) -> Iterator[None]:
    """While the context lasts, the module's linears multiply in `product_dtype`."""
    linears = [each for each in module.modules() if type(each) is nn.Linear]
    slow = [each for each in linears if product_dtype(each.weight.device, each.weight.dtype) != each.weight.dtype]
    inputs = _Widened()
    for linear in slow:
        linear.forward = _Product(linear, inputs)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for linear in slow:
            del linear.forward


class _Widened:
    """The last inputs in another dtype: several linears get the same ones after another (queries, keys, values)."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor] | None = None

    def of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = (x, x._version, x.to(dtype))
        return self._last[2]


class _Product:
    """The forward pass of one linear, some rows of its weight at a time: never all of a large one in fp32."""

    def __init__(self, linear: nn.Linear, inputs: _Widened) -> None:
        self._linear, self._inputs = linear, inputs

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._linear.weight, self._linear.bias
        if torch.is_grad_enabled():
            return nn.functional.linear(x, weight, bias)
        dtype = product_dtype(weight.device, weight.dtype)
        wide, y = self._inputs.of(x, dtype), x.new_empty(*x.shape[:-1], len(weight))
        step = max(1, WIDENED_ELEMENTS // weight.shape[1])
        for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
            some = None if bias is None else bias[rows].to(dtype)
            y[..., rows] = nn.functional.linear(wide, weight[rows].to(dtype), some)
        return y
