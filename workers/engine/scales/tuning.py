"""End-to-end tuning: once every block is done, the scales of all of them together, and MXFP4's codes.

For each quantized linear of the blocks, with codes q, zero points z and scales s of groups of G columns:

    w_hat = round_to_scale_dtype(s*(1 + p)) * (q - z)                p starts at 0
    min over p of  L = 1/N sum over tokens of KL(softmax(t) || softmax(u))
    dL/du = (softmax(u) - softmax(t)) / N                            u, t logits of the quantized and original model
    dL/dp = s * sum_group D*(q - z),  D = dL/dw_hat                  rounding passes gradients straight through
    p    <- p - lr_i * m_i/(1 - b1^i) / (sqrt(v_i/(1 - b2^i)) + eps) Adam, m and v of dL/dp; b1, b2 = 0.9, 0.95
    lr_i = 0.002 * min(1, i/10) * (1 - (i - 1)/T)                    i = 1 .. T

Blocks are tuned one by one against their own outputs; here the scales learn what each block's error does to the next
token. What is optimized is what ships: scales are rounded in every step as they are stored. The teacher costs one head
product a step, since the original model's hidden states are kept after the last block. Tuned scales are kept only if L
falls on held-out sequences; else the old ones stay.

| symbol | variable | shape |
|---|---|---|
| q, z, s | `IntegerFamily` | (groups, G), (groups,), (groups,): all linears of one scheme, flat |
| p | `GroupScales.change` | (groups,), fp32 |
| D | one linear's at a time | (out, in), the model's dtype |
| t, u | a chunk's at a time | (tokens, vocabulary), the model's dtype |

Cost: a step is a forward and a backward of the whole model over 4 sequences, three products with the head, and one pass
over codes and weights. Memory: w_hat and q of all blocks (half precision: 3 bytes per weight; 12 where codes move), 5
numbers per group, and the activations of all blocks where they fit; of the first blocks only the inputs where they do
not, and those blocks are computed twice. Where not even that fits, by an estimate, the stage is left out.

On a GPU a step is captured once and replayed (`workers.engine.device.cuda_graphs`); elsewhere, or where capture
fails, the same steps run eagerly. Several ranks each hold all blocks, and sum gradients over their sequences. What
w_hat is on floating-point grids: `workers.engine.scales.families`; there norms have a p, too
(`workers.engine.scales.norms`), and where there is room, each weight of MXFP4 has a place on its grid, which the same
steps move (`workers.engine.scales.moving_codes`). Left out: the head's own scales, zero points, the codes of integers,
the last norm, and any text but the calibration's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bitwright.errors import NumericalFailure
from workers.contracts.tuning import TuningSettings
from workers.engine.device.cuda_graphs import captured
from workers.engine.model.overflow import ALSO_DTYPE
from workers.engine.scales.memory_plan import Fit, ScaleTask, Skipped, find_fit
from workers.engine.scales.scaled_blocks import ScaledBlocks
from workers.engine.scales.step_rules import Mean, Turns
from workers.engine.scales.teacher_loss import OutputHead
from workers.engine.tune.sequence_order import MOST_HELD_OUT, minibatches, split
from workers.numerics.floats.elements import element_table
from workers.numerics.quantized import AffineWeight, BlockWeight, FloatWeight

LEARNING_RATE = 2e-3
WARM_UP_STEPS = 10
BETAS = (0.9, 0.95)
EPSILON = 1e-8
TICKS = 20
"""Reports of progress; the device is waited for each time."""


@dataclass(frozen=True)
class ScaleOutcome:
    """The tuned scales by full linear name, (out, groups), and what they gain on held-out sequences.

    norms                            the tuned ones' weights by block and full name, where norms are tuned along
    codes                            on the host, uint8 (out, in) by full linear name, where they moved
    changed                          weights whose code is another than before
    divergence_initial, divergence   mean KL a token there, with the old and with the tuned scales
    """

    scales: dict[str, Tensor]
    divergence_initial: float
    divergence: float
    held_out: int
    fit: Fit
    captured: bool
    norms: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    changed: int = 0

    @property
    def is_better(self) -> bool:
        return self.divergence < self.divergence_initial


def tune_scales(task: ScaleTask) -> ScaleOutcome | Skipped:
    """Tunes the scales of all blocks; on running out of memory, again with less at once.

    Raises:
        NumericalFailure: the divergence is not finite before tuning.
        torch.OutOfMemoryError: one of several ranks has run out while others wait for it.
    """
    if not task.schemes:
        return Skipped("no linear of a block is quantized")
    fit = find_fit(task)
    if not task.processes.least(int(isinstance(fit, Fit))):
        return fit if isinstance(fit, Skipped) else Skipped("it does not fit on every device")
    while isinstance(fit, Fit):
        try:
            return _tune(task, fit)
        except torch.OutOfMemoryError:
            if not task.processes.alone:
                raise
            lowered = fit.lowered(len(task.calls))
        # Outside the except clause: the exception holds the tensors of the failed step.
        torch.cuda.empty_cache()
        fit = lowered or Skipped("the device ran out of memory with one sequence at a time")
        if lowered is not None:
            task.log("scale_tuning_lowered", micro_batch=lowered.micro_batch, recomputed=lowered.recomputed)
    return fit


def _tune(task: ScaleTask, fit: Fit) -> ScaleOutcome | Skipped:
    model = task.model
    with model.loaded(*model.after_blocks):
        head = OutputHead.of(model, task.quantized_head)
        tuning = ScaleTuning.begin(task, fit, head)
        before = tuning.held_out_divergence()
        if not math.isfinite(before):
            raise NumericalFailure(
                f"on held-out calibration text the divergence is {before} before scales are tuned",
                field="quantization",
                hint="use more bits or smaller groups" + ALSO_DTYPE,
            )
        tuning.prepare()
        tuning.run()
        after = tuning.held_out_divergence()
        held_out = task.processes.total(len(tuning.held_out))
        scales = tuning.blocks.scales
        codes = scales.codes()
        return ScaleOutcome(
            scales=scales.stored(),
            norms=scales.norms.stored(),
            codes=codes,
            changed=_changed(task, codes),
            divergence_initial=before,
            divergence=after,
            held_out=held_out,
            fit=fit,
            captured=tuning.replay is not None,
        )


def _changed(task: ScaleTask, codes: Mapping[str, Tensor]) -> int:
    """Weights whose code has another value than before: 0 has two codes."""
    count = 0
    for index in range(len(task.calls) if codes else 0):
        for name, weight in task.weights(index).items():
            if name in codes and isinstance(weight, AffineWeight | BlockWeight):
                count += int((codes[name] != weight.codes.to(codes[name].device)).sum())
            if name in codes and isinstance(weight, FloatWeight):
                values, before = element_table(weight.scheme, codes[name].device), weight.codes.to(codes[name].device)
                count += int((values[codes[name].int()] != values[before.int()]).sum())
    return count


@dataclass
class ScaleTuning:
    """The state of the stage. What changes from step to step is on the device; `count` is steps done, int64.

    mean, square    Adam's m and v
    batches         indices of this rank's sequences in every step, (steps, batch), where the inputs are
    rates           of scales and norms in every step, (steps,); code_rates: of codes
    averaged        means over the last steps, where they are what is kept
    damped          codes that are held once they have turned back often enough
    replay          the captured step, where there is one
    """

    task: ScaleTask
    fit: Fit
    blocks: ScaledBlocks
    head: OutputHead
    batches: Tensor
    held_out: Tensor
    rates: Tensor
    code_rates: Tensor
    count: Tensor
    mean: Tensor
    square: Tensor
    averaged: Mean | None
    damped: list[Turns]
    replay: Callable[[], None] | None = None

    @classmethod
    def begin(cls, task: ScaleTask, fit: Fit, head: OutputHead) -> "ScaleTuning":
        """Loads the blocks; `head` must stay loaded."""
        device, source = task.model.device, task.inputs.device
        training, held_out = split(task.sequences, task.seed, task.processes.share_size(MOST_HELD_OUT))
        settings = TuningSettings(task.steps, task.batch_size, LEARNING_RATE)
        blocks = ScaledBlocks.load(
            task.model,
            task.calls,
            task.schemes,
            task.weights,
            changed=task.changed,
            roundings=task.roundings,
            norms=task.norms,
            codes=fit.codes,
            recomputed=fit.recomputed,
        )
        rules, moving = task.rules, blocks.scales.moving
        for codes in moving:
            codes.spread(task.steps)
            if rules.shared:
                codes.share_squares()
        return cls(
            task=task,
            fit=fit,
            blocks=blocks,
            head=head,
            batches=minibatches(training, settings, task.seed).to(source),
            held_out=held_out.to(source),
            rates=torch.zeros(task.steps, dtype=torch.float32, device=device),
            code_rates=torch.zeros(task.steps, dtype=torch.float32, device=device),
            count=torch.zeros((), dtype=torch.int64, device=device),
            mean=torch.zeros_like(blocks.scales.change),
            square=torch.zeros_like(blocks.scales.change),
            averaged=_averaged(task, blocks),
            damped=[Turns(codes, rules.turns) for codes in moving] if rules.turns else [],
        )

    def prepare(self) -> None:
        """Captures the step where that is possible."""
        if self.task.model.device.type != "cuda" or self.task.inputs.device.type != "cuda":
            return
        try:
            still = (self.rates, self.code_rates, self.count)
            self.replay = captured(self._add_gradients, self._sum_gradients, self._move, still, self.task.processes)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.task.log("capture_failed", stage="scales", reason=str(error)[:200])

    def run(self) -> None:
        """All steps, from the start."""
        rules = self.task.rules
        self.rates.copy_(rules.with_floor(rates(self.task.steps), warm_up(self.task.steps)))
        self.code_rates.copy_(rules.of_codes(self.rates))
        for tensor in (self.count, self.mean, self.square):
            tensor.zero_()
        self.blocks.scales.restart()
        every, step = max(1, self.task.steps // TICKS), self.replay or self.step
        for done in range(1, self.task.steps + 1):
            step()
            if done % every == 0:
                if self.count.is_cuda:
                    torch.cuda.synchronize(self.count.device)
                self.task.tick(done)
        if self.averaged is not None and self.task.steps:
            self.averaged.put()
            self.blocks.scales.write()

    def gradient(self, batch: Tensor) -> Tensor:
        """dL/dp of the mean over the tokens of some sequences, flat (groups,); this rank's part of the mean of all."""
        scales = self.blocks.scales
        for gradient in scales.gradients():
            gradient.zero_()
        for indices in torch.split(batch, self.fit.micro_batch):
            inputs, targets = self._rows(indices)
            loss = partial(self.head.gradient, teacher=targets, weights=self.task.rules.weights)
            self.blocks.add_gradients(inputs, loss)
        return scales.gradient.mul_(scales.start).div_(
            len(batch) * self.task.inputs.shape[1] * self.task.processes.size
        )

    def held_out_divergence(self) -> float:
        """Mean KL per token of the held-out sequences, with the weights as they are; the mean of all ranks'."""
        total = torch.zeros((), dtype=torch.float64, device=self.task.model.device)
        for indices in torch.split(self.held_out, self.fit.micro_batch):
            inputs, targets = self._rows(indices)
            total += self.head.divergence(self.blocks.forward(inputs), targets)
        mean = total / (len(self.held_out) * self.task.inputs.shape[1] * self.task.processes.size)
        self.task.processes.sum_(mean)
        return float(mean)

    def step(self) -> None:
        """One minibatch: the gradient, Adam's step, the new weights."""
        self._add_gradients()
        self._sum_gradients()
        self._move()

    def _add_gradients(self) -> None:
        self.gradient(self.batches.index_select(0, self.count.view(1).to(self.batches.device))[0])

    def _sum_gradients(self) -> None:
        self.task.processes.sum_(*self.blocks.scales.gradients())

    def _move(self) -> None:
        # A number that is not finite moves nothing; comparisons would hide it, and Adam would keep it.
        gradient = self.blocks.scales.gradient.nan_to_num_(0.0, 0.0, 0.0)
        rate, code_rate = (each.index_select(0, self.count.view(1))[0] for each in (self.rates, self.code_rates))
        self.count += 1
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        unbiased = [1 - torch.exp(self.count * math.log(beta)) for beta in BETAS]
        scale = (self.square / unbiased[1]).sqrt_().add_(EPSILON)
        self.blocks.scales.change.sub_((self.mean / scale).mul_(rate / unbiased[0]))
        for codes in self.blocks.scales.moving:
            codes.move(code_rate, (unbiased[0], unbiased[1]), BETAS)
        for damped in self.damped:
            damped.hold()
        if self.averaged is not None:
            self.averaged.add(self.count)
        self.blocks.scales.write()

    def _rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some sequences, on the device."""
        device = self.task.model.device
        further = self.task.further or (None, None)
        pairs = zip((self.task.inputs, self.task.targets), further, strict=True)
        inputs, targets = (_selected(indices, own, more) for own, more in pairs)
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _selected(indices: Tensor, own: Tensor, more: Tensor | None) -> Tensor:
    """Rows of two tensors, the second's numbered on from the first's; the host waits for nothing."""
    if more is None:
        return own.index_select(0, indices)
    first = len(own)
    of_own = own.index_select(0, indices.clamp(max=first - 1))
    of_more = more.index_select(0, (indices - first).clamp(min=0))
    return torch.where((indices < first).view(-1, 1, 1), of_own, of_more)


def warm_up(steps: int) -> Tensor:
    """The learning rate of each step, which rises and stays. fp64 (steps,)."""
    done = torch.arange(steps, dtype=torch.float64)
    return LEARNING_RATE * ((done + 1) / WARM_UP_STEPS).clamp(max=1)


def rates(steps: int) -> Tensor:
    """The learning rate of each step: a linear warm-up within a linear decay to 0. fp64 (steps,)."""
    return warm_up(steps) * (1 - torch.arange(steps, dtype=torch.float64) / max(steps, 1))


def _averaged(task: ScaleTask, blocks: ScaledBlocks) -> Mean | None:
    """Means of p and of places, where a part of the steps is averaged."""
    if not task.rules.averaged:
        return None
    tensors = [blocks.scales.change, *(codes.place for codes in blocks.scales.moving)]
    return Mean(tensors, round(task.steps * (1 - task.rules.averaged)))
