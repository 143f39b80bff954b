"""The fake quantizer in compiled loops, on a CPU, for weights that fp32 holds; functions and results of
`workers.numerics.backends.rounding.rounding_operators`, but for the order of sums over a group.

What a group has one of is left to torch's operators, as there: it is a small part of the numbers.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from workers.numerics.affine import SYMMETRIC_FACTORS, Grid, GroupRange, range_factors
from workers.numerics.backends.rounding.rounding_operators import (
    Bound,
    GridSettings,
    Groups,
    least_range,
    move_factors,
    offset_unit,
)
from workers.numerics.loops import DTYPES
from workers.numerics.loops import rounding as loops
from workers.numerics.loops.numbers import array
from workers.numerics.loops.threads import over_rows

__all__ = ["keep", "offset_unit", "search_range", "step", "warm_ups", "write"]


def warm_ups(*_: object, **__: object) -> list[Callable[[], object]]:
    """An empty list: what is compiled here takes less than a second."""
    return []


def write(groups: Groups, settings: GridSettings, w_hat: Tensor) -> None:
    """Writes w_hat of the present parameters."""
    given = (*_arrays(groups, _grid(groups, settings)), array(w_hat.view(groups.weight.shape)))
    _over(groups.weight, lambda first, end: loops.write(first, end, *given))


def step(
    groups: Groups,
    settings: GridSettings,
    *,
    gradient: Tensor,
    rate: Tensor,
    faults: Tensor,
    limits: tuple[float, float],
    w_hat: Tensor,
) -> None:
    """Updates V, alpha and beta, the latter within `limits`; writes w_hat of the new parameters.

    Adds the number of groups with NaN gradients to `faults`.
    """
    grid, far = _grid(groups, settings), np.float32(rate)
    sums = torch.empty(4, len(groups.low))
    given = (*_arrays(groups, grid), array(gradient.view(groups.weight.shape)), far, array(sums))
    _over(groups.weight, lambda first, end: loops.move(first, end, *given))
    if grid.zero is not None:
        move_factors(groups, grid, list(sums), rate=rate, limits=limits, faults=faults)
    else:
        faulty = torch.empty_like(groups.zero)
        ends = (np.float32(limits[0]), np.float32(limits[1]))
        own = (*_of_ranges(groups), np.float32(-grid.lowest), array(grid.scale), array(sums), far, *ends, array(faulty))
        over_rows(len(groups.low), 1, lambda first, end: loops.move_factors(first, end, *own))
        faults += faulty.sum(dtype=faults.dtype)
    write(groups, settings, w_hat)


def keep(groups: Groups, settings: GridSettings, better: Tensor) -> None:
    """Stores the present result in codes, scale and zero, if `better`."""
    if not better:
        return
    grid = _grid(groups, settings)
    groups.scale.copy_(grid.scale)
    if grid.zero is not None:
        groups.zero.copy_(grid.zero)
    given = (*_arrays(groups, grid), array(groups.codes))
    _over(groups.weight, lambda first, end: loops.keep(first, end, *given))


def _grid(groups: Groups, settings: GridSettings) -> Grid:
    """`Groups.grid`"""
    if not settings.symmetric:
        return groups.grid(settings)
    levels, scale = 2 ** (settings.bits - 1), torch.empty_like(groups.low)
    given = (*_of_ranges(groups), np.float32(levels), np.float32(settings.smallest), array(scale))
    over_rows(len(scale), 1, lambda first, end: loops.symmetric_scale(first, end, *given))
    return Grid(scale.to(groups.scale.dtype).to(scale.dtype), None, -levels, levels - 1)


def _of_ranges(groups: Groups) -> tuple[object, ...]:
    return tuple(map(array, (groups.low, groups.high, groups.alpha, groups.beta)))


def search_range(
    weight: Tensor, second_moments: Tensor, settings: GridSettings, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The range of each group with the least error; `rounding_operators.search_range`."""
    given = array(weight), array(second_moments.float().sqrt().contiguous())
    if settings.symmetric and scale_dtype in DTYPES:
        low, high = torch.empty(2, len(weight))
        factors, levels = (
            np.array(range_factors(SYMMETRIC_FACTORS), dtype=np.float32),
            np.float32(2 ** (settings.bits - 1)),
        )
        like = array(torch.empty(1, dtype=scale_dtype))
        all_of_it = (*given, factors, levels, np.float32(settings.smallest), like, array(low), array(high))
        work = weight.shape[1] * SYMMETRIC_FACTORS
        over_rows(len(weight), work, lambda first, end: loops.least_symmetric(first, end, *all_of_it))
        return low, high

    def lengths(scale: Tensor, bounds: Sequence[tuple[Bound, Bound]]) -> Sequence[Tensor]:
        lowest, highest = (torch.stack([_filled(end, scale) for end in side]) for side in zip(*bounds, strict=True))
        out = torch.empty_like(lowest)
        arrays = (*given, *map(array, (scale, lowest, highest, out)))
        _over(weight, lambda first, end: loops.lengths(first, end, *arrays))
        return list(out)

    return least_range(GroupRange.of(weight.float()), lengths, settings, scale_dtype)


def _over(weight: Tensor, loop: Callable[[int, int], object]) -> None:
    over_rows(weight.shape[0], weight.shape[1], loop)


def _filled(bound: Bound, like: Tensor) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.full_like(like, bound)


def _arrays(groups: Groups, grid: Grid) -> tuple[object, ...]:
    """Weight, V, s, z and the ends of q, as loops take them."""
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    tensors = (groups.weight, groups.offset, grid.scale, zero)
    return (*map(array, tensors), np.float32(grid.lowest), np.float32(grid.highest))
