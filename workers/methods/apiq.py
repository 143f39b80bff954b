"""ApiQ (Liao et al., arXiv:2402.05147): clipping and low-rank factors trained together to preserve activations.

For each linear, with s, z from the clipped ranges sigmoid(beta)*lo and sigmoid(gamma)*hi of its groups:

    Q = s * (clamp(round(W/s) + z) - z),    W_hat = Q + (alpha/r) * B A
    block    min over gamma, beta, A, B of  || F(X_fp; W) - F(X_q; W_hat) ||^2       all linears of a block F at once
    layer    min over the same of           || X_fp W^T  - X_q W_hat^T ||^2          linear by linear, as called
    aug_loss    ... + || F(X_q; W) - F(X_q; W_hat) ||^2

X_fp are the activations of the original model, X_q those of the blocks and linears quantized so far, so that each step
also corrects inherited errors. A starts from U(-1/sqrt(in), 1/sqrt(in)), B = 0, gamma = beta = 4. With D = dL/dW_hat:

    dL/dA = (alpha/r) * B^T D       dL/dB = (alpha/r) * D A^T
    dL/dgamma, dL/dbeta             straight through the rounding of W/s, none through that of z
                                    (`workers.numerics.clipping.clipped_groups`, `workers.numerics.learned_ranges`)

AdamW with decoupled weight decay, two constant learning rates: 5e-3 for gamma and beta, 5e-4 for A and B, decay 0.1.
The decay pulls gamma and beta toward tighter clipping, which is part of the method.

| symbol | variable | shape |
|---|---|---|
| W, lo, hi, gamma, beta | `base` | see `ClippedGroups` |
| A, B | views of `factors` | (r, in), (out, r), fp32: those of all linears in one tensor |
| D | `gradient` | flat, the model's dtype |

alpha/r is a factor of the trained product, as in the paper, and A and B are stored as they are: an adapter with this
alpha starts finetuning at exactly the calibrated point. A and B act rounded to the model's dtype already while they
train.

With aug_loss the target is the mean of both targets (`BlockTask.augmented`).

Layer by layer (not in the authors' code), linears with the same input (q, k, v) share a loop, in which each has its own
error and, since AdamW has no scale, its own steps; only the best step is chosen for all of them.

Beyond the paper, `base`: ranges and rounding may start from another method's result, which is either trained on or,
with `freeze_base`, kept as it is while A and B learn. Different from the paper: ranges hold 0, so that every z is a
code; symmetric scales may have either sign; the parameters kept are those with the lowest loss on held-out sequences.

Cost: a step is a forward and a backward of the block, a few passes over its weights, and three products of rank r.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from app.domain.methods import ApiQSpec
from workers.contracts.blocks import BlockTask, KernelMethod, Method, WarmUp
from workers.contracts.layer_tasks import quantize_in_order
from workers.contracts.results import BlockResult
from workers.contracts.tuning import TuningOutcome, TuningSettings
from workers.numerics.adamw import AdamW
from workers.numerics.backend import factor_kernels
from workers.numerics.clipping.clipped_groups import ClippedGroups, GroupStart, clipping_warm_ups
from workers.numerics.clipping.factor_places import FactorPlaces
from workers.numerics.learned_ranges import working_dtype
from workers.numerics.quantized import LinearResult, LowRank, Number, QuantizedWeight

BASE_SHARE = 0.2
"""Share of a block's progress that counts for a base with its own tuning."""


class ApiQ(KernelMethod[ApiQSpec]):
    def warm_ups(self, kinds: WarmUp, spec: ApiQSpec) -> list[Callable[[], object]]:
        factors = factor_kernels(kinds.device, kinds.dtype)
        calls = [] if factors is None else factors.warm_ups(kinds.dtype, kinds.device)
        if not spec.freeze_base:
            calls += clipping_warm_ups(kinds.linears, kinds.dtype, kinds.scale_dtype, kinds.device)
        return calls

    def quantize_block(self, task: BlockTask, spec: ApiQSpec) -> BlockResult:
        start: Mapping[str, LinearResult] = {}
        if spec.base != "rtn" or spec.freeze_base:
            start = task.quantize(replace(task, tick=lambda s: task.tick(BASE_SHARE * s)), spec.base_spec()).linears
        outcomes: list[TuningOutcome] = []

        def quantize(subtask: BlockTask) -> Mapping[str, LinearResult]:
            outcomes.append(_tune(subtask, spec, start))
            return outcomes[-1].linears

        if spec.granularity == "block":
            quantize(task)
            (outcome,) = outcomes
            counters: dict[str, Number] = {"best_step": outcome.best_step, "nan_gradients": outcome.faults}
            return BlockResult(outcome.linears, outcome.loss_initial, outcome.loss, counters)
        linears = quantize_in_order(task, quantize)
        best = sum(outcome.best_step for outcome in outcomes) / max(1, len(outcomes))
        counters = {"mean_best_step": best, "nan_gradients": sum(outcome.faults for outcome in outcomes)}
        return BlockResult({name: linears[name] for name in task.schemes}, counters=counters)


