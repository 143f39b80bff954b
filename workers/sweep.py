"""Sweep process (`python -m workers.sweep`): lost jobs, idle workers, retention.

Each round it takes back jobs whose workers fell silent, notifies idle workers where jobs wait, and every ten minutes
deletes what is past its retention. Many may run: a lease in the database lets one work. It needs the database alone;
with the broker away it goes on, and notifies again when the broker is back. Without any sweep jobs still start, and
idle workers take back what others lost. Beside the rounds, a courier sends webhooks, in each process that runs.
"""

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping

import structlog

from app.logs import configure_logging
from app.queue import notify_workers, silence
from app.settings import Settings, settings_or_exit, warn_of_unknown_variables
from app.store.blobs import BlobStore, open_blobs
from app.store.endings import requeue_lost
from app.store.ids import new_id
from app.store.session import Database
from app.store.tenancy.audit import REMOVED_AT_ONCE, remove_old_entries
from app.store.tenancy.hub_tokens import remove_old_tokens
from app.store.tenancy.page_sessions import remove_expired_sessions
from app.store.upkeep.garbage import ROWS_A_TRANSACTION, collect_blobs, remove_expired_keys, remove_old_jobs
from app.store.upkeep.kept_files import forget_kept
from app.store.uploads import remove_expired_uploads
from app.store.webhooks.deliveries import remove_old_deliveries
from app.store.workers import forget_workers, list_workers, live_classes, sweep_lease, waiting
from bitwright.errors import Unavailable
from bitwright.job_states import DeviceClass

LEASE_ROUNDS = 3
"""The sweep's own lease lasts for this many rounds."""
RETENTION_SECONDS = 600.0
"""Between two rounds of throwing away."""
UNSEEN_SECONDS = 86_400.0
DAY = 86_400.0
DELIVERY_DAYS = 30.0
"""So long the log of webhooks' deliveries is kept."""
JOIN_SECONDS = 2.0
"""Time that a message which is being sent has left at the end: it is due again later."""

log = structlog.get_logger("workers.sweep")


class Sweep:
    """One sweeping process; `holder` names it in the lease."""

    def __init__(self, settings: Settings, database: Database, blobs: BlobStore, holder: str) -> None:
        self._settings = settings
        self._database = database
        self._blobs = blobs
        self._holder = holder
        self._retention_due = time.monotonic()

    def round(self) -> bool:
        """Do what is due; False if another sweep has the lease.

        Raises:
            Unavailable: the database is away.
        """
        seconds = max(LEASE_ROUNDS * self._settings.sweep_interval_seconds, 1.0)
        with self._database.transaction() as session:
            if not sweep_lease(session, self._holder, seconds):
                return False
        self.requeue()
        self.notify()
        if time.monotonic() >= self._retention_due:
            self._retention_due = time.monotonic() + RETENTION_SECONDS
            self.throw_away()
        return True

    def requeue(self) -> None:
        """Take back the jobs of workers that fell silent."""
        with self._database.transaction() as session:
            lost = requeue_lost(session)
        for job_id, _device in lost:
            log.warning("job_taken_back", job_id=job_id)

    def notify(self) -> None:
        """One message for each idle worker that a waiting job could use, and none in queues that nobody reads."""
        with self._database.reading() as session:
            jobs, alive = waiting(session), live_classes(session)
            idle = [DeviceClass(state.worker.device_class) for state in list_workers(session) if state.job_id is None]
        silence(frozenset(DeviceClass) - alive)
        for device, times in messages_due(jobs, idle).items():
            if times:
                notify_workers(device.value, alive, times=times)

    def throw_away(self) -> None:
        """Delete rows past their retention, then bytes that no row names.

        A transaction removes up to `ROWS_A_TRANSACTION` rows of a kind; where there are more, the rest goes in the next
        round, after what jobs wait for.
        """
        with self._database.transaction() as session:
            more = remove_expired_keys(session) == ROWS_A_TRANSACTION
            remove_expired_sessions(session)
            remove_old_tokens(session)
            uploads = remove_expired_uploads(session)
            forget_workers(session, unseen_seconds=UNSEEN_SECONDS)
            forget_kept(session, older_than_seconds=self._settings.workspace_retention_days * DAY)
        days = self._settings.job_retention_days
        jobs: list[str] = []
        if days:
            with self._database.transaction() as session:
                jobs = remove_old_jobs(session, older_than_seconds=days * DAY)
            more |= len(jobs) == ROWS_A_TRANSACTION
        with self._database.transaction() as session:
            kept = self._settings.audit_retention_days
            entries = remove_old_entries(session, older_than_seconds=kept * DAY) if kept else 0
            deliveries = remove_old_deliveries(session, older_than_seconds=DELIVERY_DAYS * DAY)
        more |= REMOVED_AT_ONCE in (entries, deliveries)
        for upload_id in uploads:
            shutil.rmtree(self._settings.upload_dir / upload_id, ignore_errors=True)
        if more:
            self._retention_due = time.monotonic()
        blobs = [] if more else collect_blobs(self._database, self._blobs)
        counts = {"jobs": len(jobs), "uploads": len(uploads), "audit_entries": entries, "blobs": len(blobs)}
        log.info("retention_done", **counts, more=more)


def messages_due(jobs: Mapping[str, int], idle: list[DeviceClass]) -> dict[DeviceClass, int]:
    """Messages to send to each class: at most one per idle worker, and no more than jobs wait for it."""
    return {
        device: min(idle.count(device), jobs.get("any", 0) + jobs.get(device.value, 0))
        for device in DeviceClass
        if device in idle
    }


def run(sweep: Sweep, interval: float, stopping: threading.Event) -> None:
    """Sweep every `interval` seconds until `stopping` is set. No error of a round ends it."""
    while not stopping.is_set():
        try:
            sweep.round()
        except Unavailable:
            log.warning("database_unreachable")
        except Exception:  # a bucket's or a driver's own kind, too
            log.exception("sweep_failed")
        stopping.wait(interval)


def main() -> int:
    """Sweep with the settings of the environment until SIGTERM or SIGINT."""
    settings = settings_or_exit()
    configure_logging(settings)
    warn_of_unknown_variables()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    database = Database(settings.database_url)
    # Signatures need a library that nothing else of a sweep does.
    from workers.webhooks.courier import Courier  # noqa: PLC0415

    courier = Courier(settings, database)
    sending = threading.Thread(target=courier.run, args=(stopping,), name="courier", daemon=True)
    holder = f"{socket.gethostname()}.{os.getpid()}.{new_id('wrk')}"
    sweep = Sweep(settings, database, open_blobs(settings.blob_url), holder)
    log.info("sweep_started", holder=holder, interval=settings.sweep_interval_seconds)
    sending.start()
    try:
        run(sweep, settings.sweep_interval_seconds, stopping)
    finally:
        stopping.set()
        sending.join(JOIN_SECONDS)
        database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
