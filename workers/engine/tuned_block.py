"""A block whose linears take their weights from flat buffers and put their weights' gradients into others.

The tuned block is a copy: the loop may keep it from block to block while the model's own blocks come and go.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.contracts import BlockTask, TrainableWeights

PLAIN = (bool, int, float, str, type(None))
NOT_SHAPE = frozenset({"training", "layer_idx"})
"""Plain attributes of modules that differ from block to block without changing what a block computes."""


@dataclass(frozen=True)
class FlatWeights:
    """W_hat of one `TrainableWeights` and the gradient with respect to it, flat; the block's linears are views."""

    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class TunedBlock:
    """The copy of a block, with a `TunedLinear` for every linear that is tuned and nothing else trainable."""

    module: nn.Module
    flats: tuple[FlatWeights, ...]
    linears: tuple["TunedLinear", ...]

    @classmethod
    def of(cls, task: BlockTask, weights: Sequence[TrainableWeights]) -> "TunedBlock":
        """The block of a task. The copy shares no memory with it; tuned weights are left for the loop to write."""
        tuned = {name for part in weights for name in part.shapes}
        skipped: dict[int, Any] = {id(weight := task.linear(n).weight): nn.Parameter(weight[:0]) for n in tuned}
        module = copy.deepcopy(task.block, skipped).requires_grad_(False)
        flats = tuple(_flatten(module, part, task) for part in weights)
        return cls(module, flats, tuple(m for m in module.modules() if isinstance(m, TunedLinear)))

    def adopt(self, block: nn.Module) -> None:
        """The parameters and buffers of another block of the same shape, but for the tuned weights."""
        others = dict(block.named_parameters()) | dict(block.named_buffers())
        tuned = {id(linear.weight) for linear in self.linears}
        for name, mine in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if id(mine) not in tuned:
                mine.data.copy_(others[name])

    def add_gradients(self, adds: bool) -> None:
        """Whether the next backward adds to the gradients instead of overwriting them."""
        for linear in self.linears:
            linear.adds = adds


class TunedLinear(nn.Module):
    """y = x W^T + b, with dL/dW written into (or added to) `gradient`.

    weight    (out, in), a view of a flat buffer that requires a gradient so that autograd comes this way
    gradient  (out, in), a view of the flat gradient
    """

    def __init__(self, weight: Tensor, gradient: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias
        self.gradient = gradient
        self.adds = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _LinearIntoBuffer.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y


class _LinearIntoBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: TunedLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), linear, grad = ctx.saved_tensors, ctx.linear, gradients[0]
        rows = grad.flatten(0, -2)
        if linear.adds:
            linear.gradient.addmm_(rows.T, x.flatten(0, -2))
        else:
            torch.mm(rows.T, x.flatten(0, -2), out=linear.gradient)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None


def shape_of(block: nn.Module) -> tuple[object, ...]:
    """What two blocks must share to be computed by the same captured steps."""
    tensors = [(name, tuple(t.shape), t.dtype) for name, t in block.state_dict(keep_vars=True).items()]
    return (*tensors, *((name, type(module), _plain_attributes(module)) for name, module in block.named_modules()))


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, object], ...]:
    found = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, PLAIN)}
    return tuple(sorted((k, v) for k, v in found.items() if k not in NOT_SHAPE))


def _flatten(module: nn.Module, part: TrainableWeights, task: BlockTask) -> FlatWeights:
    """Flat buffers for one set of weights, with the module's linears as views of them."""
    example = task.linear(next(iter(part.shapes))).weight
    sizes = [math.prod(shape) for shape in part.shapes.values()]
    value, gradient = (torch.zeros(sum(sizes), dtype=example.dtype, device=example.device) for _ in range(2))
    pieces = zip(part.shapes.items(), torch.split(value, sizes), torch.split(gradient, sizes), strict=True)
    for (name, shape), mine, its_gradient in pieces:
        bias = getattr(module.get_submodule(name), "bias", None)
        module.set_submodule(name, TunedLinear(mine.view(shape), its_gradient.view(shape), bias))
    return FlatWeights(value, gradient)
