"""The one tuning loop: minibatch descent on a block's output error, for every method that learns.

    L = mean((block(X_q; W_hat) - Y)^2),    D = dL/dW_hat for each tuned linear

Each step the block runs forward and backward under autograd on a minibatch, the weights step by their gradient and are
written into the block anew. The loss on a fixed held-out set of sequences decides which step's result is kept; the
start counts as a candidate, so the result is never worse there than the start.

Nothing in a step waits for the device: batches, rates, losses and the choice live there. A tuned linear computes its
weight's gradient straight into a flat buffer, so that the weights of a block step in one pass.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.errors import NumericalFailure
from workers.contracts import BlockTask, TrainableWeights, TuningOutcome, TuningSettings

MOST_HELD_OUT = 16
HELD_OUT_SHARE = 8
"""One sequence in eight is held out, at most sixteen."""
CHECKS = 20
"""Times that the held-out loss would be measured over a whole run; the first third is left out."""


def tune(task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings) -> TuningOutcome:
    """Tunes `weights` in place and returns the best results seen.

    Raises:
        NumericalFailure: the loss is not finite at the start or at the end.
    """
    with tuned_block(task, weights) as tuned:
        run = _Run.begin(task, weights, settings, tuned)
        for step in range(settings.steps):
            run.step()
            if is_checked(step + 1, settings.steps):
                run.check()
                task.tick((step + 1) / settings.steps)
    return run.outcome()


@dataclass(frozen=True)
class FlatWeights:
    """W_hat of one `TrainableWeights` and the gradient with respect to it, flat; the block's linears are views."""

    value: Tensor
    gradient: Tensor


class TunedLinear(nn.Module):
    """y = x W^T + b, with dL/dW written (or added, for a later micro-batch) into `gradient`.

    weight    (out, in), a view of a flat buffer that requires a gradient so that autograd comes this way
    gradient  (out, in), a view of the flat gradient
    """

    def __init__(self, weight: Tensor, gradient: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias
        self.gradient = gradient
        self.adds = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _LinearIntoBuffer.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y


class _LinearIntoBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: TunedLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), linear, grad = ctx.saved_tensors, ctx.linear, gradients[0]
        rows = grad.flatten(0, -2)
        torch.addmm(linear.gradient, rows.T, x.flatten(0, -2), beta=int(linear.adds), out=linear.gradient)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def tuned_block(task: BlockTask, weights: Sequence[TrainableWeights]) -> Iterator[list[FlatWeights]]:
    """The block with a `TunedLinear` for each tuned linear, and nothing else trainable; restored afterwards."""
    originals = {name: task.linear(name) for part in weights for name in part.shapes}
    trainable = [p for p in task.block.parameters() if p.requires_grad]
    task.block.requires_grad_(False)
    try:
        yield [_flatten(task, part, originals) for part in weights]
    finally:
        for name, original in originals.items():
            task.block.set_submodule(name, original)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _flatten(task: BlockTask, part: TrainableWeights, originals: dict[str, nn.Linear]) -> FlatWeights:
    first = originals[next(iter(part.shapes))].weight
    size = sum(math.prod(shape) for shape in part.shapes.values())
    flat = FlatWeights(*(torch.zeros(size, dtype=first.dtype, device=first.device) for _ in range(2)))
    sizes = [math.prod(shape) for shape in part.shapes.values()]
    pieces = zip(part.shapes.items(), torch.split(flat.value, sizes), torch.split(flat.gradient, sizes), strict=True)
    for (name, shape), value, gradient in pieces:
        tuned = TunedLinear(value.view(shape), gradient.view(shape), originals[name].bias)
        task.block.set_submodule(name, tuned)
    return flat


