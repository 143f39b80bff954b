"""OmniQuant (Shao et al., arXiv:2308.13137), its learnable weight clipping (LWC): each group's range, by gradient.

For each linear of a block, with w in groups of G columns (`workers.numerics.affine` has the full formulas):

    lo' = sigmoid(l)*lo,   hi' = sigmoid(u)*hi        l, u start at 4: 0.982 of the range
    q = clamp(round(w/s) + z),   w_hat = s*(q - z)    s, z from lo' and hi'
    min over l, u of  || block(X_q; W_hat) - Y ||^2,  Y = block(X_fp; W)
    with aug_loss:  ... + || block(X_q; W_hat) - block(X_q; W) ||^2

AdamW without weight decay at a constant learning rate, over `epochs` passes. Rounding of w/s passes gradients straight
through, rounding of z none. `workers.numerics.learned_ranges` has dL/dalpha and dL/dbeta for D = dL/dw_hat; then

    dL/dl = dL/dalpha * alpha*(1 - alpha),   alpha = sigmoid(l);   u and beta the same
    m <- 0.9*m + 0.1*g,   v <- 0.999*v + 0.001*g^2,   g = dL/dl
    l <- l - lr * m/(1 - 0.9^t) / (sqrt(v/(1 - 0.999^t)) + 1e-8)

The two losses of aug_loss add up to a constant and twice the loss to the mean of both targets, and a factor of two is
nothing to Adam: so that mean is the target, and the losses that are reported are those to it.

| symbol | variable | shape |
|---|---|---|
| w | `weight` | (groups, G), the model's dtype: the groups of all linears of one scheme, one after another |
| lo, hi | `ranges` | (groups,), fp32 |
| l, u | `logits` | (2, groups), fp32 |
| m, v | `mean`, `square` | (2, groups), fp32 |
| D | `gradient` | (groups, G), the model's dtype |

Cost: epochs * samples / batch_size steps a block, each a forward and a backward of the block and a few passes over its
weights; memory, one copy of the integer result and ten numbers a group. With l and u at infinity: round to nearest.

Different from the paper: ranges hold 0, so that every z is a code; symmetric scales may have either sign (full range);
the parameters kept are those with the lowest loss on held-out sequences, which never train; passes are shuffled. Left
out on purpose: learnable equivalent transformation (LET), which the paper needs for activations only.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from app.domain.methods import OmniQuantSpec, Scheme
from workers.contracts import BlockTask, TuningSettings
from workers.numerics.affine import Grid, GroupRange, grid, round_to_grid
from workers.numerics.learned_ranges import Kept, chunks, range_gradients, steps, working_dtype
from workers.numerics.quantized import BlockResult, LinearResult, Number

START = 4.0
"""Of l and u."""
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class OmniQuant:
    needs_inputs = True

    def quantize_block(self, task: BlockTask, spec: OmniQuantSpec) -> BlockResult:
        count = spec.epochs * max(1, task.total(len(task.inputs)) // spec.batch_size)
        settings = TuningSettings(count, spec.batch_size, spec.learning_rate, schedule="constant")
        weights = [ClippedWeights(w, scheme, width, task.scale_dtype) for (scheme, width), w in task.alike().items()]
        outcome = task.tune(augmented(task) if spec.aug_loss else task, weights, settings)
        counters = {"best_step": outcome.best_step, "nan_gradients": outcome.faults}
        return BlockResult(outcome.linears, outcome.loss_initial, outcome.loss, counters)


@torch.no_grad()
def augmented(task: BlockTask) -> BlockTask:
    """The task with the mean of both targets of the augmented loss, in the targets' dtype."""
    targets, first = torch.empty_like(task.targets), 0
    for forward in task.passes(task.inputs):
        own = forward()
        part = slice(first, first := first + len(own))
        targets[part] = (own.to(targets.device, working_dtype(own)) + task.targets[part]) / 2
    return replace(task, targets=targets)


class ClippedWeights:
    """Linears of one scheme with their l and u: the `TrainableWeights` of OmniQuant."""

    def __init__(self, weights: Mapping[str, Tensor], scheme: Scheme, width: int, scale_dtype: torch.dtype) -> None:
        self.shapes: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()
        }
        self._scheme, self._scale_dtype = scheme, scale_dtype
        self.weight = torch.cat([weight.reshape(-1, width) for weight in weights.values()])
        self.ranges = GroupRange.of(self.weight.to(working_dtype(self.weight)))
        self.logits = torch.full_like(torch.stack([self.ranges.low, self.ranges.high]), START)
        self.mean, self.square = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self._count = torch.zeros((), dtype=self.logits.dtype, device=self.logits.device)
        self._faults = torch.zeros((), dtype=torch.int64, device=self.logits.device)
        self._kept = Kept.empty(self.weight, scale_dtype)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        hat = out.view(self.weight.shape)
        for groups in chunks(self.weight):
            to = self._grid(groups)
            codes, _ = round_to_grid(self._chunk(groups), to)
            hat[groups] = steps(codes, to) * to.scale.unsqueeze(-1)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """AdamW's step of the module docstring; a constant times the gradient, as fp16 has it, makes the same step."""
        g = self.gradients(gradient)
        self._faults += g.isnan().any(0).sum()
        g.nan_to_num_(0.0, 0.0, 0.0)
        self._count += 1
        self.mean.lerp_(g, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        unbiased = [1 - torch.exp(self._count * math.log(beta)) for beta in BETAS]
        self.logits -= rate * (self.mean / unbiased[0]) / ((self.square / unbiased[1]).sqrt() + EPSILON)
        self.write(out)

    def gradients(self, gradient: Tensor) -> Tensor:
        """dL/dl and dL/du, (2, groups), for D, flat or (groups, G)."""
        gradient, found = gradient.view(self.weight.shape), torch.empty_like(self.logits)
        for groups in chunks(self.weight):
            weight, to = self._chunk(groups), self._grid(groups)
            alpha, beta = self.logits[:, groups].sigmoid()
            d = gradient[groups].to(weight.dtype)
            found[:, groups] = torch.stack(range_gradients(d, weight, self.ranges.rows(groups), alpha, beta, to))
        factor = self.logits.sigmoid()
        return found.mul_(factor * (1 - factor))

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        for groups in chunks(self.weight):
            to = self._grid(groups)
            codes, _ = round_to_grid(self._chunk(groups), to)
            self._kept.overwrite(groups, codes, to, better)

    def restart(self) -> None:
        self.logits.fill_(START)
        for tensor in (self.mean, self.square, self._count, self._faults):
            tensor.zero_()

    def adopt(self, other: "ClippedWeights") -> None:
        self.restart()
        self.weight.copy_(other.weight)
        self.ranges.low.copy_(other.ranges.low)
        self.ranges.high.copy_(other.ranges.high)
        self.logits.copy_(other.logits)

    def faults(self) -> Number:
        return self._faults.clone() if self._faults.is_cuda else int(self._faults)

    def results(self) -> dict[str, LinearResult]:
        return self._kept.results(self.shapes, self._scheme, self.weight.dtype)

    def _grid(self, groups: slice) -> Grid:
        alpha, beta = self.logits[:, groups].sigmoid()
        return grid(self.ranges.rows(groups), self._scheme, self._scale_dtype, alpha, beta)

    def _chunk(self, groups: slice) -> Tensor:
        return self.weight[groups].to(self.logits.dtype)
