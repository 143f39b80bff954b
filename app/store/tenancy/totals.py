"""Usage of a tenant: jobs, the time that they took, what is stored; and the models that its jobs were on."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from app.store.clock import Instant, seconds_between
from app.store.models import Artifact, Attempt, Job, Upload, UploadFile
from bitwright.job_states import JobStatus


@dataclass(frozen=True)
class Usage:
    """Totals of a tenant.

    jobs             by status, all of them
    attempt_seconds  wall time of ended attempts, whatever their end
    artifacts        number of files, and bytes: each counts, though equal ones are stored once
    uploads          the same of complete uploads' files
    """

    jobs: dict[JobStatus, int]
    attempt_seconds: float
    artifacts: tuple[int, int]
    uploads: tuple[int, int]


@dataclass(frozen=True)
class UsedModel:
    """A model as lists show it, with the number of jobs on it, of those that succeeded, and the latest one's time."""

    model: str
    jobs: int
    succeeded: int
    latest: datetime


def usage_of(session: Session, tenant_id: str) -> Usage:
    """The totals as of now."""
    by_status = select(Job.status, func.count()).where(Job.tenant_id == tenant_id).group_by(Job.status)
    counts = {row[0]: row[1] for row in session.execute(by_status)}
    spent = func.coalesce(func.sum(seconds_between(Attempt.started_at, Attempt.finished_at)), 0.0)
    ended = select(spent).where(Attempt.tenant_id == tenant_id, Attempt.finished_at.is_not(None))
    stored = select(func.count(), func.coalesce(func.sum(Artifact.size), 0)).where(Artifact.tenant_id == tenant_id)
    sent = (
        select(func.count(), func.coalesce(func.sum(UploadFile.size), 0))
        .join(Upload, Upload.id == UploadFile.upload_id)
        .where(Upload.tenant_id == tenant_id, Upload.completed_at.is_not(None))
    )
    files, received = session.execute(stored).one(), session.execute(sent).one()
    return Usage(
        jobs=dict.fromkeys(JobStatus, 0) | counts,
        attempt_seconds=float(session.scalars(ended).one()),
        artifacts=(files[0], int(files[1])),
        uploads=(received[0], int(received[1])),
    )


def models_of(session: Session, tenant_id: str, latest_jobs: int) -> Sequence[UsedModel]:
    """The models of the tenant's latest jobs, the one used last first."""
    latest = (
        select(Job.model, Job.status, Job.created_at)
        .where(Job.tenant_id == tenant_id)
        .order_by(Job.id.desc())
        .limit(latest_jobs)
        .subquery("latest")
    )
    succeeded = func.sum(case((latest.c.status == JobStatus.SUCCEEDED, 1), else_=0))
    used = func.max(latest.c.created_at, type_=Instant())
    query = select(latest.c.model, func.count(), succeeded, used).group_by(latest.c.model).order_by(used.desc())
    return [UsedModel(model, jobs, int(done), when) for model, jobs, done, when in session.execute(query)]
