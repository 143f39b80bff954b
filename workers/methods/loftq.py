"""LoftQ (Li et al., arXiv:2310.08659): quantization and a low-rank correction, computed alternately.

    min over Q, A, B of  || W - Q - B A ||_F,      B_0 A_0 = 0;   for t = 1 .. T

    Q_t      = quantize(W - B_{t-1} A_{t-1})       NormalFloat, or round to nearest on an affine grid
    U S V^T  = SVD(W - Q_t)
    B_t, A_t = U_r sqrt(S_r), sqrt(S_r) V_r^T
    e_t      = || W - Q_t - B_t A_t ||_F           the result is the iterate with the least e_t

The second half-step is optimal for its Q_t (to 1e-4 of the error, where a side is longer than 256), so it never raises
the error. The first one may, and more iterations are then worse (their own users report it): hence the best iterate,
where the authors' code returns the last.

| symbol | variable | shape |
|---|---|---|
| W | `weight` | (out, in), fp32 |
| Q_t | `quantized` | (out, in), as codes; the error is that of the dequantized weight in the model's dtype |
| B_t, A_t | `left`, `right` | (out, r) and (r, in), fp32 |

Reads the weights alone, a block's linears of one shape as one batch; T quantizations and T decompositions, each
starting from the directions of the one before (`workers.numerics.low_rank`). Algorithm 1 of the paper has the SVD anew.

The correction acts at full strength for every alpha: peft multiplies by alpha/r, so both factors are stored divided by
sqrt(alpha/r) (`LowRank.of_product`). The authors' code and peft do not, and with their alpha = 16 and r = 64 add a
quarter of the correction that was solved for.

Different from the authors' code besides: groups lie within rows, as they do there only if in divides by the group.
Left out: their clipping to two standard deviations of a whole matrix, as uniform quantization; quantized embeddings.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from app.domain.methods import PRESET_ABSMAX, LoftQSpec, Scheme
from workers.contracts.blocks import BlockTask, Method
from workers.contracts.results import BlockResult
from workers.numerics import normal_float
from workers.numerics.affine import GroupRange, affine_grid, affine_weight, grouped, round_to_grid
from workers.numerics.low_rank import FollowedFactors
from workers.numerics.normal_float import DoubleQuantization
from workers.numerics.quantized import AffineWeight, LinearResult, LowRank, QuantizedWeight

Quantize = Callable[[Tensor], tuple[list[QuantizedWeight], Tensor]]
"""Of weights (linears, out, in): each one's codes, and all dequantized, in the dtype of `weights`."""
BATCH = 1 << 27
"""Weights that are computed together at the most."""
FIRST_ROUNDS = 2
"""Of the first decomposition, to 3e-5 of the error on what quantization leaves; the others follow it."""


@dataclass(frozen=True)
class Iterate:
    """Q_t, B_t, A_t and e_t of the module docstring; `before` is || W - Q_t - B_{t-1} A_{t-1} ||_F."""

    quantized: QuantizedWeight
    left: Tensor
    right: Tensor
    before: float
    error: float


class LoftQ:
    @torch.no_grad()
    def quantize_block(self, task: BlockTask, spec: LoftQSpec) -> BlockResult:
        results, latest = dict[str, LinearResult](), 0
        for names in task.of_one_shape(BATCH):
            weights = [task.linear(name).weight for name in names]
            dtype = weights[0].dtype
            quantize = quantizer(spec, [task.schemes[name] for name in names], task.scale_dtype, dtype)
            batch = torch.stack([weight.float() for weight in weights])
            chosen, last = best_iterates(iterates(batch, quantize, spec.rank, spec.iterations, task.seed))
            for name, best in zip(names, chosen, strict=True):
                low_rank = LowRank.of_product(best.left, best.right, spec.alpha, dtype)
                results[name] = LinearResult(best.quantized, low_rank)
            latest = max(latest, last)
            task.tick(len(results) / len(task.schemes))
        return BlockResult(
            {name: results[name] for name in task.schemes}, counters={"latest_best_iterate": float(latest)}
        )


def best_iterates(found: Iterable[list[Iterate]]) -> tuple[list[Iterate], int]:
    """The iterate of the least error for each linear, and the number of the last one among them, from 1."""
    best, numbers = dict[int, Iterate](), dict[int, int]()
    for number, iterates_ in enumerate(found, 1):
        for place, iterate in enumerate(iterates_):
            if place not in best or iterate.error < best[place].error:
                best[place], numbers[place] = iterate, number
    return list(best.values()), max(numbers.values())


@torch.no_grad()
def iterates(weights: Tensor, quantize: Quantize, rank: int, count: int, seed: int) -> Iterator[list[Iterate]]:
    """Iterates 1 to `count` for each W of a batch (linears, out, in), fp32 or fp64."""
    product, ones = torch.zeros_like(weights), torch.ones_like(weights)
    factors = FollowedFactors(rank, ones[..., 0], ones[..., 0, :], seed, rounds=FIRST_ROUNDS)
    for _ in range(count):
        quantized, shipped = quantize(weights - product)
        rest = weights - shipped
        before = torch.linalg.matrix_norm(rest - product)
        left, right = factors.of(rest)
        product = left @ right
        errors = torch.stack([before, torch.linalg.matrix_norm(rest - product)]).tolist()
        yield [Iterate(*each) for each in zip(quantized, left, right, *errors, strict=True)]


def quantizer(spec: LoftQSpec, schemes: Sequence[Scheme], scale_dtype: torch.dtype, dtype: torch.dtype) -> Quantize:
    """The quantizer of Q_t for linears of some schemes; `dtype` is that of the dequantized weights."""
    if spec.base == "affine":
        one: Callable[..., QuantizedWeight] = partial(_round_to_nearest, scale_dtype=scale_dtype, dtype=dtype)
    else:
        absmax = DoubleQuantization.of(PRESET_ABSMAX) if spec.double_quantization else scale_dtype
        one = partial(normal_float.quantize, absmax=absmax, dtype=dtype)

    def each(weights: Tensor) -> tuple[list[QuantizedWeight], Tensor]:
        found = [one(weight, scheme=scheme) for weight, scheme in zip(weights, schemes, strict=True)]
        return found, torch.stack([weight.dequantize().to(weights.dtype) for weight in found])

    def together(weights: Tensor) -> tuple[list[QuantizedWeight], Tensor]:
        whole = _round_to_nearest(weights.flatten(0, 1), schemes[0], scale_dtype, dtype)
        count, rows, _ = weights.shape
        codes, scale = whole.codes.view(count, rows, -1), whole.scale.view(count, rows, -1)
        zero = None if whole.zero_point is None else whole.zero_point.view(count, rows, -1)
        found: list[QuantizedWeight] = [
            AffineWeight(codes[i], scale[i], None if zero is None else zero[i], schemes[0], dtype) for i in range(count)
        ]
        return found, whole.dequantize().to(weights.dtype).view_as(weights)

    # Affine grids know nothing beyond their group; maxima's second level has a number for a whole linear.
    return together if spec.base == "affine" and len(set(schemes)) == 1 else each


def _round_to_nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, dtype: torch.dtype) -> AffineWeight:
    w = grouped(weight, scheme.group_size)
    grid = affine_grid(GroupRange.of(w), scheme, scale_dtype)
    codes, _ = round_to_grid(w, grid)
    return affine_weight(codes, grid, scheme, scale_dtype, dtype)


METHOD = Method(LoftQSpec, LoftQ())
