"""Finetuning: the loop that trains adapters beside a quantized model.

    L = 1/N sum over the batch's N learned tokens of -log p(x_{t+1} | x_<=t)  (+ what adapters add: `penalty`)
    lr_i = lr * min(1, i/w) * {1, 1 - u, (1 + cos(pi u))/2}        i = 1 .. T;  w warm-up steps
    u = (i - 1 - w) / (T - w), at least 0                          how far after warm-up a step begins

A step reads `batch_size` sequences, in micro-batches that fit into memory; of several ranks each reads its share, and
gradients are summed, so that each takes the same step. Nothing in the loop waits for the device: the next step's batch
is read ahead, losses stay on the device, and what is told of them is copied behind the work. The device is waited for
at a validation, and at a checkpoint.

The same request on the same device gives the same bits, whether it is interrupted or not: the order of sequences and
the random numbers of a step follow from the seed and the step's number alone, and a checkpoint holds all else
(`workers.engine.finetune.checkpoints`). On a GPU attention's gradient has a deterministic kernel, which is asked for,
and a small model's passes are captured (`workers.engine.finetune.captured_passes`).
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from app.domain.request.finetuning import Finetune
from bitwright.errors import InternalError, NumericalFailure
from bitwright.events import CheckpointEvent
from bitwright.report import Validation
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.device.read_ahead import read_ahead
from workers.engine.device.write_behind import WriteBehind
from workers.engine.finetune.captured_passes import Passes
from workers.engine.finetune.checkpoints import TrainingProgress, TrainingState
from workers.engine.finetune.flat_adamw import FlatParameters
from workers.engine.finetune.progress import TrainingNews
from workers.engine.finetune.resident_model import ResidentModel
from workers.engine.model.overflow import ALSO_DTYPE
from workers.engine.reporter import Reporter
from workers.engine.text.packing import Batch, Order, PackedSequences, Step, batch_of


@dataclass(frozen=True)
class TrainingTask:
    """Input of training.

    training, held_out   sequences of all ranks
    micro_batch          sequences through the model at once
    captures             whether passes may be captured (`workers.engine.finetune.captured_passes`)
    milestones           blocks and the like that the job has finished before
    is_told              whether an earlier attempt has told of a milestone
    """

    resident: ResidentModel
    config: Finetune
    training: PackedSequences
    held_out: PackedSequences | None
    micro_batch: int
    seed: int
    state: TrainingState
    reporter: Reporter
    processes: ProcessGroup = SINGLE_PROCESS
    milestones: int = 0
    is_told: Callable[[int], bool] = lambda _: True
    captures: bool = False


@dataclass(frozen=True)
class TrainingOutcome:
    """Outcome of training; the adapters hold the parameters that were kept.

    losses    of each step that was taken, fp32 on the host; NaN or infinite where a step went wrong
    resumed   steps that an earlier attempt had taken
    """

    progress: TrainingProgress
    losses: Tensor
    parameters: int
    resumed: int


def train(task: TrainingTask) -> TrainingOutcome:
    """Trains the adapters of `task.resident` in place, from the last checkpoint on.

    Raises:
        NumericalFailure: the loss is not finite, on held-out text or in many steps.
        InternalError: the ranks do not start from the same adapters.
    """
    devices = [task.resident.model.device] if task.resident.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return _Training.begin(task).run()


@dataclass
class _Training:
    """The state of the loop.

    losses      of each step, fp32 (steps,), on the device
    best        parameters of the best validation, where there is `patience`
    deterministic   whether every operator still has a deterministic kernel
    """

    task: TrainingTask
    parameters: FlatParameters
    order: Order
    validation: tuple[Batch, ...]
    validation_targets: int
    losses: Tensor
    progress: TrainingProgress
    resumed: int
    passes: Passes
    best: list[Tensor] = field(default_factory=list)
    deterministic: bool = True

    @classmethod
    def begin(cls, task: TrainingTask) -> "_Training":
        """Takes over the last checkpoint, if there is one."""
        config, device = task.config, task.resident.model.device
        adapters = task.resident.adapters.values()
        parameters = FlatParameters(adapters, decay=config.weight_decay, clip_norm=config.clip_norm)
        _demand_agreement(parameters, task.processes)
        validation = validation_batches(task.held_out, config, task.micro_batch, task.seed, task.processes)
        self = cls(
            task=task,
            parameters=parameters,
            order=Order(task.training, config.batch_size, task.micro_batch, task.seed, task.processes),
            validation=tuple(batch.to(device) for batch in validation),
            validation_targets=task.processes.total(sum(len(batch.target_positions) for batch in validation)),
            losses=torch.full((config.steps,), torch.nan, device=device),
            progress=task.state.progress,
            resumed=task.state.progress.step,
            passes=Passes(task.resident, task.reporter.log, captures=task.captures),
        )
        saved = task.state.tensors()
        if saved:
            parameters.restore(saved)
            self.losses.copy_(saved["losses"])
            self.best = [saved[name].to(device) for name in sorted(saved) if name.startswith("best.")]
            adopted = _checkpoint_event(task, self.progress)
            if not task.is_told(adopted.milestone):  # its attempt died before it could
                task.reporter.checkpoint(adopted)
        return self

    def run(self) -> TrainingOutcome:
        """All steps that are left."""
        task = self.task
        if not self.progress.done:
            if self.validation_targets and not self.progress.validations:
                self._validate()
            with WriteBehind(task.resident.model.device) as writer:
                self._steps(writer)
                writer.wait()
                self._keep_best()
                self._save(writer, done=True)
        return TrainingOutcome(
            progress=self.progress,
            losses=self.losses[: self.progress.step].cpu(),
            parameters=self.parameters.count,
            resumed=self.resumed,
        )

    def _steps(self, writer: WriteBehind) -> None:
        task, config, first = self.task, self.task.config, self.progress.step
        device = task.resident.model.device
        news = TrainingNews(task.reporter, self.losses, self.progress, config.steps)

        def read(ahead: int) -> Step:
            return self.order.step(first + ahead).to(device)

        with closing(read_ahead(read, config.steps - first, device)) as steps:
            for index, step in enumerate(steps, start=first):
                if self._is_stale():
                    break
                self._step(index, step)
                spent = news.step(index, step.tokens, learning_rate=config.learning_rate * rate_share(config, index))
                seconds, tokens = self.progress.seconds + spent, self.progress.tokens + step.tokens
                self.progress = self.progress.model_copy(
                    update={"step": index + 1, "seconds": seconds, "tokens": tokens}
                )
                if self.validation_targets and config.validation_every and (index + 1) % config.validation_every == 0:
                    self._validate()
                    news.pause()
                if (index + 1) % config.checkpoint_every == 0 and index + 1 < config.steps:
                    self._save(writer, done=False)
                    news.pause()
        if self.validation_targets and self.progress.validations[-1].step != self.progress.step:
            self._validate()
        news.end(self.progress.step)

    def _step(self, index: int, step: Step) -> None:
        """One step of the optimizer; nothing waits for the device."""
        task = self.task
        self._tell_adapters(index / task.config.steps)
        seed = _step_seed(task.seed, index, task.processes.rank)
        self._set_mode(training=True)
        try:
            total = self._add_gradients(step, seed)
        except RuntimeError as error:
            if not self.deterministic or "deterministic" not in str(error):
                raise
            # An adapter uses an operator that has no deterministic kernel: then attention need not have one either.
            task.reporter.log("training_not_deterministic", reason=str(error)[:200])
            self.deterministic = False
            total = self._add_gradients(step, seed)
        self.parameters.sum_over(task.processes)
        task.processes.sum_(total)
        share = rate_share(task.config, index)
        self.parameters.step(task.config.learning_rate * share, share)
        self.losses[index] = total

    def _add_gradients(self, step: Step, seed: int) -> Tensor:
        """The gradients of this rank's part of a step; its part of the loss, on the device."""
        total = torch.zeros_like(self.losses[0])
        with strictly_deterministic(self.task.resident.model.device if self.deterministic else None):
            passes = [self.passes.of(batch) for batch in step.batches]
            torch.manual_seed(seed)  # also where a step is done over: it draws what it would have drawn
            self.parameters.clear()
            for batch, run in zip(step.batches, passes, strict=True):
                total += run(batch, step.targets)
            self._add_penalty()
        return total

    def _add_penalty(self) -> None:
        """The gradient of what adapters add to the loss, once over all ranks."""
        for penalty in self.task.resident.penalties():
            if penalty.requires_grad:
                (penalty / self.task.processes.size).backward()  # type: ignore[no-untyped-call]

    def _tell_adapters(self, share: float) -> None:
        """Passes on the share of the training that is done; what adapters exclude from gradients then is held."""
        adapters = self.task.resident.adapters.values()
        before = [parameter.requires_grad for adapter in adapters for parameter in adapter.parameters()]
        for adapter in adapters:
            adapter.progress(share)
        if before != [parameter.requires_grad for adapter in adapters for parameter in adapter.parameters()]:
            self.parameters.hold_still()

    @torch.no_grad()
    def _validate(self) -> None:
        """The loss on held-out text with the parameters as they are; waits for the device."""
        task = self.task
        self._set_mode(training=False)
        loss, progress = mean_loss(task.resident, self.validation, task.processes), self.progress
        if not math.isfinite(loss):
            raise _not_finite(f"on held-out text the loss is {loss} after {progress.step} steps")
        task.reporter.metric("validation_loss", loss, progress.step)
        lowest = min((validation.loss for validation in progress.validations), default=math.inf)
        better = loss < lowest
        if better and task.config.patience is not None:
            self.best = self.parameters.values()
        self.progress = progress.model_copy(
            update={
                "validations": (*progress.validations, Validation(step=progress.step, loss=loss)),
                "best_step": progress.step if better else progress.best_step,
                "stale": 0 if better else progress.stale + 1,
            }
        )

    def _set_mode(self, *, training: bool) -> None:
        for adapter in self.task.resident.adapters.values():
            if adapter.training != training:
                adapter.train(training)

    def _is_stale(self) -> bool:
        patience = self.task.config.patience
        return patience is not None and self.progress.stale >= patience

    def _keep_best(self) -> None:
        if self.best:
            self.parameters.set_values(self.best)

    def _save(self, writer: WriteBehind, *, done: bool) -> None:
        self.progress = self.progress.model_copy(update={"done": done})
        self._set_mode(training=False)
        tensors = self.parameters.state() | {"losses": self.losses.to("cpu", copy=True)}
        tensors |= {f"best.{index:03d}": value.cpu() for index, value in enumerate(self.best)}
        writer.wait()
        writer.give(partial(self._write, self.progress, tensors))

    def _write(self, progress: TrainingProgress, tensors: dict[str, Tensor]) -> None:
        task = self.task
        task.state.save(progress, tensors)
        task.reporter.checkpoint(_checkpoint_event(task, progress))


