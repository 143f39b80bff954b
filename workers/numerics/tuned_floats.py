"""Linears on a floating-point grid whose rounding and scales are learned by the signs of gradients.

What SignRound hands to the tuning loop for the schemes of e2m1 and e4m3: the tensors, their start and the kept result.
The formulas are in `workers.numerics.backends.float_rounding_operators`.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import ScaleType
from workers.numerics import float_grids
from workers.numerics.backend import float_rounding_kernels
from workers.numerics.backends.float_rounding_operators import FloatGroups, FloatSettings
from workers.numerics.learned_ranges import working_dtype
from workers.numerics.quantized import FloatWeight, LinearResult, Number

LIMITS = (0.5, 1.5)
"""Limits of alpha: of a searched scale either way."""


class TunedFloats:
    """Linears of one scheme with their V and alpha: `TrainableWeights` of a floating-point grid."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        scale_dtype: torch.dtype,
        second_moments: Mapping[str, Tensor] = MappingProxyType({}),
        global_amax: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """The best of the stored scales as a start, weighted by the inputs' second moments where they are known.

        global_amax   by linear: largest magnitude of all that a runtime joins with it
        """
        self.shapes: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()
        }
        self._scheme, self._settings = scheme, FloatSettings.of(scheme, scale_dtype)
        grids = {
            name: float_grids.searched_grid(
                weight, scheme, scale_dtype, global_amax.get(name), second_moments.get(name)
            )
            for name, weight in weights.items()
        }
        self.state = _start(weights, grids)
        # Groups of a global scale are as many as its linear has; their number is the same for every block alike.
        self._divisors = {name: grid.global_scale for name, grid in grids.items() if grid.global_scale is not None}
        self._kernels = float_rounding_kernels(self.state.weight.device, self.state.weight.dtype)
        self._faults = torch.zeros(1, dtype=torch.int32, device=self.state.weight.device)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        self._kernels.write(self.state, self._settings, w_hat=out)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """V and alpha by the signs of their gradients."""
        self._kernels.step(
            self.state,
            self._settings,
            gradient=gradient,
            rate=rate,
            faults=self._faults,
            limits=LIMITS,
            w_hat=out,
        )

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        self._kernels.keep(self.state, self._settings, better=better)

    def restart(self) -> None:
        self.state.offset.zero_()
        self.state.alpha.fill_(1)
        self._faults.zero_()

    def adopt(self, other: "TunedFloats") -> None:
        theirs = other.state.tensors()
        for name, tensor in self.state.tensors().items():
            tensor.copy_(theirs[name])
        for name, divisor in self._divisors.items():
            divisor.copy_(other._divisors[name])
        self._faults.zero_()

    def faults(self) -> Number:
        return self._faults[0].clone() if self._faults.is_cuda else int(self._faults)

    def results(self) -> dict[str, LinearResult]:
        results, first, row = {}, 0, self._scheme.row
        for name, shape in self.shapes.items():
            groups = slice(first, first := first + math.prod(shape) // self.state.weight.shape[1])
            factor = self.state.factor[groups].reshape(shape[0], -1)
            divisor = self._divisors.get(name)
            if row is not None and row.scale is ScaleType.E8M0:
                scale = (torch.frexp(factor.float()).exponent - 1 + 127).to(torch.uint8)
            else:
                scale = factor.to(self._settings.scale_dtype if divisor is None else torch.float8_e4m3fn)
            weight = FloatWeight(
                codes=self.state.codes[groups].reshape(shape).clone(),
                scale=scale.clone(),
                scheme=self._scheme,
                dtype=self.state.weight.dtype,
                global_scale=None if divisor is None else divisor.clone(),
            )
            results[name] = LinearResult(weight)
        return results


def _start(weights: Mapping[str, Tensor], grids: Mapping[str, FloatWeight]) -> FloatGroups:
    """V = 0 and alpha = 1, and no result kept yet."""
    width = next(iter(grids.values())).group_size
    weight = torch.cat([each.reshape(-1, width) for each in weights.values()])
    working = working_dtype(weight)
    scales = {name: grid.row_factor().to(working) for name, grid in grids.items()}
    start = torch.cat([scale.flatten() for scale in scales.values()])
    divisors = [
        torch.ones_like(scale).flatten()
        if (divisor := grids[name].global_scale) is None
        else divisor.to(working).expand(scale.numel())
        for name, scale in scales.items()
    ]
    return FloatGroups(
        weight=weight,
        offset=torch.zeros_like(weight, dtype=working),
        start=start,
        divisor=torch.cat(divisors),
        alpha=torch.ones_like(start),
        codes=torch.zeros_like(weight, dtype=torch.uint8),
        factor=torch.zeros_like(start),
    )
