"""Live events for any number of streams from one poll of the store a process.

A stream first subscribes, then replays what is stored, then takes what the poll brings: nothing falls between. A stream
that reads too slowly loses its place in memory, not its events: it is told to replay from the store.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

import structlog
from starlette.concurrency import run_in_threadpool

from app.store.events import StoredEvent
from bitwright.errors import StreamsExceeded, TooManyRequests

BACKLOG = 256
"""Events that wait in memory for one stream."""
POLL_LIMIT = 1000
LONGEST_PAUSE_SECONDS = 10.0
KEYS_SECONDS = 2.0
"""A stream ends so long after its key was revoked, at the latest."""

log = structlog.get_logger(__name__)

GoodKeys = Callable[[Set[str]], Set[str]]
"""Those of the keys, by id, that still open doors."""
ReadEvents = Callable[[Mapping[str, int]], Sequence[StoredEvent]]
"""read({job_id: after}) -> stored events of those jobs with a greater sequence, in order within a job."""


@dataclass(eq=False)
class Subscription:
    """Events that the poll has brought for one stream. `lagging`: some of it was dropped; replay from the store.

    key_id      the key that the stream was opened with
    tenant_id   its tenant
    ended       the stream is to end now: the process ends, or the key does
    """

    job_id: str
    key_id: str = ""
    tenant_id: str = ""
    ended: bool = False
    waiting: list[StoredEvent] = field(default_factory=list)
    lagging: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, events: Iterable[StoredEvent]) -> None:
        """Add events, or drop all of them if the stream has fallen behind."""
        if not self.lagging:
            self.waiting.extend(events)
        if len(self.waiting) > BACKLOG:
            self.waiting, self.lagging = [], True
        self._news.set()

    def end(self) -> None:
        """Let the stream end before its job does."""
        self.ended = True
        self._news.set()

    def take(self) -> tuple[list[StoredEvent], bool]:
        """Everything that waits, and whether the stream must replay instead; both are reset."""
        taken, lagging = self.waiting, self.lagging
        self.waiting, self.lagging = [], False
        self._news.clear()
        return taken, lagging

    async def wait(self, seconds: float) -> bool:
        """Until there is news (True), or `seconds` are over (False)."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return False
        return True


class EventFeed:
    """Polls the store while anyone listens. Used from the event loop alone."""

    def __init__(
        self,
        read: ReadEvents,
        *,
        poll_seconds: float,
        max_streams: int,
        max_streams_of_key: int | None = None,
        good_keys: GoodKeys | None = None,
    ) -> None:
        self._read = read
        self._poll_seconds = poll_seconds
        self._max_streams = max_streams
        self._max_streams_of_key = max_streams_of_key or max_streams
        self._good_keys = good_keys
        self._keys_due = 0.0
        self._closing = False
        self._subscribers: dict[str, set[Subscription]] = {}
        self._cursors: dict[str, int] = {}
        self._listening = asyncio.Event()

    @property
    def streams(self) -> int:
        """Streams that are open now."""
        return sum(map(len, self._subscribers.values()))

    def require_room(self, key_id: str = "", tenant_id: str = "", most_of_tenant: int | None = None) -> None:
        """Refuse one stream too many.

        Raises:
            TooManyRequests: the process serves as many streams as it may, or as many as one key may have.
            StreamsExceeded: it serves the tenant as many as that may have.
        """
        of_tenant = sum(subscription.tenant_id == tenant_id for subscription in self._all())
        if most_of_tenant is not None and of_tenant >= most_of_tenant:
            detail = f"the tenant may follow {most_of_tenant} event streams at once, and does"
            raise StreamsExceeded(detail, quota=most_of_tenant)
        mine = sum(subscription.key_id == key_id for subscription in self._all())
        if mine >= self._max_streams_of_key:
            detail = f"this key has {mine} event streams open here, as many as one may have"
            raise TooManyRequests(detail, hint="close some, or poll the JSON page of events instead")
        if self.streams >= self._max_streams:
            detail = f"this process serves {self._max_streams} event streams already"
            raise TooManyRequests(detail, hint="poll the JSON page of events instead, or try again later")

    @contextmanager
    def subscribe(self, job_id: str, newest: int, key_id: str = "", tenant_id: str = "") -> Iterator[Subscription]:
        """Receive events of the job that are newer than `newest`, the last one stored when this was called."""
        subscription = Subscription(job_id, key_id, tenant_id, ended=self._closing)
        self._subscribers.setdefault(job_id, set()).add(subscription)
        self._cursors.setdefault(job_id, newest)
        self._listening.set()
        try:
            yield subscription
        finally:
            self._unsubscribe(subscription)

    def close(self) -> None:
        """End every stream, those to come too: the process is about to end."""
        self._closing = True
        for subscription in self._all():
            subscription.end()

    def _all(self) -> list[Subscription]:
        return [subscription for same_job in self._subscribers.values() for subscription in same_job]

    def _unsubscribe(self, subscription: Subscription) -> None:
        remaining = self._subscribers[subscription.job_id]
        remaining.discard(subscription)
        if not remaining:
            del self._subscribers[subscription.job_id], self._cursors[subscription.job_id]
        if not self._subscribers:
            self._listening.clear()

    async def run(self) -> None:
        """Poll until cancelled. A store that fails is asked again, less and less often."""
        pause = self._poll_seconds
        # Bound to the loop that runs it: an application may be started again in another one.
        self._listening = asyncio.Event()
        if self._subscribers:
            self._listening.set()
        while True:
            await self._listening.wait()
            try:
                full = await self.poll()
                pause = 0.0 if full else self._poll_seconds
                await self.end_streams_of_bad_keys()
            except Exception as error:
                pause = min(max(pause, self._poll_seconds) * 2, LONGEST_PAUSE_SECONDS)
                log.warning("event_poll_failed", again_after_seconds=pause, error=repr(error))
            await asyncio.sleep(pause)

    async def poll(self) -> bool:
        """One look at the store; whether it had more than one answer holds."""
        events = await run_in_threadpool(self._read, dict(self._cursors))
        by_job: dict[str, list[StoredEvent]] = {}
        for event in events:
            by_job.setdefault(event.job_id, []).append(event)
        for job_id, news in by_job.items():
            # A job without listeners now has no cursor; one that was joined again may be further on.
            fresh = [event for event in news if event.sequence > self._cursors.get(job_id, event.sequence)]
            if fresh:
                self._cursors[job_id] = fresh[-1].sequence
                for subscription in self._subscribers[job_id]:
                    subscription.offer(fresh)
        return len(events) >= POLL_LIMIT

    async def end_streams_of_bad_keys(self) -> None:
        """End the streams of keys that have been revoked since, every `KEYS_SECONDS`."""
        if self._good_keys is None or monotonic() < self._keys_due:
            return
        self._keys_due = monotonic() + KEYS_SECONDS
        asked = {subscription.key_id for subscription in self._all()}
        bad = asked - await run_in_threadpool(self._good_keys, asked)
        for subscription in self._all():
            if subscription.key_id in bad and not subscription.ended:
                log.info("stream_ended_with_its_key", job_id=subscription.job_id, key_id=subscription.key_id)
                subscription.end()
