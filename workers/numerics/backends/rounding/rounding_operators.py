"""The fake quantizer in torch's operators, for any device and dtype; on a CPU in as few passes as possible.

The functions are those of `workers.numerics.backends.rounding.rounding_kernels`, which has Triton's, with the same
arguments and results; formulas and symbols are in `workers.methods.sign_round`. Arithmetic is in the offsets' dtype,
fp32 or fp64.

Weights are processed in chunks whose buffers stay in a CPU's cache and are reused for every chunk. No truth values are
computed from weights: on a CPU an operator that returns or takes them costs as much as five others. So m is applied by
the derivative of clamping (`hardtanh_backward`), and the sign of 0 and of NaN is 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from app.domain.methods import PER_CHANNEL, Scheme
from workers.numerics.affine import (
    ASYMMETRIC_FACTORS,
    SMALLEST_SCALE,
    SYMMETRIC_FACTORS,
    Grid,
    GroupRange,
    affine_grid,
    range_factors,
    store_scale,
)

CACHED_ELEMENTS = 131_072
"""Elements of a chunk for each thread: the buffers of a chain of operators about fill a second-level cache."""
CHUNK_ELEMENTS = CACHED_ELEMENTS << 8
"""Elements of a chunk on a GPU, where the buffers only have to fit."""


@dataclass(frozen=True)
class GridSettings:
    """Numbers that fix the grid of every group, beside its range: b, whether z is constant, and the least |s|."""

    bits: int
    symmetric: bool
    smallest: float

    @classmethod
    def of(cls, scheme: Scheme, scale_dtype: torch.dtype) -> "GridSettings":
        """Settings of a scheme whose scales are stored in `scale_dtype`."""
        return cls(scheme.bits, scheme.symmetric, SMALLEST_SCALE[scale_dtype])


@dataclass(frozen=True)
class Groups:
    """The tensors of the quantizer, all contiguous: (groups, G) or (groups,).

    weight           the model's dtype     offset, low, high, alpha, beta    fp32, or fp64 for fp64 weights
    codes, zero      uint8                 scale    the dtype that stores scales
    unit             unit of the offsets, if Triton's kernels count them in int16
    """

    weight: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    alpha: Tensor
    beta: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor
    unit: float = 1.0

    def tensors(self) -> dict[str, Any]:
        """All tensors by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def grid(self, settings: GridSettings) -> Grid:
        """The grid of the present alpha and beta."""
        ranges, scheme = GroupRange(self.low, self.high), _scheme(settings.bits, settings.symmetric)
        return affine_grid(ranges, scheme, self.scale.dtype, self.alpha, self.beta)


@dataclass(frozen=True)
class Buffers:
    """Buffers of one chunk, (groups, G), in the working dtype; their contents change during a pass."""

    weight: Tensor
    unclamped: Tensor
    codes: Tensor


def offset_unit(steps: int, learning_rate: float) -> float | None:  # noqa: ARG001 - as in `workers.numerics.backends.rounding.rounding_kernels`
    """No unit: here V is not counted in 16 bits."""
    return None


def warm_ups(*_: object, **__: object) -> list[Callable[[], object]]:
    """An empty list: nothing is compiled."""
    return []


def write(groups: Groups, settings: GridSettings, w_hat: Tensor) -> None:
    """Writes w_hat of the present parameters."""
    grid, w_hat = groups.grid(settings), w_hat.view(groups.weight.shape)
    for rows, work in _chunks(groups):
        chunk = grid.rows(rows)
        w_hat[rows] = _steps(_codes(groups, rows, chunk, work), chunk).mul_(chunk.scale.unsqueeze(-1))


def step(
    groups: Groups,
    settings: GridSettings,
    *,
    gradient: Tensor,
    rate: Tensor,
    faults: Tensor,
    limits: tuple[float, float],
    w_hat: Tensor,
) -> None:
    """Updates V, alpha and beta, the latter within `limits`; writes w_hat of the new parameters.

    Adds the number of groups with NaN gradients to `faults`.
    """
    grid = groups.grid(settings)
    sums = [torch.empty_like(groups.low) for _ in range(2 if settings.symmetric else 4)]
    move, gradient = grid.scale.sign().mul_(-rate).unsqueeze(-1), gradient.view(groups.weight.shape)
    for rows, work in _chunks(groups):
        inside = _gradients(groups, rows, grid.rows(rows), work, gradient[rows], sums)
        groups.offset[rows].addcmul_(inside.sign_(), move[rows])
    move_factors(groups, grid, sums, rate=rate, limits=limits, faults=faults)
    write(groups, settings, w_hat)