@dataclass
class _Run:
    """One block's tuning: what is on the device between steps.

    count   steps done, int64     best, initial   held-out losses, fp64     best_step   count when `best` was measured
    """

    task: BlockTask
    weights: Sequence[TrainableWeights]
    flats: Sequence[FlatWeights]
    linears: list[TunedLinear]
    batches: Tensor
    rates: Tensor
    held_out: Tensor
    count: Tensor
    loss: Tensor
    best: Tensor
    best_step: Tensor
    initial: Tensor

    @classmethod
    def begin(
        cls,
        task: BlockTask,
        weights: Sequence[TrainableWeights],
        settings: TuningSettings,
        flats: Sequence[FlatWeights],
    ) -> "_Run":
        training, held_out = split(len(task.inputs), task.seed)
        steps = torch.arange(settings.steps, dtype=torch.float64)
        rates = settings.learning_rate * (1 - steps / max(settings.steps, 1))
        worst = torch.full((), math.inf, dtype=torch.float64, device=task.device)
        run = cls(
            task=task,
            weights=weights,
            flats=flats,
            linears=[m for m in task.block.modules() if isinstance(m, TunedLinear)],
            batches=minibatches(training, settings, task.seed).to(task.inputs.device),
            rates=rates.to(task.device, torch.float32),
            held_out=held_out.to(task.inputs.device),
            count=torch.zeros((), dtype=torch.int64, device=task.device),
            loss=worst.clone(),
            best=worst.clone(),
            best_step=torch.zeros((), dtype=torch.int64, device=task.device),
            initial=worst,
        )
        run._write()
        run.check()
        run.initial = run.loss.clone()
        run._demand_finite(run.initial, "before")
        return run

    def step(self) -> None:
        """One minibatch: gradients, the weights' step, the new weights into the block."""
        at = self.count.view(1)
        batch = self.batches.index_select(0, at.to(self.batches.device))[0]
        for number, part in enumerate(torch.split(batch, self.task.micro_batch)):
            for linear in self.linears:
                linear.adds = number > 0
            loss = self._error(part).float().square().mean()
            torch.autograd.backward(loss * (len(part) / len(batch)))
        rate = self.rates.index_select(0, at)[0]
        for weights, flat in zip(self.weights, self.flats, strict=True):
            weights.step(flat.gradient, rate)
        self._write()
        self.count += 1

    @torch.no_grad()
    def check(self) -> None:
        """Measures the held-out loss and keeps the present weights if it is the lowest so far."""
        self.loss.zero_()
        for part in torch.split(self.held_out, self.task.micro_batch):
            error = self._error(part).float().square().mean(dtype=torch.float64)
            self.loss += error * (len(part) / len(self.held_out))
        better = self.loss < self.best
        self.best.copy_(torch.where(better, self.loss, self.best))
        self.best_step.copy_(torch.where(better, self.count, self.best_step))
        for weights in self.weights:
            weights.keep(better)

    def outcome(self) -> TuningOutcome:
        self._demand_finite(self.loss, "after")
        linears = {name: result for weights in self.weights for name, result in weights.results().items()}
        return TuningOutcome(linears, float(self.initial), float(self.best), int(self.best_step))

    def _error(self, samples: Tensor) -> Tensor:
        inputs = self.task.inputs.index_select(0, samples).to(self.task.device, non_blocking=True)
        targets = self.task.targets.index_select(0, samples).to(self.task.device, non_blocking=True)
        return self.task.forward(self.task.block, inputs) - targets

    def _write(self) -> None:
        for weights, flat in zip(self.weights, self.flats, strict=True):
            weights.write(flat.value)

    def _demand_finite(self, loss: Tensor, when: str) -> None:
        if not math.isfinite(value := float(loss)):
            raise NumericalFailure(
                f"block {self.task.index}: the output error is {value} {when} tuning",
                field="quantization",
                hint="look for NaN in the model's weights, or use more bits or a lower learning rate",
            )


def is_checked(step: int, steps: int) -> bool:
    """Whether the held-out loss is measured after this step: some twenty times a run, in its last two thirds."""
    every = max(1, steps // CHECKS)
    return step == steps or (step % every == 0 and 3 * step >= steps)


def split(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out sequences; a single sequence serves as both."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    count = max(1, min(MOST_HELD_OUT, samples // HELD_OUT_SHARE))
    return (order, order) if samples == 1 else (order[count:], order[:count])


def minibatches(samples: Tensor, settings: TuningSettings, seed: int) -> Tensor:
    """Indices of every step's minibatch, (steps, batch); each pass is shuffled anew and its ragged tail dropped."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = min(settings.batch_size, len(samples))
    a_pass = len(samples) // size
    passes = [
        samples[torch.randperm(len(samples), generator=generator)][: a_pass * size].view(a_pass, size)
        for _ in range(math.ceil(settings.steps / a_pass))
    ]
    return torch.cat([torch.empty(0, size, dtype=torch.int64), *passes])[: settings.steps]
