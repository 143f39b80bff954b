"""The one tuning loop: minibatch descent on a block's output error, for every method that learns.

    L = mean((block(X_q; W_hat) - Y)^2),    D = dL/dW_hat for each tuned linear

Each step the block runs forward and backward under autograd on a minibatch, the weights step by their gradient and are
written into the block anew. The loss on a fixed held-out set of sequences decides which step's result is kept; the
start counts as a candidate, so the result is never worse there than the start.

Nothing in a step waits for the device: batches, rates, losses and the choice live there. On a GPU a step is captured
once (`workers.engine.device.cuda_graphs`) and replayed for every block of the same shape
(`workers.engine.tune.tuned_block` has
the block that the graph works on, `workers.engine.tune.minibatches` the sequences). Where capture is impossible the
same steps run eagerly. Captured steps of a few shapes are kept where they take little memory: tasks of a block's
linears in turn, or of a method that begins with another one's result, come back with every block.

With several ranks (`workers.engine.device.process_group`) each has its share of the sequences, splits that for
itself, and puts 1/W of
every batch and of the held-out set together from it. L is the mean of their means; D and the held-out loss are summed
over the ranks, between two graphs where there would be one, and all take the same step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bitwright.errors import NumericalFailure
from workers.contracts.blocks import BlockTask, SplitOutput
from workers.contracts.tuning import TrainableWeights, TuningOutcome, TuningSettings
from workers.engine.device.cuda_graphs import captured
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.model.block_calls import in_dtype
from workers.engine.model.block_shape import shape_of
from workers.engine.tune.minibatches import Minibatches, address
from workers.engine.tune.sequence_order import MOST_HELD_OUT, minibatches, split
from workers.engine.tune.tuned_block import TunedBlock
from workers.numerics.backend import block_kernels
from workers.numerics.backends.protocols import BlockKernels
from workers.numerics.product_dtype import product_dtype
from workers.numerics.quantized import Number

CHECKS = 10
"""Times that the held-out loss would be measured over a whole run; the first third is left out."""
MOST_KEPT, SHARE_KEPT = 6, 8
"""Captured runs that are kept beside the present one at most, and the part of a GPU's memory that they may hold."""
LOSS_SCALE = {torch.float16: 2.0**15}
"""By dtype: what gradients are multiplied by so that those of a mean over millions of numbers do not vanish."""


