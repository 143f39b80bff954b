"""The one tuning loop: minibatch descent on a block's output error, for every method that learns.

    L = mean((block(X_q; W_hat) - Y)^2),    D = dL/dW_hat for each tuned linear

Each step the methods' weights are written into the block, the block runs forward and backward under autograd on a
minibatch, and each weight is given its gradient to step by. The loss on a fixed held-out set of sequences decides which
step's result is kept; the start counts as a candidate, so the result is never worse there than the start.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from app.domain.errors import NumericalFailure
from workers.contracts import BlockTask, TrainableWeight, TuningOutcome, TuningSettings

MOST_HELD_OUT = 16
HELD_OUT_SHARE = 8
"""One sequence in eight is held out, at most sixteen."""
CHECKS = 20
"""Times that the held-out loss would be measured over a whole run; the first third is left out."""


def tune(task: BlockTask, weights: Mapping[str, TrainableWeight], settings: TuningSettings) -> TuningOutcome:
    """Tunes `weights` in place and returns the best results seen.

    Raises:
        NumericalFailure: the loss is not finite at the start.
    """
    training, held_out = split(len(task.inputs), task.seed)
    batches = minibatches(training, settings.batch_size, task.seed)
    with tuned_linears(task, weights) as parameters:
        _write(parameters, weights)
        best = initial = _held_out_loss(task, held_out)
        if not math.isfinite(initial):
            detail = (
                f"block {task.index}: the output error before tuning is {initial}; the weights may hold NaN or infinity"
            )
            raise NumericalFailure(detail, field="model")
        results = {name: weight.result() for name, weight in weights.items()}
        best_step = 0
        for step in range(settings.steps):
            _accumulate(task, next(batches))
            rate = settings.learning_rate * (1 - step / settings.steps)
            for name, parameter in parameters.items():
                weights[name].step(_gradient(parameter), rate)
            _write(parameters, weights)
            if is_checked(step + 1, settings.steps):
                loss = _held_out_loss(task, held_out)
                if loss < best:
                    best, best_step = loss, step + 1
                    results = {name: weight.result() for name, weight in weights.items()}
            task.tick((step + 1) / settings.steps)
    return TuningOutcome(results, initial, best, best_step)


def is_checked(step: int, steps: int) -> bool:
    """Whether the held-out loss is measured after this step: some twenty times a run, in its last two thirds."""
    every = max(1, steps // CHECKS)
    return step == steps or (step % every == 0 and 3 * step >= steps)


def split(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out sequences; a single sequence serves as both."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    count = max(1, min(MOST_HELD_OUT, samples // HELD_OUT_SHARE))
    return (order, order) if samples == 1 else (order[count:], order[:count])


def minibatches(samples: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless minibatches; every pass is shuffled anew and its ragged tail dropped."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = min(batch_size, len(samples))
    while True:
        order = samples[torch.randperm(len(samples), generator=generator)]
        yield from torch.split(order[: len(order) // size * size], size)


@contextmanager
def tuned_linears(task: BlockTask, weights: Mapping[str, TrainableWeight]) -> Iterator[dict[str, nn.Parameter]]:
    """The block with a fresh parameter for the weight of each tuned linear, and nothing else trainable."""
    originals = {name: task.linear(name).weight for name in weights}
    trainable = [p for p in task.block.parameters() if p.requires_grad]
    task.block.requires_grad_(False)
    try:
        parameters = {name: nn.Parameter(torch.empty_like(original)) for name, original in originals.items()}
        for name, parameter in parameters.items():
            task.linear(name).weight = parameter
        yield parameters
    finally:
        for name, original in originals.items():
            task.linear(name).weight = original
        for parameter in trainable:
            parameter.requires_grad_(True)


def _write(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, TrainableWeight]) -> None:
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name].weight())
        parameter.grad = None


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _accumulate(task: BlockTask, batch: Tensor) -> None:
    """Adds dL/dW_hat of a minibatch to the parameters' gradients, a micro-batch at a time."""
    for part in torch.split(batch, task.micro_batch):
        inputs, targets = _select(task.inputs, part, task), _select(task.targets, part, task)
        loss = (task.forward(task.block, inputs) - targets).float().square().mean()
        torch.autograd.backward(loss * (len(part) / len(batch)))


@torch.no_grad()
def _held_out_loss(task: BlockTask, held_out: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=task.device)
    for part in torch.split(held_out, task.micro_batch):
        inputs, targets = _select(task.inputs, part, task), _select(task.targets, part, task)
        error = (task.forward(task.block, inputs) - targets).float().square().mean(dtype=torch.float64)
        total += error * (len(part) / len(held_out))
    return float(total)


def _select(activations: Tensor, index: Tensor, task: BlockTask) -> Tensor:
    return activations[index.to(activations.device)].to(task.device, non_blocking=True)
