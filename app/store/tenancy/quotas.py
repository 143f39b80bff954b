"""Use of a tenant's quotas, and the refusal of more. Sums are taken when a quota asks for them."""

from dataclasses import dataclass
from datetime import datetime
from math import ceil

from sqlalchemy import case, func, or_, select
from sqlalchemy.orm import Session

from app.store.clock import now, seconds_from_now
from app.store.models import Artifact, Job, RateWindow, Tenant, Upload, UploadFile
from app.store.upsert import upsert
from bitwright.errors import BodyTooLarge, QueuedJobsExceeded, RateLimitExceeded, StorageExceeded, UploadsExceeded
from bitwright.job_states import JobStatus
from bitwright.tenancy import Quotas, UsedView

POSTS = "posts"
WINDOW_SECONDS = 60
"""Of the rate of POST requests."""
QUEUE_RETRY_SECONDS = 30
STORAGE_RETRY_SECONDS = 600


@dataclass(frozen=True)
class Spent:
    """A rate after a request: what is left of the window, and its seconds."""

    remaining: int
    seconds: int


def spend_post(session: Session, tenant_id: str, per_minute: int) -> Spent:
    """Count a POST request of the tenant in one statement, whichever process answers it.

    Raises:
        RateLimitExceeded: the window is used up; nothing is counted.
    """
    window = seconds_from_now(WINDOW_SECONDS)
    over = RateWindow.ends_at <= now()
    counted = {
        "used": case((over, 1), else_=RateWindow.used + 1),
        "ends_at": case((over, window), else_=RateWindow.ends_at),
    }
    statement = (
        upsert(session, RateWindow)
        .values(tenant_id=tenant_id, name=POSTS, used=1, ends_at=window)
        .on_conflict_do_update(
            index_elements=["tenant_id", "name"], set_=counted, where=or_(over, RateWindow.used < per_minute)
        )
        .returning(RateWindow.used, RateWindow.ends_at, now())
    )
    row = session.execute(statement).one_or_none() if per_minute > 0 else None
    if row is not None:
        return Spent(max(per_minute - row[0], 0), _seconds_left(row[1], row[2]))
    this = (RateWindow.tenant_id == tenant_id, RateWindow.name == POSTS)
    ends = session.execute(select(RateWindow.ends_at, now()).where(*this)).one_or_none()
    wait = WINDOW_SECONDS if ends is None else _seconds_left(ends[0], ends[1])
    raise RateLimitExceeded(
        f"the tenant may send {per_minute} POST requests a minute",
        quota=per_minute,
        retry_after_seconds=wait,
        window_seconds=WINDOW_SECONDS,
    )


def require_queue_room(session: Session, tenant_id: str, quotas: Quotas, *, queued: int = 0) -> int | None:
    """Check that one more job may wait; how many more then, None without a quota. Submissions of one tenant come one
    after the other here.

    queued   of the waiting ones, those that the check is for

    Raises:
        QueuedJobsExceeded: as many wait as may.
    """
    if quotas.queued_jobs is None:
        return None
    _lock(session, tenant_id)
    room = quotas.queued_jobs - _jobs(session, tenant_id, JobStatus.QUEUED) - 1 + queued
    if room < 0:
        raise QueuedJobsExceeded(
            f"{quotas.queued_jobs} jobs of the tenant may wait, and as many do",
            quota=quotas.queued_jobs,
            retry_after_seconds=QUEUE_RETRY_SECONDS,
        )
    return room


def require_storage(session: Session, tenant_id: str, quotas: Quotas, more_bytes: int = 1) -> None:
    """Check that the tenant may store so much more.

    Raises:
        StorageExceeded: its artifacts and uploads would take more than they may.
    """
    if quotas.storage_bytes is None:
        return
    _lock(session, tenant_id)
    used = stored_bytes(session, tenant_id)
    if used + more_bytes > quotas.storage_bytes:
        raise StorageExceeded(
            f"the tenant may store {quotas.storage_bytes} bytes and stores {used}",
            value=used,
            quota=quotas.storage_bytes,
            retry_after_seconds=STORAGE_RETRY_SECONDS,
        )


def require_upload_room(session: Session, tenant_id: str, quotas: Quotas, total_bytes: int) -> None:
    """Check that the tenant may begin an upload of so many bytes.

    Raises:
        BodyTooLarge: one upload may not be so large.
        UploadsExceeded: it has as many uploads as it may.
        StorageExceeded: see `require_storage`.
    """
    if quotas.upload_bytes is not None and total_bytes > quotas.upload_bytes:
        detail = f"the files have {total_bytes} bytes together; one upload of the tenant may have {quotas.upload_bytes}"
        hint = "leave files out that no job reads, or ask the operator to raise the tenant's quota upload_bytes"
        raise BodyTooLarge(detail, field="files", value=total_bytes, hint=hint)
    if quotas.uploads is not None:
        _lock(session, tenant_id)
        if _uploads(session, tenant_id) >= quotas.uploads:
            raise UploadsExceeded(
                f"the tenant may have {quotas.uploads} uploads, and has as many",
                quota=quotas.uploads,
                retry_after_seconds=STORAGE_RETRY_SECONDS,
            )
    require_storage(session, tenant_id, quotas, total_bytes)


def used_by(session: Session, tenant_id: str) -> UsedView:
    """The tenant's use of its quotas now."""
    return UsedView(
        queued_jobs=_jobs(session, tenant_id, JobStatus.QUEUED),
        running_jobs=_jobs(session, tenant_id, JobStatus.RUNNING),
        storage_bytes=stored_bytes(session, tenant_id),
        uploads=_uploads(session, tenant_id),
    )


def stored_bytes(session: Session, tenant_id: str) -> int:
    """Bytes of the tenant's artifacts and uploads; of an open upload, those that were announced."""
    sums = (
        session.scalar(select(func.coalesce(func.sum(table.size), 0)).where(table.tenant_id == tenant_id))
        for table in (Artifact, UploadFile)
    )
    return sum(int(size or 0) for size in sums)


def stored_bytes_by_tenant(session: Session) -> dict[str, int]:
    """`stored_bytes` of every tenant that stores anything, for metrics."""
    stored: dict[str, int] = {}
    for table in (Artifact, UploadFile):
        rows = session.execute(select(table.tenant_id, func.sum(table.size)).group_by(table.tenant_id))
        for tenant_id, size in rows:
            stored[tenant_id] = stored.get(tenant_id, 0) + int(size)
    return stored


def _lock(session: Session, tenant_id: str) -> None:
    """Hold the tenant's row, so that two requests do not both take what is left. References to it wait for nobody."""
    session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))


def _jobs(session: Session, tenant_id: str, status: JobStatus) -> int:
    where = (Job.tenant_id == tenant_id, Job.status == status)
    return session.scalar(select(func.count()).select_from(Job).where(*where)) or 0


def _uploads(session: Session, tenant_id: str) -> int:
    return session.scalar(select(func.count()).select_from(Upload).where(Upload.tenant_id == tenant_id)) or 0


def _seconds_left(ends_at: datetime, at: datetime) -> int:
    return max(1, ceil((ends_at - at).total_seconds()))
