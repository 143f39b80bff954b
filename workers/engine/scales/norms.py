"""Norms of the blocks, tuned along with the scales: every runtime loads them, and no grid holds them back.

With n the weight of an RMSNorm, o what it adds to that (0, or Gemma's 1), and y its outputs:

    n_hat = round((o + n)*(1 + p) - o)          p starts at 0; rounded to the model's dtype, as it is stored
    dL/dp = sum over tokens of y * dL/dy / (1 + p)

Rounding passes gradients straight through. Outputs and their gradients are all that this takes, so that the block's own
kernels, which give a norm's weight no gradient, stay as they are. Only norms of the hidden states are tuned whose form
is proved (`workers.engine.model.fused_parts`) and that are a tensor of the checkpoint as they are.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.methods import Form, Scheme
from workers.engine.model.fused_blocks import FusedRMSNorm
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.scales.moving_codes import moves_codes

NormName = tuple[int, str, str]
"""A norm: number of its block, the block's full name, and the norm's inside it."""


def tunes_norms(scheme: Scheme) -> bool:
    """True if norms are tuned along with a scheme: where scales hardly move, and where codes do."""
    return scheme.form in {Form.FLOAT, Form.BLOCKS} or moves_codes(scheme)


def tunable_norms(model: StreamedModel, quantized: Collection[str]) -> tuple[NormName, ...]:
    """The norms that can be tuned, of blocks with one of the quantized linears, in order."""
    found = []
    for index, block in enumerate(model.blocks):
        prefix = model.layout.block(index)
        if any(name.startswith(f"{prefix}.") for name in quantized):
            found += [
                (index, prefix, name)
                for name, module in block.named_modules()
                if isinstance(module, FusedRMSNorm)
                and module.weight.shape == (model.width,)
                and f"{prefix}.{name}.weight" in model.sources
            ]
    return tuple(found)


@dataclass(frozen=True)
class TunedNorm:
    """One norm of a block on the device.

    start              n before tuning, fp32 or fp64 (width,)
    change, gradient   p and dL/dp, views of what is flat over all
    """

    module: FusedRMSNorm
    start: Tensor
    change: Tensor
    gradient: Tensor

    @torch.no_grad()
    def write(self) -> None:
        """The weight of the present p, rounded as it is stored, in its place."""
        offset = self.module.offset
        # Without an offset the weight at p = 0 is the old one, bit for bit; with one n + (o + n)*p is that, too.
        self.module.weight.copy_(self.start + (self.start + offset) * self.change)

    def watch(self, normal: Tensor) -> Tensor:
        """The norm's outputs, whose gradient is looked at on its way."""
        anchor = torch.empty(0, device=normal.device, dtype=normal.dtype, requires_grad=True)
        watched: Tensor = _Watched.apply(normal, anchor, self)  # type: ignore[no-untyped-call]
        return watched


@dataclass(frozen=True)
class Norms:
    """All norms that are tuned, one after another in `change` and `gradient`, flat (norms * width,)."""

    names: Sequence[NormName]
    change: Tensor
    gradient: Tensor
    tuned: dict[NormName, TunedNorm] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Sequence[NormName], change: Tensor, gradient: Tensor) -> "Norms":
        """The norms of these names; `adopt` finds them in their blocks."""
        return cls(names, change, gradient)

    def adopt(self, prefix: str, block: nn.Module) -> None:
        """Takes over the norms of a loaded block, whose weights are written from now on."""
        width = len(self.change) // max(1, len(self.names))
        for place, name in enumerate(self.names):
            if name[1] != prefix:
                continue
            module = block.get_submodule(name[2])
            assert isinstance(module, FusedRMSNorm)  # noqa: S101 - for the type checker
            own = slice(place * width, (place + 1) * width)
            change, gradient = self.change[own], self.gradient[own]
            start = module.weight.detach().to(change.dtype, copy=True)
            norm = self.tuned[name] = TunedNorm(module, start, change, gradient)
            module.watch = norm.watch

    def write(self) -> None:
        """The weights of the present p."""
        for norm in self.tuned.values():
            norm.write()

    def stored(self) -> dict[int, dict[str, Tensor]]:
        """The present weights in the model's dtype: by block, by full parameter name."""
        found: dict[int, dict[str, Tensor]] = {}
        for (index, prefix, name), norm in self.tuned.items():
            found.setdefault(index, {})[f"{prefix}.{name}.weight"] = norm.module.weight.detach().clone()
        return found


class _Watched(torch.autograd.Function):
    """Outputs y of a norm as they are; in backward y * dL/dy is summed over tokens.

    The anchor asks for a gradient, so that autograd comes this way where the block's inputs ask for none.
    """

    @staticmethod
    def forward(ctx: Any, normal: Tensor, anchor: Tensor, norm: TunedNorm) -> Tensor:
        del anchor
        ctx.save_for_backward(normal)
        ctx.norm = norm
        return normal.view_as(normal)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (normal,), norm, given = ctx.saved_tensors, ctx.norm, gradients[0]
        width, wide = normal.shape[-1], norm.gradient.dtype
        sums = (normal.to(wide) * given.to(wide)).view(-1, width).sum(0)
        norm.gradient.add_(sums / (1 + norm.change))
        return (given if ctx.needs_input_grad[0] else None), None, None