def _checkpoint_event(task: TrainingTask, progress: TrainingProgress) -> CheckpointEvent:
    """The event of a checkpoint that is durable."""
    milestone = task.milestones + math.ceil(progress.step / task.config.checkpoint_every) - 1 + int(progress.done)
    return CheckpointEvent(step=progress.step, total=task.config.steps, milestone=milestone)


def rate_share(config: Finetune, index: int) -> float:
    """The learning rate of a step, from 0, as a share of the request's."""
    warm_up = config.warmup_steps()
    if index < warm_up:
        return (index + 1) / warm_up
    after = (index - warm_up) / (config.steps - warm_up)
    return {"constant": 1.0, "linear": 1 - after, "cosine": (1 + math.cos(math.pi * after)) / 2}[config.schedule]


def validation_batches(
    held_out: PackedSequences | None, config: Finetune, micro_batch: int, seed: int, processes: ProcessGroup
) -> list[Batch]:
    """This rank's share of the validation sequences, on the host."""
    if held_out is None or not len(held_out):
        return []
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(held_out), generator=generator)[: config.validation_sequences]
    return [batch_of(held_out, own) for own in torch.split(processes.share(rows), micro_batch) if len(own)]


@torch.no_grad()
def mean_loss(resident: ResidentModel, batches: Iterable[Batch], processes: ProcessGroup) -> float:
    """Nats per token over all ranks' batches, on the model's device; waits for it."""
    sums = torch.zeros(2, dtype=torch.float64, device=resident.model.device)
    for batch in batches:
        with resident.together():
            sums[0] += resident.loss(batch)
        sums[1] += len(batch.target_positions)
    processes.sum_(sums)
    total, tokens = sums.tolist()
    return total / tokens if tokens else math.nan


def _demand_agreement(parameters: FlatParameters, processes: ProcessGroup) -> None:
    if processes.alone:
        return
    checksum = sum(int(value.view(torch.uint8).sum(dtype=torch.int64)) for value in parameters.values())
    if not processes.agree(checksum):
        raise InternalError("the ranks start from different adapters")


LOWER_RATE = "use a lower learning rate, or more bits" + ALSO_DTYPE


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}:step:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _not_finite(what: str) -> NumericalFailure:
    return NumericalFailure(what, field="finetune.learning_rate", hint=LOWER_RATE)


@contextmanager
def strictly_deterministic(device: torch.device | None) -> Iterator[None]:
    """Only deterministic kernels on a GPU; attention's gradient has one, but not where torch may only warn.

    Raises:
        RuntimeError: an operator has none.
    """
    if device is None or device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
