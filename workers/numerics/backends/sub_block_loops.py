"""Fits of sub-blocks in compiled loops on a CPU; functions and results of `workers.numerics.blocks.sub_blocks`, but for
the order of sums. A lattice's levels, four together, are left to torch's operators.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from app.domain.methods.block_types import BlockType
from workers.numerics.backends.column_loops import levels_of
from workers.numerics.loops import sub_blocks as loops
from workers.numerics.loops.numbers import array
from workers.numerics.loops.threads import over_rows


def fit_factors(
    numbers: Tensor, weights: Tensor, kind: BlockType, divisors: Sequence[float], *, unsigned: bool, refinements: int
) -> tuple[Tensor, Tensor]:
    """Factors and errors (...,) of numbers (..., columns), fp32."""
    found = torch.empty(2, *numbers.shape[:-1])
    given = (*_flat(numbers, weights, divisors), unsigned, refinements, *levels_of(kind), *_flat_rows(found))
    _over(numbers, len(divisors), lambda first, end: loops.fit_factors(first, end, *given))
    return found[0], found[1]


def fit_with_offsets(
    numbers: Tensor,
    weights: Tensor,
    kind: BlockType,
    divisors: Sequence[float],
    *,
    free: bool,
    alike: float,
    refinements: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors, offsets and errors (...,) of numbers (..., columns), fp32."""
    found = torch.empty(3, *numbers.shape[:-1])
    given = (*_flat(numbers, weights, divisors), free, np.float32(alike), refinements, *levels_of(kind))
    rows = _flat_rows(found)
    _over(numbers, 2 * len(divisors), lambda first, end: loops.fit_with_offsets(first, end, *given, *rows))
    return found[0], found[1], found[2]


def _flat(numbers: Tensor, weights: Tensor, divisors: Sequence[float]) -> tuple[object, ...]:
    width = numbers.shape[-1]
    pair = (x.reshape(-1, width).contiguous() for x in (numbers, weights))
    return (*map(array, pair), np.array(divisors, dtype=np.float32))


def _flat_rows(found: Tensor) -> list[object]:
    return [array(row.flatten()) for row in found]


def _over(numbers: Tensor, trials: int, loop: Callable[[int, int], object]) -> None:
    over_rows(numbers.numel() // numbers.shape[-1], numbers.shape[-1] * trials, loop)
