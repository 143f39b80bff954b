"""SignRound (Cheng et al., arXiv:2309.05516; AutoRound): learned rounding and clipping by signed gradient descent.

For each linear of a block, with w in groups of G columns (`workers.numerics.affine` has the full formulas):

    q = clamp(round(w/s(alpha, beta) + V) + z),   w_hat = s*(q - z)
    min over V, alpha, beta of  || block(X_fp; W) - block(X_q; W_hat) ||^2
    V     <- V     - lr_t * sign(dL/dV)         V starts at 0; lr_t sums to about 1/2, which keeps it in [-1/2, 1/2]
    alpha <- alpha - lr_t * sign(dL/dalpha)     in [0, 1], starts at 1; beta the same
    lr_t = lr*(1 - t/T),  lr = 1/T

Rounding passes gradients straight through. With D = dL/dw_hat and m = [q was not clamped]:

    dL/dV = s*D*m                               dL/ds = sum_group D*((q - z) - m*w/s)
    symmetric   only the side that sets s learns: ds/dalpha = -lo/Q if -alpha*lo > beta*hi, else ds/dbeta = -hi/Q
    asymmetric  dL/dz = -s * sum_group D*(1 - m);  z = -alpha*lo/s;  s = (beta*hi - alpha*lo)/(2^b - 1)

| symbol | variable | shape |
|---|---|---|
| w | `weight` | (groups, G), the model's dtype: the groups of all linears of one scheme, one after another |
| V | `offset` | (groups, G), fp32; on a GPU int16 in multiples of lr/T (`workers.numerics.kernels`) |
| alpha, beta | `alpha`, `beta` | (groups,), fp32 |
| lo, hi | `ranges` | (groups,), fp32 |
| D | `gradient` | (groups, G), the model's dtype |

Cost: a step is a forward and a backward of the block and one pass over its weights; memory, V and one copy of the
integer result besides. The step is written by hand, since only signs of the gradients are used: no graph is kept for
the quantizer. With 0 steps the result is round to nearest.

The start (`scale_search`) may shrink lo and hi first: of some range factors, those with the least rounding error when
columns are weighted by their inputs' second moments. alpha and beta then stay in [1/2, 3/2].

Different from the paper: that start; the original block's output comes from the original stream and the quantized
block sees the quantized stream (as in AutoRound's code); the parameters kept are those with the lowest loss on held-out
sequences, not on the step's own minibatch. Left out: activation quantization, norm and bias tuning.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from app.domain.methods import Scheme, SignRoundSpec
from workers.contracts import BlockTask, TuningSettings, WarmUp
from workers.numerics.affine import SMALLEST_SCALE, Grid, GroupRange, grid, round_to_grid, search_range
from workers.numerics.quantized import AffineWeight, BlockResult, LinearResult

FULL_LIMITS, SEARCHED_LIMITS = (0.0, 1.0), (0.5, 1.5)
"""Of alpha and beta: a full range may only shrink, a searched one may also widen."""
CACHED_ELEMENTS = 524_288
"""Elements of a chunk: as fp32 they about fill two cores' second-level caches."""


class SignRound:
    needs_inputs = True

    def warm_ups(self, kinds: WarmUp, spec: SignRoundSpec) -> list[Callable[[], object]]:
        return warm_ups(kinds, spec)

    def quantize_block(self, task: BlockTask, spec: SignRoundSpec) -> BlockResult:
        rate = spec.learning_rate or 1 / max(spec.steps, 1)
        settings = TuningSettings(spec.steps, spec.batch_size, rate)
        source = task if spec.quantized_inputs else replace(task, inputs=task.inputs_fp)
        weights = rounded_weights(task, search=spec.scale_search and spec.steps > 0, settings=settings)
        outcome = task.tune(source, weights, settings)
        counters = {"best_step": float(outcome.best_step), "nan_gradients": float(outcome.faults)}
        return BlockResult(outcome.linears, outcome.loss_initial, outcome.loss, counters)