class Tuner:
    """Tunes block after block; `tune` is the `Tune` of the methods.

    log        called with an event's name and fields when the tuner falls back to a slower way
    processes  those that tune together; each of them must call `tune` with the same settings
    """

    def __init__(
        self, log: Callable[..., None] = lambda *_, **__: None, processes: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self._log = log
        self._processes = processes
        self._runs: list[_Run] = []
        self._present: _Run | None = None

    def tune(self, task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings) -> TuningOutcome:
        """Tunes `weights` and returns the best results seen; on running out of memory, again with less at once.

        Raises:
            NumericalFailure: the loss is not finite at the start or at the end.
            torch.OutOfMemoryError: not even one sequence at a time fits; or, with several ranks, this one has run out
                while others wait for it.
        """
        settings = replace(settings, batch_size=self._processes.share_size(settings.batch_size))
        micro_batch = min(task.micro_batch, settings.batch_size)
        while True:
            try:
                return self._tune(task, weights, settings, micro_batch)
            except torch.OutOfMemoryError:
                if not self._processes.alone or (micro_batch == 1 and not self._kept()):
                    raise
            # Outside the except clause: the exception holds the tensors of the failed step.
            kept = self._kept()
            self._runs.clear()
            self._present = None
            torch.cuda.empty_cache()
            if not kept:
                micro_batch = max(1, micro_batch // 2)
                self._log("micro_batch_lowered", block=task.index, micro_batch=micro_batch)
            for trainable in weights:
                trainable.restart()

    def release(self) -> None:
        """Lets go of the captured steps and their memory."""
        self._runs.clear()
        self._present = None

    def _kept(self) -> list["_Run"]:
        """Those of other shapes than the present one."""
        return [run for run in self._runs if run is not self._present]

    def _tune(
        self, task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings, micro_batch: int
    ) -> TuningOutcome:
        shape = _shape(task, weights, settings, micro_batch)
        run = self._present = next((run for run in self._runs if run.shape == shape), None)
        if run is not None:
            run.adopt(task, weights)
        else:
            self._make_room(task.device)
            before = _reserved(task.device)
            run = self._present = _Run.begin(task, weights, settings, micro_batch, self._processes)
            self._runs.append(run)
            run.prepare(self._log)
            run.bytes = max(0, _reserved(task.device) - before) + task.owns_sequences * run.data.bytes
        run.start()
        for step in range(settings.steps):
            run.data.bring()
            (run.half_step if step < settings.half_batches else run.step)()
            if is_checked(step + 1, settings.steps):
                run.check()
                task.tick((step + 1) / settings.steps)
        outcome = run.outcome()
        if not room_for_runs(task.device):
            self.release()
        return outcome

    def _make_room(self, device: torch.device) -> None:
        """Lets the oldest captured runs go, so that what stays takes little memory beside a new one."""
        while self._runs and (
            len(self._runs) > MOST_KEPT or sum(run.bytes for run in self._runs) > room_for_runs(device)
        ):
            del self._runs[0]


def room_for_runs(device: torch.device) -> int:
    """Bytes that kept runs may hold beside the present one; 0 where none is kept: only a captured step is worth it."""
    return torch.cuda.get_device_properties(device).total_memory // SHARE_KEPT if device.type == "cuda" else 0


@dataclass
class _Run:
    """One block's tuning, and after it that of any other block of the same shape.

    What changes from step to step is on the device: `count` steps done (int64); `loss` of the last check, the
    lowest so far, `best`, and the first, `initial` (fp64); `best_step`, the count when `best` was measured.

    bytes   of a GPU's memory that it holds: of its graphs, and of sequences that are its own
    """

    task: BlockTask
    shape: tuple[object, ...]
    block: TunedBlock
    weights: Sequence[TrainableWeights]
    settings: TuningSettings
    micro_batch: int
    data: Minibatches
    rates: Tensor
    count: Tensor
    loss: Tensor
    best: Tensor
    best_step: Tensor
    kernels: BlockKernels | None
    processes: ProcessGroup
    initial: Number = math.nan
    bytes: int = 0
    step: Callable[[], None] = lambda: None
    half_step: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None

    @classmethod
    def begin(
        cls,
        task: BlockTask,
        weights: Sequence[TrainableWeights],
        settings: TuningSettings,
        micro_batch: int,
        processes: ProcessGroup,
    ) -> "_Run":
        device = task.device
        data = Minibatches(task.inputs, task.targets, device, **_sequences(task, settings, processes))
        run = cls(
            task=task,
            shape=_shape(task, weights, settings, micro_batch),
            block=TunedBlock.of(task, weights, settings.gradients),
            kernels=block_kernels(data.inputs.device, data.inputs.dtype),
            processes=processes,
            weights=weights,
            settings=settings,
            micro_batch=micro_batch,
            data=data,
            rates=torch.zeros(settings.steps, dtype=torch.float32, device=device),
            count=torch.zeros((), dtype=torch.int64, device=device),
            loss=torch.full((), math.inf, dtype=torch.float64, device=device),
            best=torch.full((), math.inf, dtype=torch.float64, device=device),
            best_step=torch.zeros((), dtype=torch.int64, device=device),
        )
        run.task = run._without_tensors(task)
        run.step, run.half_step, run.check = run._step, run._half_step, run._check
        return run

    def adopt(self, task: BlockTask, weights: Sequence[TrainableWeights]) -> None:
        """Takes over another block: its parameters, its weights' start, its seed."""
        self.block.adopt(task)
        for present, other in zip(self.weights, weights, strict=True):
            present.adopt(other)
        self.data.adopt(task.inputs, task.targets, **_sequences(task, self.settings, self.processes))
        self.task = self._without_tensors(task)

    def _without_tensors(self, task: BlockTask) -> BlockTask:
        """A task as a run keeps it, which may outlive what the task was about."""
        nothing = torch.empty(0)
        return replace(task, block=self.block.module, inputs=nothing, inputs_fp=nothing, targets=nothing)

    def prepare(self, log: Callable[..., None]) -> None:
        """Captures step and check where that is possible."""
        if self.task.device.type != "cuda" or not self.settings.steps:
            return
        self.data.start()
        try:
            still = (self.rates, self.count)
            pool = torch.cuda.graph_pool_handle()
            step = captured(self._gradients, self._sum_gradients, self._move, still, self.processes, pool)
            half_step = step
            if self.settings.half_batches:
                half_step = captured(self._half_gradients, self._sum_gradients, self._move, still, self.processes, pool)
            check = captured(self._measure, self._sum_loss, self._choose, still, self.processes)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log("capture_failed", block=self.task.index, reason=str(error)[:200])
        else:
            self.step, self.half_step, self.check = step, half_step, check
        for weights in self.weights:
            weights.restart()  # a capture's steps move no parameter, but what an optimizer remembers

    def start(self) -> None:
        """Everything to its start; the start's own loss is the first candidate.

        Raises:
            NumericalFailure: that loss is not finite; on a GPU whoever reads the outcome has to look.
        """
        done = torch.arange(self.settings.steps, dtype=torch.float64)
        decay = done / max(self.settings.steps, 1) if self.settings.schedule == "linear" else torch.zeros_like(done)
        self.rates.copy_(self.settings.learning_rate * (1 - decay))
        self.data.start()
        self.count.zero_()
        self.best.fill_(math.inf)
        for weights, flat in zip(self.weights, self.block.flats, strict=True):
            weights.write(flat.written)
            flat.publish()
        self.check()
        self.initial = self._measured("before")

    def outcome(self) -> TuningOutcome:
        last = self._measured("after")
        linears = {name: result for weights in self.weights for name, result in weights.results().items()}
        faults = sum(weights.faults() for weights in self.weights)
        if not isinstance(last, Tensor):
            return TuningOutcome(linears, self.initial, float(self.best), int(self.best_step), faults)
        best = torch.where(last.isfinite(), self.best, last)
        return TuningOutcome(linears, self.initial, best, self.best_step.clone(), faults)

    def _step(self) -> None:
        """One minibatch: gradients, the weights' step, the new weights into the block."""
        self._gradients()
        self._sum_gradients()
        self._move()

    def _half_step(self) -> None:
        self._half_gradients()
        self._sum_gradients()
        self._move()

    def _gradients(self) -> None:
        self._gradients_of(self.data.rows(self.count.view(1)))

    def _half_gradients(self) -> None:
        """Of the first half of the minibatch; a single sequence is its own half."""
        batch = self.data.rows(self.count.view(1))
        self._gradients_of(batch[: max(1, len(batch) // 2)])

    def _gradients_of(self, batch: Tensor) -> None:
        for number, rows in enumerate(torch.split(batch, self.micro_batch)):
            self.block.begin(adds=number > 0)
            self._add_gradients(rows, len(rows) / (len(batch) * self.processes.size))

    def _sum_gradients(self) -> None:
        self.processes.sum_(*(flat.gradient for flat in self.block.flats))

    def _move(self) -> None:
        constant = self.settings.schedule == "constant"  # one is as good as another, and needs no kernel
        rate = self.rates[0] if constant else self.rates.index_select(0, self.count.view(1))[0]
        for weights, flat in zip(self.weights, self.block.flats, strict=True):
            weights.step(flat.gradient, rate, flat.written)
            flat.publish()
        self.count += 1

    def _check(self) -> None:
        """Measures the held-out loss and keeps the present weights if it is the lowest so far."""
        self._measure()
        self._sum_loss()
        self._choose()

    @torch.no_grad()
    def _measure(self) -> None:
        self.loss.zero_()
        for rows in torch.split(self.data.held_out, self._measured_at_once):
            parts = self._outputs(rows)
            self.loss += self._error(parts, rows, len(rows) / (len(self.data.held_out) * self.processes.size))

    @property
    def _measured_at_once(self) -> int:
        """Sequences of the held-out loss that pass the block together: on a CPU as many as fit with gradients, where
        products of more tokens are quicker; on a GPU those of a captured step, and after a lack of memory those of one.
        """
        as_planned = self.micro_batch == min(self.task.micro_batch, self.settings.batch_size)
        return self.task.micro_batch if as_planned and self.task.device.type != "cuda" else self.micro_batch

    def _sum_loss(self) -> None:
        self.processes.sum_(self.loss)

    @torch.no_grad()
    def _choose(self) -> None:
        better = self.loss < self.best
        self.best.copy_(torch.where(better, self.loss, self.best))
        self.best_step.copy_(torch.where(better, self.count, self.best_step))
        for weights in self.weights:
            weights.keep(better)

    def _add_gradients(self, rows: Tensor, share: float) -> None:
        """Adds the weights' gradients of `share` times the error of some sequences."""
        outputs = self._outputs(rows)
        gradient = self._error_gradient(outputs, rows, share)
        trained = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(trained, [gradient] * len(trained))

    def _outputs(self, rows: Tensor) -> list[Tensor]:
        """The block's output for some sequences, as one tensor or as two that add up to it."""
        forward, module = self.task.forward, self.block.module
        if self.kernels is None:
            return [forward(module, self.data.inputs.index_select(0, rows))]
        inputs = self.kernels.take_rows(self.data.inputs, rows)
        dtype = product_dtype(inputs.device, inputs.dtype)
        if dtype != inputs.dtype:
            forward, inputs = partial(in_dtype, dtype, forward), inputs.to(dtype)
        if isinstance(module, SplitOutput):
            return list(forward(module.residual_and_update, inputs))
        return [forward(module, inputs)]

    @torch.no_grad()
    def _error(self, parts: list[Tensor], rows: Tensor, share: float) -> Tensor:
        """`share` times the mean squared error of outputs, fp32."""
        if self.kernels is not None:
            return self.kernels.square_error(parts, self.data.targets, rows, share, 1.0)[0]
        return self._difference(parts, rows).square().mean() * share

    @torch.no_grad()
    def _error_gradient(self, parts: list[Tensor], rows: Tensor, share: float) -> Tensor:
        """`LOSS_SCALE` times the gradient of `_error` by the outputs."""
        scaled = LOSS_SCALE.get(parts[0].dtype, 1.0)
        if self.kernels is not None:
            return self.kernels.error_gradient(parts, self.data.targets, rows, share, scaled)
        error = self._difference(parts, rows)
        return error.mul_(2 * share * scaled / error.numel()).to(parts[0].dtype)

    def _difference(self, parts: list[Tensor], rows: Tensor) -> Tensor:
        """Outputs less targets; in half precision rounded as the outputs are, though squares and their mean are not."""
        (output,) = parts
        error = output - self.data.targets.index_select(0, rows)
        return error.to(torch.promote_types(output.dtype, torch.float32))

    def _measured(self, when: str) -> Number:
        """The loss of the last check; a number of its own on a GPU, where nobody waits for it here."""
        if self.loss.is_cuda:
            return self.loss.clone()
        if not math.isfinite(value := float(self.loss)):
            raise NumericalFailure(
                f"block {self.task.index}: the output error is {value} {when} tuning",
                field="quantization",
                hint="look for NaN in the model's weights, or use more bits or a lower learning rate",
            )
        return value


def _shape(
    task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings, micro_batch: int
) -> tuple[object, ...]:
    """The properties that a captured step depends on beside the values in its tensors."""
    # Sequences that are its task's alone are copied to where those of the first task lie.
    activations = [
        (tuple(tensor.shape), tensor.dtype) if task.owns_sequences else address(tensor, task.device)
        for tensor in (task.inputs, task.targets)
    ]
    kinds = [(type(w), tuple(w.shapes.items())) for w in weights]
    return (
        settings,
        micro_batch,
        activations,
        kinds,
        tuple(task.schemes.items()),
        id(task.forward),
        shape_of(task.block),
    )


def _reserved(device: torch.device) -> int:
    """Bytes of a GPU that this process's allocator holds: those of graphs stay there."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _sequences(task: BlockTask, settings: TuningSettings, processes: ProcessGroup) -> dict[str, Tensor]:
    """Training and validation sequences, as `Minibatches` takes them."""
    training, held_out = split(len(task.inputs), task.seed, processes.share_size(MOST_HELD_OUT))
    return {"batches": minibatches(training, settings, task.seed), "held_out": held_out}


def is_checked(step: int, steps: int) -> bool:
    """True if the held-out loss is measured after this step: about seven times per run, in its last two thirds."""
    every = max(1, steps // CHECKS)
    return step == steps or (step % every == 0 and 3 * step >= steps)
