"""A worker's side of a job: claim it, write for it under the fence, end it.

The fence: every write says which attempt it is for, and takes effect only while that attempt is the job's latest, is
running, and its lease has not run out. So of a worker that slept through its lease nothing arrives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, and_, case, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql.dml import ReturningUpdate

from app.domain.attempt_lines import AttemptEvent
from app.domain.request.job_request import JobRequest
from app.store.clock import now, seconds_from_now
from app.store.documents import document
from app.store.endings import close_attempt, end_with_error
from app.store.ids import new_id
from app.store.models import Artifact, Attempt, Event, Job, Tenant
from app.store.status import NOT_RUNNING, enter
from app.store.tenancy.usage import CURRENCY, add_usage, job_cost
from bitwright.errors import AttemptSuperseded, BitwrightError, InvalidRequest
from bitwright.events import BlockEvent, CheckpointEvent, ProgressEvent
from bitwright.job_states import FINAL_STATUSES, DeviceClass, JobStatus
from bitwright.report import Report


@dataclass(frozen=True)
class Claim:
    """A job that this worker now holds.

    available_at   since when it could be claimed
    told           milestones of it that earlier attempts have told, blocks and checkpoints together
    traceparent    of the request that made it, where that was traced
    """

    job_id: str
    tenant_id: str
    attempt: int
    request: JobRequest
    micro_batch_divisor: int
    created_at: datetime
    available_at: datetime
    told: int
    traceparent: str | None


@dataclass(frozen=True)
class NewArtifact:
    """A file that an attempt made and whose bytes are in the blob store."""

    format: str
    path: str
    """Relative to the checkpoint's folder, with forward slashes."""
    sha256: str
    size: int
    media_type: str


@dataclass(frozen=True)
class Terms:
    """Terms of a worker's attempts: what it gives to each, and at which price.

    devices        GPUs, or processes on a CPU
    price_micros   millionths of the currency for an hour of one of them; None: it has no price
    running_jobs   jobs that a tenant may have running whose own quotas do not say; None: any number
    """

    devices: int = 1
    price_micros: int | None = None
    running_jobs: int | None = None


def claim(
    session: Session,
    *,
    worker_id: str,
    device_class: DeviceClass,
    lease_seconds: float,
    terms: Terms = Terms(),
) -> Claim | None:
    """Take the next job that this worker may run, in one statement; None if there is none.

    Highest priority first, then the tenant with the fewest running jobs, then the one that was served longest ago,
    then the oldest. So tenants take turns, however many jobs each has. On PostgreSQL, rows that another claim has
    locked are skipped; on SQLite, one transaction writes at a time.

    A job whose request another version of the service stored and this one does not understand fails, and the next one
    is taken: it must not stand in the way of all others.
    """
    held_by = (worker_id, device_class, lease_seconds)
    while (job := _take_within_quota(session, *held_by, terms)) is not None:
        try:
            asked = JobRequest.model_validate(job.request)
        except ValidationError as error:
            detail = (
                f"this version of the service does not understand the stored request: {error.error_count()} problems"
            )
            end_with_error(session, job, InvalidRequest(detail, field="request", hint="submit the job again"))
            continue
        return Claim(
            job_id=job.id,
            tenant_id=job.tenant_id,
            attempt=job.attempt,
            request=asked,
            micro_batch_divisor=job.micro_batch_divisor,
            created_at=job.created_at,
            available_at=job.available_at,
            told=job.blocks_done,
            traceparent=job.traceparent,
        )
    return None


class Wish(StrEnum):
    """Wish of a caller for a job that runs."""

    CANCEL = "cancel"
    HOLD = "hold"


class _OverQuota(Exception):
    """Two claims at one moment took a tenant's last place: this one gives its job back."""


def _take_within_quota(
    session: Session, worker_id: str, device_class: DeviceClass, lease_seconds: float, terms: Terms
) -> Job | None:
    """The next job, of which no other claim made one too many for its tenant meanwhile."""
    while True:
        try:
            with session.begin_nested():
                job = _take(session, worker_id, device_class, lease_seconds, terms)
                if job is not None:
                    _serve(session, job, terms)
                return job
        except _OverQuota:
            session.expire_all()


def _serve(session: Session, job: Job, terms: Terms) -> None:
    """Note that the tenant was served; claims for one tenant come one after the other from here to their commit.

    Raises:
        _OverQuota: it has more running jobs than it may.
    """
    served = update(Tenant).where(Tenant.id == job.tenant_id).values(served_at=now()).returning(Tenant.quotas)
    own = session.execute(served.execution_options(synchronize_session=False)).scalar_one()
    limit = (own or {}).get("running_jobs", terms.running_jobs)
    if limit is None:
        return
    running = (Job.tenant_id == job.tenant_id, Job.status == JobStatus.RUNNING)
    if (session.scalar(select(func.count()).select_from(Job).where(*running)) or 0) > limit:
        raise _OverQuota


