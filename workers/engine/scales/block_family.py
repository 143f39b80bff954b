"""Linears in a block type of llama.cpp's, flat: their weights as functions of all that a block stores beside its codes.

    w_hat = f * L_q + o      f = d * (first + step * k)                    o = -(dmin * m), or d_2 where there is no m
    d = fp16(d_0*(1 + p))    k = round, by code, of (first + step * k_0)*(1 + p_j)       dmin, m likewise

of a block with sub-blocks j; rounding passes gradients straight through, D = dL/dw_hat:

    dL/dp_j = d * (first + step * k_0) * G_j,   G_j = sum of D * L_q      for m: -dmin * m_0 * sum of D
    dL/dp   = d_0 * sum_j (first + step * k) * G_j                        for dmin: -dmin_0 * sum_j m * sum of D

The numbers of a block lie together: p_j of the factors, then of the offsets, p of d, then of dmin. Codes of few bits
move as those of FP4 do (`workers.engine.scales.moving_codes`). What is written is what a file says, to the bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import BlockType, SmallIntegers
from workers.engine.scales.moving_codes import MovingCodes
from workers.engine.tune.gradient_linear import Receive
from workers.numerics.backends.place_operators import parts
from workers.numerics.blocks.axis import BlockAxis
from workers.numerics.quantized import BlockWeight

LARGEST = 65504.0
"""Of fp16."""


@dataclass(frozen=True)
class Layout:
    """Places of a block's numbers: p of its sub-blocks' factors and offsets, of its d and of its dmin."""

    factors: slice
    offsets: slice
    scale: slice
    minimum: slice

    @classmethod
    def of(cls, kind: BlockType) -> "Layout":
        """The layout of a type; what it has not takes no place."""
        sub_blocks = kind.weights // kind.columns
        sizes = (sub_blocks * bool(kind.scales), sub_blocks * bool(kind.minimums), 1, int(kind.offset))
        return cls(*(slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))))

    @property
    def size(self) -> int:
        """Numbers of a block."""
        return int(self.minimum.stop)


def numbers_of(kind: BlockType, groups: int) -> int:
    """Numbers of p for so many sub-blocks, of whole blocks."""
    return groups * kind.columns // kind.weights * Layout.of(kind).size


class _Level:
    """d and k of the blocks of a family, or dmin and m: at the start, and as they are now.

    scale     fp16's numbers (blocks,);  numbers  first + step * k, (blocks, sub-blocks), ones where there are no codes
    """

    def __init__(self, blocks: int, kind: BlockType, integers: SmallIntegers | None, value: Tensor) -> None:
        working = torch.promote_types(value.dtype, torch.float32)
        self._integers = integers
        self.scale = torch.zeros(blocks, dtype=working, device=value.device)
        self.numbers = torch.ones(blocks, kind.weights // kind.columns, dtype=working, device=value.device)
        self.now, self.numbers_now = self.scale.clone(), self.numbers.clone()

    def put(self, blocks: slice, scale: Tensor, codes: Tensor | None) -> None:
        self.scale[blocks] = scale.flatten().to(self.scale)
        if codes is not None:
            self.numbers[blocks] = self._value(codes.to(self.numbers).view(-1, self.numbers.shape[1]))

    def write(self, change: Tensor, of_codes: Tensor) -> Tensor:
        """Takes the changes of d (blocks, 1) and of k (blocks, sub-blocks or 0); their products, (groups,)."""
        self.now.copy_(self.rounded(slice(None), change).to(self.now))
        if self._integers is not None:
            self.numbers_now.copy_(self._value(self.codes(slice(None), of_codes)))
        return (self.now.unsqueeze(1) * self.numbers_now).flatten()

    def rounded(self, blocks: slice, change: Tensor) -> Tensor:
        """d as it is stored, fp16 (blocks,)."""
        return (self.scale[blocks] * (1 + change.squeeze(1))).clamp(-LARGEST, LARGEST).half()

    def codes(self, blocks: slice, change: Tensor) -> Tensor:
        """k, (blocks, sub-blocks), as floating-point numbers."""
        assert self._integers is not None  # noqa: S101 - for the type checker
        wanted = (self.numbers[blocks] * (1 + change) - self._integers.first) / self._integers.step
        return wanted.round_().clamp_(0, self._integers.largest)

    def _value(self, codes: Tensor) -> Tensor:
        return codes if self._integers is None else codes * self._integers.step + self._integers.first


class BlockFamily:
    """The family of a block type; `moving` says whether its codes move."""

    trains = True

    def __init__(self, count: int, width: int, scheme: Scheme, value: Tensor, *, moving: bool) -> None:
        """Room for `count` sub-blocks of `width` columns."""
        assert scheme.blocks is not None  # noqa: S101 - for the type checker
        self.value = value
        self.kind: BlockType = scheme.blocks
        self._axis, self._layout = BlockAxis(self.kind), Layout.of(self.kind)
        self._of_block = self.kind.weights // width
        blocks = count // self._of_block
        self._scale = _Level(blocks, self.kind, self.kind.scales, value)
        self._minimum = _Level(blocks, self.kind, self.kind.minimums, value) if self.kind.offset else None
        self._sign = -1.0 if self.kind.minimums else 1.0
        self.codes = MovingCodes(count, self._axis, value) if moving else None
        self._still = None if moving else torch.zeros(count, width, dtype=torch.uint8, device=value.device)

    def put(self, groups: slice, weight: object, original: Tensor | None = None) -> Tensor:
        assert isinstance(weight, BlockWeight)  # noqa: S101 - for the type checker
        weight, width, blocks = weight.to(self.value.device), self.value.shape[1], self._blocks(groups)
        self._scale.put(blocks, weight.scale, weight.scale_codes)
        if self._minimum is not None and weight.minimum is not None:
            self._minimum.put(blocks, weight.minimum, weight.minimum_codes)
        codes = weight.codes.view(-1, width)
        if self._still is not None:
            self._still[groups] = codes
        if self.codes is not None:
            assert original is not None  # noqa: S101 - for the type checker
            offset, factor = weight.offset(), weight.factor().view(-1, 1)
            numbers = original.to(device=self.value.device, dtype=self.codes.place.dtype).view(-1, width)
            numbers = numbers if offset is None else numbers - offset.view(-1, 1)
            self.codes.put(groups, codes, numbers * torch.where(factor == 0, 0.0, 1 / factor))
        start = self.value.new_zeros(blocks.stop - blocks.start, self._layout.size, dtype=self._scale.scale.dtype)
        for level, of_codes, own in self._levels():
            start[:, own] = level.scale[blocks].unsqueeze(1)
            if of_codes.stop > of_codes.start:
                start[:, of_codes] = level.numbers[blocks]
        return start.flatten()

    def write(self, change: Tensor) -> None:
        change = change.view(-1, self._layout.size)
        products = [level.write(change[:, own], change[:, of_codes]) for level, of_codes, own in self._levels()]
        factor, offset = products[0].float(), None if len(products) < 2 else self._sign * products[1].float()
        for rows in parts(self.value):
            weight = self._values(rows).float().mul_(factor[rows].unsqueeze(1))
            self.value[rows] = weight if offset is None else weight.add_(offset[rows].unsqueeze(1))

    def stored(self, groups: slice, change: Tensor) -> Mapping[str, Tensor]:
        """The stored tensors of a `BlockWeight` by name, flat, but for the codes."""
        blocks, change = self._blocks(groups), change.view(-1, self._layout.size)
        found: dict[str, Tensor] = {}
        for name, (level, of_codes, own) in zip(("scale", "minimum"), self._levels(), strict=False):
            found[name] = level.rounded(blocks, change[:, own])
            if of_codes.stop > of_codes.start:
                found[f"{name}_codes"] = level.codes(blocks, change[:, of_codes]).to(torch.uint8).flatten()
        return found

    def receiver(self, groups: slice, gradient: Tensor) -> Receive:
        shape, first, blocks = self.value[groups].shape, groups.start, self._blocks(groups)

        def receive(by_output: Tensor, x: Tensor) -> None:
            by_weight = (by_output.T @ x).view(shape)
            sums = torch.empty(2, shape[0], dtype=gradient.dtype, device=gradient.device)
            for rows in parts(by_weight):
                levels = self._values(slice(first + rows.start, min(first + rows.stop, groups.stop)))
                torch.sum(levels.to(gradient.dtype).mul_(by_weight[rows]), 1, out=sums[0, rows])
            sums[1] = by_weight.sum(1, dtype=gradient.dtype).mul_(self._sign)
            rows_of = gradient.view(-1, self._layout.size)
            for (level, of_codes, own), total in zip(self._levels(), sums, strict=False):
                by_block = total.view(-1, self._of_block)
                if of_codes.stop > of_codes.start:
                    rows_of[:, of_codes] += by_block * level.now[blocks].unsqueeze(1)
                rows_of[:, own] += (by_block * level.numbers_now[blocks]).sum(1, keepdim=True)
            if self.codes is not None:
                sign = self._scale.now[blocks].unsqueeze(1) * self._scale.numbers_now[blocks]
                self.codes.receive(groups, by_weight * sign.sign().view(-1, 1).to(by_weight.dtype))

        return receive

    def _values(self, rows: slice) -> Tensor:
        """Levels of some sub-blocks, a new tensor."""
        if self.codes is not None:
            return self.codes.values(rows)
        assert self._still is not None  # noqa: S101 - for the type checker
        return self._axis.value(self._still[rows].float())

    def _levels(self) -> list[tuple[_Level, slice, slice]]:
        """Each level with the places of the changes of its codes and of its scale."""
        levels = [(self._scale, self._layout.factors, self._layout.scale)]
        if self._minimum is not None:
            levels.append((self._minimum, self._layout.offsets, self._layout.minimum))
        return levels

    def _blocks(self, groups: slice) -> slice:
        return slice(groups.start // self._of_block, groups.stop // self._of_block)
