"""Reports of an attempt while it runs: typed lines through one `write`, progress at most once per second and stage."""

import time
from collections.abc import Callable
from typing import Literal

from app.domain.attempt_lines import AttemptLine
from bitwright.events import BlockEvent, CheckpointEvent, LogEvent, MetricEvent, ProgressEvent, Stage, WarningEvent

PROGRESS_INTERVAL_SECONDS = 1.0


class Reporter:
    """Writes events; keeps the warnings for the report."""

    def __init__(self, write: Callable[[AttemptLine], None]) -> None:
        self._write = write
        self._last: dict[Stage, float] = {}
        self.warnings: list[str] = []

    def progress(self, stage: Stage, done: float, total: float, unit: str, eta_seconds: float | None = None) -> None:
        """Writes the progress of a stage at intervals; the first and the last of a stage always."""
        now = time.monotonic()
        if done < total and now - self._last.get(stage, -PROGRESS_INTERVAL_SECONDS) < PROGRESS_INTERVAL_SECONDS:
            return
        self._last[stage] = now
        self._write(ProgressEvent(stage=stage, done=done, total=total, unit=unit, eta_seconds=eta_seconds))

    def block(self, event: BlockEvent) -> None:
        """A block is quantized and durable."""
        self._write(event)

    def checkpoint(self, event: CheckpointEvent) -> None:
        """Training up to a step is durable."""
        self._write(event)

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        self._write(MetricEvent(name=name, value=value, step=step))

    def warning(self, code: str, message: str) -> None:
        self.warnings.append(message)
        self._write(WarningEvent(code=code, message=message))

    def log(
        self,
        event: str,
        level: Literal["debug", "info", "warning", "error"] = "info",
        **fields: str | int | float | bool | None,
    ) -> None:
        """A line for people who look for the cause of something; `event` is constant, what varies is a field."""
        self._write(LogEvent(level=level, event=event, fields=fields))
