"""Reports of an attempt while it runs: typed lines through one `write`, progress at most once per second and stage."""

import time
from collections.abc import Callable
from secrets import token_hex
from typing import Literal

from app.domain.attempt_lines import AttemptLine, SpanLine
from bitwright.events import BlockEvent, CheckpointEvent, LogEvent, MetricEvent, ProgressEvent, Stage, WarningEvent

PROGRESS_INTERVAL_SECONDS = 1.0


class Spans:
    """Spans of an attempt's process: its stages, in turn, and below each what it makes. Any thread may tell.

    under   the attempt's `traceparent`; None: nobody wants to know
    """

    def __init__(self, write: Callable[[AttemptLine], None], under: str | None) -> None:
        self._write = write
        self._attempt = None if under is None else under.split("-")[2]
        self._stage: Stage | None = None
        self._own, self._since = "", 0.0

    def enter(self, stage: Stage | None) -> None:
        """End the span of the stage that runs, and begin that of `stage`."""
        if stage is self._stage:
            return
        if self._stage is not None and self._attempt is not None:
            self._tell(self._stage.value, self._own, self._attempt, self._since)
        self._stage, self._own, self._since = stage, token_hex(8), time.perf_counter()

    def block(self, event: BlockEvent, started: float) -> None:
        """Tell the span of a block that is durable now; `started` by `time.perf_counter`."""
        if self._attempt is not None:
            about: dict[str, str | int] = {"bitwright.block.index": event.index, "bitwright.block.name": event.name}
            self._tell("block", token_hex(8), self._own if self._stage else self._attempt, started, **about)

    def _tell(self, name: str, own: str, parent: str, started: float, **attributes: str | int) -> None:
        end_ns = time.time_ns()
        start_ns = end_ns - int((time.perf_counter() - started) * 1e9)
        self._write(
            SpanLine(name=name, span_id=own, parent_id=parent, start_ns=start_ns, end_ns=end_ns, attributes=attributes)
        )


class Reporter:
    """Writes events; keeps the warnings for the report.

    traceparent   the attempt's place in a trace, where one is kept
    """

    def __init__(self, write: Callable[[AttemptLine], None], traceparent: str | None = None) -> None:
        self._write = write
        self.spans = Spans(write, traceparent)
        self._last: dict[Stage, float] = {}
        self.warnings: list[str] = []

    def progress(self, stage: Stage, done: float, total: float, unit: str, eta_seconds: float | None = None) -> None:
        """Writes the progress of a stage at intervals; the first and the last of a stage always."""
        now = time.monotonic()
        if done < total and now - self._last.get(stage, -PROGRESS_INTERVAL_SECONDS) < PROGRESS_INTERVAL_SECONDS:
            return
        self._last[stage] = now
        self._write(ProgressEvent(stage=stage, done=done, total=total, unit=unit, eta_seconds=eta_seconds))

    def block(self, event: BlockEvent, started: float | None = None) -> None:
        """A block is quantized and durable.

        started   when this attempt took it up, by `time.perf_counter`; None: an earlier one did
        """
        self._write(event)
        if started is not None:
            self.spans.block(event, started)

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