def _tune(task: BlockTask, spec: ApiQSpec, start: Mapping[str, LinearResult]) -> TuningOutcome:
    settings = TuningSettings(spec.steps, spec.batch_size, spec.range_learning_rate, schedule="constant")
    return task.tune(task.augmented() if spec.aug_loss else task, corrected_weights(task, spec, start), settings)


def corrected_weights(task: BlockTask, spec: ApiQSpec, start: Mapping[str, LinearResult]) -> list["CorrectedWeights"]:
    """The task's linears in groups of the same scheme and group width."""
    corrected = []
    for (scheme, width), weights in task.alike().items():
        base: Base
        if spec.freeze_base:
            base = FrozenWeights({name: start[name].weight for name in weights})
        else:
            groups = {name: weight.reshape(-1, width) for name, weight in weights.items()}
            starts = [GroupStart.at(start[n].affine, g) if start else GroupStart.full(g) for n, g in groups.items()]
            base = ClippedGroups(torch.cat(list(groups.values())), GroupStart.joined(starts), scheme, task.scale_dtype)
        corrected.append(CorrectedWeights(weights, base, spec, task.seed))
    return corrected


class FrozenWeights:
    """Another method's weights, of any form, which are not trained."""

    def __init__(self, weights: Mapping[str, QuantizedWeight]) -> None:
        self.weights = weights
        self.value = torch.cat([weight.dequantize().flatten() for weight in weights.values()])


Base = ClippedGroups | FrozenWeights


