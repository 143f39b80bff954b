"""A linear whose weight's gradient is handed over as soon as it can be computed, instead of being kept by autograd."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workers.numerics.floats.input_rounding import InputRounding

Receive = Callable[[Tensor, Tensor], None]
"""Given dL/dy (tokens, out) and x (tokens, in), from which dL/dW = (dL/dy)^T x."""


class Backward(Protocol):
    """The backward pass of a linear: hands dL/dW over, and returns dL/dx (tokens, in) if it is asked for."""

    def __call__(self, by_output: Tensor, x: Tensor, weight: Tensor, *, by_input: bool) -> Tensor | None:
        """Of dL/dy (tokens, out), x (tokens, in) and W (out, in)."""
        ...


def exact(receive: Receive) -> Backward:
    """The backward pass whose products are those of its factors; `receive` gets the factors of dL/dW."""

    def backward(by_output: Tensor, x: Tensor, weight: Tensor, *, by_input: bool) -> Tensor | None:
        receive(by_output, x)
        return by_output @ weight if by_input else None

    return backward


class GradientLinear(nn.Module):
    """y = x W^T + b.

    weight    (out, in), a view of a flat buffer; requires a gradient, so that autograd comes this way
    bias      (out,), not trained
    backward  the backward pass, which hands over the weight's gradient; the parameter itself gets none
    rounding  of x before the product, which passes gradients straight through; dL/dW is that by the rounded x
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, backward: Backward, rounding: InputRounding | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias
        self.backward = backward
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding is not None:
            x = StraightThrough.apply(x, self.rounding)  # type: ignore[no-untyped-call]
        y: Tensor = _Product.apply(x, self.weight, self.bias, self.backward)  # type: ignore[no-untyped-call]
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backward: Backward) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pass_back = backward
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grad, by_input = ctx.saved_tensors, gradients[0], ctx.needs_input_grad[0]
        by_x = ctx.pass_back(grad.flatten(0, -2), x.flatten(0, -2), weight, by_input=by_input)
        return None if by_x is None else by_x.view_as(x), None, None, None
