"""Courier of webhooks in the sweep's process: takes what is due from the store, sends it, notes what came of it.

Any number may run: a message that one has taken, no other gets before it counts as lost. Slow receivers hold only
their own few threads, never a round of the sweep.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import structlog

from app.domain.webhooks.addresses import Allowed
from app.settings import Settings
from app.store.session import Database
from app.store.tenancy.hub_tokens import Vault
from app.store.webhooks.deliveries import Sending, anything_due, note, take_due
from bitwright.errors import BitwrightError, Unavailable
from workers.webhooks.sending import Post

THREADS = 16
POLL_SECONDS = 1.0
CLOSING_SECONDS = 12.0
"""A little longer than a try lasts."""

log = structlog.get_logger(__name__)


class Courier:
    """One sender; `round` takes what there is room for."""

    def __init__(self, settings: Settings, database: Database, post: Post | None = None) -> None:
        self._database = database
        self._vault = Vault(settings.token_keys)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="webhook")
        self._names = ThreadPoolExecutor(THREADS, thread_name_prefix="webhook-name")
        self._post = post or Post(Allowed.of(settings.webhook_allowed), self._names)
        self._sending: dict[Future[None], str] = {}

    def round(self) -> int:
        """Begin to send what is due; how many messages that are.

        Raises:
            Unavailable: the database is away.
        """
        self._sending = {future: endpoint for future, endpoint in self._sending.items() if not future.done()}
        room = THREADS - len(self._sending)
        if room == 0:
            return 0
        with self._database.reading() as session:
            if not anything_due(session):
                return 0
        with self._database.transaction() as session:
            taken = take_due(session, self._vault, limit=room, busy=list(self._sending.values()))
        for message in taken:
            self._sending[self._threads.submit(self._deliver, message)] = message.endpoint_id
        return len(taken)

    def settle(self, seconds: float = CLOSING_SECONDS) -> None:
        """Wait for what is being sent."""
        for future in list(self._sending):
            future.exception(seconds)

    def run(self, stopping: threading.Event) -> None:
        """Send until `stopping` is set. No error ends it."""
        while not stopping.is_set():
            try:
                self.round()
            except Unavailable:
                log.warning("database_unreachable")
            except Exception:
                log.exception("courier_failed")
            stopping.wait(POLL_SECONDS)
        self.close()

    def close(self) -> None:
        """End the threads; what is being sent is due again later, unless it ends now."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._names.shutdown(wait=False, cancel_futures=True)

    def _deliver(self, message: Sending) -> None:
        facts = {"delivery_id": message.delivery_id, "webhook_id": message.endpoint_id, "attempt": message.attempt}
        try:
            outcome = self._post.send(message)
            with self._database.transaction() as session:
                note(session, message, outcome)
        except BitwrightError as error:
            log.warning("webhook_not_noted", code=error.code, **facts)
        except Exception:
            log.exception("webhook_failed", **facts)
        else:
            log.info("webhook_sent", status=outcome.status_code, error=outcome.error, seconds=outcome.seconds, **facts)
