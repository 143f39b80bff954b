"""Publications: records of results on their way to the Hub, one for each job. The job itself stays succeeded.

A worker takes one as it takes a job: with a lease, and a number that fences its writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError
from sqlalchemy import ColumnElement, and_, delete, or_, select, update
from sqlalchemy.orm import Session

from app.domain.request.publishing import Publish
from app.store.clock import now, seconds_from_now
from app.store.documents import document
from app.store.models import Job, Publication, Tenant
from app.store.tenancy.hub_tokens import erase_token
from bitwright.errors import BitwrightError, Conflict, NotFound, Retry
from bitwright.events import ErrorData
from bitwright.job_states import PublicationStatus

OPEN = (PublicationStatus.QUEUED, PublicationStatus.RUNNING)
MOST_ATTEMPTS = 8
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 15.0, 3600.0
"""Between two attempts; doubled with each."""


@dataclass(frozen=True)
class PublicationClaim:
    """A publication that a worker holds until its lease runs out."""

    job_id: str
    tenant_id: str
    attempt: int
    publish: Publish


def publication_of(session: Session, tenant_id: str, job_id: str) -> Publication:
    """The publication of a job that is the tenant's.

    Raises:
        NotFound: there is none.
    """
    query = select(Publication).where(Publication.job_id == job_id, Publication.tenant_id == tenant_id)
    found = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if found is None:
        hint = f"POST /v1/jobs/{job_id}/publish begins one"
        raise NotFound(f"job {job_id} was not published", value=job_id, hint=hint)
    return found


def begin_publication(session: Session, tenant_id: str, job_id: str, publish: Publish) -> None:
    """Queue the publication of a job; one that has ended makes way.

    Raises:
        Conflict: one is on its way.
    """
    ended = delete(Publication).where(Publication.job_id == job_id, Publication.status.not_in(OPEN))
    session.execute(ended.execution_options(synchronize_session=False))
    if session.scalar(select(Publication.status).where(Publication.job_id == job_id)) is not None:
        hint = f"GET /v1/jobs/{job_id}/publish tells when it has ended"
        raise Conflict(f"job {job_id} is being published", value=job_id, hint=hint)
    request = publish.model_dump(mode="json")
    session.add(Publication(job_id=job_id, tenant_id=tenant_id, status=PublicationStatus.QUEUED, request=request))
    session.flush()


def begin_if_asked(session: Session, tenant_id: str, job_id: str) -> bool:
    """Queue the publication that a job's request asks for; True if it asks for one."""
    asked = session.scalar(select(Job.request).where(Job.id == job_id)) or {}
    if not asked.get("publish"):
        return False
    begin_publication(session, tenant_id, job_id, Publish.model_validate(asked["publish"]))
    return True


def claim_publication(session: Session, worker_id: str, lease_seconds: float) -> PublicationClaim | None:
    """Take the publication that has waited longest, or one that a lost worker held; None if there is none."""
    waits = and_(Publication.status == PublicationStatus.QUEUED, Publication.available_at <= now())
    lost = and_(Publication.status == PublicationStatus.RUNNING, Publication.lease_expires_at <= now())
    query = (
        select(Publication)
        .join(Tenant, Tenant.id == Publication.tenant_id)
        .where(or_(waits, lost), Tenant.suspended_at.is_(None))
        .order_by(Publication.available_at, Publication.job_id)
        .limit(1)
        .with_for_update(of=Publication, skip_locked=True)
    )
    row = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if row is None:
        return None
    held = {
        "status": PublicationStatus.RUNNING,
        "attempt": row.attempt + 1,
        "worker_id": worker_id,
        "lease_expires_at": seconds_from_now(lease_seconds),
    }
    _write(session, held, Publication.job_id == row.job_id)
    try:
        publish = Publish.model_validate(row.request)
    except ValidationError:  # of another version of the service
        error = Conflict("this version of the service does not understand the stored publication", hint="publish again")
        end_publication(
            session, PublicationClaim(row.job_id, row.tenant_id, row.attempt + 1, Publish(hub="a/b")), error
        )
        return None
    return PublicationClaim(row.job_id, row.tenant_id, row.attempt + 1, publish)


def renew_publication(session: Session, claim: PublicationClaim, lease_seconds: float) -> bool:
    """Hold it longer; False if it is held no more: another worker has it, or the job was deleted."""
    return _write(session, {"lease_expires_at": seconds_from_now(lease_seconds)}, *_fence(claim))


def release_publication(session: Session, claim: PublicationClaim) -> None:
    """Give it back at once: the worker shuts down."""
    values = {"status": PublicationStatus.QUEUED, "available_at": now(), **_NOBODY}
    _write(session, values, *_fence(claim))


def succeed_publication(session: Session, claim: PublicationClaim, answer: Mapping[str, str]) -> bool:
    """End it well with the Hub's answer, and forget the job's own token; False if it is held no more."""
    values = {"status": PublicationStatus.DONE, "answer": dict(answer), "error": None, "finished_at": now(), **_NOBODY}
    done = _write(session, values, *_fence(claim))
    if done:
        erase_token(session, claim.job_id)
    return done


def end_publication(session: Session, claim: PublicationClaim, error: BitwrightError, wait_seconds: float = 0) -> bool:
    """Note an error: it waits for another attempt where that may help, else it has failed. True if it has.

    wait_seconds   that the Hub asked for; the back-off may be longer
    """
    again = error.retry is Retry.LATER and claim.attempt < MOST_ATTEMPTS
    values: dict[str, object] = {"error": document(ErrorData.of(error)), **_NOBODY}
    if again:
        delay = max(wait_seconds, back_off(claim.attempt))
        values |= {"status": PublicationStatus.QUEUED, "available_at": seconds_from_now(delay)}
    else:
        values |= {"status": PublicationStatus.FAILED, "finished_at": now()}
    if _write(session, values, *_fence(claim)) and not again:
        erase_token(session, claim.job_id)
    return not again


def back_off(attempt: int) -> float:
    """Seconds after the attempt of this number, from 1."""
    return min(FIRST_WAIT_SECONDS * 2.0 ** (attempt - 1), LONGEST_WAIT_SECONDS)


_NOBODY: Mapping[str, object] = {"worker_id": None, "lease_expires_at": None}


def _fence(claim: PublicationClaim) -> tuple[ColumnElement[bool], ...]:
    return (
        Publication.job_id == claim.job_id,
        Publication.attempt == claim.attempt,
        Publication.status == PublicationStatus.RUNNING,
        Publication.lease_expires_at > now(),
    )


def _write(session: Session, values: Mapping[str, object], *where: ColumnElement[bool]) -> bool:
    statement = update(Publication).where(*where).values({**values, "updated_at": now()}).returning(Publication.job_id)
    return session.execute(statement.execution_options(synchronize_session=False)).one_or_none() is not None
