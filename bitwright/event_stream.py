"""Server-sent events: the wire format (HTML standard, section 9.2), and a stream that survives cut connections."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import httpx

from bitwright.errors import TooManyRequests, Unavailable
from bitwright.events import StatusEvent
from bitwright.job_states import FINAL_STATUSES
from bitwright.transport import RetryPolicy, Transport
from bitwright.views import EventView, JobView

READ_TIMEOUT_SECONDS = 45.0
"""Three of the service's keep-alive comments: silence for longer means that the connection is dead."""


@dataclass
class ServerSentEvent:
    """One event of the wire: `id` is the last id seen, `data` its lines joined."""

    id: str = ""
    event: str = "message"
    data: str = ""


@dataclass
class _Pending:
    event: str = ""
    data: list[str] = field(default_factory=list)


def parse_events(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    """Events from the lines of a `text/event-stream` body. An event that the stream's end cuts off is dropped."""
    pending, last_id = _Pending(), ""
    for line in lines:
        if line == "":
            if pending.data:
                yield ServerSentEvent(last_id, pending.event or "message", "\n".join(pending.data))
            pending = _Pending()
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            pending.data.append(value)
        elif name == "event":
            pending.event = value
        elif name == "id" and "\0" not in value:
            last_id = value


def follow(transport: Transport, job_id: str, *, after: int, get_job: Callable[[str], JobView]) -> Iterator[EventView]:
    """The job's events with a sequence above `after`, until the job is final and all of them came.

    A connection that breaks or falls silent is opened again after the last event that arrived.

    Raises:
        Unavailable: the service stayed away for as many tries as the retry policy allows.
        NotFound: there is no such job for this key.
    """
    failures = 0
    while True:
        before, latest = after, None
        try:
            for event in _one_connection(transport, job_id, after):
                after, latest = event.sequence, event.event
                yield event
        except (httpx.TransportError, Unavailable, TooManyRequests) as error:
            failures = 0 if after > before else failures
            failures = _wait_or_give_up(transport, failures, error)
            continue
        if after > before:
            failures = 0
        # A retried job has a final status in its past: only the job itself says whether more will come.
        if latest is None or (isinstance(latest, StatusEvent) and latest.status in FINAL_STATUSES):
            job = get_job(job_id)
            if job.status in FINAL_STATUSES and job.last_event <= after:
                return
        failures = _wait_or_give_up(transport, failures, None)


def _one_connection(transport: Transport, job_id: str, after: int) -> Iterator[EventView]:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after), "Cache-Control": "no-store"}
    with transport.stream(f"/v1/jobs/{job_id}/events", headers=headers, read_timeout=READ_TIMEOUT_SECONDS) as response:
        if response.status_code == httpx.codes.NO_CONTENT:
            return
        for event in parse_events(response.iter_lines()):
            yield EventView.model_validate_json(event.data)


def _wait_or_give_up(transport: Transport, failures: int, error: Exception | None) -> int:
    """Sleep before the next connection; the number of fruitless connections in a row so far."""
    policy: RetryPolicy = transport.retry
    if error is not None and failures + 1 >= policy.attempts:
        raise error if isinstance(error, Unavailable | TooManyRequests) else transport.unreachable(error) from error
    time.sleep(policy.delay(min(failures, policy.attempts)))
    return failures + 1
