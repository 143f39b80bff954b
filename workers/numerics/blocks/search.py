"""A weight in one of llama.cpp's block types, searched: factors and offsets of sub-blocks, then their codes.

With the scales d (and dmin) of a block rounded to fp16 first, and integer codes k (and m) of its sub-blocks:

    1. each sub-block's best factor f and offset o by itself          `workers.numerics.blocks.sub_blocks`
    2. d = argmin over trials of sum_j A_j (f_j - d k_j)^2,  A_j = sum a l^2;  dmin likewise, with sum a
    3. in turn, a few rounds: codes of each sub-block among their neighbours, its weights' levels found anew for each,
       so that what is compared is the error itself;  then d, dmin by least squares over the block's levels and codes

What a round makes worse is not kept. a are second moments of the inputs, or 1: the sum of a (w - w_hat)^2 is what the
rounding does to the outputs as far as inputs are uncorrelated. The trials and least squares for given levels are the
idea of llama.cpp's own quantizer (`make_qkx3_quants` and its like), of which this shares no code; it does not do 3.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import BlockType, SmallIntegers
from workers.numerics.backend import search_kernels
from workers.numerics.blocks.levels import codes_of, inverse, nearest_levels
from workers.numerics.blocks.stored_parts import empty_weight, rows_of
from workers.numerics.blocks.sub_blocks import Fit, fit_sub_blocks
from workers.numerics.quantized import BlockWeight

ROUNDS = 2
PART, DEVICE_PART = 1 << 17, 1 << 25
"""Weights at a time on the host, where what is computed of them stays in its caches, and on a device, where some dozen
numbers for each have room."""
SECOND_TRIALS = 13
LARGEST = 65504.0
"""Of fp16."""
LEAST_SHARE = 1e-5
"""Of the mean weight, which a column has at least: one whose inputs were all 0 has some weights still."""


@dataclass(frozen=True)
class _Blocks:
    """Numbers of blocks (blocks, sub-blocks, columns) in units of a power of two of each, and their weights.

    known   whether all numbers of a block are finite: there is no weight for the others, and NaN says so
    """

    kind: BlockType
    numbers: Tensor
    weights: Tensor
    unit: Tensor
    known: Tensor

    def stored(self, scale: Tensor) -> Tensor:
        """Scales (blocks,) rounded as they are stored, in the same units."""
        return (scale * self.unit).clamp(-LARGEST, LARGEST).half().float() / self.unit


@dataclass(frozen=True)
class _State:
    """Scales (blocks,), codes of sub-blocks (blocks, sub-blocks), levels, and the errors of the blocks."""

    scale: Tensor
    codes: Tensor
    minimum: Tensor
    minimum_codes: Tensor
    levels: Tensor
    error: Tensor

    def better(self, other: "_State") -> "_State":
        """Block by block, the one of the smaller error."""
        wins = other.error < self.error

        def chosen(name: str) -> Tensor:
            mine, theirs = getattr(self, name), getattr(other, name)
            return torch.where(wins.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        return _State(*(chosen(name) for name in _State.__dataclass_fields__))


@torch.no_grad()
def search_blocks(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> BlockWeight:
    """The weight (out, in) in a type of llama.cpp's whose blocks divide its rows.

    importance   of the squared errors, not negative: (in,) or (out, in); None: all alike
    """
    kind = scheme.blocks
    if kind is None or weight.shape[1] % kind.weights:
        raise ValueError(f"{scheme} has no blocks in rows of {weight.shape[1]}")
    made = empty_weight(weight, scheme)
    search_into(made, weight, column_weights(importance, weight))
    return made


def search_into(
    made: BlockWeight,
    weight: Tensor,
    weights: Tensor,
    factor: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    codes: bool = True,
) -> None:
    """Searches a weight (out, in) and writes what is found to `made`, whose tensors may be views.

    weights          of the squared errors, fp32, (in,) or (out, in), of the mean 1
    factor, offset   of the sub-blocks, (sub-blocks, out); written where given
    codes            whether codes of weights are written
    """
    kernels = search_kernels(weight.device, weight.dtype)
    if kernels is not None:
        kernels.search(made, weight, weights, factor, offset, codes=codes)
        return
    step = max(1, (PART if weight.device.type == "cpu" else DEVICE_PART) // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        found = _searched(weight[rows].contiguous(), made.kind, weights if weights.ndim == 1 else weights[rows])
        part = rows_of(made, rows)
        stored = (part.codes, part.scale, part.scale_codes, part.minimum, part.minimum_codes)
        for place, tensor in zip(stored, found, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
    if factor is not None:
        factor.copy_(made.factor().T)
    if offset is not None and (own := made.offset()) is not None:
        offset.copy_(own.T)


def _searched(weight: Tensor, kind: BlockType, weights: Tensor) -> tuple[Tensor | None, ...]:
    blocks = _blocks(weight, kind, weights)
    state = _start(blocks, fit_sub_blocks(blocks.numbers, blocks.weights, kind))
    for _ in range(ROUNDS):
        if kind.scales is not None:
            state = state.better(_moved_codes(blocks, state))
        state = state.better(_refitted(blocks, state))
    rows = len(weight)

    def in_rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(rows, -1)

    scale = in_rows(torch.where(blocks.known, state.scale * blocks.unit, torch.nan)).half()
    minimum = in_rows(state.minimum * blocks.unit).half() if kind.offset else None
    return (
        codes_of(in_rows(state.levels), kind),
        scale,
        None if kind.scales is None else in_rows(state.codes).to(torch.uint8),
        minimum,
        None if kind.minimums is None else in_rows(state.minimum_codes).to(torch.uint8),
    )


def _blocks(weight: Tensor, kind: BlockType, weights: Tensor) -> _Blocks:
    shape = (-1, kind.weights // kind.columns, kind.columns)
    numbers = weight.float().reshape(shape)
    largest = numbers.abs().amax((1, 2))
    known = torch.isfinite(largest)
    unit = torch.exp2(torch.frexp(largest)[1].float().clamp(-120, 120))
    unit = torch.where(known & (largest > 0), unit, 1.0)
    numbers = torch.where(known.view(-1, 1, 1), numbers / unit.view(-1, 1, 1), 0.0)
    return _Blocks(kind, numbers, weights.expand(weight.shape).reshape(shape), unit, known)


def column_weights(importance: Tensor | None, weight: Tensor) -> Tensor:
    """Importance of the mean 1, fp32 (in,) or (out, in); None: ones. No column has none at all."""
    if importance is None:
        return torch.ones(weight.shape[1], device=weight.device)
    return _of_mean_1(importance.float(), importance.float().mean())


def block_weights(importance: Tensor, width: int) -> Tensor:
    """Importance (in,), of the mean 1 in each `width` consecutive columns, fp32 (in,)."""
    blocks = importance.float().view(-1, width)
    return _of_mean_1(blocks, blocks.mean(1, keepdim=True)).flatten()


def _of_mean_1(importance: Tensor, mean: Tensor) -> Tensor:
    return torch.where(mean <= 0, 1.0, (importance / mean).clamp(min=LEAST_SHARE))


def _start(blocks: _Blocks, fit: Fit) -> _State:
    kind, (count, parts) = blocks.kind, fit.factor.shape
    nothing = torch.zeros(count, parts, device=fit.factor.device)
    scale, codes = fit.factor[:, 0], nothing
    if kind.scales is not None:
        scale = _second_scale(fit.factor, blocks.weights.sum(-1), kind.scales)
    scale = blocks.stored(scale)
    if kind.scales is not None:
        codes = _nearest_codes(fit.factor, scale, kind.scales)
    minimum, minimum_codes = fit.offset[:, 0], nothing
    if kind.minimums is not None:
        minimum = _second_scale(-fit.offset, blocks.weights.sum(-1), kind.minimums)
    minimum = blocks.stored(minimum)
    if kind.minimums is not None:
        minimum_codes = _nearest_codes(-fit.offset, minimum, kind.minimums)
    return _with_levels(blocks, scale, codes, minimum, minimum_codes)


def _second_scale(numbers: Tensor, weights: Tensor, integers: SmallIntegers) -> Tensor:
    """d of the least sum of weights * (numbers - d k)^2 over trials, (blocks,), of numbers (blocks, sub-blocks)."""
    widest = numbers.gather(1, numbers.abs().argmax(1, keepdim=True))
    best = torch.full((len(numbers),), torch.inf, device=numbers.device)
    scale = torch.zeros_like(best)
    for divisor in second_divisors(integers):
        tried = widest / divisor
        whole = _value(_nearest_codes(numbers, tried.squeeze(1), integers), integers)
        found = (weights * numbers * whole).sum(1) * inverse((weights * whole.square()).sum(1))
        error = (weights * (numbers - found.unsqueeze(1) * whole).square()).sum(1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, found, scale)
    return scale


def second_divisors(integers: SmallIntegers) -> list[float]:
    """Divisors of the widest number of a block for trials of its scale."""
    last = integers.first + integers.step * integers.largest
    edge = integers.first if abs(integers.first) > abs(last) else last
    steps = (trial - SECOND_TRIALS // 2 for trial in range(SECOND_TRIALS))
    return [edge * (1 + step * 0.5 / SECOND_TRIALS / abs(edge) ** 0.5) for step in steps]


def _nearest_codes(numbers: Tensor, scale: Tensor, integers: SmallIntegers) -> Tensor:
    """Codes of numbers (blocks, sub-blocks) with scales (blocks,), as floating-point numbers."""
    return _rounded(numbers * inverse(scale).unsqueeze(1), integers)


def _rounded(quotients: Tensor, integers: SmallIntegers) -> Tensor:
    return ((quotients - integers.first) / integers.step).round_().clamp_(0, integers.largest)


def _value(codes: Tensor, integers: SmallIntegers | None) -> Tensor:
    return torch.ones_like(codes) if integers is None else codes * integers.step + integers.first


def _with_levels(blocks: _Blocks, scale: Tensor, codes: Tensor, minimum: Tensor, minimum_codes: Tensor) -> _State:
    """The state with the nearest levels; its error by block."""
    levels, error = _rounding(blocks, scale, codes, minimum, minimum_codes)
    return _State(scale, codes, minimum, minimum_codes, levels, error.sum(1))


def _rounding(
    blocks: _Blocks, scale: Tensor, codes: Tensor, minimum: Tensor, minimum_codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Nearest levels, and the errors of the sub-blocks (blocks, sub-blocks)."""
    kind = blocks.kind
    factor = (scale.unsqueeze(1) * _value(codes, kind.scales)).unsqueeze(-1)
    numbers = blocks.numbers
    if kind.offset:
        numbers = numbers - _offset(kind, minimum, minimum_codes).unsqueeze(-1)
    levels = nearest_levels(numbers * inverse(factor), kind, blocks.weights)
    error = torch.addcmul(numbers, levels, factor, value=-1).square_().mul_(blocks.weights).sum(-1)
    return levels, error


