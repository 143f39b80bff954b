"""Linears on a floating-point grid whose rounding is learned by the signs of gradients, scales fixed.

The schemes of e2m1 and e4m3; the formulas are in `workers.numerics.backends.rounding.float_rounding_operators`.

Scales are the best that can be stored (`float_grids.searched`) and stay so. Tuned along with V, as
those of integers are, they do harm: a group of 16 has little say in its scale's gradient, and a step of it moves all of
its weights. On the tiny model of the tests, NVFP4 at 65,536 tokens, a KL of 0.0016 with scales fixed is 0.0031 with
tuned ones, and 0.0046 rounded to nearest; the first two blocks of SmolLM2-135M (50 steps, 8,192 tokens) lose 36 and
41 % of their held-out error with scales fixed, and 0 and 26 % of a larger one with tuned ones.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.backend import float_rounding_kernels
from workers.numerics.backends.rounding.float_rounding_operators import FloatGroups
from workers.numerics.floats import float_grids
from workers.numerics.floats.elements import element_of
from workers.numerics.learned_ranges import working_dtype
from workers.numerics.quantized import FloatWeight
from workers.numerics.tuned_codes import TunedCodes


def tuned_floats(
    weights: Mapping[str, Tensor],
    scheme: Scheme,
    scale_dtype: torch.dtype,
    second_moments: Mapping[str, Tensor] = MappingProxyType({}),
    joined_amax: Mapping[str, Tensor] = MappingProxyType({}),
) -> TunedCodes[FloatGroups]:
    """V = 0 on the best of the stored scales, weighted by the inputs' second moments where they are known.

    joined_amax   by linear, as in `workers.numerics.floats.joined`
    """
    grids = {
        name: float_grids.searched_grid(weight, scheme, scale_dtype, joined_amax.get(name), second_moments.get(name))
        for name, weight in weights.items()
    }
    state = _start(weights, grids)
    kernels = float_rounding_kernels(state.weight.device, state.weight.dtype)
    return TunedCodes(grids, state, element_of(scheme), kernels)


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
