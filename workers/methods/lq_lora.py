"""LQ-LoRA (Guo et al., arXiv:2311.12023): a weight as quantized part plus low-rank part, computed alternately.

    W ~ Q + L1 L2,   Q on the NormalFloat grid of configuration c = (b0, b1, b2, B0, B1),   rank(L1 L2) = R

    Q <- 0,  then repeat      L1, L2 <- SVD_R(W - Q)          Q <- quantize_c(W - L1 L2)
                              e <- || sqrt(F) * (W - Q - L1 L2) ||_F        until e no longer falls
    last                      L1, L2 <- SVD_R(W - Q)                        for the Q of the least e

    symbol    variable            shape, meaning
    W         weight              (out, in), fp32
    Q         base                its codes, and maxima in two levels (`workers.numerics.normal_float`)
    L1, L2    left, right         (out, R), (R, in)
    F         rows, columns       Fisher information as u v^T: sqrt(u) (out,), sqrt(v) (in,); all 1 without it
    c         scheme, absmax      of the linear's share of the budget

The budget (the paper's integer programme) is the engine's: it chooses c for each linear so that the sum of the squared
errors is least (`workers.numerics.allocation`, in place of a licensed solver). F is the empirical one: squared
gradients of the language-model loss, one sequence per example, summed over the calibration text
(`workers.engine.quantize.fisher`).

A block's linears of one shape are one batch, from which a linear leaves once its error no longer falls. Cost: two
decompositions (`workers.numerics.low_rank`: exact where a side has up to 256, then randomized to about 1e-5 of the
error), and per iteration O(out*in*R) to follow the factors, and a rounding; to choose, one decomposition and a rounding
of `SCORED_ROWS` rows per configuration, for all configurations of one group size and width at once.

NF2 has no value between -1 and 0, so one rounding leaves a mean error, which adds up from block to block; only further
iterations move it into L1 L2. On an MLP linear of SmolLM2-135M (groups of 32, R = 64) it was 0.17 of the root mean
square error after one iteration and 0.02 after nine: few iterations are no cheap preview of 2 bits. The scores that
choose c are of one iteration all the same, and make NF2 look worse than it ends (0.45 of the weight against 0.38).

Different from the authors' code: the best iterate is returned, not the one after it, with the best factors for its Q,
which cost the error nothing and at 2 bits lower it by 1%. Within the loop factors are followed from one iteration to
the next instead of decomposed anew: on linears of SmolLM2-135M errors ended within 0.4% of the exact loop's, some above
and some below, in a third to two thirds of the time. F is known by its row and column
sums alone, for the error too, so that it takes (out + in) numbers; the authors use those for the SVD and all of F
for the error. To choose c, errors are those of the first iteration, whose L1 L2 = SVD_R(W) does not depend on c, over
some rows; the authors run every configuration to the end, over all rows. The b2 of a budget includes fp16 and bf16,
which cost the same: 432 configurations, as in the code. Left out: data parallel scoring, and 8-bit factors at
evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from app.domain.methods import PRESET_ABSMAX, AbsmaxScheme, LQLoRASpec, Scheme
from workers.contracts.blocks import BlockTask, Fisher, Method, ScoreTask
from workers.contracts.results import BlockResult
from workers.numerics import normal_float
from workers.numerics.low_rank import FollowedFactors, weighted_factors
from workers.numerics.normal_float import DoubleQuantization
from workers.numerics.quantized import CodebookWeight, LinearResult, LowRank

BATCH = 1 << 27
"""Weights that are decomposed together at the most."""
SCORED_ROWS, STRIP = 64, 16
"""Rows that a configuration is scored by, in strips: with all, choosing among 432 takes about ten times as long."""


class LQLoRA:
    @torch.no_grad()
    def quantize_block(self, task: BlockTask, spec: LQLoRASpec) -> BlockResult:
        results = dict[str, LinearResult]()
        for names in task.of_one_shape(BATCH):
            results |= self._quantize(task, names, spec)
            task.tick(len(results) / len(task.schemes))
        return BlockResult({name: results[name] for name in task.schemes})

    @torch.no_grad()
    def candidate_errors(self, tasks: Sequence[ScoreTask], spec: LQLoRASpec) -> list[list[float]]:
        """Squared weighted error of each configuration of each linear after one iteration."""
        by_shape, errors = dict[torch.Size, list[int]](), dict[int, Tensor]()
        for index, task in enumerate(tasks):
            by_shape.setdefault(task.weight.shape, []).append(index)
        for shape, alike in by_shape.items():
            at_once = max(1, BATCH // shape.numel())
            for first in range(0, len(alike), at_once):
                some = alike[first : first + at_once]
                errors |= zip(some, _scores([tasks[index] for index in some], spec.rank), strict=True)
        # One wait for the device, not one for each linear.
        scores = torch.cat([errors[index] for index in range(len(tasks))]).tolist() if tasks else []
        ends = accumulate(len(task.candidates) for task in tasks)
        return [scores[end - len(task.candidates) : end] for task, end in zip(tasks, ends, strict=True)]

    def _quantize(self, task: BlockTask, names: Sequence[str], spec: LQLoRASpec) -> dict[str, LinearResult]:
        weights = [task.linear(name).weight for name in names]
        decompositions = decompose(
            torch.stack([weight.float() for weight in weights]),
            [(task.schemes[name], task.absmax.get(name, PRESET_ABSMAX)) for name in names],
            [RankOne.of(task.fisher.get(name), weight) for name, weight in zip(names, weights, strict=True)],
            rank=spec.rank,
            iterations=spec.iterations,
            seed=task.seed,
        )
        results = {}
        for name, weight, each in zip(names, weights, decompositions, strict=True):
            low_rank = LowRank.of_product(each.left, each.right, spec.alpha, weight.dtype)
            results[name] = LinearResult(replace(each.base, dtype=weight.dtype), low_rank)
        return results


def _scores(tasks: Sequence[ScoreTask], rank: int) -> list[Tensor]:
    """Of linears of one shape: squared errors of their candidates, fp64 (candidates,)."""
    weights = torch.stack([task.weight.float() for task in tasks])
    known = [RankOne.of(task.fisher, task.weight) for task in tasks]
    rows, columns = torch.stack([each.rows for each in known]), torch.stack([each.columns for each in known])
    left, right = weighted_factors(weights, rank, rows, columns, tasks[0].seed)
    looked_at = scored_rows(weights.shape[1]).to(weights.device)
    found = []
    for task, rest, each in zip(tasks, weights[:, looked_at] - left[:, looked_at] @ right, known, strict=True):
        weighing = each.standing_for_all(looked_at)
        configurations = [(c.scheme, second_level(c.absmax)) for c in task.candidates]
        found.append(normal_float.squared_errors(rest, configurations, weighing.rows, weighing.columns))
    return found


@dataclass(frozen=True)
class RankOne:
    """sqrt(F) as an outer product: sqrt(u) (out,) and sqrt(v) (in,), with u v^T as large in sum as F."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, fisher: Fisher | None, weight: Tensor) -> "RankOne":
        """sqrt(F) from the sums of F; all 1 without F, or if F is 0 throughout."""
        if fisher is None or not bool(fisher.rows.sum() > 0):
            return cls(*(torch.ones(size, device=weight.device) for size in weight.shape))
        rows, columns = (sums.to(weight.device, torch.float32) for sums in (fisher.rows, fisher.columns))
        return cls(rows.sqrt(), (columns / columns.sum()).sqrt())

    def standing_for_all(self, rows: Tensor) -> "RankOne":
        """The factors of some rows alone, with the weight of all rows: errors over them estimate those over all."""
        kept = self.rows[rows]
        return RankOne(kept * (self.rows.square().sum() / kept.square().sum().clamp(min=1e-30)).sqrt(), self.columns)

    def error(self, difference: Tensor) -> Tensor:
        """|| sqrt(F) * difference ||_F, fp64 ()."""
        squares: Tensor = (self.rows[:, None] * difference * self.columns).square().sum(dtype=torch.float64)
        return squares.sqrt()


