"""Reading of jobs' events. Within a job, events become visible in the order of their numbers, without gaps."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from app.store.ids import require_id
from app.store.models import Event, Job
from bitwright.errors import NotFound
from bitwright.events import EVENT
from bitwright.events import Event as AnyEvent

MAX_PAGE = 1000
CURSORS_A_QUERY = 200
"""SQLite refuses expressions more than 1000 deep."""


@dataclass(frozen=True)
class StoredEvent:
    """An event with its place in its job's history."""

    job_id: str
    sequence: int
    created_at: datetime
    attempt: int
    event: AnyEvent


class EventRepository:
    """The events of one tenant's jobs."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def page(self, job_id: str, after: int, limit: int) -> list[StoredEvent]:
        """Up to `limit` events with numbers above `after`, in order.

        Raises:
            NotFound: the tenant has no such job.
        """
        require_id("job", job_id, "job")
        where_job = (Job.id == job_id, Job.tenant_id == self._tenant_id)
        if self._session.scalars(select(Job.id).where(*where_job)).one_or_none() is None:
            raise NotFound(f"there is no job {job_id}", value=job_id)
        return events_after(self._session, {job_id: after}, min(max(limit, 1), MAX_PAGE))

    def latest_of(self, job_id: str, types: Collection[str], limit: int) -> list[StoredEvent]:
        """The latest `limit` events of these types, in order; of a job that the tenant has, else none."""
        ours = (Event.job_id == job_id, Event.tenant_id == self._tenant_id, Event.data["type"].as_string().in_(types))
        query = select(Event).where(*ours).order_by(Event.sequence.desc()).limit(min(max(limit, 1), MAX_PAGE))
        return [_stored(row) for row in reversed(self._session.scalars(query).all())]


def events_after(session: Session, cursors: Mapping[str, int], limit: int) -> list[StoredEvent]:
    """Up to `limit` events of many jobs of any tenant, each job's after the number given with its id.

    Each job's events come in order; ask again with the new numbers until the answer is empty.
    """
    jobs = sorted(cursors.items())
    rows: list[Event] = []
    for start in range(0, len(jobs), CURSORS_A_QUERY):
        some = jobs[start : start + CURSORS_A_QUERY]
        news = or_(*(and_(Event.job_id == job_id, Event.sequence > _bounded(after)) for job_id, after in some))
        query = select(Event).where(news).order_by(Event.job_id, Event.sequence).limit(limit - len(rows))
        rows += session.scalars(query).all()
        if len(rows) >= limit:
            break
    return [_stored(row) for row in rows]


def _bounded(after: int) -> int:
    """A number that every database's integer column can be compared with."""
    return min(max(after, 0), 2**31 - 1)


def _stored(row: Event) -> StoredEvent:
    return StoredEvent(
        job_id=row.job_id,
        sequence=row.sequence,
        created_at=row.created_at,
        attempt=row.attempt,
        event=EVENT.validate_python(row.data),
    )