class CorrectedWeights:
    """Q of some linears with their A and B: the `TrainableWeights` of ApiQ."""

    def __init__(self, weights: Mapping[str, Tensor], base: Base, spec: ApiQSpec, seed: int) -> None:
        self.shapes: Mapping[str, tuple[int, int]] = {n: (w.shape[0], w.shape[1]) for n, w in weights.items()}
        self.base, self._spec = base, spec
        example = next(iter(weights.values()))
        self._dtype, working = example.dtype, working_dtype(example)
        self._start = torch.cat([_first_factors(s, self._rank(s), seed) for s in self.shapes.values()])
        self._start = self._start.to(example.device, working)
        self.factors, self._kept = self._start.clone(), self._start.clone()
        self._optimizer = AdamW.of(self.factors)
        self._faults, self._last_fault = torch.zeros(2, dtype=torch.int64, device=example.device).unbind()
        self._kernels = factor_kernels(example.device, example.dtype)
        if self._kernels is not None:
            sizes = list(self.shapes.values())
            self._places = FactorPlaces.of(sizes, [self._rank(s) for s in sizes], spec.alpha, example.device)
            self._rounded = self.factors.to(self._dtype, copy=True)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        if isinstance(self.base, ClippedGroups):
            self.base.write(out.view(self.base.weight.shape))
        else:
            out.copy_(self.base.value)
        if self._kernels is not None:
            self._rounded.copy_(self.factors)
            self._kernels.add_products(self._places, self._rounded, out)
            return
        self._add_products(out)

    def _add_products(self, out: Tensor) -> None:
        for w_hat, low_rank in self._linears(out, self.factors):
            w_hat.copy_(w_hat.to(self.factors.dtype) + self._strength(low_rank) * (low_rank.b @ low_rank.a))

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """AdamW's steps of the module docstring; `rate` is that of the ranges."""
        share = self._spec.learning_rate / self._spec.range_learning_rate
        decay = self._spec.weight_decay
        if self._kernels is None:
            by_factors = self.factor_gradients(gradient)
            self._faults += by_factors.isnan().any()
            self._optimizer.step(self.factors, by_factors, rate * share, decay)
        else:
            self._kernels.step(
                self._places,
                self.factors,
                self._rounded,
                self._optimizer,
                gradient=gradient,
                rate=rate,
                share=share,
                decay=decay,
                faults=self._faults,
                last_fault=self._last_fault,
            )
        if isinstance(self.base, ClippedGroups):
            shape = self.base.weight.shape
            self.base.step(gradient.view(shape), rate, decay, out.view(shape))
        else:
            out.copy_(self.base.value)
        if self._kernels is None:
            self._add_products(out)
        else:
            self._kernels.add_products(self._places, self._rounded, out)

    @torch.no_grad()
    def factor_gradients(self, gradient: Tensor) -> Tensor:
        """dL/dA and dL/dB as they lie in `factors`, for D, flat."""
        linears = [(d.to(self.factors.dtype), low_rank) for d, low_rank in self._linears(gradient, self.factors)]
        return torch.cat([by.flatten() for linear in linears for by in factor_gradients(*linear)])

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        if isinstance(self.base, ClippedGroups):
            self.base.keep(better)
        self._kept.copy_(torch.where(better, self.factors, self._kept))

    def restart(self) -> None:
        if isinstance(self.base, ClippedGroups):
            self.base.restart()
        self.factors.copy_(self._start)
        self._optimizer.reset()
        self._faults.zero_()
        self._last_fault.zero_()

    def adopt(self, other: "CorrectedWeights") -> None:
        if isinstance(self.base, ClippedGroups) and isinstance(other.base, ClippedGroups):
            self.base.adopt(other.base)
        elif isinstance(self.base, FrozenWeights) and isinstance(other.base, FrozenWeights):
            self.base.weights = other.base.weights
            self.base.value.copy_(other.base.value)
        self._start.copy_(other._start)
        self.restart()

    def faults(self) -> Number:
        return self._faults.clone() if self._faults.is_cuda else int(self._faults)

    def results(self) -> dict[str, LinearResult]:
        if isinstance(self.base, ClippedGroups):
            quantized = self.base.kept.results(self.shapes, self.base.scheme, self._dtype)
            weights: Mapping[str, QuantizedWeight] = {name: result.weight for name, result in quantized.items()}
        else:
            weights = self.base.weights
        pairs = self._linears(torch.empty(sum(map(math.prod, self.shapes.values())), device="meta"), self._kept)
        return {
            name: LinearResult(weight, self._copy(pair))
            for (name, weight), (_, pair) in zip(weights.items(), pairs, strict=True)
        }

    def _copy(self, pair: LowRank) -> LowRank:
        a, b = (factor.to(self._dtype, copy=True) for factor in (pair.a, pair.b))
        return LowRank(a, b, pair.alpha)

    def _linears(self, flat: Tensor, factors: Tensor) -> list[tuple[Tensor, LowRank]]:
        """Each linear's slice of `flat` as (out, in), and its A and B, rounded to the model's dtype."""
        linears, at, first = [], 0, 0
        rounded = factors.to(self._dtype).to(factors.dtype)
        for out, columns in self.shapes.values():
            rank = self._rank((out, columns))
            matrix = flat[at : (at := at + out * columns)].view(out, columns)
            a = rounded[first : (first := first + rank * columns)].view(rank, columns)
            b = rounded[first : (first := first + out * rank)].view(out, rank)
            linears.append((matrix, LowRank(a, b, self._spec.alpha)))
        return linears

    def _rank(self, shape: tuple[int, int]) -> int:
        return min(self._spec.rank, *shape)

    def _strength(self, low_rank: LowRank) -> float:
        return low_rank.alpha / low_rank.rank


def factor_gradients(gradient: Tensor, low_rank: LowRank) -> tuple[Tensor, Tensor]:
    """dL/dA (r, in) and dL/dB (out, r) of one linear for D = `gradient` (out, in).

    AdamW steps by them, and by the gradients of the ranges (`workers.numerics.learned_ranges`).
    """
    scaled = gradient * (low_rank.alpha / low_rank.rank)
    return low_rank.b.T @ scaled, scaled @ low_rank.a.T


def _first_factors(shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    """A and B at the start, fp32, flat."""
    generator, (out, columns) = torch.Generator().manual_seed(seed), shape
    a = (torch.rand(rank * columns, generator=generator) * 2 - 1) / columns**0.5
    return torch.cat([a, torch.zeros(out * rank)])


METHOD = Method(ApiQSpec, ApiQ())
