"""Linears whose codes are learned by the signs of gradients on grids that stay.

What SignRound hands to the tuning loop for floating-point grids (`workers.numerics.floats.tuned_floats`) and for
llama.cpp's block types (`workers.numerics.blocks.tuned_blocks`): the tensors, their start and the kept result.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from workers.numerics.quantized import BlockWeight, FloatWeight, LinearResult, Number


class Groups(Protocol):
    """The tensors of a quantizer; the kept codes are uint8 (groups, G)."""

    @property
    def codes(self) -> Tensor: ...
    def tensors(self) -> dict[str, Any]:
        """All tensors by name."""
        ...

    def restart(self) -> None:
        """Sets what steps move to its start."""
        ...


class Quantizer(Protocol):
    """The functions of `workers.numerics.backends` for groups and a grid of one kind."""

    def write(self, groups: Any, grid: Any, /, w_hat: Tensor) -> None: ...
    def step(self, groups: Any, grid: Any, /, *, gradient: Tensor, rate: Tensor, faults: Tensor, w_hat: Tensor) -> None:
        """Moves by the signs of gradients, and writes."""
        ...

    def keep(self, groups: Any, grid: Any, /, better: Tensor) -> None: ...


State = TypeVar("State", bound=Groups)


class TunedCodes(Generic[State]):
    """Linears of one scheme as `TrainableWeights`.

    starts   what they begin as, of the shapes of the weights; only the codes are made anew
    grid     the element or axis that all have in common
    """

    def __init__(
        self,
        starts: Mapping[str, BlockWeight] | Mapping[str, FloatWeight],
        state: State,
        grid: Any,
        kernels: Quantizer,
    ) -> None:
        self.shapes: Mapping[str, tuple[int, int]] = {name: start.shape for name, start in starts.items()}
        self.state = state
        self._starts: Mapping[str, BlockWeight | FloatWeight] = dict(starts)
        self._grid, self._kernels = grid, kernels
        self._faults = torch.zeros(1, dtype=torch.int32, device=state.codes.device)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        self._kernels.write(self.state, self._grid, w_hat=out)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        self._kernels.step(self.state, self._grid, gradient=gradient, rate=rate, faults=self._faults, w_hat=out)

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        self._kernels.keep(self.state, self._grid, better=better)

    def restart(self) -> None:
        self.state.restart()
        self._faults.zero_()

    def adopt(self, other: "TunedCodes[State]") -> None:
        theirs = other.state.tensors()
        for name, tensor in self.state.tensors().items():
            tensor.copy_(theirs[name])
        self._starts = other._starts  # no step reads them
        self._faults.zero_()

    def faults(self) -> Number:
        return self._faults[0].clone() if self._faults.is_cuda else int(self._faults)

    def results(self) -> dict[str, LinearResult]:
        results, first = {}, 0
        for name, shape in self.shapes.items():
            groups = slice(first, first := first + math.prod(shape) // self.state.codes.shape[1])
            codes = self.state.codes[groups].reshape(shape).clone()
            results[name] = LinearResult(replace(self._starts[name], codes=codes))
        return results