def _offset(kind: BlockType, minimum: Tensor, minimum_codes: Tensor) -> Tensor:
    return minimum.unsqueeze(1) if kind.minimums is None else -(minimum.unsqueeze(1) * minimum_codes)


def _moved_codes(blocks: _Blocks, state: _State) -> _State:
    """Each sub-block's codes among the neighbours of those that it has."""
    kind, integers = blocks.kind, blocks.kind.scales
    assert integers is not None  # noqa: S101 - for the type checker
    best = _Choice(state.codes, state.minimum_codes, *_rounding(blocks, *_numbers(state)))
    for step in (-1, 1):
        codes = (state.codes + step).clamp(0, integers.largest)
        best = best.better(_with_its_minimum(blocks, state, codes) if kind.minimums else _tried(blocks, state, codes))
    if kind.minimums is not None:
        for step in (-1, 1):
            moved = (best.minimum_codes + step).clamp(0, kind.minimums.largest)
            best = best.better(_tried(blocks, state, best.codes, moved))
    return replace(
        state, codes=best.codes, minimum_codes=best.minimum_codes, levels=best.levels, error=best.error.sum(1)
    )


@dataclass(frozen=True)
class _Choice:
    """Codes of sub-blocks (blocks, sub-blocks), levels, and the errors of the sub-blocks."""

    codes: Tensor
    minimum_codes: Tensor
    levels: Tensor
    error: Tensor

    def better(self, other: "_Choice") -> "_Choice":
        wins = other.error < self.error
        return _Choice(
            torch.where(wins, other.codes, self.codes),
            torch.where(wins, other.minimum_codes, self.minimum_codes),
            torch.where(wins.unsqueeze(-1), other.levels, self.levels),
            torch.where(wins, other.error, self.error),
        )


