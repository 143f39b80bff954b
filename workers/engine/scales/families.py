"""The linears of one scheme and group width, flat: their weights as functions of what each scheme's scales can be.

    integers              w_hat = round(s*(1 + p)) * (q - z)         rounded to the dtype that stores scales
    FP8, a scale per row  w_hat = round(s*(1 + p)) * L
    NVFP4                 w_hat = e4m3(S*(1 + 2*p)) / G * L          s = S/G, S the stored scale, G the global one
    others                w_hat as it is

L is the value of a code, e4m3 or e2m1. A code of an e4m3 scale is 6 to 12 % wide, so that its p moves at twice the
pace; it is kept in fp32 and adds up until it reaches the next code. Scales that are powers of two would halve or
double, and those of a whole tensor or block are shared by what a runtime joins: both stay.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import WHOLE, Element, ScaleType
from workers.engine.tune.gradient_linear import Receive
from workers.numerics.affine import store_scale
from workers.numerics.floats.elements import element_table
from workers.numerics.floats.float_grids import E4M3_MAX, SMALLEST_E4M3
from workers.numerics.group_scales import (
    add_level_gradient,
    add_scale_gradient,
    dequantize_groups,
    dequantize_levels,
)
from workers.numerics.quantized import AffineWeight, FloatWeight

TunedWeight = AffineWeight | FloatWeight
PACE_E4M3 = 2.0
"""Of p where scales are e4m3: the reach of a stage is then one or two codes."""


class Family(Protocol):
    """Linears whose groups lie one after another.

    value   w_hat, (groups, G), the model's dtype
    trains  whether p has a number for each group; else the weights stay as they are put
    """

    value: Tensor
    trains: bool

    def put(self, groups: slice, weight: TunedWeight) -> Tensor | None:
        """Takes over a linear; the derivative of a weight by p where L or q - z is 1, at p = 0, (groups,)."""

    def write(self, change: Tensor) -> None:
        """The weights of p (groups of the family,), as they would be stored."""

    def stored(self, groups: slice, change: Tensor) -> Tensor | None:
        """The scales of some groups with their p, as they are stored; None where they stay."""

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        """Adds the groups' sums of D*(q - z), or D*L, to `gradient` (groups,)."""


class IntegerFamily:
    """Codes q, uint8 (groups, G); zero points, uint8 (groups,), or the constant one of symmetric schemes."""

    trains = True

    def __init__(self, count: int, width: int, scheme: Scheme, value: Tensor) -> None:
        """Room for `count` groups of `width` columns."""
        self.value = value
        self._codes = torch.zeros(count, width, dtype=torch.uint8, device=value.device)
        self._zero: Tensor | int = 2 ** (scheme.bits - 1) if scheme.symmetric else torch.zeros_like(self._codes[:, 0])
        self._start = torch.zeros(count, dtype=_working(value), device=value.device)
        self._dtype: torch.dtype = torch.float32

    def put(self, groups: slice, weight: TunedWeight) -> Tensor | None:
        assert isinstance(weight, AffineWeight)  # noqa: S101 - for the type checker
        self._codes[groups] = weight.codes.view(-1, self._codes.shape[1]).to(self._codes.device)
        self._start[groups] = weight.scale.flatten().to(self._start)
        if weight.zero_point is not None and isinstance(self._zero, Tensor):
            self._zero[groups] = weight.zero_point.flatten().to(self._zero.device)
        self._dtype = weight.scale.dtype
        return self._start[groups]

    def write(self, change: Tensor) -> None:
        dequantize_groups(self._codes, self._rounded(slice(None), change), self._zero, self.value)

    def stored(self, groups: slice, change: Tensor) -> Tensor | None:
        return self._rounded(groups, change).to(self._dtype)

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        codes = self._codes[groups]
        zero = self._zero if isinstance(self._zero, int) else self._zero[groups]

        def receive(by_output: Tensor, x: Tensor) -> None:
            add_scale_gradient((by_output.T @ x).view(codes.shape), codes, zero, gradient)

        return receive

    def _rounded(self, groups: slice, change: Tensor) -> Tensor:
        return store_scale(self._start[groups] * (1 + change), self._dtype)