def work_waits(session: Session, device_class: DeviceClass) -> bool:
    """True if a claim would find a job for this class, or a worker has lost one. It writes and locks nothing."""
    lost = (Job.status == JobStatus.RUNNING, Job.lease_expires_at <= now())
    query = select(Job.id).where(or_(and_(*_eligible(Job, device_class)), and_(*lost))).limit(1)
    return session.scalars(query).first() is not None


def _take(
    session: Session, worker_id: str, device_class: DeviceClass, lease_seconds: float, terms: Terms
) -> Job | None:
    held = {
        "attempt": Job.attempt + 1,
        "fruitless_attempts": Job.fruitless_attempts + 1,
        "worker_id": worker_id,
        "lease_expires_at": seconds_from_now(lease_seconds),
        "started_at": func.coalesce(Job.started_at, now()),
        "error": None,
    }
    entered = enter(session, JobStatus.RUNNING, Job.id == _next_job(device_class, terms), values=held)
    if entered is None:
        return None
    number = {"job_id": entered.job_id, "number": entered.attempt, "tenant_id": entered.tenant_id}
    given = {"device_class": device_class.value, "devices": terms.devices, "price_micros": terms.price_micros}
    session.add(Attempt(**number, **given, worker_id=worker_id, status=JobStatus.RUNNING))
    session.flush()
    return session.get_one(Job, entered.job_id, populate_existing=True)


def has_ended(session: Session, job_id: str) -> bool:
    """True if a job of any tenant is in a final status, or is no more: its worker's scratch folder may go."""
    status = session.scalar(select(Job.status).where(Job.id == job_id))
    return status is None or status in FINAL_STATUSES


def _eligible(job: type[Job], device_class: DeviceClass) -> tuple[ColumnElement[bool], ...]:
    return (
        job.status == JobStatus.QUEUED,
        job.held.is_(False),
        job.available_at <= now(),
        job.device.in_(["any", device_class.value]),
    )


def _next_job(device_class: DeviceClass, terms: Terms) -> ColumnElement[str]:
    waiting, busy = aliased(Job, name="waiting"), aliased(Job, name="busy")
    load = (
        select(busy.tenant_id, func.count().label("running"))
        .where(busy.status == JobStatus.RUNNING)
        .group_by(busy.tenant_id)
        .subquery("load")
    )
    running = func.coalesce(load.c.running, 0)
    limit = func.coalesce(Tenant.quotas["running_jobs"].as_integer(), terms.running_jobs)
    return (
        select(waiting.id)
        .join(Tenant, Tenant.id == waiting.tenant_id)
        .outerjoin(load, load.c.tenant_id == waiting.tenant_id)
        .where(*_eligible(waiting, device_class), Tenant.suspended_at.is_(None), or_(limit.is_(None), running < limit))
        .order_by(waiting.priority.desc(), running, Tenant.served_at.asc().nulls_first(), waiting.id)
        .limit(1)
        .with_for_update(of=waiting, skip_locked=True)
        .scalar_subquery()
    )


