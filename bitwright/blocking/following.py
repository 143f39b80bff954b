# Made from bitwright/asynchronous/following.py by `make client`: change it there.
"""Event stream of a job to its end, over connections that break."""

from collections.abc import Callable, Generator
from contextlib import closing

import httpx

from bitwright.blocking.transport import Transport
from bitwright.blocking.waits import sleep
from bitwright.errors import TooManyRequests, Unavailable
from bitwright.event_stream import READ_TIMEOUT_SECONDS, EventParser
from bitwright.events import StatusEvent
from bitwright.job_states import FINAL_STATUSES
from bitwright.views import EventView, JobView


def follow(
    transport: Transport, job_id: str, *, after: int, get_job: Callable[[str], JobView]
) -> Generator[EventView, None, None]:
    """The job's events with a sequence above `after`, until the job is final and its last event has come.

    A connection that breaks or falls silent is opened again after the last event that arrived.

    Raises:
        Unavailable: the service stayed away for as many tries as the retry policy allows.
        NotFound: there is no such job for this key.
    """
    failures = 0
    while True:
        before, latest = after, None
        try:
            with closing(_one_connection(transport, job_id, after)) as events:
                for event in events:
                    after, latest = event.sequence, event.event
                    yield event
        except (httpx.TransportError, Unavailable, TooManyRequests) as error:
            failures = 0 if after > before else failures
            if failures + 1 >= transport.retry.attempts:
                raise transport.last_error(error) from error
            sleep(transport.retry.delay(failures))
            failures += 1
            continue
        if after > before:
            failures = 0
        # A retried job has a final status in its past: only the job itself says whether more will come.
        if latest is None or (isinstance(latest, StatusEvent) and latest.status in FINAL_STATUSES):
            job = get_job(job_id)
            if job.status in FINAL_STATUSES and job.last_event <= after:
                return
        sleep(transport.retry.delay(min(failures, transport.retry.attempts)))
        failures += 1


def _one_connection(transport: Transport, job_id: str, after: int) -> Generator[EventView, None, None]:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after), "Cache-Control": "no-store"}
    path, parser = f"/v1/jobs/{job_id}/events", EventParser()
    with transport.stream(path, headers=headers, read_timeout=READ_TIMEOUT_SECONDS) as response:
        if response.status_code == httpx.codes.NO_CONTENT:
            return
        for chunk in response.iter_bytes():
            for event in parser.feed(chunk):
                yield EventView.model_validate_json(event.data)
