"""Coordinate descent on all that a block type stores of a weight, by the error of the linear's outputs.

    min over codes q, k, m and scales d, dmin of  tr((W_hat - W) H (W_hat - W)^T)
    w_hat = d (first + step k) L_q - dmin m

One of them at a time, for all rows at once, with G = (W_hat - W) H kept as it changes. Where v is the change of w_hat
by a unit of a number, over the columns B that it touches, the best change of that number is

    - G[:, B] v / (v H[B, B] v)

rounded to what can be stored next to it: a level, an integer, a number of fp16. So no step raises the error. A sweep
is over the codes of weights, column by column (in a lattice, four at a time), then those of sub-blocks, then the scales
of blocks. Cost of a sweep: two products of out*in^2.

Coordinate descent on codes of a fixed grid is QuantEase's (Behdin et al., arXiv:2309.01885); here the grid moves, too.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.domain.methods.block_types import ODD_LEVELS, BlockType, SmallIntegers
from workers.numerics.backend import descent_kernels, level_loops
from workers.numerics.blocks.levels import QUAD, codes_of, inverse, level_table, nearest_levels
from workers.numerics.blocks.stored_parts import of_rows
from workers.numerics.quantized import BlockWeight

COLUMNS = 128
"""Columns whose changes reach the others' G at once, by one product."""
LARGEST = 65504.0
"""Of fp16."""


@torch.no_grad()
def descend(weight: Tensor, start: BlockWeight, hessian: Tensor, sweeps: int) -> BlockWeight:
    """The weight (out, in) from a quantized one, with H (in, in), fp32 or fp64, whose diagonal is positive.

    Rows that begin with numbers that are not finite stay.
    """
    state = _State.of(weight, start, hessian)
    known = state.pull.isfinite().all(1, keepdim=True)
    state.pull.masked_fill_(~known, 0.0)
    kernels = descent_kernels(weight.device, hessian.dtype)
    if kernels is not None:
        state = state.turned()
    for _ in range(sweeps):
        if kernels is None:
            state.sweep()
        else:
            kernels.sweep(state.kind, state.hessian, *state.moving())
    return of_rows(known, (state if kernels is None else state.turned()).weight(start), start)


