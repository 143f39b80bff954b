"""The thread of a worker that runs jobs. It asks the database at each message, and every few seconds by itself.

So a broker that is full, flushed or dead, a sweep that is not there and a clock that is wrong cost a job some seconds.
"""

import random
import threading
from time import monotonic

import structlog

from app.store.attempts import work_waits
from bitwright.errors import Unavailable
from workers.supervise.context import WorkerContext
from workers.supervise.work import work

JITTER = 0.25
"""Share of the interval by which a wait is shorter or longer, so that many workers do not ask at once."""
LONGEST_WAIT_SECONDS = 60.0
"""Between two questions to a database that is away, or after a fault; the wait doubles until then."""

log = structlog.get_logger(__name__)


class Runner:
    """Asks for work, and works until there is none; one pass after another, from `start` until `stop`."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._changed = threading.Condition()
        self._begun, self._ended, self._notified = 0, 0, False
        self._faults = 0
        self._thread = threading.Thread(target=self._run, name="runner", daemon=True)

    def start(self) -> None:
        """Begin with the first question at once: jobs may have waited for this worker."""
        self._thread.start()

    def notify(self) -> None:
        """Ask now, and return when a pass that began after this call has ended: no other message is taken meanwhile."""
        with self._changed:
            wanted = self._begun + 1
            self._notified = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended >= wanted or self._context.stopping.is_set())

    def stop(self) -> None:
        """Ask no more, give back what is in hand, and wait for that. Safe to call if `start` never was."""
        self._context.stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._context.stopping.is_set():
            with self._changed:
                self._begun, self._notified = self._begun + 1, False
            self._pass()
            with self._changed:
                self._ended = self._begun
                self._changed.notify_all()
            self._wait(self._pause())

    def _pass(self) -> None:
        """Work if there is something to do. No fault ends the thread."""
        context = self._context
        try:
            self._tend()
            with context.database.reading() as session:
                waits = work_waits(session, context.device)
            if waits:
                work(context, context.device.value)
                self._tend()
            self._faults = 0
        except Unavailable:
            self._faults += 1
            if self._faults == 1:
                log.warning("database_unreachable")
        except Exception:  # a driver's own kinds, too: a worker that no longer asks would look idle for ever
            self._faults += 1
            log.exception("work_failed")

    def _tend(self) -> None:
        """Have ready what the next job begins with."""
        context = self._context
        if context.spares is None or not context.spares.count:
            return
        context.spares.tend()
        if context.reader is not None:
            context.reader.start()

    def _pause(self) -> float:
        interval = self._context.settings.worker_poll_seconds
        longest = max(interval, LONGEST_WAIT_SECONDS)
        spread = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (nobody gains by guessing it)
        return float(min(interval * 2.0 ** min(self._faults, 16), longest) * spread)

    def _wait(self, seconds: float) -> None:
        """Wait so long, but no longer than until a notification or the worker's stop."""
        stopping, until = self._context.stopping, monotonic() + seconds
        with self._changed:
            # `stopping` is set by a signal handler, which may take no lock: it is looked at now and then.
            while not self._notified and not stopping.is_set() and (left := until - monotonic()) > 0:
                self._changed.wait(min(left, 0.5))
