"""The fake quantizer on block types in compiled loops, on a CPU, for places that are fp32; functions and results of
`workers.numerics.backends.rounding.block_rounding_operators`.

Levels of a lattice are found four together, which is left to torch's operators.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from app.domain.methods.block_types import ODD_LEVELS
from workers.numerics.backends.rounding import block_rounding_operators as operators
from workers.numerics.backends.rounding.block_rounding_operators import BlockGroups
from workers.numerics.blocks.axis import BlockAxis
from workers.numerics.blocks.levels import level_table
from workers.numerics.loops import block_rounding as loops
from workers.numerics.loops.numbers import array
from workers.numerics.loops.threads import over_rows

warm_ups = operators.warm_ups


def write(groups: BlockGroups, axis: BlockAxis, w_hat: Tensor) -> None:
    """Writes w_hat of the present places."""
    if axis.kind.levels == ODD_LEVELS:
        operators.write(groups, axis, w_hat)
        return
    given = _arrays(groups, axis, w_hat)
    _over(groups, lambda first, end: loops.write(first, end, *given))


def step(
    groups: BlockGroups, axis: BlockAxis, *, gradient: Tensor, rate: Tensor, faults: Tensor, w_hat: Tensor
) -> None:
    """Updates x and writes w_hat of the new one. Adds the number of NaN gradients to `faults`; they move nothing."""
    if axis.kind.levels == ODD_LEVELS:
        operators.step(groups, axis, gradient=gradient, rate=rate, faults=faults, w_hat=w_hat)
        return
    faulty = torch.empty(len(groups.place), dtype=torch.int32)
    moves = (array(gradient.view(groups.place.shape)), np.float32(rate), array(faulty))
    given = (*_arrays(groups, axis, w_hat), *moves)
    _over(groups, lambda first, end: loops.step(first, end, *given))
    faults += faulty.sum(dtype=faults.dtype)


def keep(groups: BlockGroups, axis: BlockAxis, better: Tensor) -> None:
    """Stores the present codes, if `better`."""
    if axis.kind.levels == ODD_LEVELS:
        operators.keep(groups, axis, better)
    elif better:
        given = (array(groups.place), np.float32(axis.high), array(groups.codes))
        _over(groups, lambda first, end: loops.keep(first, end, *given))


def _arrays(groups: BlockGroups, axis: BlockAxis, w_hat: Tensor) -> tuple[object, ...]:
    """Places, the largest code, f, o, levels and w_hat, as loops take them."""
    kind, levels = axis.kind, level_table(axis.kind, w_hat.device)
    scaling = (
        array(groups.factor),
        array(groups.offset),
        np.float32(kind.levels[0]) if kind.uniform else array(levels),
    )
    return (array(groups.place), np.float32(axis.high), *scaling, array(w_hat.view(groups.place.shape)))


def _over(groups: BlockGroups, loop: Callable[[int, int], object]) -> None:
    rows, columns = groups.place.shape
    over_rows(rows, columns, loop)
