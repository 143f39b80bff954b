"""The linears of one scheme and group width, flat: their weights as functions of what each scheme's scales can be.

    integers              w_hat = round(s*(1 + p)) * (q - z)         rounded to the dtype that stores scales
    FP8, a scale per row  w_hat = round(s*(1 + p)) * L
    NVFP4                 w_hat = e4m3(S*(1 + 2*p)) / G * L          s = S/G, S the stored scale, G the global one
    MXFP4                 w_hat = 2^e * L                            e as it is
    llama.cpp's types     `workers.engine.scales.block_family`
    others                w_hat as it is

L is the value of a code, e4m3 or e2m1. Codes of e2m1, and of llama.cpp's types up to 6 bits, move, too, where there
is room for what that takes (`workers.engine.scales.moving_codes`); a family without p or moving codes is what a
gradient goes through. Scales: `workers.engine.scales.float_scales`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import Element
from workers.engine.scales.block_family import BlockFamily, numbers_of
from workers.engine.scales.float_scales import FloatScales, trains
from workers.engine.scales.moving_codes import FloatAxis, IntegerAxis, MovingCodes, moves_codes
from workers.engine.tune.gradient_linear import Receive
from workers.numerics.affine import store_scale
from workers.numerics.backends.place_operators import parts
from workers.numerics.floats.elements import element_of, element_table
from workers.numerics.group_scales import (
    add_level_gradient,
    add_scale_gradient,
    dequantize_groups,
    dequantize_levels,
)
from workers.numerics.quantized import AffineWeight, BlockWeight, FloatWeight

TunedWeight = AffineWeight | FloatWeight | BlockWeight


class Family(Protocol):
    """Linears whose groups lie one after another.

    value   w_hat, (groups, G), the model's dtype
    """

    value: Tensor

    @property
    def trains(self) -> bool:
        """True if p has a number for each group; else scales stay as they are put."""

    @property
    def codes(self) -> MovingCodes | None:
        """The codes, where they move."""

    def put(self, groups: slice, weight: TunedWeight, original: Tensor | None = None) -> Tensor | None:
        """Takes over a linear; the derivative of a weight by p where L or q - z is 1, at p = 0, (groups,).

        original   the weight that was quantized, (out, in), where codes move
        """

    def write(self, change: Tensor) -> None:
        """The weights of p (groups of the family,), as they would be stored."""

    def stored(self, groups: slice, change: Tensor) -> Tensor | Mapping[str, Tensor] | None:
        """The scales of some groups with their p, as they are stored; None where they stay.

        Where more than one tensor of a weight is tuned, all of them by name.
        """

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        """Adds the groups' sums of D*(q - z), or D*L, to `gradient` (groups,)."""


class IntegerFamily:
    """Codes q, uint8 (groups, G); zero points, uint8 (groups,), or the constant one of symmetric schemes.

    `moving` says whether the codes move. A symmetric group's scale may be negative: D times its sign moves them.
    """

    trains = True

    def __init__(self, count: int, width: int, scheme: Scheme, value: Tensor, *, moving: bool) -> None:
        """Room for `count` groups of `width` columns."""
        self.value = value
        stored = 0 if moving else count
        self._codes = torch.zeros(stored, width, dtype=torch.uint8, device=value.device)
        self._zero: Tensor | int = 2 ** (scheme.bits - 1)
        if not scheme.symmetric:
            self._zero = torch.zeros(count, dtype=torch.uint8, device=value.device)
        self._start = torch.zeros(count, dtype=_working(value), device=value.device)
        self._dtype: torch.dtype = torch.float32
        self.codes = MovingCodes(count, IntegerAxis(scheme.bits), value) if moving else None

    def put(self, groups: slice, weight: TunedWeight, original: Tensor | None = None) -> Tensor | None:
        assert isinstance(weight, AffineWeight)  # noqa: S101 - for the type checker
        width, device = self.value.shape[1], self.value.device
        codes = weight.codes.view(-1, width).to(device)
        self._start[groups] = weight.scale.flatten().to(self._start)
        if weight.zero_point is not None and isinstance(self._zero, Tensor):
            self._zero[groups] = weight.zero_point.flatten().to(device)
        self._dtype = weight.scale.dtype
        if self.codes is None:
            self._codes[groups] = codes
        else:
            assert original is not None  # noqa: S101 - for the type checker
            start = self._start[groups].unsqueeze(1)
            scaled = original.to(device=device, dtype=start.dtype).view(-1, width) * torch.where(
                start == 0, 0.0, 1 / start
            )
            self.codes.put(groups, codes, scaled.add_(self._zeros(groups)))
        return self._start[groups]

    def write(self, change: Tensor) -> None:
        scale = self._rounded(slice(None), change)
        if self.codes is None:
            dequantize_groups(self._codes, scale, self._zero, self.value)
        else:
            self.codes.dequantize(scale, self._zero, self.value)

    def stored(self, groups: slice, change: Tensor) -> Tensor | None:
        return self._rounded(groups, change).to(self._dtype)

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        if self.codes is not None:
            return self._moving_receiver(groups, gradient, self.codes)
        codes = self._codes[groups]
        zero = self._zero if isinstance(self._zero, int) else self._zero[groups]

        def receive(by_output: Tensor, x: Tensor) -> None:
            add_scale_gradient((by_output.T @ x).view(codes.shape), codes, zero, gradient)

        return receive

    def _moving_receiver(self, groups: slice, gradient: Tensor, codes: MovingCodes) -> Receive:
        shape, start = self.value[groups].shape, self._start[groups]
        zero = self._zero if isinstance(self._zero, int) else self._zero[groups]

        def receive(by_output: Tensor, x: Tensor) -> None:
            codes.receive_with_scale(groups, (by_output.T @ x).view(shape), zero, start.sign(), gradient)

        return receive

    def _zeros(self, rows: slice) -> Tensor | int:
        """z, (groups, 1) or one for all."""
        return self._zero if isinstance(self._zero, int) else self._zero[rows].to(self._start.dtype).unsqueeze(1)

    def _rounded(self, groups: slice, change: Tensor) -> Tensor:
        return store_scale(self._start[groups] * (1 + change), self._dtype)


