"""Linears on a floating-point grid whose rounding is learned by the signs of gradients, scales fixed.

What SignRound hands to the tuning loop for the schemes of e2m1 and e4m3: the tensors, their start and the kept result;
the formulas are in `workers.numerics.backends.rounding.float_rounding_operators`.

Scales are the best that can be stored (`float_grids.searched`) and stay so. Tuned along with V, as
those of integers are, they do harm: a group of 16 has little say in its scale's gradient, and a step of it moves all of
its weights. On the tiny model of the tests, NVFP4 at 65,536 tokens, a KL of 0.0016 with scales fixed is 0.0031 with
tuned ones, and 0.0046 rounded to nearest; the first two blocks of SmolLM2-135M (50 steps, 8,192 tokens) lose 36 and
41 % of their held-out error with scales fixed, and 0 and 26 % of a larger one with tuned ones.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.backend import float_rounding_kernels
from workers.numerics.backends.rounding.float_rounding_operators import FloatGroups
from workers.numerics.floats import float_grids
from workers.numerics.floats.elements import element_of
from workers.numerics.learned_ranges import working_dtype
from workers.numerics.quantized import FloatWeight, LinearResult, Number


class TunedFloats:
    """Linears of one scheme with their V: `TrainableWeights` of a floating-point grid."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        scale_dtype: torch.dtype,
        second_moments: Mapping[str, Tensor] = MappingProxyType({}),
        joined_amax: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """V = 0 on the best of the stored scales, weighted by the inputs' second moments where they are known.

        joined_amax   by linear, as in `workers.numerics.floats.joined`
        """
        self.shapes: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()
        }
        self._element = element_of(scheme)
        self._grids = {
            name: float_grids.searched_grid(
                weight, scheme, scale_dtype, joined_amax.get(name), second_moments.get(name)
            )
            for name, weight in weights.items()
        }
        self.state = _start(weights, self._grids)
        self._kernels = float_rounding_kernels(self.state.weight.device, self.state.weight.dtype)
        self._faults = torch.zeros(1, dtype=torch.int32, device=self.state.weight.device)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        self._kernels.write(self.state, self._element, w_hat=out)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """V by the signs of its gradients."""
        self._kernels.step(self.state, self._element, gradient=gradient, rate=rate, faults=self._faults, w_hat=out)

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        self._kernels.keep(self.state, self._element, better=better)

    def restart(self) -> None:
        self.state.offset.zero_()
        self._faults.zero_()

    def adopt(self, other: "TunedFloats") -> None:
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
            groups = slice(first, first := first + math.prod(shape) // self.state.weight.shape[1])
            codes = self.state.codes[groups].reshape(shape).clone()
            results[name] = LinearResult(replace(self._grids[name], codes=codes))
        return results


def group_width(grid: FloatWeight) -> int:
    """Columns of a group that all rows of a weight are whole numbers of: the last group of a block may be narrower."""
    return math.gcd(grid.group_size, grid.shape[1])


def _start(weights: Mapping[str, Tensor], grids: Mapping[str, FloatWeight]) -> FloatGroups:
    """V = 0, and no result kept yet."""
    width = group_width(next(iter(grids.values())))
    weight = torch.cat([each.reshape(-1, width) for each in weights.values()])
    working = working_dtype(weight)
    factors = [
        grid.row_factor().repeat_interleave(grid.group_size // width, 1)[:, : grid.shape[1] // width].flatten()
        for grid in grids.values()
    ]
    return FloatGroups(
        weight=weight,
        offset=torch.zeros_like(weight, dtype=working),
        factor=torch.cat(factors).to(working),
        codes=torch.zeros_like(weight, dtype=torch.uint8),
    )