def move_factors(
    groups: Groups, grid: Grid, sums: Sequence[Tensor], *, rate: Tensor, limits: tuple[float, float], faults: Tensor
) -> None:
    """Updates alpha and beta from sums over each group: of D*(q - z), D*m*w and, if there is z, of D and D*m."""
    d_alpha, d_beta = _range_gradients(groups, grid, sums)
    faults += d_alpha.isnan().sum(dtype=faults.dtype)
    for factor, by_factor in ((groups.alpha, d_alpha), (groups.beta, d_beta)):
        factor.sub_(by_factor.nan_to_num_().sign_().mul_(rate)).clamp_(*limits)


def _gradients(groups: Groups, rows: slice, grid: Grid, work: Buffers, d: Tensor, sums: Sequence[Tensor]) -> Tensor:
    """D*m of a chunk, of which dL/dV is s times, for D = `d`.

    Writes to `sums` those of D*(q - z), D*m*w and, if there are four, of D and D*m over each group.
    """
    by_steps, by_weight, *by_zero = (total[rows] for total in sums)
    d = d.to(work.codes.dtype)
    steps = _steps(_codes(groups, rows, grid, work), grid)
    torch.sum(steps.mul_(d), -1, out=by_steps)
    if by_zero:
        torch.sum(d, -1, out=by_zero[0])
    inside: Tensor = torch.ops.aten.hardtanh_backward.grad_input(
        d, work.unclamped, grid.lowest - 0.5, grid.highest + 0.5, grad_input=work.unclamped
    )
    torch.sum(work.weight.mul_(inside), -1, out=by_weight)
    if by_zero:
        torch.sum(inside, -1, out=by_zero[1])
    return inside