def _tried(blocks: _Blocks, state: _State, codes: Tensor, minimum_codes: Tensor | None = None) -> _Choice:
    minimum_codes = state.minimum_codes if minimum_codes is None else minimum_codes
    return _Choice(codes, minimum_codes, *_rounding(blocks, state.scale, codes, state.minimum, minimum_codes))


def _with_its_minimum(blocks: _Blocks, state: _State, codes: Tensor) -> _Choice:
    """Codes of factors with the offset's code that is best for the levels that they lead to."""
    kind, levels = blocks.kind, _tried(blocks, state, codes).levels
    assert kind.minimums is not None  # noqa: S101 - for the type checker
    factor = (state.scale.unsqueeze(1) * _value(codes, kind.scales)).unsqueeze(-1)
    offset = (blocks.weights * (blocks.numbers - factor * levels)).sum(-1) / blocks.weights.sum(-1)
    return _tried(blocks, state, codes, _nearest_codes(-offset, state.minimum, kind.minimums))


def _numbers(state: _State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return state.scale, state.codes, state.minimum, state.minimum_codes


def _refitted(blocks: _Blocks, state: _State) -> _State:
    """Scales of the blocks by least squares with the levels and codes that there are."""
    kind = blocks.kind
    first = state.levels * _value(state.codes, kind.scales).unsqueeze(-1)
    weighted = blocks.weights * first
    square, product = (weighted * first).sum((1, 2)), (weighted * blocks.numbers).sum((1, 2))
    if not kind.offset:
        return _with_levels(blocks, blocks.stored(product * inverse(square)), *_numbers(state)[1:])
    second = torch.ones_like(state.codes) if kind.minimums is None else -state.minimum_codes
    by_part, totals = blocks.weights.sum(-1), (blocks.weights * blocks.numbers).sum(-1)
    cross, other = (weighted.sum(-1) * second).sum(1), (by_part * second.square()).sum(1)
    product_2 = (totals * second).sum(1)
    determinant = square * other - cross * cross
    solvable = determinant > 1e-9 * square * other
    scale = (other * product - cross * product_2) * inverse(determinant)
    minimum = (square * product_2 - cross * product) * inverse(determinant)
    scale, minimum = torch.where(solvable, scale, state.scale), torch.where(solvable, minimum, state.minimum)
    if kind.minimums is not None:
        minimum = minimum.clamp(min=0)
    return _with_levels(blocks, blocks.stored(scale), state.codes, blocks.stored(minimum), state.minimum_codes)