class FloatFamily:
    """Values L of the codes, as e4m3, which holds those of e2m1, too, (groups, G), with a scale for each group.

    Scales are of a dtype of 16 or 32 bits, or e4m3 beside the linear's G.
    """

    trains = True

    def __init__(self, count: int, width: int, scheme: Scheme, value: Tensor) -> None:
        """Room for `count` groups of `width` columns."""
        self.value = value
        self._scheme = scheme
        self._levels = torch.zeros(count, width, dtype=torch.float8_e4m3fn, device=value.device)
        self._start = torch.zeros(count, dtype=_working(value), device=value.device)
        self._divisor = torch.ones(count, dtype=torch.float32, device=value.device)
        self._dtype: torch.dtype = torch.float32
        small = scheme.row is not None and scheme.row.scale is ScaleType.E4M3
        self._pace = PACE_E4M3 if small else 1.0

    def put(self, groups: slice, weight: TunedWeight) -> Tensor | None:
        assert isinstance(weight, FloatWeight)  # noqa: S101 - for the type checker
        device = self.value.device
        values = element_table(self._scheme, device).index_select(0, weight.codes.to(device).flatten().int())
        self._levels[groups] = values.view(-1, self._levels.shape[1]).to(torch.float8_e4m3fn)
        self._start[groups] = weight.scale.flatten().to(device).to(self._start.dtype)
        if weight.global_scale is not None:
            self._divisor[groups] = weight.global_scale.to(device)
        self._dtype = weight.scale.dtype
        return self._start[groups] / self._divisor[groups] * self._pace

    def write(self, change: Tensor) -> None:
        factor = self._rounded(slice(None), change).float()
        # A division where there is one in `FloatWeight.factor`, whose bits these are.
        factor = factor / self._divisor if self._dtype.itemsize == 1 else factor
        dequantize_levels(self._levels, factor, self.value)

    def stored(self, groups: slice, change: Tensor) -> Tensor | None:
        return self._rounded(groups, change).to(self._dtype)

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        levels = self._levels[groups]

        def receive(by_output: Tensor, x: Tensor) -> None:
            add_level_gradient((by_output.T @ x).view(levels.shape), levels, gradient)

        return receive

    def _rounded(self, groups: slice, change: Tensor) -> Tensor:
        """Stored scales, in the working dtype."""
        wanted = self._start[groups] * (1 + self._pace * change)
        if self._dtype.itemsize > 1:
            return store_scale(wanted, self._dtype)
        return wanted.float().clamp(SMALLEST_E4M3, E4M3_MAX).to(self._dtype).to(wanted.dtype)


class FixedFamily:
    """Weights that stay: what a gradient through them needs, and no codes."""

    trains = False

    def __init__(self, count: int, width: int, scheme: Scheme, value: Tensor) -> None:
        """Room for `count` rows of `width` columns, which is the shape of `value`."""
        del count, width, scheme
        self.value = value

    def put(self, groups: slice, weight: TunedWeight) -> Tensor | None:
        self.value[groups] = weight.to(self.value.device).dequantize().view(-1, self.value.shape[1])
        return None

    def write(self, change: Tensor) -> None:
        """Nothing changes."""

    def stored(self, groups: slice, change: Tensor) -> Tensor | None:
        del groups, change
        return None

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        del groups, gradient
        return lambda *_: None


def kind_of(scheme: Scheme) -> Callable[[int, int, Scheme, Tensor], Family]:
    """The family of a scheme: the scales of some stay."""
    row = scheme.row
    if row is None or row.element is Element.INTEGER:
        return IntegerFamily
    moves = row.rows == 1 and row.scale is not ScaleType.E8M0 and (row.group_size == WHOLE or row.whole_groups)
    return FloatFamily if moves else FixedFamily


def trains(scheme: Scheme) -> bool:
    """True if the scheme's scales are tuned."""
    return kind_of(scheme) is not FixedFamily


def _working(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
