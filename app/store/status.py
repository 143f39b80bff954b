"""The one place that writes a job's status: checked against TRANSITIONS, recorded as an event, in one transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, insert, select, update
from sqlalchemy.orm import Session

from app.domain.job_states import TRANSITIONS
from app.store.clock import now
from app.store.documents import document
from app.store.first_rows import DEFAULTS, FirstRows, Row, store_first_rows
from app.store.hub.publications import begin_if_asked
from app.store.models import Event, Job, table_of
from app.store.tenancy.hub_tokens import erase_token
from app.store.tenancy.usage import add_usage
from app.store.webhooks.outbox import tell_of_job
from bitwright.events import ErrorData, LogEvent, StatusEvent
from bitwright.job_states import FINAL_STATUSES, JobStatus

NOT_RUNNING: Mapping[str, object] = {"worker_id": None, "lease_expires_at": None}
"""Columns that a job gives up as it leaves `running`."""
PAUSED, RESUMED = "job_paused", "job_resumed"
"""Events of a job's log."""


@dataclass(frozen=True)
class Entered:
    """The job that entered a status."""

    job_id: str
    tenant_id: str
    attempt: int


def begin(session: Session, row: Row, *, labels: Sequence[Row] = (), entry: Row | None = None) -> Job:
    """Store a new job, queued, with its first event, its labels and an entry of the audit log.

    row   columns that have no default

    The object is none of the session's: another query gives the same job as one that is.
    """
    job = {**DEFAULTS, **row, "status": JobStatus.QUEUED, "last_event": 1, "attempt": 0}
    owner = {"job_id": row["id"], "tenant_id": row["tenant_id"]}
    told = document(StatusEvent(status=JobStatus.QUEUED, attempt=0))
    event = {**owner, "sequence": 1, "attempt": 0, "data": told}
    stored = store_first_rows(session, FirstRows(job, event, [{**owner, **label} for label in labels], entry))
    if stored.has_webhooks:
        tell_of_job(session, row["tenant_id"], row["id"], JobStatus.QUEUED.value, attempt=0)
    return Job(**job, created_at=stored.at, available_at=stored.at, updated_at=stored.at)


def enter(
    session: Session,
    status: JobStatus,
    *where: ColumnElement[bool],
    values: Mapping[str, object],
    error: ErrorData | None = None,
) -> Entered | None:
    """Move the one job that `where` selects to `status` and append the status event.

    None if no job matches, or the one that does is in a status from which TRANSITIONS does not lead to `status`.
    The UPDATE itself checks that, so no other transaction can come between.
    """
    before = [origin for origin, targets in TRANSITIONS.items() if status in targets]
    ended = {"held": False} if status in FINAL_STATUSES else {}
    statement = (
        update(Job)
        .where(Job.status.in_(before), *where)
        .values({"status": status, "last_event": Job.last_event + 1, "updated_at": now(), **ended, **values})
        .returning(Job.id, Job.tenant_id, Job.attempt, Job.last_event)
        .execution_options(synchronize_session=False)
    )
    row = session.execute(statement).one_or_none()
    if row is None:
        return None
    event = StatusEvent(status=status, attempt=row.attempt, error=error)
    _tell(session, row.id, row.tenant_id, sequence=row.last_event, event=event)
    if status in FINAL_STATUSES:
        published = status is JobStatus.SUCCEEDED and begin_if_asked(session, row.tenant_id, row.id)
        if not published:  # else the token is erased at the publication's end
            erase_token(session, row.id)
        add_usage(session, row.tenant_id, jobs=1)
    code = error.code if error is not None and status is JobStatus.FAILED else None
    tell_of_job(session, row.tenant_id, row.id, status.value, attempt=row.attempt, error=code)
    return Entered(job_id=row.id, tenant_id=row.tenant_id, attempt=row.attempt)


def hold(session: Session, job: Job, *, held: bool) -> None:
    """Pause or resume a job that the session has locked, and say so in its log. Its status is left alone."""
    job.held, job.last_event, job.updated_at = held, job.last_event + 1, session.scalars(select(now())).one()
    session.flush()
    event = LogEvent(event=PAUSED if held else RESUMED)
    _tell(session, job.id, job.tenant_id, sequence=job.last_event, event=event, attempt=job.attempt)
    tell_of_job(session, job.tenant_id, job.id, "paused" if held else "resumed", attempt=job.attempt)


def _tell(
    session: Session,
    job_id: str,
    tenant_id: str,
    *,
    sequence: int,
    event: StatusEvent | LogEvent,
    attempt: int | None = None,
) -> None:
    """attempt   of a status, its own"""
    number = event.attempt if isinstance(event, StatusEvent) else attempt
    row = {"job_id": job_id, "sequence": sequence, "tenant_id": tenant_id, "attempt": number}
    session.execute(insert(table_of(Event)).values(**row, data=document(event)))
