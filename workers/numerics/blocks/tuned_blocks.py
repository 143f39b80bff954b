"""Linears in a block type of llama.cpp's whose rounding is learned by the signs of gradients.

What SignRound hands to the tuning loop for these schemes: the tensors, their start and the kept result; the formulas
are in `workers.numerics.backends.rounding.block_rounding_operators`.

The start is a quantized weight: its grid and its codes. Factors, offsets and their codes stay, so that what is tuned is
what a file stores, to the bit.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from workers.numerics.backend import block_rounding_kernels
from workers.numerics.backends.rounding.block_rounding_operators import BlockGroups
from workers.numerics.blocks.axis import BlockAxis, start_of
from workers.numerics.learned_ranges import working_dtype
from workers.numerics.quantized import BlockWeight, LinearResult, Number


class TunedBlocks:
    """Linears of one scheme with the places of their weights: `TrainableWeights` of a block type."""

    def __init__(self, weights: Mapping[str, Tensor], starts: Mapping[str, BlockWeight]) -> None:
        """Weights (out, in), and what they begin as."""
        self.shapes: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()
        }
        self._grids = dict(starts)
        self._axis = BlockAxis(next(iter(starts.values())).kind)
        self.state = _start(self._axis, weights, starts)
        self._kernels = block_rounding_kernels(self.state.place.device, self.state.place.dtype)
        self._faults = torch.zeros(1, dtype=torch.int32, device=self.state.place.device)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        self._kernels.write(self.state, self._axis, w_hat=out)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """Places by the signs of their gradients."""
        self._kernels.step(self.state, self._axis, gradient=gradient, rate=rate, faults=self._faults, w_hat=out)

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        self._kernels.keep(self.state, self._axis, better=better)

    def restart(self) -> None:
        self.state.place.copy_(self.state.start)
        self._faults.zero_()

    def adopt(self, other: "TunedBlocks") -> None:
        theirs = other.state.tensors()
        for name, tensor in self.state.tensors().items():
            tensor.copy_(theirs[name])
        self._grids = other._grids  # no step reads them
        self._faults.zero_()

    def faults(self) -> Number:
        return self._faults[0].clone() if self._faults.is_cuda else int(self._faults)

    def results(self) -> dict[str, LinearResult]:
        results, first = {}, 0
        for name, shape in self.shapes.items():
            groups = slice(first, first := first + math.prod(shape) // self.state.place.shape[1])
            codes = self.state.codes[groups].reshape(shape).clone()
            results[name] = LinearResult(replace(self._grids[name], codes=codes))
        return results


def _start(axis: BlockAxis, weights: Mapping[str, Tensor], starts: Mapping[str, BlockWeight]) -> BlockGroups:
    """Every place in its code's interval, and no result kept yet."""
    width, grids = axis.kind.columns, [starts[name] for name in weights]
    weight = torch.cat([each.reshape(-1, width) for each in weights.values()])
    working = working_dtype(weight)
    factor = torch.cat([grid.factor().flatten() for grid in grids]).to(working)
    offsets = [offset.flatten() for grid in grids if (offset := grid.offset()) is not None]
    offset = torch.cat(offsets).to(working) if offsets else factor.new_empty(0)
    codes = torch.cat([grid.codes.view(-1, width) for grid in grids])
    place = start_of(axis, weight, codes, factor, offset if offsets else None)
    return BlockGroups(place, place.clone(), factor, offset, torch.zeros_like(codes))
