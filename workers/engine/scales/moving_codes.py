"""Codes that move end to end: a place x for each weight on the axis of its grid's indices, rounded in every step.

    w_hat = s * value(q),  q = clamp(round(x), low, high)       value(k): the grid's k-th value
    x starts at u(w/s), at most 0.49 from the code of before    u: the piecewise linear inverse of `value`
    D = dL/dw_hat                                               rounding passes gradients straight through
    x <- x - r_i * m_i/(1 - b1^i) / sqrt(v_i/(1 - b2^i))        Adam, m and v of D; r_i is half the rate of scales, of
                                                                FP4 less where there are more than 400 steps
    x stays within low - 0.49 and high + 0.49

dL/dx is D times s and the distance of neighbouring values, both positive: Adam divides a gradient by its own size, so
D stands for it. Where the original weight lies in its code's interval says how little is lost by the other
neighbour, and 0.49 that the code of before is kept as long as nothing moves. Of a place that starts in the middle of
its interval, nothing would be known, and no step that keeps the other weights would reach an end of it.

| symbol | variable | shape |
|---|---|---|
| x | `place` | (groups, G), fp32 (fp64 for a model in it) |
| D, m, v | `gradient`, `mean`, `square` | the same, bf16 for a model in half precision: of fp32's range, and averaged |

The axis is all that is known of the grid. Straight-through gradients through whole models: Bengio et al.,
arXiv:1308.3432; for codes against the original model's distribution: LLM-QAT, arXiv:2305.17888.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import COARSE, COARSE_BITS, COMPENSATED, Element
from workers.numerics.backend import place_kernels
from workers.numerics.backends.place_operators import Places
from workers.numerics.floats.elements import LAST_INDEX, code_of_index, from_index, to_index

PACE_CODES = 0.5
"""Of x, in parts of the rate of scales: at the highest rate a thousandth of a code a step."""
REACH_STEPS, SLOWEST = 400, 0.5
"""Steps of FP4's codes at that pace: with more they go slower by as much, down to half of it. 800 and 1,600 steps at
half the pace were better than 400; at the full one 800 were worse. Integers of 2 bits gain from 1,200 at the full pace.
"""
BOX = 0.49
"""The farthest that a place starts from its code."""
MOVED = COARSE | COMPENSATED
"""Named schemes whose codes move. NVFP4's could, too, beside scales that are tuned themselves: 2 % on a tiny model, and
not measured on a real one."""
TINY = 1e-12
"""Added to the root: a gradient that is nothing moves nothing."""


def moves_codes(scheme: Scheme) -> bool:
    """True if codes of the scheme move where there is room: coarse ones, in whole groups."""
    row = scheme.row
    if row is None or (row.element is Element.INTEGER and row.rows == 1):
        return scheme.bits <= COARSE_BITS
    return scheme.name in MOVED and row.rows == 1 and row.whole_groups


class Axis(Protocol):
    """A grid as whole numbers in the order of its values."""

    @property
    def low(self) -> int:
        """The smallest index."""

    @property
    def high(self) -> int:
        """The largest one."""

    def place(self, scaled: Tensor) -> Tensor:
        """u of weights over their scale."""

    def rounded(self, place: Tensor) -> Tensor:
        """Indices of places, a new tensor."""

    def value(self, index: Tensor) -> Tensor:
        """Values of whole indices, in their dtype."""

    def index(self, codes: Tensor) -> Tensor:
        """Indices of stored codes, fp32."""

    def code(self, index: Tensor) -> Tensor:
        """Codes of whole indices as they are stored, uint8."""


@dataclass(frozen=True)
class FloatAxis:
    """The axis of E2M1.

    values   of its codes, fp32 (2^bits,)
    """

    element: Element
    values: Tensor

    @property
    def low(self) -> int:
        return -LAST_INDEX[self.element]

    @property
    def high(self) -> int:
        return LAST_INDEX[self.element]

    def place(self, scaled: Tensor) -> Tensor:
        return to_index(scaled, self.element)

    def rounded(self, place: Tensor) -> Tensor:
        return place.round().clamp_(self.low, self.high)

    def value(self, index: Tensor) -> Tensor:
        return from_index(index, self.element)

    def index(self, codes: Tensor) -> Tensor:
        values = self.values.index_select(0, codes.flatten().int()).view(codes.shape)
        return to_index(values, self.element).round_()

    def code(self, index: Tensor) -> Tensor:
        return code_of_index(index, self.element)


@dataclass(frozen=True)
class IntegerAxis:
    """The axis of integers, which are its indices."""

    bits: int

    @property
    def low(self) -> int:
        return 0

    @property
    def high(self) -> int:
        return int(2**self.bits) - 1

    def place(self, scaled: Tensor) -> Tensor:
        return scaled

    def rounded(self, place: Tensor) -> Tensor:
        return place.round().clamp_(self.low, self.high)

    def value(self, index: Tensor) -> Tensor:
        return index

    def index(self, codes: Tensor) -> Tensor:
        return codes.float()

    def code(self, index: Tensor) -> Tensor:
        return index.to(torch.uint8)


class MovingCodes:
    """The codes of linears whose groups lie one after another: their places, gradients, and Adam's m and v."""

    def __init__(self, count: int, axis: Axis, value: Tensor) -> None:
        """Room for `count` groups of weights like `value` (groups, G)."""
        working = torch.promote_types(value.dtype, torch.float32)
        moments = torch.bfloat16 if value.dtype.itemsize == 2 else working
        self._axis, self.pace = axis, 1.0
        self.place = torch.zeros(count, value.shape[1], dtype=working, device=value.device)
        self.gradient, self.mean, self.square = (torch.zeros_like(self.place, dtype=moments) for _ in range(3))

    def put(self, groups: slice, codes: Tensor, scaled: Tensor) -> None:
        """Takes over codes as they are stored; `scaled` is the original weight over its scales, both (groups, G)."""
        index = self._axis.index(codes).to(self.place.dtype)
        self.place[groups] = self._axis.place(scaled).to(index.dtype).clamp(index - BOX, index + BOX)

    def values(self, rows: slice) -> Tensor:
        """The values of the codes, without scales: fp32 (or fp64), a new tensor."""
        return self._axis.value(self.indices(rows))

    def codes(self, groups: slice) -> Tensor:
        """The codes as they are stored, uint8."""
        return self._axis.code(self.indices(groups))

    def receive(self, groups: slice, gradient: Tensor) -> None:
        """Adds D (groups, G) to what this step has had of it."""
        self.gradient[groups] += gradient

    def dequantize(self, scale: Tensor, zero: Tensor | int, out: Tensor) -> None:
        """Writes scale*(value - zero) to `out` (groups, G): scale (groups,), zero the same or one number for all."""
        places = self._places()
        place_kernels(places).dequantize_places(places, scale, zero, out)

    def receive_with_scale(
        self, groups: slice, gradient: Tensor, zero: Tensor | int, sign: Tensor, out: Tensor
    ) -> None:
        """Adds D*sign to what this step has had of it, and each group's sum of D*(value - zero) to `out`; D is lost.

        gradient  D of these groups, (count, G); zero, sign and out: of these groups, (count,), zero or one for all
        """
        places = self._places()
        place_kernels(places).add_place_gradient(gradient, places, groups, zero, sign, out)

    def restart(self) -> None:
        """Forgets past gradients."""
        for tensor in (self.gradient, self.mean, self.square):
            tensor.zero_()

    def spread(self, steps: int) -> None:
        """Slows FP4's codes down for that many steps."""
        if isinstance(self._axis, FloatAxis):
            self.pace = max(SLOWEST, min(1.0, REACH_STEPS / max(1, steps)))

    def share_squares(self) -> None:
        """Makes v one number a group from now on: the mean of D^2 over it."""
        self.square = torch.zeros(len(self.place), 1, dtype=self.square.dtype, device=self.square.device)

    def indices(self, rows: slice) -> Tensor:
        """Whole indices of the codes, a new tensor of the places' dtype."""
        return self._axis.rounded(self.place[rows])

    def move(self, rate: Tensor, unbiased: tuple[Tensor, Tensor], betas: tuple[float, float]) -> None:
        """A step of Adam; a gradient that is not finite counts as 0.

        rate      that of scales, a number on the device
        unbiased  1 - b1^i and 1 - b2^i, the same
        """
        places = self._places()
        place_kernels(places).move_places(places, rate * (PACE_CODES * self.pace) / unbiased[0], unbiased[1], betas)

    def _places(self) -> Places:
        tensors, axis = (self.place, self.gradient, self.mean, self.square), self._axis
        return Places(*tensors, axis.low, axis.high, box=BOX, tiny=TINY, fp4=isinstance(axis, FloatAxis))
