"""A linear whose weight is quantized and never trained, and the adapter beside it that is.

    y  = x W_hat^T + bias + adapter(x)
    dx = dy W_hat + what comes through the adapter            no gradient of W_hat is ever made, nor x kept for one

W_hat is either kept in the compute dtype, or made anew from codes and scales whenever it is needed, in the forward and
in the backward pass, so that of all weights one exists at a time. In a block that is computed again for the backward
pass it is saved as activations are: what the first forward pass saves is dropped, and from the second one to the
backward pass the block's weights exist, so that they are made twice a step and not three times.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.numerics.backend import unpack_kernels
from workers.numerics.packed_weight import PackedWeight
from workers.numerics.quantized import LinearResult, QuantizedWeight

MakeWeight = Callable[[], Tensor]
"""W_hat, (out, in), in the compute dtype."""


class AdaptedLinear(nn.Module):
    """Stands in for an `nn.Linear` while an adapter is trained.

    weight   W_hat where it is kept, or what makes it
    bias     (out,), not trained
    adapter  called as adapter(x) -> what is added to y, both (..., in) and (..., out) in the compute dtype
    saves    whether the backward pass finds W_hat among what was saved, instead of making it
    """

    def __init__(
        self,
        weight: Tensor | MakeWeight,
        bias: nn.Parameter | None,
        adapter: nn.Module | None,
        *,
        saves: bool = False,
    ) -> None:
        super().__init__()
        kept = weight if isinstance(weight, Tensor) else None
        self.make_weight = (lambda: kept) if kept is not None else weight
        self.bias = bias
        self.adapter = adapter
        self.saves = saves

    def forward(self, x: Tensor) -> Tensor:
        update = None if self.adapter is None else self.adapter(x)
        y: Tensor = _Product.apply(x, self.make_weight, self.bias, update, self.saves)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, make_weight: MakeWeight, bias: Tensor | None, update: Tensor | None, saves: bool
    ) -> Tensor:
        weight, ctx.make_weight = make_weight(), make_weight
        if saves and ctx.needs_input_grad[0]:
            ctx.save_for_backward(weight)
        y = nn.functional.linear(x, weight, bias)
        return y if update is None else y.add_(update)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (by_output,) = gradients
        by_input = None
        if ctx.needs_input_grad[0]:
            (weight,) = ctx.saved_tensors or (ctx.make_weight(),)
            by_input = by_output @ weight
        return by_input, None, None, by_output if ctx.needs_input_grad[3] else None, None


def rebuilt(weight: QuantizedWeight | LinearResult, dtype: torch.dtype) -> MakeWeight:
    """Makes W_hat from a weight on its device, each time anew; on a GPU from packed codes."""
    if isinstance(weight, LinearResult):
        result = weight
        return lambda: result.dequantize().to(dtype)
    if weight.dtype == dtype and unpack_kernels(weight.codes.device, dtype) is not None:
        return partial(PackedWeight.of(weight).dequantize, dtype)
    plain = weight
    return lambda: plain.dequantize().to(dtype)
