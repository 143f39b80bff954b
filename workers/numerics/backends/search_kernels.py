"""A Triton kernel of the search of block types: all trials and rounds of a block in one launch, instead of a thousand.

The formulas and their order are those of `workers.numerics.blocks.search` and `.sub_blocks`; a program has a few rows
of one block of columns, (ROWS, sub-blocks, columns). Arithmetic is fp32 with IEEE's divisions and roundings. Sums may
differ in their last bits, so that of trials that are as good another is kept. A block with a number that is not finite
has NaN as its scale.

The interpreter runs the same code on a CPU (TRITON_INTERPRET=1); there the tests compare it with the plain one.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import ODD_LEVELS, BlockType, SmallIntegers
from workers.numerics.backends.column_kernels import _inverse, _nearest_level, _to_whole, level_facts
from workers.numerics.blocks.levels import NEIGHBOURS, neighbours
from workers.numerics.blocks.search import ROUNDS, second_divisors
from workers.numerics.blocks.stored_parts import columns_of, empty_weight
from workers.numerics.blocks.sub_blocks import ALIKE, REFINEMENTS, edges_of, trials_of
from workers.numerics.quantized import BlockWeight

PROGRAM_ELEMENTS = 1024
NEAR = tl.constexpr(NEIGHBOURS)
SAME = tl.constexpr(ALIKE)
LARGEST = tl.constexpr(65504.0)
"""Of fp16."""


def search(
    made: BlockWeight,
    weight: Tensor,
    weights: Tensor,
    factor: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    codes: bool = True,
) -> None:
    """Searches a weight (out, in) of any strides and writes what is found to `made`, whose tensors may be views.

    weights          of the squared errors, fp32, (in,) or (out, in), the last dimension contiguous
    factor, offset   of the sub-blocks, fp32 (sub-blocks, out), contiguous; written where given
    codes            whether codes of weights are written
    """
    kind, (rows, columns) = made.kind, weight.shape
    each = max(1, PROGRAM_ELEMENTS // kind.weights)
    unused = weights
    table, facts = level_facts(kind, weight.device)
    lattice = kind.levels == ODD_LEVELS
    tables = _tables(kind, weight.device)
    _search[(triton.cdiv(rows, each), columns // kind.weights)](
        weight,
        weights,
        neighbours(weight.device) if lattice else unused if table is None else table,
        tables,
        made.codes,
        made.scale,
        *(unused if tensor is None else tensor for tensor in (made.scale_codes, made.minimum, made.minimum_codes)),
        unused if factor is None else factor,
        unused if offset is None else offset,
        rows,
        *weight.stride(),
        0 if weights.ndim == 1 else weights.stride(0),
        made.codes.stride(0),
        made.scale.stride(0),
        0 if made.scale_codes is None else made.scale_codes.stride(0),
        OFFSET_KIND=0 if not kind.offset else 1 if kind.minimums is None else 2,
        TRIALS=_trials(kind),
        SECOND=len(second_divisors(kind.scales or SmallIntegers(1))),
        LAST_LEVEL=float(kind.levels[-1]),
        BY_MAGNITUDE=kind.levels[0] == -kind.levels[-1],
        SCALES=kind.scales is not None,
        **_integers(kind.scales, ""),
        **_integers(kind.minimums, "_2"),
        CODES=codes,
        GRID=factor is not None,
        REFINEMENTS=REFINEMENTS,
        ROUNDS=ROUNDS,
        ROWS=each,
        PARTS=kind.weights // kind.columns,
        WIDTH=kind.columns,
        num_warps=4,
        FACTS=(*facts.values(), lattice),
    )


def warm_ups(columns: int, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """A launch on a few rows of each layout that a search meets, which compiles it."""
    kind = scheme.blocks
    if kind is None or columns % kind.weights:
        return []
    whole = torch.ones(16, columns, dtype=dtype, device=device)
    weights, block = torch.ones(columns, device=device), torch.ones(kind.weights, 16, device=device).T
    factor = torch.empty(kind.weights // kind.columns, 16, device=device)
    made = empty_weight(whole, scheme)
    part = columns_of(made, slice(0, kind.weights))
    offset = factor.clone() if kind.offset else None
    return [
        partial(search, made, whole, weights),
        partial(search, part, block, weights[: kind.weights], factor, offset, codes=False),
    ]


def _integers(integers: SmallIntegers | None, which: str) -> dict[str, int]:
    own = integers or SmallIntegers(1)
    return {f"FIRST{which}": own.first, f"STEP{which}": own.step, f"MOST{which}": own.largest}


def _trials(kind: BlockType) -> int:
    spreads = len(trials_of(kind).spreads())
    return 2 * spreads + 1 if kind.offset else spreads * len(edges_of(kind))


@cache
def _tables(kind: BlockType, device: torch.device) -> Tensor:
    """Divisors of the first trials, how far their offsets lie inside, and divisors of scales' and minimums' trials."""
    spreads = trials_of(kind).spreads()
    if kind.offset:
        first = [(1.0, 0.0)] + [(spread, inside) for spread in spreads for inside in (0.0, 1 - 1 / spread)]
    else:
        first = [(edge * spread, 0.0) for spread in spreads for edge in edges_of(kind)]
    numbers = [divisor for divisor, _ in first] + [inside for _, inside in first]
    for integers in (kind.scales, kind.minimums):
        numbers += second_divisors(integers or SmallIntegers(1))
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@triton.jit
def _across(x):  # type: ignore[no-untyped-def]
    """(ROWS, PARTS) for every column."""
    return x[:, :, None]


@triton.jit
def _levels(  # type: ignore[no-untyped-def]
    numbers, weights, TABLE, WEIGHTED: tl.constexpr, FACTS: tl.constexpr
):
    """`workers.numerics.blocks.levels.nearest_levels`, with weights where a lattice asks for them."""
    if FACTS[5]:
        quads: tl.constexpr = numbers.shape[2] // 4
        magnitude = tl.reshape(tl.abs(numbers), (numbers.shape[0], numbers.shape[1], quads, 4))
        index = tl.minimum(tl.maximum(_to_whole((magnitude - 1) / 2), 0.0), 7.0).to(tl.int32)
        digit = tl.arange(0, 4)[None, None, None, :]
        at = tl.sum(index << (3 * digit), 3)[:, :, :, None] * (NEAR * 4) + digit
        found = tl.load(TABLE + at)
        if WEIGHTED:
            weight = tl.reshape(weights, (numbers.shape[0], numbers.shape[1], quads, 4))
            least = tl.sum((found - magnitude) * (found - magnitude) * weight, 3)[:, :, :, None]
            for other in range(1, NEAR):
                point = tl.load(TABLE + at + other * 4)
                error = tl.sum((point - magnitude) * (point - magnitude) * weight, 3)[:, :, :, None]
                found = tl.where(error < least, point, found)
                least = tl.minimum(error, least)
        found = tl.reshape(found, (numbers.shape[0], numbers.shape[1], numbers.shape[2]))
        level = tl.where(numbers < 0, -found, found)
    else:
        level = _nearest_level(numbers, TABLE, FACTS[0], FACTS[1], FACTS[2], FACTS[3], FACTS[4])
    return level


@triton.jit
def _widest(numbers, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the numbers along the last axis the first of the largest magnitude."""
    magnitude = tl.abs(numbers)
    place = tl.arange(0, numbers.shape[axis])
    place = place[None, None, :] if axis == 2 else place[None, :]
    most = tl.max(magnitude, axis, keep_dims=True)
    first = tl.min(tl.where(magnitude == most, place, numbers.shape[axis]), axis, keep_dims=True)
    return tl.sum(tl.where(place == first, numbers, 0.0), axis)


