"""Wall time by stage, such that the stages add up to the total; and the peak memory."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bitwright.events import Stage
from bitwright.report import PeakMemory


class StageClock:
    """Exactly one stage runs at any time, from the clock's making on.

    entered   called with each stage as it begins; those that run for a moment within another one are part of it
    """

    def __init__(self, stage: Stage, entered: Callable[[Stage], None] = lambda _: None) -> None:
        self._stage = stage
        self._since = time.perf_counter()
        self._spent: dict[Stage, float] = {}
        self._entered = entered
        entered(stage)

    def enter(self, stage: Stage) -> None:
        """Ends the running stage and begins `stage`, which may have run before."""
        self._switch(stage)
        self._entered(stage)

    def _switch(self, stage: Stage) -> None:
        now = time.perf_counter()
        self._spent[self._stage] = self._spent.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    @contextmanager
    def during(self, stage: Stage) -> Iterator[None]:
        """`stage` runs inside the context, and the stage before it again afterwards."""
        before = self._stage
        self._switch(stage)
        try:
            yield
        finally:
            self._switch(before)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage up to now, and their sum as `total`."""
        self._switch(self._stage)
        stages = {stage.value: self._spent[stage] for stage in Stage if stage in self._spent}
        return stages | {"total": sum(stages.values())}


def peak_memory(device: torch.device) -> PeakMemory:
    """The most that this process held at any time, mapped weight files included."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return PeakMemory(
        host_bytes=host, device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    )