class AttemptWriter:
    """All writes for one attempt. Each raises `AttemptSuperseded` once the attempt no longer holds the job."""

    def __init__(self, session: Session, job_id: str, attempt: int) -> None:
        self._session = session
        self._job_id = job_id
        self._attempt = attempt

    def renew(self, lease_seconds: float) -> Wish | None:
        """Hold the job for `lease_seconds` from now; what a caller has asked of it."""
        statement = (
            update(Job)
            .where(*self._fence())
            .values(lease_expires_at=seconds_from_now(lease_seconds))
            .returning(Job.cancel_requested, Job.held)
            .execution_options(synchronize_session=False)
        )
        row = self._session.execute(statement).one_or_none()
        if row is None:
            raise self._superseded()
        if row.cancel_requested:
            return Wish.CANCEL
        return Wish.HOLD if row.held else None

    def append(self, events: Sequence[AttemptEvent]) -> None:
        """Store events in this order, numbered after the job's latest; one statement fences and numbers them.

        Raises:
            NumericalFailure: a number in an event is not finite.
        """
        if not events:
            return
        blocks = [e.index if e.milestone is None else e.milestone for e in events if isinstance(e, BlockEvent)]
        milestones = blocks + [event.milestone for event in events if isinstance(event, CheckpointEvent)]
        row = self._session.execute(self._count(events, milestones)).one_or_none()
        if row is None:
            raise self._superseded()
        first = row.last_event - len(events) + 1
        common = {"job_id": self._job_id, "tenant_id": row.tenant_id, "attempt": self._attempt}
        rows = [{"sequence": first + i, "data": document(e)} for i, e in enumerate(events)]
        self._session.execute(insert(Event), [common | row for row in rows])
        if blocks:
            this_attempt = (Attempt.job_id == self._job_id, Attempt.number == self._attempt)
            more = {"blocks_done": Attempt.blocks_done + len(blocks)}
            self._session.execute(update(Attempt).where(*this_attempt).values(more))

    def succeed(self, report: Report, artifacts: Sequence[NewArtifact], *, currency: str = CURRENCY) -> None:
        """End the job well: report, artifacts, status and event, all or nothing.

        Where attempts have a price, the report gets the job's cost in `currency`.

        Raises:
            NumericalFailure: a number in the report is not finite.
        """
        report = self._with_cost(report, currency)
        values = {"report": document(report), "error": None, "finished_at": now(), **NOT_RUNNING}
        entered = enter(self._session, JobStatus.SUCCEEDED, *self._fence(), values=values)
        if entered is None:
            raise self._superseded()
        self._replace_artifacts(entered.tenant_id, artifacts)
        close_attempt(self._session, self._job_id, self._attempt, JobStatus.SUCCEEDED)

    def fail(
        self,
        error: BitwrightError,
        *,
        report: Report | None = None,
        artifacts: Sequence[NewArtifact] = (),
        currency: str = CURRENCY,
    ) -> JobStatus:
        """End the attempt with an error: `error.retry` decides whether the job waits for another. The job's new status.

        A missed requirement keeps its report and artifacts: give them. A job that a caller asked to cancel is
        cancelled, whatever the error.
        """
        job = self._locked()
        report = None if report is None else self._with_cost(report, currency)
        status = end_with_error(self._session, job, error, report)
        if report is not None or artifacts:
            self._replace_artifacts(job.tenant_id, artifacts)
        return status

    def cancelled(self) -> None:
        """End the job because a caller asked for it."""
        values = {"finished_at": now(), **NOT_RUNNING}
        if enter(self._session, JobStatus.CANCELLED, *self._fence(), values=values) is None:
            raise self._superseded()
        close_attempt(self._session, self._job_id, self._attempt, JobStatus.CANCELLED)

    def release(self) -> JobStatus:
        """Give the job back at once and uncounted: the worker shuts down, or the job is paused, and nobody is at fault.

        A job that a caller asked to cancel is cancelled. The job's new status.
        """
        job = self._locked()
        if job.cancel_requested:
            self.cancelled()
            return JobStatus.CANCELLED
        values = {"available_at": now(), "fruitless_attempts": max(job.fruitless_attempts - 1, 0), **NOT_RUNNING}
        enter(self._session, JobStatus.QUEUED, *self._fence(), values=values)
        close_attempt(self._session, self._job_id, self._attempt, JobStatus.QUEUED)
        return JobStatus.QUEUED

    def _fence(self) -> tuple[ColumnElement[bool], ...]:
        return (
            Job.id == self._job_id,
            Job.attempt == self._attempt,
            Job.status == JobStatus.RUNNING,
            Job.lease_expires_at > now(),
        )

    def _locked(self) -> Job:
        query = select(Job).where(*self._fence()).with_for_update().execution_options(populate_existing=True)
        job = self._session.scalars(query).one_or_none()
        if job is None:
            raise self._superseded()
        return job

    def _count(self, events: Sequence[AttemptEvent], milestones: Sequence[int]) -> ReturningUpdate[int, str]:
        """The statement that takes numbers for events and keeps what they tell of the job's progress."""
        values: dict[str, Any] = {"last_event": Job.last_event + len(events), "updated_at": now()}
        progress = [event for event in events if isinstance(event, ProgressEvent)]
        if progress:
            values["progress"] = document(progress[-1])
        if milestones:
            # A block that an earlier attempt had finished is no progress: else an endless loop of them would count.
            done = max(milestones) + 1
            values["fruitless_attempts"] = case((Job.blocks_done < done, 0), else_=Job.fruitless_attempts)
            values["blocks_done"] = case((Job.blocks_done < done, done), else_=Job.blocks_done)
        counted = update(Job).where(*self._fence()).values(values).execution_options(synchronize_session=False)
        return counted.returning(Job.last_event, Job.tenant_id)

    def _replace_artifacts(self, tenant_id: str, artifacts: Sequence[NewArtifact]) -> None:
        self._session.execute(delete(Artifact).where(Artifact.job_id == self._job_id))
        owner = {"job_id": self._job_id, "tenant_id": tenant_id}
        self._session.add_all(Artifact(id=new_id("art"), **owner, **vars(artifact)) for artifact in artifacts)
        self._session.flush()
        add_usage(self._session, tenant_id, stored_bytes=sum(artifact.size for artifact in artifacts))

    def _with_cost(self, report: Report, currency: str) -> Report:
        cost = job_cost(self._session, self._job_id, currency)
        return report if cost is None else report.model_copy(update={"cost": cost})

    def _superseded(self) -> AttemptSuperseded:
        return AttemptSuperseded(f"attempt {self._attempt} no longer holds job {self._job_id}")