@dataclass(frozen=True)
class _State:
    """Tensors that move, in H's dtype; changed in place.

    levels                     (out, in)
    numbers, minimum_numbers   first + step * k and m, (out, sub-blocks); ones where there are no codes
    scale, minimum             d, and -dmin or the offset itself, (out, blocks)
    pull                       G, (out, in)
    """

    kind: BlockType
    hessian: Tensor
    levels: Tensor
    numbers: Tensor
    scale: Tensor
    minimum_numbers: Tensor
    minimum: Tensor
    pull: Tensor

    @classmethod
    def of(cls, weight: Tensor, start: BlockWeight, hessian: Tensor) -> "_State":
        """The state of a quantized weight."""
        kind, like = start.kind, hessian
        levels = level_table(kind, weight.device)[start.codes.long()].to(like)
        scale = start.scale.to(like)
        ones = scale.repeat_interleave(kind.weights // kind.columns, 1).fill_(1)
        numbers = _numbers(start.scale_codes, kind.scales, ones)
        minimum = torch.zeros_like(scale) if start.minimum is None else start.minimum.to(like)
        minimum_numbers = _numbers(start.minimum_codes, kind.minimums, ones)
        pull = (replace(start, dtype=torch.float32).dequantize().to(like) - weight.to(like)) @ hessian
        minimum = -minimum if kind.minimums else minimum
        return cls(kind, hessian, levels, numbers, scale.clone(), minimum_numbers, minimum.clone(), pull)

    def moving(self) -> tuple[Tensor, ...]:
        """Tensors that change in a sweep, in the order of the fields."""
        return self.levels, self.numbers, self.scale, self.minimum_numbers, self.minimum, self.pull

    def turned(self) -> "_State":
        """The same with rows last, where they were first, or the other way around."""
        return _State(self.kind, self.hessian.contiguous(), *(tensor.T.contiguous() for tensor in self.moving()))

    def sweep(self) -> None:
        """A sweep; rows are first."""
        self.move_codes()
        for number in range(self.numbers.shape[1]):
            self.move_sub_block(number)
        for number in range(self.scale.shape[1]):
            self.move_block(number)

    def move_codes(self) -> None:
        """Levels of all columns in turn, each the nearest to where its error would be least."""
        loops, factors = level_loops(self.kind, self.levels.device, self.levels.dtype), self._factors()
        for first in range(0, self.levels.shape[1], COLUMNS):
            batch = slice(first, min(first + COLUMNS, self.levels.shape[1]))
            near, changes = self.hessian[batch, batch], torch.zeros_like(self.levels[:, batch])
            pull, parts = (
                self.pull[:, batch].clone(),
                slice(first // self.kind.columns, batch.stop // self.kind.columns),
            )
            if loops is not None:
                loops.move_levels(self.kind, self.levels[:, batch], pull, factors[:, parts], near, changes)
            else:
                factor = factors[:, parts].repeat_interleave(self.kind.columns, 1)
                move = self._move_points if self.kind.levels == ODD_LEVELS else self._move_levels
                move(batch, near, factor, pull, changes)
            self.pull.addmm_(changes, self.hessian[batch])

    def _factors(self) -> Tensor:
        """Factors of all sub-blocks, (out, sub-blocks)."""
        return self.scale.repeat_interleave(self.kind.weights // self.kind.columns, 1) * self.numbers

    def _move_levels(self, batch: slice, near: Tensor, factor: Tensor, pull: Tensor, changes: Tensor) -> None:
        """Levels in turn; `pull` and `changes` of the batch follow."""
        steps, levels = inverse(factor) / near.diagonal(), self.levels[:, batch]
        for j in range(near.shape[0]):
            now, before = slice(j, j + 1), levels[:, j : j + 1]
            after = nearest_levels(torch.addcmul(before, pull[:, now], steps[:, now], value=-1), self.kind)
            change = torch.mul(after - before, factor[:, now], out=changes[:, now])
            pull.addmm_(change, near[now])
            before.copy_(after)

    def _move_points(self, batch: slice, near: Tensor, factor: Tensor, pull: Tensor, changes: Tensor) -> None:
        """Points of a lattice in turn; `pull` and `changes` of the batch follow."""
        inverses = inverse(factor)
        for j in range(0, near.shape[0], QUAD):
            now = slice(j, j + QUAD)
            before, hessian = self.levels[:, batch][:, now], near[now, now]
            best = torch.linalg.solve(hessian, pull[:, now].T).T
            weights = hessian.diagonal().expand(before.shape).contiguous()
            wanted = (before - best * inverses[:, now]).contiguous()
            after = nearest_levels(wanted, self.kind, weights).to(before.dtype)
            change = (after - before) * factor[:, now]
            # The nearest point is so by the diagonal alone.
            gains = (2 * change * pull[:, now] + (change @ hessian) * change).sum(1, keepdim=True) < 0
            changes[:, now] = torch.where(gains, change, 0.0)
            before.copy_(torch.where(gains, after, before))
            pull.addmm_(changes[:, now], near[now])

    def move_sub_block(self, number: int) -> None:
        """k and m of one sub-block."""
        kind = self.kind
        columns = slice(number * kind.columns, (number + 1) * kind.columns)
        block = columns.start // kind.weights
        for integers, numbers, scale, by in (
            (kind.scales, self.numbers, self.scale, self.levels[:, columns]),
            (kind.minimums, self.minimum_numbers, self.minimum, torch.ones_like(self.levels[:, columns])),
        ):
            if integers is None:
                continue
            unit = by * scale[:, block : block + 1]
            codes = (numbers[:, number] + self._best(columns, unit) - integers.first) / integers.step
            after = codes.round_().clamp_(0, integers.largest) * integers.step + integers.first
            self._apply(columns, unit, after - numbers[:, number])
            numbers[:, number] = after

    def move_block(self, number: int) -> None:
        """d and dmin of one block."""
        kind, parts = self.kind, self.kind.weights // self.kind.columns
        columns, own = (slice(number * size, (number + 1) * size) for size in (kind.weights, parts))
        units = [(self.scale, self.levels[:, columns] * self.numbers[:, own].repeat_interleave(kind.columns, 1))]
        if kind.offset:
            units.append((self.minimum, self.minimum_numbers[:, own].repeat_interleave(kind.columns, 1)))
        for scale, unit in units:
            wanted = scale[:, number] + self._best(columns, unit)
            after = wanted.clamp(-LARGEST, LARGEST).half().to(scale.dtype)
            self._apply(columns, unit, after - scale[:, number])
            scale[:, number] = after

    def _best(self, columns: slice, unit: Tensor) -> Tensor:
        """The best change of a number that changes the weights of some columns by `unit`, (out,)."""
        curvature = ((unit @ self.hessian[columns, columns]) * unit).sum(1)
        return -(self.pull[:, columns] * unit).sum(1) * inverse(curvature)

    def _apply(self, columns: slice, unit: Tensor, change: Tensor) -> None:
        self.pull.addmm_(unit * change.unsqueeze(1), self.hessian[columns])

    def weight(self, start: BlockWeight) -> BlockWeight:
        """As it is stored."""
        minimum = -self.minimum if self.kind.minimums else self.minimum
        return replace(
            start,
            codes=codes_of(self.levels.float(), self.kind),
            scale=self.scale.half(),
            scale_codes=_codes(self.numbers, self.kind.scales),
            minimum=minimum.half() if self.kind.offset else None,
            minimum_codes=_codes(self.minimum_numbers, self.kind.minimums),
        )


def _numbers(codes: Tensor | None, integers: SmallIntegers | None, ones: Tensor) -> Tensor:
    return ones.clone() if codes is None or integers is None else codes.to(ones) * integers.step + integers.first


def _codes(numbers: Tensor, integers: SmallIntegers | None) -> Tensor | None:
    return None if integers is None else ((numbers - integers.first) / integers.step).to(torch.uint8)
