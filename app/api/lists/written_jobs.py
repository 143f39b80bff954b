"""Jobs of lists as JSON, kept from list to list: most of a page looks as it did a moment ago.

A job's JSON is made from its view, as the answer about a single job is, and kept together with everything of the job
that may change (`ListedJob.state`). The next list asks the database for that alone, and reads in full only those jobs
of which it is another one. The place in the queue, which changes with other jobs, is put in each time.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic_core import to_json

from app.api.representations import job_view
from app.store.job_pages import ListedJob
from app.store.models import Job
from app.store.waiting import Place

MOST_KEPT = 2000
LONGEST_KEPT = 32_768
"""Bytes of the longest JSON that is kept."""


class WrittenJobs:
    """One per process, for any thread."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[tuple[Any, ...], bytes]] = {}

    def of(self, listed: Iterable[ListedJob]) -> dict[str, bytes]:
        """Those of the jobs, by id, that are kept as they are now."""
        found = {}
        for job in listed:
            kept = self._kept.get(job.id)
            if kept is not None and kept[0] == job.state:
                found[job.id] = kept[1]
        return found

    def write(self, listed: Iterable[ListedJob], jobs: Iterable[Job]) -> dict[str, bytes]:
        """Jobs of a list that were read in full, by id. They may be newer than their states, which are then passed."""
        states = {job.id: job.state for job in listed}
        written = {job.id: job_view(job).model_dump_json(by_alias=True, exclude={"queue"}).encode() for job in jobs}
        with self._lock:
            for job_id in list(islice(self._kept, max(len(self._kept) + len(written) - self._most, 0))):
                del self._kept[job_id]
            kept = {job_id: text for job_id, text in written.items() if len(text) <= LONGEST_KEPT}
            self._kept |= {job_id: (states[job_id], text) for job_id, text in kept.items()}
        return written


def page_json(jobs: Sequence[tuple[str, bytes]], places: Mapping[str, Place], next_cursor: str | None) -> bytes:
    """A page of jobs, each with its id and its JSON without the place in the queue."""
    items = b",".join(text[:-1] + b',"queue":' + _place(places.get(job_id)) + b"}" for job_id, text in jobs)
    return b'{"items":[' + items + b'],"next_cursor":' + to_json(next_cursor) + b"}"


def _place(place: Place | None) -> bytes:
    return b"null" if place is None else to_json({"position": place.position, "eta_seconds": place.eta_seconds})
