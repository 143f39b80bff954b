"""A linear whose weight's gradient is handed over as soon as it can be computed, instead of being kept by autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workers.numerics.floats.input_rounding import InputRounding

Receive = Callable[[Tensor, Tensor], None]
"""Given dL/dy (tokens, out) and x (tokens, in), from which dL/dW = (dL/dy)^T x."""


class GradientLinear(nn.Module):
    """y = x W^T + b.

    weight    (out, in), a view of a flat buffer; requires a gradient, so that autograd comes this way
    bias      (out,), not trained
    receive   called with the factors of the weight's gradient; the parameter itself gets none
    rounding  of x before the product, which passes gradients straight through; dL/dW is that by the rounded x
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, receive: Receive, rounding: InputRounding | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias
        self.receive = receive
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding is not None:
            x = StraightThrough.apply(x, self.rounding)  # type: ignore[no-untyped-call]
        y: Tensor = _Product.apply(x, self.weight, self.bias, self.receive)  # type: ignore[no-untyped-call]
        return y


class StraightThrough(torch.autograd.Function):
    """Rounded inputs, whose gradient is that of the inputs."""

    @staticmethod
    def forward(_: Any, x: Tensor, rounding: InputRounding) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, receive: Receive) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.receive = receive
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grad = ctx.saved_tensors, gradients[0]
        ctx.receive(grad.flatten(0, -2), x.flatten(0, -2))
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None
