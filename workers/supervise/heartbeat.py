"""Heartbeat of a worker: its row in the store, with its capacity, and hourly pruning of its disk."""

import threading
import time
from dataclasses import asdict
from importlib.metadata import version

import structlog

from app.store.attempts import has_ended
from app.store.workers import clock_skew, describe, gone, heartbeat, register
from bitwright.errors import Unavailable
from bitwright.views import CLOCK_SKEW, RUNTIMES
from workers.disk.hub_cache import prune_models
from workers.disk.workspace import prune
from workers.supervise.context import WorkerContext

HEARTBEAT_SECONDS = 10.0
PRUNE_SECONDS = 3600.0
DAY = 86_400.0
SKEW_SECONDS = 2.0
"""Distance from the database's clock from which on it is logged."""
SKEW_CHANGE_SECONDS = 1.0
"""Change of that distance from which on it is registered and logged again."""

log = structlog.get_logger(__name__)


def changed(before: float | None, skew: float) -> bool:
    """True if the distance from the database's clock differs from the one registered before."""
    return before is None or abs(skew - before) > SKEW_CHANGE_SECONDS


class Heartbeat:
    """Registers the worker and renews its row from a thread until `stop`."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._done = threading.Event()
        self._skew: float | None = None
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Register, whether or not there is a broker. A second call does nothing."""
        if self._thread.is_alive():
            return
        log.info("worker_started", worker_id=self._context.worker_id, device=self._context.device.value)
        self._thread.start()

    def _description(self, skew: float) -> dict[str, object]:
        capacity = asdict(self._context.capacity)
        capacity.pop("device")
        runtimes = {name: found.version for name, found in self._context.runtimes.items()}
        return {"version": version("bitwright"), CLOCK_SKEW: skew, RUNTIMES: runtimes, **capacity}

    def _warn(self, skew: float) -> None:
        """Say that this machine's clock is wrong, when it is found to be and when it has changed by much."""
        if abs(skew) > SKEW_SECONDS and changed(self._skew, skew):
            hint = "set this machine's clock; jobs run all the same, but times in its logs are off"
            log.warning("clock_skewed", seconds_ahead_of_database=skew, hint=hint)

    def stop(self) -> None:
        """Remove the row. Safe to call if `start` never was."""
        self._done.set()
        if not self._thread.is_alive():
            return
        self._thread.join()
        try:
            with self._context.database.transaction() as session:
                gone(session, self._context.worker_id)
        except Unavailable:
            log.warning("worker_not_removed")

    def _keep(self) -> None:
        self._beat()
        pruned_at = -PRUNE_SECONDS
        while not self._done.wait(HEARTBEAT_SECONDS):
            self._beat()
            if time.monotonic() - pruned_at > PRUNE_SECONDS:
                pruned_at = time.monotonic()
                self._prune()

    def _prune(self) -> None:
        """Delete what nobody has used for long and no job needs. Only this machine can see it.

        Scratch folders of jobs that have ended, or are no more; models from the Hub.
        """

        def in_use(job_id: str) -> bool:
            with self._context.database.reading() as session:
                return not has_ended(session, job_id)

        settings = self._context.settings
        try:
            unused = settings.workspace_retention_days * DAY
            pruned = prune(settings.workspace_dir, unused_seconds=unused, in_use=in_use)
            models = prune_models(settings.hub_dir, unused_seconds=settings.hub_retention_days * DAY)
        except (Unavailable, OSError) as error:
            log.warning("disk_not_pruned", error=type(error).__name__)
        else:
            log.info("disk_pruned", jobs=len(pruned), models=len(models))

    def _beat(self) -> None:
        context = self._context
        try:
            with context.database.reading() as session:
                skew = round(clock_skew(session), 3)
            self._warn(skew)
            with context.database.transaction() as session:
                if not heartbeat(session, context.worker_id):
                    register(session, context.worker_id, context.device, self._description(skew))
                elif changed(self._skew, skew):
                    describe(session, context.worker_id, self._description(skew))
                else:
                    return
            self._skew = skew
        except Exception as error:  # whatever it is: a worker without a heartbeat is notified no more
            log.warning("heartbeat_failed", error=type(error).__name__)
