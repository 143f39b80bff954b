"""From the lines of a child to the event table: validated, coalesced, written under the fence."""

import time
from collections import deque

import structlog
from pydantic import ValidationError

from app.domain.attempt_lines import ATTEMPT_LINE, AttemptEvent, AttemptLine
from app.store.attempts import AttemptWriter, Claim
from bitwright.errors import Unavailable
from bitwright.events import BlockEvent, CheckpointEvent, ProgressEvent
from workers.supervise.context import WorkerContext

FLUSH_SECONDS = 1.0
MAX_WAITING = 10_000
"""Events kept while the database is away; of more, the oldest go."""
MAX_COMPLAINTS = 20
"""Invalid lines that are logged one by one; the rest are counted."""

log = structlog.get_logger(__name__)


class LineReader:
    """Validates the lines of one child. A line that is no `AttemptLine` is logged and ignored."""

    def __init__(self) -> None:
        self.ignored = 0

    def read(self, raw: bytes) -> AttemptLine | None:
        """The line, or None if it is invalid or empty."""
        if not raw.strip():
            return None
        try:
            return ATTEMPT_LINE.validate_json(raw)
        except ValidationError as error:
            self.ignored += 1
            if self.ignored <= MAX_COMPLAINTS:
                problem = error.errors(include_url=False, include_input=False)[0]
                log.warning("line_ignored", reason=problem["type"], size=len(raw))
            return None


class EventBuffer:
    """Collects events and writes them once per second; of the progress events in between, the last one.

    A finished block or checkpoint is written at once: it decides whether the attempt counts as fruitless.
    """

    def __init__(self, context: WorkerContext, claim: Claim) -> None:
        self._context = context
        self._claim = claim
        self._events: deque[AttemptEvent] = deque(maxlen=MAX_WAITING)
        self._progress: ProgressEvent | None = None
        self._urgent = False
        self._due = time.monotonic()

    def add(self, event: AttemptEvent) -> None:
        """Take an event; `flush` writes it."""
        if isinstance(event, ProgressEvent):
            self._progress = event
            return
        self._events.append(event)
        self._urgent = self._urgent or isinstance(event, BlockEvent | CheckpointEvent)

    def flush_if_due(self) -> None:
        """Write what waits, if a second has passed or a block has ended. Raises as `flush`."""
        if self._urgent or time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write what waits. A database out of reach leaves it waiting.

        Raises:
            AttemptSuperseded: another attempt holds the job; nothing was written.
        """
        waiting = [*self._events, *([self._progress] if self._progress else [])]
        self._due = time.monotonic() + FLUSH_SECONDS
        self._urgent = False
        if not waiting:
            return
        try:
            with self._context.database.transaction() as session:
                AttemptWriter(session, self._claim.job_id, self._claim.attempt).append(waiting)
        except Unavailable as error:
            log.warning("events_not_written", waiting=len(waiting), error=error.code)
            return
        self._events.clear()
        self._progress = None
