"""All experts of a part at once: one product over tokens sorted by expert, where their weights lie evenly in a buffer.

A block's experts are many small linears: called one by one they cost a launch each, forward and twice backward. Their
weights already lie one after another in the tuning loop's flat buffers (`workers.engine.tune.tuned_block`), so that
the same matrix of every expert is one view (experts, out, in) with a constant step. A grouped product takes them all,
and nothing waits for the device to know who has how many tokens: a step with experts can be captured.

    y[rows of e] = x[rows of e] W_e^T        dL/dx[rows of e] = dL/dy[rows of e] W_e
    dL/dW_e = dL/dy[rows of e]^T x[rows of e], exactly 0 where e has no rows
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.contracts.experts import RoutedExperts

Receive = Callable[[Tensor, Tensor, Tensor], None]
"""Given dL/dy (rows, out), x (rows, in) and the rows' ends by expert, from which dL/dW of every expert."""
ALIGNED = 16
"""Bytes that rows of a grouped product begin at multiples of."""


@dataclass(frozen=True)
class Stack:
    """One matrix of every expert, or several next to each other.

    weight    (experts, out, in), a view with a constant step; requires a gradient, so that autograd comes this way
    bias      (experts, out), not trained; None where there is none
    receive   called with the factors of the weight's gradient
    """

    weight: nn.Parameter
    bias: Tensor | None
    receive: Receive

    def __call__(self, rows: Tensor, ends: Tensor, owners: Tensor | None) -> Tensor:
        """(rows, in) -> (rows, out); `ends` of each expert's rows, int32; `owners` of rows, where there is a bias."""
        y: Tensor = _GroupedProduct.apply(rows, self.weight, ends, self.receive)  # type: ignore[no-untyped-call]
        return y if self.bias is None or owners is None else y + self.bias[owners]


@dataclass(frozen=True)
class GroupedExperts:
    """The `joined` of a part: its experts by two products.

    sides, down   their weights
    activated     what the part does between the two
    """

    sides: Stack
    down: Stack
    activated: Callable[[Tensor], Tensor]

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        owners = None
        if self.sides.bias is not None or self.down.bias is not None:
            places = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
            owners = torch.searchsorted(ends, places, right=True)
        return self.down(self.activated(self.sides(rows, ends, owners)), ends, owners)


def bias_of(part: RoutedExperts, names: Sequence[str]) -> Tensor | None:
    """The biases of these linears of every expert next to each other, (experts, out); None where there is none."""
    rows = [[part.linear(expert, name).bias for name in names] for expert in range(part.number)]
    present = [[bias.detach() for bias in row if bias is not None] for row in rows]
    return torch.stack([torch.cat(row) for row in present]) if all(len(row) == len(names) for row in present) else None


def receiver(gradient: Tensor, adds: Callable[[], bool], still: Tensor) -> Receive:
    """Puts dL/dW of every expert into `gradient` (experts, out, in), or adds it where `adds()` says so.

    still   truth values (experts,): whose gradient is 0 whatever it would be
    """

    def receive(by_output: Tensor, x: Tensor, ends: Tensor) -> None:
        made = weight_gradients(by_output, x, ends)
        # A kernel may leave what it does not compute as it finds it: nobody's gradient is nothing.
        without = (torch.diff(ends, prepend=ends.new_zeros(1)) == 0) | still
        made.masked_fill_(without.view(-1, 1, 1), 0)
        if adds():
            gradient.add_(made)
        else:
            gradient.copy_(made)

    return receive


def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (rows, in) of each expert times its weight of (experts, in, out): (rows, out)."""
    if _grouped(x, weight):
        return nn.functional.grouped_mm(x, weight, offs=ends)
    return torch.cat([part @ weight[expert] for expert, part in enumerate(torch.split(x, _sizes(ends)))])


def weight_gradients(by_output: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dL/dW (experts, out, in) from dL/dy (rows, out) and x (rows, in)."""
    if _grouped(x, by_output):
        return nn.functional.grouped_mm(by_output.T, x, offs=ends)
    sizes = _sizes(ends)
    pairs = zip(torch.split(by_output, sizes), torch.split(x, sizes), strict=True)
    return torch.stack([part.T @ own for part, own in pairs])


def _sizes(ends: Tensor) -> list[int]:
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


def _grouped(*matrices: Tensor) -> bool:
    """True if torch has a grouped product for these that does not wait for the device."""
    first = matrices[0]
    dtypes = (torch.bfloat16,) if first.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    widths = [size for matrix in matrices for size in matrix.shape[-2 if matrix.ndim > 2 else -1 :]]
    return first.dtype in dtypes and all(width * first.element_size() % ALIGNED == 0 for width in widths)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, receive: Receive) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.receive = receive
        return product(x, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, ends), grad = ctx.saved_tensors, gradients[0].contiguous()
        ctx.receive(grad, x, ends)
        return (product(grad, weight, ends) if ctx.needs_input_grad[0] else None), None, None, None