@dataclass(frozen=True)
class Decomposition:
    """W ~ base + left @ right; errors of every iteration; the base is that with the least."""

    base: CodebookWeight
    left: Tensor
    right: Tensor
    errors: tuple[float, ...]


def decompose(
    weights: Tensor,
    configurations: Sequence[tuple[Scheme, AbsmaxScheme | None]],
    information: Sequence[RankOne],
    *,
    rank: int,
    iterations: int,
    seed: int,
) -> list[Decomposition]:
    """The loop of the module docstring for a batch of weights (linears, out, in), fp32, which end one by one."""
    rows, columns = torch.stack([i.rows for i in information]), torch.stack([i.columns for i in information])
    factors, rest = FollowedFactors(rank, rows, columns, seed, rounds=1, by_powers=True), weights
    going, bases = list(range(len(weights))), dict[int, CodebookWeight]()
    errors: list[list[float]] = [[] for _ in weights]
    for _ in range(iterations):
        left, right = factors.of(rest)
        product = left @ right
        found = [quantize(weights[i] - p, *configurations[i]) for i, p in zip(going, product, strict=True)]
        rest = torch.stack([weights[i] - base.dequantize() for i, base in zip(going, found, strict=True)])
        now = torch.stack([information[i].error(rest[k] - product[k]) for k, i in enumerate(going)]).tolist()
        falls = [k for k, i in enumerate(going) if not errors[i] or now[k] < min(errors[i])]
        for i, error in zip(going, now, strict=True):
            errors[i].append(error)
        bases |= {going[k]: found[k] for k in falls}
        if len(falls) < len(going):
            factors.keep(falls)
            rest, going = rest[falls], [going[k] for k in falls]
        if not going:
            break
    best = [bases[i] for i in range(len(weights))]
    rest = torch.stack([weight - base.dequantize() for weight, base in zip(weights, best, strict=True)])
    left, right = weighted_factors(rest, rank, rows, columns, seed)
    return [Decomposition(*each) for each in zip(best, left, right, map(tuple, errors), strict=True)]


def scored_rows(count: int) -> Tensor:
    """Indices of the rows that score a configuration: all if there are few, else strips at even distances.

    A strip holds whole superblocks of groups, or nearly so; no row is in two.
    """
    if count <= SCORED_ROWS:
        return torch.arange(count)
    starts = torch.linspace(0, count - STRIP, SCORED_ROWS // STRIP).round().long()
    return (starts.unsqueeze(1) + torch.arange(STRIP)).flatten()


def quantize(weight: Tensor, scheme: Scheme, absmax: AbsmaxScheme | None) -> CodebookWeight:
    """Nearest NormalFloat values of an fp32 weight, dequantized to fp32."""
    return normal_float.quantize(weight, scheme, second_level(absmax), torch.float32)


def second_level(absmax: AbsmaxScheme | None) -> DoubleQuantization:
    """The codes of the maxima: QLoRA's where there is no budget."""
    return DoubleQuantization.of(PRESET_ABSMAX if absmax is None else absmax)


METHOD = Method(LQLoRASpec, LQLoRA())
