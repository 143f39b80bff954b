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
| w | `_weight` | (out, groups, G) |
| V | `_offset` | (out, groups, G), fp32 |
| alpha, beta | `_alpha`, `_beta` | (out, groups), fp32 |
| D | `gradient` | (out, in), the model's dtype |

Cost: a step is a forward and a backward of the block and a few passes over its weights; memory, V and one copy of the
integer result besides. The step is written by hand, since only signs of the gradients are used: no graph is kept for
the quantizer. With 0 steps the result is round to nearest.

Different from the paper: the original block's output comes from the original stream and the quantized block sees the
quantized stream (as in AutoRound's code); the parameters kept are those with the lowest loss on held-out sequences,
not on the step's own minibatch. Left out: activation quantization, norm and bias tuning.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from app.domain.methods import Scheme, SignRoundSpec
from workers.contracts import BlockTask, TuningSettings
from workers.numerics.affine import Grid, GroupRange, affine_weight, grid, grouped, round_to_grid
from workers.numerics.quantized import BlockResult, LinearResult

EVERY_ROW = slice(None)
CACHED_ELEMENTS = 131_072
"""Elements of a chunk: a handful of fp32 tensors of this size fit the second-level cache."""


class SignRound:
    needs_inputs = True

    def quantize_block(self, task: BlockTask, spec: SignRoundSpec) -> BlockResult:
        weights = {
            name: RoundedWeight(task.linear(name).weight.detach(), scheme, task.scale_dtype)
            for name, scheme in task.schemes.items()
        }
        rate = spec.learning_rate or 1 / max(spec.steps, 1)
        outcome = task.tune(task, weights, TuningSettings(spec.steps, spec.batch_size, rate))
        return BlockResult(outcome.linears, outcome.loss_initial, outcome.loss)


class RoundedWeight:
    """One linear's weight with its V, alpha and beta; a `TrainableWeight`."""

    def __init__(self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> None:
        self._scheme, self._scale_dtype, self._dtype, self._shape = scheme, scale_dtype, weight.dtype, weight.shape
        working = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._weight = grouped(weight.to(working), scheme.group_size)
        self._ranges = GroupRange.of(self._weight)
        self._offset = torch.zeros_like(self._weight)
        self._alpha = torch.ones_like(self._ranges.low)
        self._beta = torch.ones_like(self._ranges.low)

    @torch.no_grad()
    def weight(self) -> Tensor:
        hat = torch.empty(self._shape, dtype=self._dtype, device=self._weight.device)
        for rows in self._row_chunks():
            to = self._grid(rows)
            codes, _ = round_to_grid(self._weight[rows], to, self._offset[rows])
            hat[rows] = _dequantize(codes, to).flatten(1)
        return hat

    @torch.no_grad()
    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """The signed step of the module docstring, then alpha and beta back into [0, 1]."""
        for rows in self._row_chunks():
            d_offset, d_alpha, d_beta = self.gradients(gradient[rows], rows)
            self._offset[rows].sub_(d_offset.sign_(), alpha=learning_rate)
            self._alpha[rows].sub_(d_alpha.sign_(), alpha=learning_rate).clamp_(0, 1)
            self._beta[rows].sub_(d_beta.sign_(), alpha=learning_rate).clamp_(0, 1)

    def gradients(self, gradient: Tensor, rows: slice = EVERY_ROW) -> tuple[Tensor, Tensor, Tensor]:
        """dL/dV, dL/dalpha and dL/dbeta of some rows for D = `gradient`, by the formulas of the module docstring."""
        to, weight = self._grid(rows), self._weight[rows]
        d = gradient.reshape(weight.shape).to(weight.dtype)
        codes, free = round_to_grid(weight, to, self._offset[rows])
        inside = codes == free
        scale = to.scale.unsqueeze(-1)
        steps = codes if to.zero is None else codes - to.zero.unsqueeze(-1)
        d_inside = d * inside
        d_scale = (d * steps).sum(-1) - (d_inside * weight).sum(-1) / to.scale
        d_zero = -to.scale * (d.sum(-1) - d_inside.sum(-1))
        return d_inside.mul_(scale), *self._range_gradients(d_scale, d_zero, to, rows)

    def result(self) -> LinearResult:
        to = self._grid()
        codes, _ = round_to_grid(self._weight, to, self._offset)
        return LinearResult(affine_weight(codes, to, self._scheme, self._scale_dtype, self._dtype))

    def _grid(self, rows: slice = EVERY_ROW) -> Grid:
        alpha, beta = self._alpha[rows], self._beta[rows]
        return grid(self._ranges.rows(rows), self._scheme, self._scale_dtype, alpha, beta)

    def _range_gradients(self, d_scale: Tensor, d_zero: Tensor, to: Grid, rows: slice) -> tuple[Tensor, Tensor]:
        """dL/dalpha and dL/dbeta from dL/ds and dL/dz, each (rows, groups)."""
        low, high, alpha = self._ranges.low[rows], self._ranges.high[rows], self._alpha[rows]
        if to.zero is None:
            low_wins = -alpha * low > self._beta[rows] * high
            d_alpha = d_scale * torch.where(low_wins, low / to.lowest, 0)
            return d_alpha, d_scale * torch.where(low_wins, 0, high / to.lowest)
        d_scale = d_scale + d_zero * alpha * low / to.scale.square()
        return -d_zero * low / to.scale - d_scale * low / to.highest, d_scale * high / to.highest

    def _row_chunks(self) -> Iterator[slice]:
        """Slices of rows: on a CPU as many as stay in its cache through a chain of operations, else all."""
        count = len(self._weight)
        size = count if self._weight.is_cuda else max(1, CACHED_ELEMENTS // self._shape[1])
        return (slice(start, start + size) for start in range(0, count, size))


def _dequantize(codes: Tensor, to: Grid) -> Tensor:
    steps = codes if to.zero is None else codes - to.zero.unsqueeze(-1)
    return steps * to.scale.unsqueeze(-1)