def _range_gradients(groups: Groups, grid: Grid, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """dL/dalpha and dL/dbeta, (groups,), from the sums of `_gradients`."""
    by_steps, by_weight, *by_zero = sums
    d_scale = by_steps - by_weight.div_(grid.scale)
    if grid.zero is None:
        low_wins = -groups.alpha * groups.low > groups.beta * groups.high
        d_alpha = d_scale * torch.where(low_wins, groups.low / grid.lowest, 0)
        return d_alpha, d_scale * torch.where(low_wins, 0, groups.high / grid.lowest)
    d_zero = -grid.scale * (by_zero[0] - by_zero[1])
    d_scale += d_zero * groups.alpha * groups.low / grid.scale.square()
    return -d_zero * groups.low / grid.scale - d_scale * groups.low / grid.highest, d_scale * groups.high / grid.highest


def keep(groups: Groups, settings: GridSettings, better: Tensor) -> None:
    """Stores the present result in codes, scale and zero, if `better`."""
    if not better.is_cuda and not better:
        return
    grid = groups.grid(settings)
    _overwrite(groups.scale, grid.scale, better)
    if grid.zero is not None:
        _overwrite(groups.zero, grid.zero, better)
    for rows, work in _chunks(groups):
        _overwrite(groups.codes[rows], _codes(groups, rows, grid.rows(rows), work).sub_(grid.lowest), better)


def search_range(
    weight: Tensor, second_moments: Tensor, settings: GridSettings, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The range of each group with the least sum_j moments_j * (w_hat_j - w_j)^2, rounded to nearest: low and high.

    weight           (groups, G), contiguous
    second_moments   fp32 (columns // G, G), of the linear's input columns; its rows of groups repeat in this order

    The full range and shrunk ones are tried: symmetric, with either sign of the scale; asymmetric, with every pair of
    factors for the two sides. Among equals the first, larger one is taken.
    """
    rows = len(second_moments) * max(1, _elements(weight) // second_moments.numel())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    ranges = []
    for chunk in torch.split(weight, rows):
        roots = second_moments.to(dtype).sqrt().repeat(len(chunk) // len(second_moments), 1)
        wide = chunk.to(dtype)
        ranges.append(least_range(GroupRange.of(wide), _Lengths(wide, roots), settings, scale_dtype))
    low, high = (torch.cat(bounds) for bounds in zip(*ranges, strict=True))
    return low, high


Bound = Tensor | float
"""Of a group's codes, less the zero point: (groups,), or a number for all."""
Lengths = Callable[[Tensor, Sequence[tuple[Bound, Bound]]], Sequence[Tensor]]
"""For a scale and bounds of codes: s * sqrt(sum of moments * error^2) of each group, once for each pair of bounds."""


def least_range(
    full: GroupRange, lengths: Lengths, settings: GridSettings, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The range with the least of `lengths` for each group: low and high. `full` is that of the weights."""
    search = _search_symmetric if settings.symmetric else _search_asymmetric
    return search(full, lengths, settings.bits, scale_dtype)


def _search_symmetric(full: GroupRange, lengths: Lengths, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The search for both signs of a scale, which share w/s, since rounding is even: only the extra code differs."""
    levels = 2 ** (bits - 1)
    low_wins, widest = -full.low > full.high, torch.maximum(-full.low, full.high)
    least, reach, by_low = torch.full_like(widest, torch.inf), widest, low_wins
    for factor in range_factors(SYMMETRIC_FACTORS):
        scale = store_scale(widest * factor / levels, scale_dtype)
        positive, negative = lengths(scale, ((-levels, levels - 1), (1 - levels, levels)))
        usual, other = torch.where(low_wins, positive, negative), torch.where(low_wins, negative, positive)
        for total, side in ((usual, low_wins), (other, ~low_wins)):
            better = total < least
            least = torch.where(better, total, least)
            reach, by_low = torch.where(better, widest * factor, reach), torch.where(better, side, by_low)
    nothing = torch.zeros_like(reach)
    return torch.where(by_low, -reach, nothing), torch.where(by_low, nothing, reach)


def _search_asymmetric(
    full: GroupRange, lengths: Lengths, bits: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scheme = _scheme(bits, False)
    least, best = torch.full_like(full.low, torch.inf), full
    factors = range_factors(ASYMMETRIC_FACTORS)
    for candidate in (GroupRange(full.low * a, full.high * b) for a in factors for b in factors):
        tried = affine_grid(candidate, scheme, scale_dtype)
        zero: Bound = 0.0 if tried.zero is None else tried.zero
        (total,) = lengths(tried.scale, ((tried.lowest - zero, tried.highest - zero),))
        better = total < least
        least = torch.where(better, total, least)
        best = GroupRange(torch.where(better, candidate.low, best.low), torch.where(better, candidate.high, best.high))
    return best.low, best.high


class _Lengths:
    """`Lengths` of weights and roots of moments, both (groups, G) in the working dtype."""

    def __init__(self, weight: Tensor, roots: Tensor) -> None:
        self._weight, self._roots = weight, roots
        self._in_steps, self._rounded, self._error = (torch.empty_like(weight) for _ in range(3))

    def __call__(self, scale: Tensor, bounds: Sequence[tuple[Bound, Bound]]) -> list[Tensor]:
        torch.div(self._weight, scale.unsqueeze(-1), out=self._in_steps)
        torch.round(self._in_steps, out=self._rounded)
        return [self._length(*each) * scale for each in bounds]

    def _length(self, lowest: Bound, highest: Bound) -> Tensor:
        error = self._error
        if isinstance(lowest, Tensor) and isinstance(highest, Tensor):
            torch.maximum(self._rounded, lowest.unsqueeze(-1), out=error)
            torch.minimum(error, highest.unsqueeze(-1), out=error)
        else:
            torch.clamp(self._rounded, float(lowest), float(highest), out=error)
        error.sub_(self._in_steps).mul_(self._roots)
        length: Tensor = torch.linalg.vector_norm(error, dim=-1)
        return length


def _codes(groups: Groups, rows: slice, grid: Grid, work: Buffers) -> Tensor:
    """q of a chunk in `work.codes`, the same before clamping in `work.unclamped` and w in `work.weight`."""
    weight = work.weight.copy_(groups.weight[rows])
    unclamped = torch.addcdiv(groups.offset[rows], weight, grid.scale.unsqueeze(-1), out=work.unclamped).round_()
    if grid.zero is not None:
        unclamped += grid.zero.unsqueeze(-1)
    return torch.clamp(unclamped, grid.lowest, grid.highest, out=work.codes)


def _steps(codes: Tensor, grid: Grid) -> Tensor:
    """q - z, written over q."""
    return codes if grid.zero is None else codes.sub_(grid.zero.unsqueeze(-1))


def _overwrite(kept: Tensor, value: Tensor, better: Tensor) -> None:
    kept.copy_(torch.where(better, value.to(kept.dtype), kept) if better.is_cuda else value)


def _chunks(groups: Groups) -> Iterator[tuple[slice, Buffers]]:
    """Slices of groups, each with buffers that it may use."""
    count, width = groups.weight.shape
    size = min(count, max(1, _elements(groups.weight) // width))
    buffers = [torch.empty_like(groups.offset[:size]) for _ in fields(Buffers)]
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        yield rows, Buffers(*(buffer[: rows.stop - start] for buffer in buffers))


def _elements(weight: Tensor) -> int:
    return CHUNK_ELEMENTS if weight.is_cuda else CACHED_ELEMENTS * torch.get_num_threads()


@lru_cache
def _scheme(bits: int, symmetric: bool) -> Scheme:
    return Scheme(bits=bits, group_size=PER_CHANNEL, symmetric=symmetric)
