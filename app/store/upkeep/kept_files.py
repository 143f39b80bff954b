"""Files of what unfinished jobs have finished so far, kept in the blob store so that another machine goes on from them.

A worker replaces a job's rows under its fence. They go when the job succeeds or is deleted, and of a job that failed or
was cancelled when its scratch folder would, too. Files that no row names any more are collected like other blobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from app.store.attempts import AttemptWriter
from app.store.clock import seconds_from_now
from app.store.models import Job, KeptFile
from bitwright.job_states import FINAL_STATUSES, JobStatus


@dataclass(frozen=True)
class Kept:
    """A file of a job's `state`, with its path in there."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class KeptState:
    """Finished files of an attempt when it last told; none: nothing is kept."""

    attempt: int
    files: tuple[Kept, ...]


def keep(session: Session, job_id: str, attempt: int, files: Sequence[Kept], lease_seconds: float) -> None:
    """Put these files in the place of those that were kept of the job, for the attempt that holds it.

    Raises:
        AttemptSuperseded: another attempt holds the job.
    """
    AttemptWriter(session, job_id, attempt).renew(lease_seconds)
    session.execute(delete(KeptFile).where(KeptFile.job_id == job_id))
    tenant_id = session.execute(select(Job.tenant_id).where(Job.id == job_id)).scalar_one()
    owner = {"job_id": job_id, "tenant_id": tenant_id, "attempt": attempt}
    if files:
        session.execute(insert(KeptFile), [{**owner, **vars(file)} for file in files])


def kept_state(session: Session, job_id: str) -> KeptState:
    """The files that are kept of a job."""
    rows = session.scalars(select(KeptFile).where(KeptFile.job_id == job_id).order_by(KeptFile.path)).all()
    files = tuple(Kept(row.path, row.sha256, row.size) for row in rows)
    return KeptState(attempt=rows[0].attempt if rows else 0, files=files)


def forget_kept(session: Session, *, older_than_seconds: float) -> int:
    """Forget what is kept of jobs that succeeded, or ended otherwise so long ago; the number of files."""
    succeeded = Job.status == JobStatus.SUCCEEDED
    old = Job.status.in_(FINAL_STATUSES) & (Job.finished_at <= seconds_from_now(-older_than_seconds))
    ended = select(Job.id).join(KeptFile, KeptFile.job_id == Job.id).where(succeeded | old)
    gone = delete(KeptFile).where(KeptFile.job_id.in_(ended)).returning(KeptFile.path)
    return len(session.execute(gone.execution_options(synchronize_session=False)).all())
