"""OmniQuant (Shao et al., arXiv:2308.13137), its learnable weight clipping (LWC): each group's range, by gradient.

For each linear of a block, with w in groups of G columns (`workers.numerics.affine` has the full formulas):

    lo' = sigmoid(l)*lo,   hi' = sigmoid(u)*hi        l, u start at 4: 0.982 of the range
    q = clamp(round(w/s) + z),   w_hat = s*(q - z)    s, z from lo' and hi'
    min over l, u of  || block(X_q; W_hat) - Y ||^2,  Y = block(X_fp; W)
    with aug_loss:  ... + || block(X_q; W_hat) - block(X_q; W) ||^2

AdamW without weight decay at a constant learning rate, over `epochs` passes. Rounding of w/s passes gradients straight
through, rounding of z none. `workers.numerics.learned_ranges` has dL/dalpha and dL/dbeta for D = dL/dw_hat; then

    dL/dl = dL/dalpha * alpha*(1 - alpha),   alpha = sigmoid(l);   u and beta the same

and the step is that of `workers.numerics.adamw`. With aug_loss the target is the mean of both targets
(`BlockTask.augmented`).

| symbol | variable | shape |
|---|---|---|
| w | `groups.weight` | (groups, G), the model's dtype: the groups of all linears of one scheme, one after another |
| lo, hi | `groups.start.ranges` | (groups,), fp32 |
| l, u | `groups.logits` | (2, groups), fp32 |
| D | `gradient` | (groups, G), the model's dtype |

Cost: epochs * sequences / batch_size steps per block, each a forward and a backward of the block and a few passes over
its weights; memory, one copy of the integer result and ten numbers per group. With l and u at infinity: round to
nearest.

Different from the paper: ranges hold 0, so that every z is a code; symmetric scales may have either sign (full range);
the parameters kept are those with the lowest loss on held-out sequences, which never train; passes are shuffled. Left
out on purpose: learnable equivalent transformation (LET), which the paper needs for activations only.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from app.domain.methods import OmniQuantSpec, Scheme
from workers.contracts.blocks import BlockTask, KernelMethod, Method, WarmUp
from workers.contracts.results import BlockResult
from workers.contracts.tuning import TuningSettings
from workers.numerics.affine import GroupRange, affine_grid, round_to_grid
from workers.numerics.clipping.clipped_groups import ClippedGroups, GroupStart, clipping_warm_ups
from workers.numerics.learned_ranges import steps
from workers.numerics.quantized import LinearResult, Number


class OmniQuant(KernelMethod[OmniQuantSpec]):
    def warm_ups(self, kinds: WarmUp, spec: OmniQuantSpec) -> list[Callable[[], object]]:  # noqa: ARG002 - as of any method
        return clipping_warm_ups(kinds.linears, kinds.dtype, kinds.scale_dtype, kinds.device)

    def quantize_block(self, task: BlockTask, spec: OmniQuantSpec) -> BlockResult:
        count = spec.epochs * max(1, task.total(len(task.inputs)) // spec.batch_size)
        settings = TuningSettings(count, spec.batch_size, spec.learning_rate, schedule="constant")
        weights = [ClippedWeights(w, scheme, width, task.scale_dtype) for (scheme, width), w in task.alike().items()]
        outcome = task.tune(task.augmented() if spec.aug_loss else task, weights, settings)
        counters: dict[str, Number] = {"best_step": outcome.best_step, "nan_gradients": outcome.faults}
        return BlockResult(outcome.linears, outcome.loss_initial, outcome.loss, counters)


def clipping_gradients(
    weight: Tensor, logits: Tensor, gradient: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> Tensor:
    """dL/dl and dL/du, (2, groups), for D = `gradient`: the module docstring's formulas, written plainly.

    AdamW steps by them. `ClippedGroups` computes the same in chunks that fit a cache; tests compare it with this.

    weight, gradient   (groups, G)
    logits             l and u, (2, groups)
    """
    w, d, (alpha, beta) = weight.to(logits.dtype), gradient.to(logits.dtype), logits.sigmoid()
    full = GroupRange.of(w)
    clipped = affine_grid(full, scheme, scale_dtype, alpha, beta)
    codes, unclamped = round_to_grid(w, clipped)
    d_scale = (d * steps(codes, clipped)).sum(-1) - (d * (codes == unclamped) * w).sum(-1) / clipped.scale
    if clipped.zero is None:
        low_wins, levels = -alpha * full.low > beta * full.high, 2 ** (scheme.bits - 1)
        by_low, by_high = torch.where(low_wins, -full.low / levels, 0), torch.where(low_wins, 0, -full.high / levels)
    else:
        by_low, by_high = -full.low / (2**scheme.bits - 1), full.high / (2**scheme.bits - 1)
    return torch.stack([d_scale * by_low * alpha * (1 - alpha), d_scale * by_high * beta * (1 - beta)])


class ClippedWeights:
    """Linears of one scheme with their l and u: the `TrainableWeights` of OmniQuant."""

    def __init__(self, weights: Mapping[str, Tensor], scheme: Scheme, width: int, scale_dtype: torch.dtype) -> None:
        self.shapes: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()
        }
        weight = torch.cat([weight.reshape(-1, width) for weight in weights.values()])
        self.groups = ClippedGroups(weight, GroupStart.full(weight), scheme, scale_dtype)

    @torch.no_grad()
    def write(self, out: Tensor) -> None:
        self.groups.write(out.view(self.groups.weight.shape))

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """AdamW's step by `clipping_gradients`; a constant times the gradient, as fp16 has it, makes the same step."""
        shape = self.groups.weight.shape
        self.groups.step(gradient.view(shape), rate, 0.0, out.view(shape))

    @torch.no_grad()
    def keep(self, better: Tensor) -> None:
        self.groups.keep(better)

    def restart(self) -> None:
        self.groups.restart()

    def adopt(self, other: "ClippedWeights") -> None:
        self.groups.adopt(other.groups)

    def faults(self) -> Number:
        return self.groups.faults.clone() if self.groups.faults.is_cuda else int(self.groups.faults)

    def results(self) -> dict[str, LinearResult]:
        return self.groups.kept.results(self.shapes, self.groups.scheme, self.groups.weight.dtype)


METHOD = Method(OmniQuantSpec, OmniQuant())