def warm_ups(task: WarmUp, spec: SignRoundSpec) -> list[Callable[[], object]]:
    """Calls that compile this method's kernels for the linears of a model; none where there are no such kernels."""
    kinds = {(scheme, columns) for columns, scheme in task.linears}
    found: list[Callable[[], object]] = []
    for scheme, columns in kinds:
        width = columns if scheme.group_size < 0 else scheme.group_size
        fused = kernels_for(torch.empty(0, dtype=task.dtype, device=task.device))
        if fused is not None:
            grid_settings = (scheme.bits, scheme.symmetric, SMALLEST_SCALE[task.scale_dtype])
            counted = fused.offset_unit(spec.steps, 1.0) is not None
            given = {"dtypes": (task.dtype, task.scale_dtype), "counted": counted, "device": task.device}
            found += fused.warm_ups(columns, width, *grid_settings, **given)
    return found


def rounded_weights(task: BlockTask, *, search: bool, settings: TuningSettings | None = None) -> list["RoundedWeights"]:
    """The block's linears, those of the same scheme and group width together.

    search    whether ranges start from those with the least rounding error
    settings  of the steps to come; where they are known, V may be counted in steps
    """
    alike: dict[tuple[Scheme, int], dict[str, Tensor]] = {}
    for name, scheme in task.schemes.items():
        weight = task.linear(name).weight.detach()
        width = weight.shape[1] if scheme.group_size < 0 else scheme.group_size
        alike.setdefault((scheme, width), {})[name] = weight
    moments = task.moments if search else {}
    return [
        RoundedWeights(w, scheme, width, task.scale_dtype, moments, settings) for (scheme, width), w in alike.items()
    ]


def start_ranges(
    weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], scheme: Scheme, width: int, scale_dtype: torch.dtype
) -> GroupRange:
    """lo and hi of all groups, one linear after another; searched for linears whose inputs' moments are known."""
    ranges = []
    for name, weight in weights.items():
        groups = weight.reshape(-1, width)
        fused = kernels_for(groups)
        if name not in moments:
            ranges.append(GroupRange.of(groups.to(working_dtype(weight))))
        elif fused is not None:
            settings = (scheme.bits, scheme.symmetric, SMALLEST_SCALE[scale_dtype], scale_dtype)
            ranges.append(GroupRange(*fused.search_range(groups, moments[name].view(-1, width), *settings)))
        else:
            ranges.append(_search_in_chunks(groups, moments[name].view(-1, width), scheme, scale_dtype))
    return GroupRange(torch.cat([r.low for r in ranges]), torch.cat([r.high for r in ranges]))


