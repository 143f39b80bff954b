"""LoftQ (Li et al., arXiv:2310.08659): quantization and a low-rank correction, computed alternately.

    min over Q, A, B of  || W - Q - B A ||_F,      B_0 A_0 = 0;   for t = 1 .. T

    Q_t      = quantize(W - B_{t-1} A_{t-1})       NormalFloat, or round to nearest on an affine grid
    U S V^T  = SVD(W - Q_t)
    B_t, A_t = U_r sqrt(S_r), sqrt(S_r) V_r^T
    e_t      = || W - Q_t - B_t A_t ||_F           the result is the iterate with the least e_t

The second half-step is optimal for its Q_t, so it never raises the error. The first one may, and more iterations are
then worse (their own users report it): hence the best iterate, where the authors' code returns the last.

| symbol | variable | shape |
|---|---|---|
| W | `weight` | (out, in), fp32 |
| Q_t | `quantized` | (out, in), as codes; the error is that of the dequantized weight in the model's dtype |
| B_t, A_t | `left`, `right` | (out, r) and (r, in), fp32 |

Reads the weights alone, one linear at a time; T quantizations and T decompositions (`workers.numerics.low_rank`).

The correction acts at full strength for every alpha: peft multiplies by alpha/r, so both factors are stored divided by
sqrt(alpha/r) (`LowRank.of_product`). The authors' code and peft do not, and with their alpha = 16 and r = 64 add a
quarter of the correction that was solved for.

Different from the authors' code besides: groups lie within rows, as they do there only if in divides by the group.
Left out: their clipping to two standard deviations of a whole matrix, as uniform quantization; quantized embeddings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from app.domain.methods import PRESET_ABSMAX, LoftQSpec, Scheme
from workers.contracts.blocks import BlockTask, Method
from workers.contracts.results import BlockResult
from workers.numerics import normal_float
from workers.numerics.affine import GroupRange, affine_grid, affine_weight, grouped, round_to_grid
from workers.numerics.low_rank import best_factors
from workers.numerics.normal_float import DoubleQuantization
from workers.numerics.quantized import AffineWeight, LinearResult, LowRank, QuantizedWeight

Quantize = Callable[[Tensor], QuantizedWeight]


@dataclass(frozen=True)
class Iterate:
    """Q_t, B_t, A_t and e_t of the module docstring; `before` is || W - Q_t - B_{t-1} A_{t-1} ||_F."""

    quantized: QuantizedWeight
    left: Tensor
    right: Tensor
    before: float
    error: float


class LoftQ:
    def quantize_block(self, task: BlockTask, spec: LoftQSpec) -> BlockResult:
        results, latest = {}, 0
        for done, (name, scheme) in enumerate(task.schemes.items()):
            weight = task.linear(name).weight
            quantize = quantizer(spec, scheme, task.scale_dtype, weight.dtype)
            candidates = list(iterates(weight.float(), quantize, spec.rank, spec.iterations, task.seed))
            best = min(range(len(candidates)), key=lambda t: candidates[t].error)
            chosen, latest = candidates[best], max(latest, best + 1)
            low_rank = LowRank.of_product(chosen.left, chosen.right, spec.alpha, weight.dtype)
            results[name] = LinearResult(chosen.quantized, low_rank)
            task.tick((done + 1) / len(task.schemes))
        return BlockResult(results, counters={"latest_best_iterate": float(latest)})


@torch.no_grad()
def iterates(weight: Tensor, quantize: Quantize, rank: int, count: int, seed: int) -> Iterator[Iterate]:
    """Iterates 1 to `count` for W (out, in), fp32 or fp64."""
    product = torch.zeros_like(weight)
    for _ in range(count):
        quantized = quantize(weight - product)
        rest = weight - quantized.dequantize().to(weight.dtype)
        before = torch.linalg.matrix_norm(rest - product)
        left, right = best_factors(rest, rank, seed)
        product = left @ right
        error = torch.linalg.matrix_norm(rest - product)
        yield Iterate(quantized, left, right, float(before), float(error))


def quantizer(spec: LoftQSpec, scheme: Scheme, scale_dtype: torch.dtype, dtype: torch.dtype) -> Quantize:
    """The quantizer of Q_t; `dtype` is that of the dequantized weight."""
    if spec.base == "affine":
        return partial(_round_to_nearest, scheme=scheme, scale_dtype=scale_dtype, dtype=dtype)
    absmax = DoubleQuantization.of(PRESET_ABSMAX) if spec.double_quantization else scale_dtype
    return partial(normal_float.quantize, scheme=scheme, absmax=absmax, dtype=dtype)


def _round_to_nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, dtype: torch.dtype) -> AffineWeight:
    w = grouped(weight, scheme.group_size)
    grid = affine_grid(GroupRange.of(w), scheme, scale_dtype)
    codes, _ = round_to_grid(w, grid)
    return affine_weight(codes, grid, scheme, scale_dtype, dtype)


METHOD = Method(LoftQSpec, LoftQ())