class FloatFamily:
    """Values L of the codes, as e4m3, which holds those of e2m1, too, (groups, G), with a scale for each group."""

    trains = True
    codes = None

    def __init__(self, count: int, width: int, scheme: Scheme, value: Tensor) -> None:
        """Room for `count` groups of `width` columns."""
        self.value = value
        self._scheme = scheme
        self._levels = torch.zeros(count, width, dtype=torch.float8_e4m3fn, device=value.device)
        self._scales = FloatScales(count, scheme, value)

    def put(self, groups: slice, weight: TunedWeight, original: Tensor | None = None) -> Tensor | None:
        del original
        assert isinstance(weight, FloatWeight)  # noqa: S101 - for the type checker
        device = self.value.device
        values = element_table(self._scheme, device).index_select(0, weight.codes.to(device).flatten().int())
        self._levels[groups] = values.view(-1, self._levels.shape[1]).to(torch.float8_e4m3fn)
        return self._scales.put(groups, weight)

    def write(self, change: Tensor) -> None:
        dequantize_levels(self._levels, self._scales.factor(change), self.value)

    def stored(self, groups: slice, change: Tensor) -> Tensor | None:
        return self._scales.stored(groups, change)

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        levels = self._levels[groups]

        def receive(by_output: Tensor, x: Tensor) -> None:
            add_level_gradient((by_output.T @ x).view(levels.shape), levels, gradient)

        return receive


class MovingFamily:
    """Codes of e2m1 that move, beside scales that are tuned along or stay."""

    def __init__(self, count: int, width: int, scheme: Scheme, value: Tensor) -> None:
        """Room for `count` groups of `width` columns."""
        del width
        self.value = value
        self.trains = trains(scheme)
        self._scales = FloatScales(count, scheme, value)
        self.codes = MovingCodes(count, FloatAxis(element_of(scheme), element_table(scheme, value.device)), value)

    def put(self, groups: slice, weight: TunedWeight, original: Tensor | None = None) -> Tensor | None:
        assert isinstance(weight, FloatWeight)  # noqa: S101 - for the type checker
        assert original is not None  # noqa: S101 - for the type checker
        start, width = self._scales.put(groups, weight), self.value.shape[1]
        factor = weight.factor().to(original.device).view(-1, 1)
        scaled = original.to(self.codes.place.dtype).view(-1, width) / factor
        self.codes.put(groups, weight.codes.to(original.device).view(-1, width), scaled)
        return start

    def write(self, change: Tensor) -> None:
        self.codes.dequantize(self._scales.factor(change), 0, self.value)

    def stored(self, groups: slice, change: Tensor) -> Tensor | None:
        return self._scales.stored(groups, change) if self.trains else None

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        shape, first = self.value[groups].shape, groups.start

        def receive(by_output: Tensor, x: Tensor) -> None:
            by_weight = (by_output.T @ x).view(shape)
            self.codes.receive(groups, by_weight)
            if not self.trains:
                return
            for rows in parts(by_weight):
                levels = self.codes.values(slice(first + rows.start, min(first + rows.stop, groups.stop)))
                gradient[rows] += levels.to(gradient.dtype).mul_(by_weight[rows]).sum(-1)

        return receive


class FixedFamily:
    """Weights that stay: what a gradient through them needs, and no codes."""

    trains = False
    codes = None

    def __init__(self, count: int, width: int, scheme: Scheme, value: Tensor) -> None:
        """Room for `count` rows of `width` columns, which is the shape of `value`."""
        del count, width, scheme
        self.value = value

    def put(self, groups: slice, weight: TunedWeight, original: Tensor | None = None) -> Tensor | None:
        del original
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


def kind_of(scheme: Scheme, codes: bool) -> Callable[[int, int, Scheme, Tensor], Family]:
    """The family of a scheme; codes: whether those that can move do."""
    row = scheme.row
    if scheme.blocks is not None:
        return partial(BlockFamily, moving=codes and moves_codes(scheme))
    if row is None or row.element is Element.INTEGER:
        return partial(IntegerFamily, moving=codes and moves_codes(scheme))
    if codes and moves_codes(scheme):
        return MovingFamily
    return FloatFamily if trains(scheme) else FixedFamily


def changes(scheme: Scheme, groups: int) -> int:
    """Numbers of p for so many groups of a scheme."""
    if scheme.blocks is not None:
        return numbers_of(scheme.blocks, groups)
    return groups if trains(scheme) else 0


def grouped(scheme: Scheme, codes: bool) -> bool:
    """True if the groups of a scheme lie one after another in its family, else rows do."""
    return kind_of(scheme, codes) is not FixedFamily


def _working(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
