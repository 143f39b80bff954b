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

Cost of a linear: two decompositions (`workers.numerics.low_rank`: exact for sides up to 2,048, then randomized), and
per iteration O(out*in*R) to follow the factors, and a rounding; to choose, one decomposition and a rounding of
`SCORED_ROWS` rows per configuration.

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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.domain.methods import PRESET_ABSMAX, AbsmaxScheme, LQLoRASpec, Scheme
from workers.contracts.blocks import BlockTask, Fisher, Method, ScoreTask
from workers.contracts.results import BlockResult
from workers.numerics import normal_float
from workers.numerics.low_rank import FollowedFactors, weighted_factors
from workers.numerics.normal_float import DoubleQuantization
from workers.numerics.quantized import CodebookWeight, LinearResult, LowRank

SCORED_ROWS, STRIP = 64, 16
"""Rows that a configuration is scored by, in strips: with all, choosing among 432 takes about ten times as long."""


class LQLoRA:
    def quantize_block(self, task: BlockTask, spec: LQLoRASpec) -> BlockResult:
        results = {}
        for name, scheme in task.schemes.items():
            results[name] = self._quantize(task, name, scheme, spec)
            task.tick(len(results) / len(task.schemes))
        return BlockResult(results)

    @torch.no_grad()
    def candidate_errors(self, task: ScoreTask, spec: LQLoRASpec) -> list[float]:
        """Squared weighted error of each configuration after one iteration."""
        weight, weights = task.weight.float(), RankOne.of(task.fisher, task.weight)
        left, right = weighted_factors(weight, spec.rank, weights.rows, weights.columns, task.seed)
        looked_at = scored_rows(len(weight)).to(weight.device)
        rest, weights = weight[looked_at] - left[looked_at] @ right, weights.standing_for_all(looked_at)
        errors = [weights.error(rest - quantize(rest, c.scheme, c.absmax).dequantize()) for c in task.candidates]
        # One wait for the device, not one per configuration.
        return torch.stack(errors).square().tolist()

    @torch.no_grad()
    def _quantize(self, task: BlockTask, name: str, scheme: Scheme, spec: LQLoRASpec) -> LinearResult:
        weight = task.linear(name).weight
        decomposition = decompose(
            weight.float(),
            scheme,
            task.absmax.get(name, PRESET_ABSMAX),
            RankOne.of(task.fisher.get(name), weight),
            rank=spec.rank,
            iterations=spec.iterations,
            seed=task.seed,
        )
        low_rank = LowRank.of_product(decomposition.left, decomposition.right, spec.alpha, weight.dtype)
        return LinearResult(replace(decomposition.base, dtype=weight.dtype), low_rank)


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
    weight: Tensor,
    scheme: Scheme,
    absmax: AbsmaxScheme | None,
    weights: RankOne,
    *,
    rank: int,
    iterations: int,
    seed: int,
) -> Decomposition:
    """The loop of the module docstring for a weight (out, in), fp32."""
    factors = FollowedFactors(rank, weights.rows, weights.columns, seed)
    quantized, best = torch.zeros_like(weight), None
    errors: list[float] = []
    for _ in range(iterations):
        left, right = factors.of(weight - quantized)
        product = left @ right
        base = quantize(weight - product, scheme, absmax)
        quantized = base.dequantize()
        errors.append(float(weights.error(weight - quantized - product)))
        if best is not None and errors[-1] >= min(errors[:-1]):
            break
        best = base
    assert best is not None  # noqa: S101 - for the type checker; the first iteration sets it
    left, right = weighted_factors(weight - best.dequantize(), rank, weights.rows, weights.columns, seed)
    return Decomposition(best, left, right, tuple(errors))


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
    stored = DoubleQuantization.of(PRESET_ABSMAX if absmax is None else absmax)
    return normal_float.quantize(weight, scheme, stored, torch.float32)


METHOD = Method(LQLoRASpec, LQLoRA())
