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
| V | `offset` | (groups, G), fp32; on a GPU int16 in multiples of lr/T (`backends/rounding/rounding_kernels.py`) |
| alpha, beta | `alpha`, `beta` | (groups,), fp32 |
| lo, hi | `ranges` | (groups,), fp32 |
| D | `gradient` | (groups, G), the model's dtype |

Cost: a step is a forward and a backward of the block and one pass over its weights; memory, V and one copy of the
integer result besides. The step is written by hand, since only signs of the gradients are used: no graph is kept for
the quantizer. With 0 steps the result is round to nearest.

The start (`scale_search`) may shrink lo and hi first: of some range factors, those with the least rounding error when
columns are weighted by their inputs' second moments. alpha and beta then stay in [1/2, 3/2].

Floating-point grids (FP4, FP8; `floats.tuned_floats`): the same with the values of the element in place of
the integers. A piecewise linear map u takes the k-th value to k, and V is added to u(w/s), so that it reaches the next
value everywhere; scales are the best that can be stored, and stay. Where the scheme rounds activations, the block is
tuned with rounded ones (`workers.engine.tune`), straight through.

llama.cpp's block types (`blocks.tuned_blocks`): the same with u((w - o)/f). Where there are steps, factors, offsets and
codes of at most 6 bits begin as GPTQ and its sweeps make them, and V so that u + V is in its code's interval: signs
alone, which move all weights at once, are a long way from codes that know how columns go together.

