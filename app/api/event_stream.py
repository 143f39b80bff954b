"""One job's events as server-sent events: replayed from the store, then live, until the job's last event."""

from collections.abc import AsyncIterator, Sequence

from starlette.concurrency import run_in_threadpool

from app.api.event_feed import EventFeed, Subscription
from app.api.representations import event_view
from app.store.events import EventRepository, StoredEvent
from app.store.jobs import JobRepository
from app.store.models import Job
from app.store.session import Database
from bitwright.errors import NotFound
from bitwright.events import StatusEvent
from bitwright.job_states import FINAL_STATUSES

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_SECONDS = 15.0
RECONNECT_MILLISECONDS = 2000
RETRY = f"retry: {RECONNECT_MILLISECONDS}\n\n".encode()
REPLAY_PAGE = 500
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class JobEvents:
    """The store's side of a stream: one tenant's job."""

    def __init__(self, database: Database, tenant_id: str, job_id: str) -> None:
        self._database = database
        self.tenant_id = tenant_id
        self.job_id = job_id

    def job(self) -> Job:
        """The job as it is now.

        Raises:
            NotFound: the tenant has no such job.
        """
        with self._database.reading() as session:
            return JobRepository(session, self.tenant_id).get(self.job_id)

    def page(self, after: int, limit: int = REPLAY_PAGE) -> Sequence[StoredEvent]:
        """Stored events with a greater sequence than `after`."""
        with self._database.reading() as session:
            return EventRepository(session, self.tenant_id).page(self.job_id, after, limit)

    def finished(self, last_sent: int) -> bool:
        """True if nothing comes after event `last_sent`: the job is final or deleted."""
        try:
            job = self.job()
        except NotFound:
            return True
        return job.status in FINAL_STATUSES and job.last_event <= last_sent


async def stream_events(
    feed: EventFeed, source: JobEvents, newest: int, after: int, key_id: str = ""
) -> AsyncIterator[bytes]:
    """The body of a stream. `newest` is the last event that was stored before; `after`, the last the caller has.

    One that ends before its job does says again when to come back: another process may serve by then.
    """
    last_sent = after
    with feed.subscribe(source.job_id, newest, key_id, source.tenant_id) as subscription:
        yield RETRY
        replaying = True
        while True:
            if subscription.ended:
                yield RETRY
                return
            try:
                events, replaying = await _next_events(source, subscription, last_sent, replaying)
            except NotFound:  # deleted meanwhile
                return
            for event in events:
                yield encode(event)
                last_sent = event.sequence
            if replaying:
                continue
            # A retried job has a final status in its past, so the job itself is asked.
            if events and _is_final(events[-1]) and await run_in_threadpool(source.finished, last_sent):
                return
            if not await subscription.wait(KEEP_ALIVE_SECONDS):
                if await run_in_threadpool(source.finished, last_sent):
                    return
                yield b": ping\n\n"


async def _next_events(
    source: JobEvents, subscription: Subscription, last_sent: int, replaying: bool
) -> tuple[Sequence[StoredEvent], bool]:
    """Events after `last_sent`, and whether the next ones must come from the store."""
    if replaying:
        page = await run_in_threadpool(source.page, last_sent)
        return page, len(page) == REPLAY_PAGE
    events, lagging = subscription.take()
    fresh = [event for event in events if event.sequence > last_sent]
    if lagging or (fresh and fresh[0].sequence != last_sent + 1):
        return [], True
    return fresh, False


def _is_final(stored: StoredEvent) -> bool:
    return isinstance(stored.event, StatusEvent) and stored.event.status in FINAL_STATUSES


def encode(stored: StoredEvent) -> bytes:
    """An event in the wire format: its sequence as id, its type as name, its view as JSON on one line."""
    data = event_view(stored).model_dump_json()
    return f"id: {stored.sequence}\nevent: {stored.event.type}\ndata: {data}\n\n".encode()
