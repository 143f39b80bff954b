"""Linears in a block type of llama.cpp's whose rounding is learned by the signs of gradients.

What SignRound hands to the tuning loop for these schemes: the tensors, their start and the kept result; the formulas
are in `workers.numerics.backends.block_rounding_operators`.

The start is the searched grid (`workers.numerics.blocks.search`), weighted by the inputs' second moments. Its d and
dmin are fp16 numbers and stay, so that what is tuned is what a file stores, to the bit.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import ODD_LEVELS, BlockType
from workers.numerics.backends import block_rounding_operators as operators
from workers.numerics.backends.block_rounding_operators import BlockGroups
from workers.numerics.blocks.search import column_weights, search_blocks
from workers.numerics.learned_ranges import working_dtype
from workers.numerics.quantized import BlockWeight, LinearResult, Number

PACE = 0.0
"""Of alpha and beta beside V's."""


class TunedBlocks:
    """Linears of one scheme with their V, alpha and beta: `TrainableWeights` of a block type."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        second_moments: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """V = 0 and alpha = beta = 1 on the searched grid, weighted by the inputs' second moments where known."""
        self.shapes: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()
        }
        self._grids = {
            name: search_blocks(weight, scheme, second_moments.get(name)) for name, weight in weights.items()
        }
        self._kind: BlockType = next(iter(self._grids.values())).kind
        self.state = _start(weights, self._grids, second_moments)
        self._faults = torch.zeros(1, dtype=torch.int32, device=self.state.weight.device)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        operators.write(self.state, self._kind, w_hat=out)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """V, alpha and beta by the signs of their gradients."""
        operators.step(
            self.state, self._kind, gradient=gradient, rate=rate, faults=self._faults, pace=PACE, w_hat=out
        )

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        operators.keep(self.state, self._kind, better=better)

    def restart(self) -> None:
        self.state.offset.zero_()
        self.state.alpha.fill_(1)
        self.state.beta.fill_(1)
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
            groups = slice(first, first := first + math.prod(shape) // self._kind.columns)
            grid = self._grids[name]
            of_parts = {
                part: None if getattr(grid, part) is None else getattr(self.state, part)[groups].view(shape[0], -1).clone()
                for part in ("scale_codes", "minimum_codes")
            }
            codes = self.state.codes[groups].reshape(shape).clone()
            results[name] = LinearResult(replace(grid, codes=codes, **of_parts))
        return results


def _start(
    weights: Mapping[str, Tensor], grids: Mapping[str, BlockWeight], second_moments: Mapping[str, Tensor]
) -> BlockGroups:
    """V = 0, alpha = beta = 1, and no result kept yet."""
    kind = next(iter(grids.values())).kind
    weight = torch.cat([each.reshape(-1, kind.columns) for each in weights.values()])
    working = working_dtype(weight)
    parts = kind.weights // kind.columns

    def of_sub_blocks(tensors: list[Tensor]) -> Tensor:
        return torch.cat([each.float().repeat_interleave(parts, 1).flatten() for each in tensors]).to(working)

    scale = of_sub_blocks([grid.scale for grid in grids.values()])
    one, none = torch.ones_like(scale), scale.new_empty(0)
    numbers = one.clone()
    if kind.scales is not None:
        codes = torch.cat([_given(grid.scale_codes).flatten() for grid in grids.values()])
        numbers = (codes.float() * kind.scales.step + kind.scales.first).to(working)
    minimum, minimum_numbers = none, none
    if kind.offset:
        minimum, minimum_numbers = of_sub_blocks([_given(grid.minimum) for grid in grids.values()]), one.clone()
    if kind.minimums is not None:
        minimum = -minimum
        minimum_numbers = torch.cat([_given(grid.minimum_codes).flatten() for grid in grids.values()]).to(working)
    importance = none
    if kind.levels == ODD_LEVELS:
        importance = torch.cat(
            [
                column_weights(second_moments.get(name), each).expand(each.shape).reshape(-1, kind.columns)
                for name, each in weights.items()
            ]
        )
    return BlockGroups(
        weight=weight,
        offset=torch.zeros_like(weight, dtype=working),
        scale=scale,
        numbers=numbers,
        minimum=minimum,
        minimum_numbers=minimum_numbers,
        alpha=one.clone(),
        beta=one.clone(),
        importance=importance.to(working),
        codes=torch.zeros_like(weight, dtype=torch.uint8),
        scale_codes=torch.zeros_like(one, dtype=torch.uint8),
        minimum_codes=torch.zeros_like(one, dtype=torch.uint8),
    )


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # noqa: S101 - for the type checker
    return tensor
