"""Scales of floating-point grids as functions of a change p, rounded as they are stored.

    float scales   s = round(s_0*(1 + p))          to the dtype that stores them
    e4m3 scales    s = e4m3(S*(1 + 2*p)) / G       S the stored scale, G the global one
    e8m0 scales    s = 2^e                         no p

A code of an e4m3 scale is 6 to 12 % wide, so that its p moves at twice the pace; it is kept in fp32 and adds up until
it reaches the next code. Scales that are powers of two would halve or double, and those of a whole tensor or block are
shared by what a runtime joins: both stay.
"""

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import WHOLE, Element, ScaleType
from workers.numerics.affine import store_scale
from workers.numerics.floats.float_grids import E4M3_MAX, SMALLEST_E4M3
from workers.numerics.quantized import FloatWeight

PACE_E4M3 = 2.0
"""Of p where scales are e4m3: the reach of a stage is then one or two codes."""


def trains(scheme: Scheme) -> bool:
    """True if the scheme's scales are tuned."""
    row = scheme.row
    if row is None or row.element is Element.INTEGER:
        return True
    return row.rows == 1 and row.scale is not ScaleType.E8M0 and (row.group_size == WHOLE or row.whole_groups)


class FloatScales:
    """Scales of many groups, one for each: of a dtype of 16 or 32 bits, e4m3 beside the linear's G, or powers of two.

    Of powers of two the factor itself is kept.
    """

    def __init__(self, count: int, scheme: Scheme, value: Tensor) -> None:
        """Room for `count` groups of weights like `value`."""
        row = scheme.row
        self._start = torch.zeros(count, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device)
        self._divisor = torch.ones(count, dtype=torch.float32, device=value.device)
        self._dtype: torch.dtype = torch.float32
        self._pace = PACE_E4M3 if row is not None and row.scale is ScaleType.E4M3 else 1.0
        self._trains = trains(scheme)

    def put(self, groups: slice, weight: FloatWeight) -> Tensor | None:
        """Takes over a linear's; what p is multiplied by for a weight whose L is 1, (groups,), where there is a p."""
        stored = weight.scale if self._trains else weight.factor()
        self._start[groups] = stored.flatten().to(self._start.device).to(self._start.dtype)
        if not self._trains:
            return None
        if weight.global_scale is not None:
            self._divisor[groups] = weight.global_scale.to(self._start.device)
        self._dtype = weight.scale.dtype
        return self._start[groups] / self._divisor[groups] * self._pace

    def factor(self, change: Tensor) -> Tensor:
        """s of every group, fp32 (groups,)."""
        if not self._trains:
            return self._start.float()
        factor = self._rounded(slice(None), change).float()
        # A division where there is one in `FloatWeight.factor`, whose bits these are.
        return factor / self._divisor if self._dtype.itemsize == 1 else factor

    def stored(self, groups: slice, change: Tensor) -> Tensor:
        """The scales of some groups with their p, in the dtype that stores them."""
        return self._rounded(groups, change).to(self._dtype)

    def _rounded(self, groups: slice, change: Tensor) -> Tensor:
        """Stored scales, in the working dtype."""
        wanted = self._start[groups] * (1 + self._pace * change)
        if self._dtype.itemsize > 1:
            return store_scale(wanted, self._dtype)
        return wanted.float().clamp(SMALLEST_E4M3, E4M3_MAX).to(self._dtype).to(wanted.dtype)
