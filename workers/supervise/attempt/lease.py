"""Keeps a running attempt's lease, and knows why the attempt should end early."""

import threading
import time
from typing import Self

import structlog

from app.store.attempts import AttemptWriter, Claim, Wish
from bitwright.errors import AttemptSuperseded, TimeLimitExceeded, Unavailable
from workers.supervise.context import WorkerContext

RENEW_SECONDS = 1.5
"""A cancel is seen at a renewal; it must free the process within five seconds."""

log = structlog.get_logger(__name__)


class JobCancelled(Exception):
    """A caller asked to cancel the job."""


class JobPaused(Exception):
    """A caller asked to pause the job."""


class WorkerStopping(Exception):
    """This worker was asked to end."""


class LeaseKeeper:
    """Renews the lease from a thread. `check` raises what the thread, the clock or the worker found."""

    def __init__(self, context: WorkerContext, claim: Claim) -> None:
        self._context = context
        self._claim = claim
        limit = claim.request.time_limit_seconds or context.settings.job_time_limit_seconds
        self._limit = limit
        self._deadline = time.monotonic() + limit
        self._done = threading.Event()
        self._cancelled = threading.Event()
        self._paused = threading.Event()
        self._lost = threading.Event()
        self._interval = min(RENEW_SECONDS, context.settings.heartbeat_seconds)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def check(self) -> None:
        """Raise if the attempt must end.

        Raises:
            AttemptSuperseded: another attempt holds the job; nothing may be written.
            JobCancelled: a caller cancelled.
            JobPaused: a caller paused it; a later attempt goes on from its last block or checkpoint.
            TimeLimitExceeded: the attempt has run for too long.
            WorkerStopping: the worker process is asked to end.
        """
        if self._lost.is_set():
            raise AttemptSuperseded(f"attempt {self._claim.attempt} of {self._claim.job_id} lost its lease")
        if self._cancelled.is_set():
            raise JobCancelled
        if self._paused.is_set():
            raise JobPaused
        if time.monotonic() > self._deadline:
            hint = "raise time_limit_seconds, or ask for fewer steps or sequences; a retry goes on from the last block"
            raise TimeLimitExceeded(
                f"the attempt ran longer than {self._limit} s", field="time_limit_seconds", value=self._limit, hint=hint
            )
        if self._context.stopping.is_set():
            raise WorkerStopping

    def renew(self) -> None:
        """Renew once, now. A database out of reach is no reason to stop: the fence decides when it is back."""
        try:
            with self._context.database.transaction() as session:
                writer = AttemptWriter(session, self._claim.job_id, self._claim.attempt)
                wish = writer.renew(self._context.settings.lease_seconds)
        except AttemptSuperseded:
            self._lost.set()
        except Unavailable as error:
            log.warning("lease_not_renewed", error=error.code)
        except Exception as error:  # a driver's own kinds, too: a lease that nobody renews any more ends the attempt
            log.warning("lease_not_renewed", error=type(error).__name__)
        else:
            if wish is not None:
                (self._cancelled if wish is Wish.CANCEL else self._paused).set()

    def _keep(self) -> None:
        with structlog.contextvars.bound_contextvars(job_id=self._claim.job_id, attempt=self._claim.attempt):
            while not self._done.wait(self._interval) and not self._lost.is_set():
                self.renew()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
