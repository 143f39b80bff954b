"""The thread of a worker that publishes results, beside the one that runs jobs: it needs a network and no GPU."""

import threading

import structlog

from app.store.hub.publications import claim_publication
from bitwright.errors import Unavailable
from workers.supervise.context import WorkerContext
from workers.supervise.publish.attempt import publish

log = structlog.get_logger(__name__)


class Publisher:
    """Asks for publications every few seconds, and works on one at a time, from `start` until `stop`."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        """Begin, if the operator lets workers reach the Hub."""
        if self._context.settings.hub_enabled:
            self._thread.start()

    def stop(self) -> None:
        """Give back what is in hand, and wait for that. Safe to call if `start` never was."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def once(self) -> bool:
        """Work on the next publication; False if there is none.

        Raises:
            Unavailable: the database is away.
        """
        settings = self._context.settings
        with self._context.database.transaction() as session:
            claim = claim_publication(session, self._context.worker_id, float(settings.lease_seconds))
        if claim is None:
            return False
        publish(self._context, claim, self._done)
        return True

    def _run(self) -> None:
        while not self._done.wait(self._context.settings.worker_poll_seconds):
            try:
                while not self._done.is_set() and self.once():
                    pass
            except Unavailable:
                log.warning("database_unreachable")
            except Exception:  # a thread that has ended would publish nothing for ever
                log.exception("publishing_failed")
