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

import torch
from torch import Tensor

from app.domain.methods import Scheme, SignRoundSpec
from workers.contracts import BlockTask, TuningSettings
from workers.numerics.affine import Grid, GroupRange, affine_weight, grid, grouped, round_to_grid
from workers.numerics.quantized import BlockResult, LinearResult


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
        to = self._grid()
        codes, _ = round_to_grid(self._weight, to, self._offset)
        return _dequantize(codes, to).view(self._shape).to(self._dtype)

    @torch.no_grad()
    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """The signed step of the module docstring, then alpha and beta back into [0, 1]."""
        d_offset, d_alpha, d_beta = self.gradients(gradient)
        self._offset.sub_(d_offset.sign_(), alpha=learning_rate)
        self._alpha.sub_(d_alpha.sign_(), alpha=learning_rate).clamp_(0, 1)
        self._beta.sub_(d_beta.sign_(), alpha=learning_rate).clamp_(0, 1)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dL/dV, dL/dalpha and dL/dbeta for D = `gradient`, by the formulas of the module docstring."""
        to = self._grid()
        d = gradient.reshape(self._weight.shape).to(self._weight.dtype)
        codes, free = round_to_grid(self._weight, to, self._offset)
        inside = codes == free
        scale = to.scale.unsqueeze(-1)
        steps = codes if to.zero is None else codes - to.zero.unsqueeze(-1)
        d_inside = d * inside
        d_scale = (d * steps - d_inside * self._weight / scale).sum(-1)
        d_offset = d_inside.mul_(scale)
        if to.zero is None:
            return d_offset, *self._symmetric_range_gradients(d_scale, to)
        d_zero = -to.scale * (d * ~inside).sum(-1)
        return d_offset, *self._asymmetric_range_gradients(d_scale, d_zero, to)

    def result(self) -> LinearResult:
        to = self._grid()
        codes, _ = round_to_grid(self._weight, to, self._offset)
        return LinearResult(affine_weight(codes, to, self._scheme, self._scale_dtype, self._dtype))

    def _grid(self) -> Grid:
        return grid(self._ranges, self._scheme, self._scale_dtype, self._alpha, self._beta)

    def _symmetric_range_gradients(self, d_scale: Tensor, to: Grid) -> tuple[Tensor, Tensor]:
        levels = -to.lowest
        low_wins = -self._alpha * self._ranges.low > self._beta * self._ranges.high
        d_alpha = d_scale * torch.where(low_wins, -self._ranges.low / levels, 0)
        return d_alpha, d_scale * torch.where(low_wins, 0, -self._ranges.high / levels)

    def _asymmetric_range_gradients(self, d_scale: Tensor, d_zero: Tensor, to: Grid) -> tuple[Tensor, Tensor]:
        low, high, top = self._ranges.low, self._ranges.high, to.highest
        d_scale = d_scale + d_zero * self._alpha * low / to.scale.square()
        d_alpha = d_zero * (-low / to.scale) - d_scale * low / top
        return d_alpha, d_scale * high / top


def _dequantize(codes: Tensor, to: Grid) -> Tensor:
    steps = codes if to.zero is None else codes - to.zero.unsqueeze(-1)
    return steps * to.scale.unsqueeze(-1)