def _search_in_chunks(groups: Tensor, moments: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> GroupRange:
    """Whole rows of the linear at a time, as many as stay in the cache."""
    count = len(moments) * max(1, CACHED_ELEMENTS // moments.numel())
    found = []
    for part in torch.split(groups, count):
        repeated = moments.to(working_dtype(part)).repeat(len(part) // len(moments), 1)
        found.append(search_range(part.to(repeated.dtype), repeated, scheme, scale_dtype))
    return GroupRange(torch.cat([r.low for r in found]), torch.cat([r.high for r in found]))


@dataclass(frozen=True)
class Rounding:
    """What is learned and what it is learned for; see the module docstring for shapes."""

    weight: Tensor
    low: Tensor
    high: Tensor
    offset: Tensor
    alpha: Tensor
    beta: Tensor

    @classmethod
    def start(cls, weight: Tensor, ranges: GroupRange, *, counted: bool = False) -> "Rounding":
        """V = 0 and alpha = beta = 1: round to nearest. `counted`: V is in 16 bits."""
        one = torch.ones_like(ranges.low)
        offset = torch.zeros_like(weight, dtype=torch.int16 if counted else working_dtype(weight))
        return cls(weight, ranges.low, ranges.high, offset, one, one.clone())

    def part(self, groups: slice) -> "Rounding":
        return Rounding(*(getattr(self, f.name)[groups] for f in fields(self)))

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
        return grid(GroupRange(self.low, self.high), scheme, scale_dtype, self.alpha, self.beta)


@dataclass(frozen=True)
class Kept:
    """The result remembered: stored codes (groups, G) uint8, scale (groups,) and zero point (groups,) uint8."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class RoundedWeights:
    """Linears of one scheme with their V, alpha and beta: the `TrainableWeights` of SignRound."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        width: int,
        scale_dtype: torch.dtype,
        moments: Mapping[str, Tensor] = MappingProxyType({}),
        settings: TuningSettings | None = None,
    ) -> None:
        self.shapes: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()
        }
        self._scheme, self._scale_dtype = scheme, scale_dtype
        self._limits = SEARCHED_LIMITS if moments else FULL_LIMITS
        ranges = start_ranges(weights, moments, scheme, width, scale_dtype)
        weight = torch.cat([weight.reshape(-1, width) for weight in weights.values()])
        self._fused = kernels_for(weight)
        self._unit: float | None = None
        if self._fused is not None and settings is not None:
            self._unit = self._fused.offset_unit(settings.steps, settings.learning_rate)
        self.state = Rounding.start(weight, ranges, counted=self._unit is not None)
        groups = self.state.low
        self._kept = Kept(
            codes=torch.zeros_like(self.state.weight, dtype=torch.uint8),
            scale=torch.zeros_like(groups, dtype=scale_dtype),
            zero_point=torch.zeros_like(groups, dtype=torch.uint8),
        )
        self._faults = torch.zeros(1, dtype=torch.int32, device=groups.device)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        if self._fused is not None:
            self._fused.write(self._groups(self._fused), *self._grid_settings(), hat=out)
            return
        hat = out.view(self.state.weight.shape)
        for groups in self._chunks():
            part = self.state.part(groups)
            to = part.grid(self._scheme, self._scale_dtype)
            codes, _ = _codes(part, to)
            hat[groups] = _steps(codes, to) * to.scale.unsqueeze(-1)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """The signed step of the module docstring, then alpha and beta back into their limits."""
        if self._fused is not None:
            groups, settings = self._groups(self._fused), self._grid_settings()
            step = {"gradient": gradient, "rate": rate, "faults": self._faults, "limits": self._limits, "hat": out}
            self._fused.step(groups, *settings, **step)
            return
        gradient = gradient.view(self.state.weight.shape)
        for groups in self._chunks():
            part = self.state.part(groups)
            d_offset, d_alpha, d_beta = gradients(part, gradient[groups], self._scheme, self._scale_dtype)
            self._faults += d_alpha.isnan().sum(dtype=torch.int32)
            part.offset.sub_(d_offset.nan_to_num_().sign_().mul_(rate))
            part.alpha.sub_(d_alpha.nan_to_num_().sign_().mul_(rate)).clamp_(*self._limits)
            part.beta.sub_(d_beta.nan_to_num_().sign_().mul_(rate)).clamp_(*self._limits)
        self.write(out)

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        if self._fused is not None:
            self._fused.keep(self._groups(self._fused), *self._grid_settings(), better=better)
            return
        for groups in self._chunks():
            part = self.state.part(groups)
            to = part.grid(self._scheme, self._scale_dtype)
            codes, _ = _codes(part, to)
            _overwrite(self._kept.codes[groups], codes.sub_(to.lowest), better)
            _overwrite(self._kept.scale[groups], to.scale, better)
            if to.zero is not None:
                _overwrite(self._kept.zero_point[groups], to.zero, better)

    def restart(self) -> None:
        self.state.offset.zero_()
        self.state.alpha.fill_(1)
        self.state.beta.fill_(1)
        self._faults.zero_()

    def adopt(self, other: "RoundedWeights") -> None:
        for field in fields(self.state):
            getattr(self.state, field.name).copy_(getattr(other.state, field.name))
        self._faults.zero_()

    def faults(self) -> int:
        return int(self._faults)

    def results(self) -> dict[str, LinearResult]:
        results, first = {}, 0
        for name, shape in self.shapes.items():
            groups = slice(first, first := first + math.prod(shape) // self.state.weight.shape[1])
            weight = AffineWeight(
                codes=self._kept.codes[groups].reshape(shape).clone(),
                scale=self._kept.scale[groups].reshape(shape[0], -1).clone(),
                zero_point=None
                if self._scheme.symmetric
                else self._kept.zero_point[groups].reshape(shape[0], -1).clone(),
                scheme=self._scheme,
                dtype=self.state.weight.dtype,
            )
            results[name] = LinearResult(weight)
        return results

    def _groups(self, fused: ModuleType) -> Any:
        """This object's tensors as the kernels take them."""
        state, kept = self.state, self._kept
        learned = (state.weight, state.offset, state.low, state.high, state.alpha, state.beta)
        return fused.Groups(*learned, kept.codes, kept.scale, kept.zero_point, self._unit or 1.0)

    def _grid_settings(self) -> tuple[int, bool, float]:
        """Bits, symmetry and least scale, as the kernels take them."""
        return self._scheme.bits, self._scheme.symmetric, SMALLEST_SCALE[self._scale_dtype]

    def _chunks(self) -> Iterator[slice]:
        """Slices of groups: as many as stay in a CPU's cache through a chain of operations, or fit a GPU easily."""
        count, width = self.state.weight.shape
        size = max(1, (CACHED_ELEMENTS << 6 if self.state.weight.is_cuda else CACHED_ELEMENTS) // width)
        return (slice(start, start + size) for start in range(0, count, size))


def gradients(part: Rounding, d: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dV, dL/dalpha and dL/dbeta for D = `d` (groups, G), by the formulas of the module docstring."""
    to = part.grid(scheme, scale_dtype)
    weight, d = part.weight.to(part.offset.dtype), d.to(part.offset.dtype)
    codes, free = _codes(part, to)
    d_inside = d * (codes == free)
    d_scale = (d * _steps(codes, to)).sum(-1) - (d_inside * weight).sum(-1) / to.scale
    d_zero = -to.scale * (d.sum(-1) - d_inside.sum(-1))
    return d_inside.mul_(to.scale.unsqueeze(-1)), *_range_gradients(part, d_scale, d_zero, to)


def kernels_for(weight: Tensor) -> ModuleType | None:
    """The module of Triton kernels where it serves this weight: on a GPU, for dtypes that fp32 holds."""
    if not weight.is_cuda or weight.dtype == torch.float64 or find_spec("triton") is None:
        return None
    return import_module("workers.numerics.kernels")


def working_dtype(weight: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 weights."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _range_gradients(part: Rounding, d_scale: Tensor, d_zero: Tensor, to: Grid) -> tuple[Tensor, Tensor]:
    """dL/dalpha and dL/dbeta from dL/ds and dL/dz, each (groups,)."""
    if to.zero is None:
        low_wins = -part.alpha * part.low > part.beta * part.high
        d_alpha = d_scale * torch.where(low_wins, part.low / to.lowest, 0)
        return d_alpha, d_scale * torch.where(low_wins, 0, part.high / to.lowest)
    d_scale = d_scale + d_zero * part.alpha * part.low / to.scale.square()
    return -d_zero * part.low / to.scale - d_scale * part.low / to.highest, d_scale * part.high / to.highest


def _codes(part: Rounding, to: Grid) -> tuple[Tensor, Tensor]:
    return round_to_grid(part.weight.to(part.offset.dtype), to, part.offset)


def _steps(codes: Tensor, to: Grid) -> Tensor:
    """q - z"""
    return codes if to.zero is None else codes - to.zero.unsqueeze(-1)


def _overwrite(kept: Tensor, value: Tensor, better: Tensor) -> None:
    kept.copy_(torch.where(better, value.to(kept.dtype), kept))
