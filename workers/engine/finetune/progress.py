"""Progress reporting for finetuning: loss, learning rate and tokens/s, at most once per second.

Losses are on the device. What is told of them is copied behind the work and read when it has come, so that telling
never makes the loop wait.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import NumericalFailure
from bitwright.events import Stage
from workers.engine.device.side_stream import Mark, mark
from workers.engine.finetune.checkpoints import TrainingProgress
from workers.engine.model.overflow import ALSO_DTYPE
from workers.engine.reporter import Reporter

INTERVAL_SECONDS = 1.0


@dataclass(frozen=True)
class _Copy:
    """The mean loss of some steps on its way to the host, and what is reported with it."""

    loss: Tensor
    arrives: Mark
    step: int
    learning_rate: float
    tokens_per_second: float


class TrainingNews:
    """Tells of steps; `losses` of all steps, on the device."""

    def __init__(self, reporter: Reporter, losses: Tensor, progress: TrainingProgress, total: int) -> None:
        self._reporter = reporter
        self._losses = losses
        self._total = total
        self._first = self._reported = progress.step
        self._copy: _Copy | None = None
        self._now = time.perf_counter()
        self._due = self._now + INTERVAL_SECONDS
        self._seconds, self._tokens = 0.0, 0
        reporter.progress(Stage.FINETUNE, progress.step, total, "steps")

    def step(self, index: int, tokens: int, *, learning_rate: float) -> float:
        """A step is given to the device. Returns the seconds since the one before it.

        Raises:
            NumericalFailure: no loss since the last word was finite.
        """
        now = time.perf_counter()
        spent, self._now = now - self._now, now
        self._seconds += spent
        self._tokens += tokens
        done = index + 1
        if self._copy is not None and (self._copy.arrives is None or self._copy.arrives.query()):  # type: ignore[no-untyped-call]
            self._tell(self._copy)
        if now >= self._due and self._copy is None:
            self._due = now + INTERVAL_SECONDS
            self._begin(done, learning_rate)
            left = self._seconds * (self._total - done) / (done - self._first)
            self._reporter.progress(Stage.FINETUNE, done, self._total, "steps", left)
        return spent

    def pause(self) -> None:
        """Leaves the time since the last step out of the count."""
        self._now = time.perf_counter()

    def end(self, step: int) -> None:
        """All steps are taken; waits for the device."""
        if self._copy is not None:
            self._tell(self._copy)
        if step > self._reported:
            self._begin(step, 0.0)
            assert self._copy is not None  # noqa: S101 - for the type checker
            self._tell(self._copy)
        self._reporter.progress(Stage.FINETUNE, self._total, self._total, "steps")

    def _begin(self, done: int, learning_rate: float) -> None:
        recent = self._losses[self._reported : done]
        mean = torch.where(recent.isfinite(), recent, torch.nan).nanmean()
        host = torch.empty((), dtype=mean.dtype, pin_memory=mean.is_cuda)
        host.copy_(mean, non_blocking=True)
        rate = self._tokens / max(self._seconds, 1e-9)
        self._copy = _Copy(host, mark(mean.device), done, learning_rate, rate)
        self._reported = done

    def _tell(self, copy: _Copy) -> None:
        if copy.arrives is not None:
            copy.arrives.synchronize()
        self._copy, loss = None, float(copy.loss)
        if not math.isfinite(loss):
            raise NumericalFailure(
                f"the training loss is not finite at step {copy.step}",
                field="finetune.learning_rate",
                hint="use a lower learning rate, or more bits" + ALSO_DTYPE,
            )
        self._reporter.metric("loss", loss, copy.step)
        if copy.learning_rate:
            self._reporter.metric("learning_rate", copy.learning_rate, copy.step)
        self._reporter.metric("tokens_per_second", copy.tokens_per_second, copy.step)