Different from the paper: that start; the original block reads the original activations and the quantized
block the quantized ones (as in AutoRound's code); the parameters kept are those with the lowest loss on held-out
sequences, not on the step's own minibatch. Left out: norm and bias tuning.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from app.domain.methods import Form, GPTQSpec, Scheme, SignRoundSpec
from app.domain.methods.named_schemes import COMPENSATED
from workers.contracts.blocks import BlockTask, KernelMethod, Method, WarmUp
from workers.contracts.experts import experts_of
from workers.contracts.results import BlockResult
from workers.contracts.tuning import Gradients, TuningSettings
from workers.numerics.affine import GroupRange, round_to_grid
from workers.numerics.backend import block_rounding_kernels, float_rounding_kernels, rounding_kernels
from workers.numerics.backends.rounding.block_rounding_operators import BlockGroups
from workers.numerics.backends.rounding.float_rounding_operators import FloatGroups
from workers.numerics.backends.rounding.rounding_operators import GridSettings, Groups
from workers.numerics.blocks.search import search_blocks
from workers.numerics.blocks.tuned_blocks import tuned_blocks
from workers.numerics.blocks.warm_up import block_warm_ups
from workers.numerics.eight_bits import backward as eight_bits
from workers.numerics.floats.tuned_floats import tuned_floats
from workers.numerics.learned_ranges import steps, working_dtype
from workers.numerics.quantized import AffineWeight, BlockWeight, LinearResult, Number
from workers.numerics.tuned_codes import TunedCodes

FULL_LIMITS, SEARCHED_LIMITS = (0.0, 1.0), (0.5, 1.5)
"""Limits of alpha and beta: a full range may only shrink, a searched one may also widen."""

QUICK_GRADIENTS: Gradients = "quick"
"""Products that gradients of quick steps are made by: their signs are all that is used."""

SWEEPS = 2
"""Of coordinate descent after GPTQ's last column, where llama.cpp's types begin."""
START_TOKENS = 64
"""Of each input of a linear, at most, in the H from which it begins; steps see all."""


class SignRound(KernelMethod[SignRoundSpec]):
    def warm_ups(self, kinds: WarmUp, spec: SignRoundSpec) -> list[Callable[[], object]]:
        return warm_ups(kinds, spec)

    def quantize_block(self, task: BlockTask, spec: SignRoundSpec) -> BlockResult:
        rate = spec.learning_rate or 1 / max(spec.steps, 1)
        settings = TuningSettings(
            spec.steps,
            spec.batch_size,
            rate,
            half_batches=spec.half_batches(),
            gradients=QUICK_GRADIENTS if spec.quick_steps else "exact",
        )
        source = task if spec.quantized_inputs else replace(task, inputs=task.inputs_fp)
        starts = compensated(task) if spec.steps else {}
        weights = rounded_weights(task, search=spec.scale_search and spec.steps > 0, settings=settings, starts=starts)
        outcome = task.tune(source, weights, settings)
        counters = {"best_step": outcome.best_step, "nan_gradients": outcome.faults}
        return BlockResult(outcome.linears, outcome.loss_initial, outcome.loss, counters)


def warm_ups(kinds: WarmUp, spec: SignRoundSpec) -> list[Callable[[], object]]:
    """Calls that compile this method's kernels for the linears of a model; empty if there is nothing to compile."""
    calls: list[Callable[[], object]] = []
    kernels, dtypes = rounding_kernels(kinds.device, kinds.dtype), (kinds.dtype, kinds.scale_dtype)
    counted = kernels.offset_unit(spec.steps, 1.0) is not None
    if spec.quick_steps and any(eight_bits.pays(kinds.device, kinds.dtype, (n, n)) for n, _ in kinds.linears):
        calls += eight_bits.warm_ups(kinds.device, kinds.dtype)
    for columns, scheme in kinds.linears:
        if scheme.blocks is not None:
            blocks = block_rounding_kernels(kinds.device, kinds.dtype)
            calls += blocks.warm_ups(scheme.blocks, kinds.dtype, kinds.device)
            starts = bool(spec.steps) and scheme.name in COMPENSATED
            calls += block_warm_ups(columns, scheme, dtypes, kinds.device, eliminates=starts, sweeps=SWEEPS * starts)
            continue
        if scheme.row is not None and scheme.form is Form.FLOAT:
            width, floats = math.gcd(scheme.width(columns), columns), float_rounding_kernels(kinds.device, kinds.dtype)
            calls += floats.warm_ups(width, scheme.row.element, kinds.dtype, kinds.device)
            continue
        width, settings = scheme.width(columns), GridSettings.of(scheme, kinds.scale_dtype)
        calls += kernels.warm_ups(columns, width, settings, dtypes=dtypes, counted=counted, device=kinds.device)
    return calls


def rounded_weights(
    task: BlockTask,
    *,
    search: bool,
    settings: TuningSettings | None = None,
    starts: Mapping[str, BlockWeight] = MappingProxyType({}),
) -> list["Tuned"]:
    """The block's linears in groups of the same scheme and group width.

    search    whether ranges start from those with the least rounding error
    settings  settings of the steps that follow; if they are known, V may be counted in steps
    starts    of linears in llama.cpp's types; those that have none begin with the search of round to nearest
    """
    second_moments, amax = task.second_moments if search else {}, task.joined_amax()
    made: list[Tuned] = []
    for (scheme, width), weights in task.alike().items():
        if scheme.form is Form.BLOCKS:
            made.append(tuned_blocks(weights, {name: starts.get(name) or _searched(task, name) for name in weights}))
        elif scheme.form is Form.FLOAT:
            made.append(tuned_floats(weights, scheme, task.scale_dtype, second_moments, amax))
        else:
            made.append(RoundedWeights(weights, scheme, width, task.scale_dtype, second_moments, settings))
    return made


def compensated(task: BlockTask) -> dict[str, BlockWeight]:
    """The linears in llama.cpp's types up to 6 bits as GPTQ makes them: codes that know the outputs of each."""
    schemes = {name: scheme for name, scheme in task.schemes.items() if scheme.blocks and scheme.name in COMPENSATED}
    if not schemes:
        return {}
    inputs = task.inputs if experts_of(task.block) else task.inputs[: _sequences_of_start(task, schemes)]
    start = replace(task, schemes=schemes, inputs=inputs, tick=lambda _: None)
    made = task.quantize(start, GPTQSpec(act_order=False, sweeps=SWEEPS)).linears
    return {name: result.weight for name, result in made.items() if isinstance(result.weight, BlockWeight)}


def _sequences_of_start(task: BlockTask, names: Iterable[str]) -> int:
    """As many sequences of this rank as the widest of some linears needs for its H, beside those of the others."""
    wanted = START_TOKENS * max(task.linear(name).in_features for name in names)
    tokens = task.total(len(task.inputs)) * task.inputs.shape[1]
    return math.ceil(len(task.inputs) * min(1.0, wanted / tokens))


def _searched(task: BlockTask, name: str) -> BlockWeight:
    return search_blocks(task.linear(name).weight.detach(), task.schemes[name], task.second_moments.get(name))


def start_ranges(
    weights: Mapping[str, Tensor],
    second_moments: Mapping[str, Tensor],
    scheme: Scheme,
    width: int,
    scale_dtype: torch.dtype,
) -> GroupRange:
    """lo and hi of all groups, linear by linear; searched for linears with known second moments of the inputs."""
    ranges = []
    for name, weight in weights.items():
        groups = weight.reshape(-1, width)
        if name in second_moments:
            kernels, settings = rounding_kernels(groups.device, groups.dtype), GridSettings.of(scheme, scale_dtype)
            bounds = kernels.search_range(groups, second_moments[name].view(-1, width), settings, scale_dtype)
            ranges.append(GroupRange(*bounds))
        else:
            ranges.append(GroupRange.of(groups.to(working_dtype(weight))))
    return GroupRange(torch.cat([r.low for r in ranges]), torch.cat([r.high for r in ranges]))


def start(weight: Tensor, ranges: GroupRange, scale_dtype: torch.dtype, unit: float | None = None) -> Groups:
    """V = 0 and alpha = beta = 1, round to nearest, and no result kept yet; V counted in units if there is one."""
    return Groups(
        weight=weight,
        offset=torch.zeros_like(weight, dtype=working_dtype(weight) if unit is None else torch.int16),
        low=ranges.low,
        high=ranges.high,
        alpha=torch.ones_like(ranges.low),
        beta=torch.ones_like(ranges.low),
        codes=torch.zeros_like(weight, dtype=torch.uint8),
        scale=torch.zeros_like(ranges.low, dtype=scale_dtype),
        zero=torch.zeros_like(ranges.low, dtype=torch.uint8),
        unit=1.0 if unit is None else unit,
    )


def signed_step(
    groups: Groups, gradient: Tensor, rate: Tensor | float, scheme: Scheme, limits: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """V, alpha and beta after a step for D = `gradient` (groups, G): the module docstring's formulas, written plainly.

    The backends compute the same in fewer passes over the weights; tests compare them with this.
    """
    moved = zip((groups.offset, groups.alpha, groups.beta), gradients(groups, gradient, scheme), strict=True)
    offset, alpha, beta = (parameter - rate * by_parameter.sign() for parameter, by_parameter in moved)
    return offset, alpha.clamp(*limits), beta.clamp(*limits)


def gradients(groups: Groups, gradient: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dV, dL/dalpha and dL/dbeta for D = `gradient`."""
    grid = groups.grid(GridSettings.of(scheme, groups.scale.dtype))
    weight, d = groups.weight.to(groups.offset.dtype), gradient.to(groups.offset.dtype)
    codes, unclamped = round_to_grid(weight, grid, groups.offset)
    inside = d * (codes == unclamped)
    d_offset = inside * grid.scale.unsqueeze(-1)
    d_scale = (d * steps(codes, grid)).sum(-1) - (inside * weight).sum(-1) / grid.scale
    if grid.zero is None:
        low_wins = -groups.alpha * groups.low > groups.beta * groups.high
        d_alpha = d_scale * torch.where(low_wins, groups.low / grid.lowest, 0)
        return d_offset, d_alpha, d_scale * torch.where(low_wins, 0, groups.high / grid.lowest)
    d_zero = -grid.scale * (d.sum(-1) - inside.sum(-1))
    d_scale = d_scale + d_zero * groups.alpha * groups.low / grid.scale.square()
    d_alpha = -d_zero * groups.low / grid.scale - d_scale * groups.low / grid.highest
    return d_offset, d_alpha, d_scale * groups.high / grid.highest


class RoundedWeights:
    """Linears of one scheme with their V, alpha and beta: the `TrainableWeights` of SignRound."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        width: int,
        scale_dtype: torch.dtype,
        second_moments: Mapping[str, Tensor] = MappingProxyType({}),
        settings: TuningSettings | None = None,
    ) -> None:
        self.shapes: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()
        }
        self._scheme, self._settings = scheme, GridSettings.of(scheme, scale_dtype)
        self._limits = SEARCHED_LIMITS if second_moments else FULL_LIMITS
        ranges = start_ranges(weights, second_moments, scheme, width, scale_dtype)
        weight = torch.cat([w.reshape(-1, width) for w in weights.values()])
        self._kernels = rounding_kernels(weight.device, weight.dtype)
        unit = None if settings is None else self._kernels.offset_unit(settings.steps, settings.learning_rate)
        self.state = start(weight, ranges, scale_dtype, unit)
        self._faults = torch.zeros(1, dtype=torch.int32, device=weight.device)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        self._kernels.write(self.state, self._settings, w_hat=out)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """`signed_step` in the fewest passes that the device allows."""
        self._kernels.step(
            self.state,
            self._settings,
            gradient=gradient,
            rate=rate,
            faults=self._faults,
            limits=self._limits,
            w_hat=out,
        )

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        self._kernels.keep(self.state, self._settings, better=better)

    def restart(self) -> None:
        self.state.offset.zero_()
        self.state.alpha.fill_(1)
        self.state.beta.fill_(1)
        self._faults.zero_()

    def adopt(self, other: "RoundedWeights") -> None:
        theirs = other.state.tensors()
        for name, tensor in self.state.tensors().items():
            tensor.copy_(theirs[name])
        self._faults.zero_()

    def faults(self) -> Number:
        return self._faults[0].clone() if self._faults.is_cuda else int(self._faults)

    def results(self) -> dict[str, LinearResult]:
        results, first = {}, 0
        for name, shape in self.shapes.items():
            groups = slice(first, first := first + math.prod(shape) // self.state.weight.shape[1])
            weight = AffineWeight(
                codes=self.state.codes[groups].reshape(shape).clone(),
                scale=self.state.scale[groups].reshape(shape[0], -1).clone(),
                zero_point=None if self._scheme.symmetric else self.state.zero[groups].reshape(shape[0], -1).clone(),
                scheme=self._scheme,
                dtype=self.state.weight.dtype,
            )
            results[name] = LinearResult(weight)
        return results


Tuned = RoundedWeights | TunedCodes[FloatGroups] | TunedCodes[BlockGroups]
"""A scheme's linears as the loop tunes them, by the form of their weights."""


METHOD = Method(SignRoundSpec, SignRound())