@triton.jit
def _codes_of(numbers, scale, FIRST: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest codes of numbers (ROWS, PARTS) with scales (ROWS,)."""
    code = _to_whole((numbers * _inverse(scale)[:, None] - FIRST) / STEP)
    return tl.minimum(tl.maximum(code, 0.0), MOST * 1.0)


@triton.jit
def _second_scale(  # type: ignore[no-untyped-def]
    numbers, weights, DIVISORS, SECOND: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr
):
    widest = _widest(numbers, 1)
    least = widest * 0.0 + float("inf")
    scale = widest * 0.0
    for trial in range(SECOND):
        tried = tl.div_rn(widest, tl.load(DIVISORS + trial) + widest * 0.0)
        whole = _codes_of(numbers, tried, FIRST, STEP, MOST) * STEP + FIRST
        found = tl.sum(weights * numbers * whole, 1) * _inverse(tl.sum(weights * whole * whole, 1))
        off = numbers - found[:, None] * whole
        error = tl.sum(weights * off * off, 1)
        scale = tl.where(error < least, found, scale)
        least = tl.minimum(error, least)
    return scale


@triton.jit
def _stored(scale, unit):  # type: ignore[no-untyped-def]
    """Scales rounded as they are stored."""
    return tl.div_rn(tl.minimum(tl.maximum(scale * unit, -LARGEST), LARGEST).to(tl.float16).to(tl.float32), unit)


@triton.jit
def _offset(minimum, minimum_codes, OFFSET_KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = -(minimum[:, None] * minimum_codes) if OFFSET_KIND == 2 else minimum[:, None] + minimum_codes * 0.0
    return offset


@triton.jit
def _solved(  # type: ignore[no-untyped-def]
    numbers, weights, factor, offset, TABLE, OFFSET_KIND: tl.constexpr, FACTS: tl.constexpr
):
    """The best factor and offset (ROWS, PARTS) for the levels that a factor and an offset give, and their error."""
    scaled = numbers
    if OFFSET_KIND > 0:
        scaled = numbers - _across(offset)
    levels = _levels(scaled * _across(_inverse(factor)), weights, TABLE, False, FACTS)
    energy, product = tl.sum(weights * numbers * numbers, 2), tl.sum(weights * numbers * levels, 2)
    two = tl.sum(weights * levels * levels, 2)
    slope = product * _inverse(two)
    shift = slope * 0.0
    error = energy - slope * product
    if OFFSET_KIND > 0:
        total, first, one = tl.sum(weights, 2), tl.sum(weights * numbers, 2), tl.sum(weights * levels, 2)
        determinant = total * two - one * one
        alike = determinant <= SAME * total * two
        inverse = _inverse(determinant)
        both = tl.where(alike, 0.0, (total * product - first * one) * inverse)
        shift = tl.where(alike, first * _inverse(total), (two * first - one * product) * inverse)
        if OFFSET_KIND == 2:
            slope = tl.where(shift > 0, slope, both)
            shift = tl.minimum(shift, 0.0)
        else:
            slope = both
        error = energy - 2 * (slope * product + shift * first)
        error += slope * slope * two + 2 * slope * shift * one + shift * shift * total
        error = tl.maximum(error, 0.0)
    return slope, shift, error


@triton.jit
def _rounding(  # type: ignore[no-untyped-def]
    numbers, weights, factor, offset, TABLE, OFFSET_KIND: tl.constexpr, FACTS: tl.constexpr
):
    """The nearest levels with factors and offsets (ROWS, PARTS), and the errors of sub-blocks."""
    own = numbers
    if OFFSET_KIND > 0:
        own = numbers - _across(offset)
    levels = _levels(own * _across(_inverse(factor)), weights, TABLE, True, FACTS)
    off = own - levels * _across(factor)
    return levels, tl.sum(off * off * weights, 2)


@triton.jit(do_not_specialize=["weights_row", "codes_row", "scale_row", "parts_row"])
def _search(  # type: ignore[no-untyped-def]
    WEIGHT,
    WEIGHTS,
    TABLE,
    TRIED,
    CODE,
    SCALE,
    SCALE_CODE,
    MINIMUM,
    MINIMUM_CODE,
    FACTOR,
    OFFSET,
    rows,
    weight_row,
    weight_column,
    weights_row,
    codes_row,
    scale_row,
    parts_row,
    OFFSET_KIND: tl.constexpr,
    TRIALS: tl.constexpr,
    SECOND: tl.constexpr,
    LAST_LEVEL: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
    SCALES: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    MOST: tl.constexpr,
    FIRST_2: tl.constexpr,
    STEP_2: tl.constexpr,
    MOST_2: tl.constexpr,
    CODES: tl.constexpr,
    GRID: tl.constexpr,
    REFINEMENTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    FACTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    real = row < rows
    part = tl.arange(0, PARTS)
    column = (block * PARTS + part)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    held = real[:, None, None] & (column >= 0)[None, :, :]
    at = row[:, None, None] * weight_row + column[None, :, :] * weight_column
    numbers = tl.load(WEIGHT + at, mask=held, other=0.0).to(tl.float32)
    weights = tl.load(WEIGHTS + row[:, None, None] * weights_row + column[None, :, :], mask=held, other=1.0)

    finite = (numbers == numbers) & (tl.abs(numbers) < float("inf"))  # noqa: PLR0124 - NaN alone differs
    known = tl.min(tl.min(finite.to(tl.int32), 2), 1) > 0
    numbers = tl.where(known[:, None, None], numbers, 0.0)
    largest = tl.max(tl.max(tl.abs(numbers), 2), 1)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    exponent = tl.minimum(tl.maximum(exponent, -120), 120)
    unit = tl.where(largest > 0, ((exponent + 127) << 23).to(tl.float32, bitcast=True), 1.0)
    numbers = tl.div_rn(numbers, unit[:, None, None] + numbers * 0.0)
    by_part = tl.sum(weights, 2)

    # Each sub-block by itself.
    if OFFSET_KIND > 0:
        low, high = tl.min(numbers, 2), tl.max(numbers, 2)
        if OFFSET_KIND == 2:
            low = tl.minimum(low, 0.0)
        widest = tl.div_rn(tl.maximum(high - low, 0.0), low * 0.0 + LAST_LEVEL)
    else:
        low = by_part * 0.0
        widest = tl.max(tl.abs(numbers), 2) if BY_MAGNITUDE else _widest(numbers, 2)
    factor, offset = widest * 0.0, widest * 0.0
    least = widest * 0.0 + float("inf")
    for trial in range(TRIALS + REFINEMENTS):
        refines = trial >= TRIALS
        which = tl.minimum(trial, TRIALS - 1)
        tried = tl.div_rn(widest, tl.load(TRIED + which) + widest * 0.0)
        from_there = low
        if OFFSET_KIND > 0:
            from_there = low + widest * LAST_LEVEL * tl.load(TRIED + TRIALS + which) / 2
        tried = tl.where(refines, factor, tried)
        from_there = tl.where(refines, offset, from_there)
        slope, shift, error = _solved(numbers, weights, tried, from_there, TABLE, OFFSET_KIND, FACTS)
        better = error < least
        factor = tl.where(better, slope, factor)
        offset = tl.where(better, shift, offset)
        least = tl.where(better, error, least)

    # Scales of the block, and codes.
    codes, minimum_codes = factor * 0.0, factor * 0.0
    if SCALES:
        scale = _stored(_second_scale(factor, by_part, TRIED + 2 * TRIALS, SECOND, FIRST, STEP, MOST), unit)
        codes = _codes_of(factor, scale, FIRST, STEP, MOST)
    else:
        scale = _stored(tl.sum(factor, 1), unit)
    minimum = scale * 0.0
    if OFFSET_KIND == 2:
        divisors = TRIED + 2 * TRIALS + SECOND
        minimum = _stored(_second_scale(-offset, by_part, divisors, SECOND, FIRST_2, STEP_2, MOST_2), unit)
        minimum_codes = _codes_of(-offset, minimum, FIRST_2, STEP_2, MOST_2)
    elif OFFSET_KIND == 1:
        minimum = _stored(tl.sum(offset, 1), unit)

    value = codes * 0.0 + 1.0
    if SCALES:
        value = codes * STEP + FIRST
    own = _offset(minimum, minimum_codes, OFFSET_KIND)
    levels, errors = _rounding(numbers, weights, scale[:, None] * value, own, TABLE, OFFSET_KIND, FACTS)
    error = tl.sum(errors, 1)
    for _round in range(ROUNDS):
        if SCALES:
            # Codes of sub-blocks among their neighbours.
            best, best_minimum, best_errors = codes, minimum_codes, errors
            for step in range(2):
                moved = tl.minimum(tl.maximum(codes + (2 * step - 1), 0.0), MOST * 1.0)
                tried = scale[:, None] * (moved * STEP + FIRST)
                with_it = minimum_codes
                if OFFSET_KIND == 2:
                    levels, _errors = _rounding(numbers, weights, tried, own, TABLE, OFFSET_KIND, FACTS)
                    off = tl.sum(weights * (numbers - _across(tried) * levels), 2)
                    with_it = _codes_of(-tl.div_rn(off, by_part), minimum, FIRST_2, STEP_2, MOST_2)
                levels, tried_errors = _rounding(
                    numbers, weights, tried, _offset(minimum, with_it, OFFSET_KIND), TABLE, OFFSET_KIND, FACTS
                )
                better = tried_errors < best_errors
                best = tl.where(better, moved, best)
                best_minimum = tl.where(better, with_it, best_minimum)
                best_errors = tl.where(better, tried_errors, best_errors)
            if OFFSET_KIND == 2:
                for step in range(2):
                    with_it = tl.minimum(tl.maximum(best_minimum + (2 * step - 1), 0.0), MOST_2 * 1.0)
                    levels, tried_errors = _rounding(
                        numbers,
                        weights,
                        scale[:, None] * (best * STEP + FIRST),
                        _offset(minimum, with_it, OFFSET_KIND),
                        TABLE,
                        OFFSET_KIND,
                        FACTS,
                    )
                    better = tried_errors < best_errors
                    best_minimum = tl.where(better, with_it, best_minimum)
                    best_errors = tl.where(better, tried_errors, best_errors)
            total = tl.sum(best_errors, 1)
            better = total < error
            codes = tl.where(better[:, None], best, codes)
            minimum_codes = tl.where(better[:, None], best_minimum, minimum_codes)
            error = tl.where(better, total, error)
            value = codes * STEP + FIRST
        # Scales of the block by least squares with the levels that there are.
        own = _offset(minimum, minimum_codes, OFFSET_KIND)
        levels, errors = _rounding(numbers, weights, scale[:, None] * value, own, TABLE, OFFSET_KIND, FACTS)
        first = levels * _across(value)
        square = tl.sum(tl.sum(weights * first * first, 2), 1)
        product = tl.sum(tl.sum(weights * first * numbers, 2), 1)
        if OFFSET_KIND > 0:
            second = codes * 0.0 + 1.0
            if OFFSET_KIND == 2:
                second = -minimum_codes
            cross = tl.sum(tl.sum(weights * first, 2) * second, 1)
            other = tl.sum(by_part * second * second, 1)
            product_2 = tl.sum(tl.sum(weights * numbers, 2) * second, 1)
            determinant = square * other - cross * cross
            solvable = determinant > 1e-9 * square * other
            inverse = _inverse(determinant)
            new_scale = tl.where(solvable, (other * product - cross * product_2) * inverse, scale)
            new_minimum = tl.where(solvable, (square * product_2 - cross * product) * inverse, minimum)
            if OFFSET_KIND == 2:
                new_minimum = tl.maximum(new_minimum, 0.0)
            new_minimum = _stored(new_minimum, unit)
        else:
            new_scale, new_minimum = product * _inverse(square), minimum
        new_scale = _stored(new_scale, unit)
        levels, tried_errors = _rounding(
            numbers,
            weights,
            new_scale[:, None] * value,
            _offset(new_minimum, minimum_codes, OFFSET_KIND),
            TABLE,
            OFFSET_KIND,
            FACTS,
        )
        total = tl.sum(tried_errors, 1)
        better = total < error
        scale = tl.where(better, new_scale, scale)
        minimum = tl.where(better, new_minimum, minimum)
        errors = tl.where(better[:, None], tried_errors, errors)
        error = tl.where(better, total, error)
        own = _offset(minimum, minimum_codes, OFFSET_KIND)

    whole = tl.where(known, scale * unit, float("nan"))
    tl.store(SCALE + row * scale_row + block, whole.to(tl.float16), mask=real)
    of_parts = row[:, None] * parts_row + (block * PARTS + part)[None, :]
    held_parts = real[:, None] & (part >= 0)[None, :]
    if SCALES:
        tl.store(SCALE_CODE + of_parts, codes.to(tl.uint8), mask=held_parts)
    if OFFSET_KIND > 0:
        tl.store(MINIMUM + row * scale_row + block, (minimum * unit).to(tl.float16), mask=real)
    if OFFSET_KIND == 2:
        tl.store(MINIMUM_CODE + of_parts, minimum_codes.to(tl.uint8), mask=held_parts)
    if GRID:
        turned = (block * PARTS + part)[None, :] * rows + row[:, None]
        tl.store(FACTOR + turned, whole[:, None] * value, mask=held_parts)
        if OFFSET_KIND > 0:
            tl.store(OFFSET + turned, _offset(minimum * unit, minimum_codes, OFFSET_KIND), mask=held_parts)
    if CODES:
        levels, errors = _rounding(numbers, weights, scale[:, None] * value, own, TABLE, OFFSET_KIND, FACTS)
        if FACTS[5]:
            code = (levels + 15) / 2
        elif FACTS[0]:
            code = levels - FACTS[1]
        else:
            code = tl.load(TABLE + (levels * 2 - FACTS[3] + FACTS[4] + 1).to(tl.int32))
        tl.store(CODE + row[:, None, None] * codes_row + column[None, :, :], code.to(tl.uint8), mask=held)
