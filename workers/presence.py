"""A worker's row in the store: it says that the worker lives and what it can hold."""

import threading
import time
from dataclasses import asdict
from importlib.metadata import version

import structlog

from app.domain.errors import Unavailable
from app.queue import notify_workers
from app.store.attempts import has_ended
from app.store.workers import gone, heartbeat, register
from workers.context import WorkerContext
from workers.hub_cache import prune_models
from workers.workspace import prune

HEARTBEAT_SECONDS = 10.0
PRUNE_SECONDS = 3600.0
DAY = 86_400.0

log = structlog.get_logger(__name__)


class Presence:
    """Registers the worker and renews its row from a thread until `stop`."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="presence", daemon=True)

    def start(self) -> None:
        """Register, and ring for this class once: jobs may have waited for a first worker."""
        if self._thread.is_alive():  # the broker was lost and found: Celery is ready once more
            return
        log.info("worker_started", worker_id=self._context.worker_id, device=self._context.device.value)
        self._thread.start()

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
        self._tell()
        notify_workers(self._context.device.value)
        pruned_at = -PRUNE_SECONDS
        while not self._done.wait(HEARTBEAT_SECONDS):
            self._tell()
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

    def _tell(self) -> None:
        context = self._context
        try:
            with context.database.transaction() as session:
                if not heartbeat(session, context.worker_id):
                    told = {"version": version("bitwright"), **asdict(context.capacity)}
                    told.pop("device")
                    register(session, context.worker_id, context.device, told)
        except Exception as error:  # whatever it is: a worker without a heartbeat is rung for no more
            log.warning("heartbeat_failed", error=type(error).__name__)
