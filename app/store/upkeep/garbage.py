"""Removal of expired rows, and of blobs that no row names."""

from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby, islice

from sqlalchemy import ColumnElement, delete, exists, func, select
from sqlalchemy.orm import Session

from app.store.blobs import BlobEntry, BlobStore
from app.store.clock import now, seconds_from_now
from app.store.models import Artifact, IdempotencyKey, Job, KeptFile, Upload, UploadFile
from app.store.session import Database
from bitwright.job_states import FINAL_STATUSES

GRACE_SECONDS = 24 * 3600.0
"""A blob is stored before the row that names it is committed, and a large checkpoint or upload takes hours to store."""
HASHES_A_QUERY = 500
ROWS_A_TRANSACTION = 1000
"""Jobs or keys that one transaction removes: on SQLite nobody else writes meanwhile."""


def remove_expired_keys(session: Session, *, limit: int = ROWS_A_TRANSACTION) -> int:
    """Remove up to `limit` Idempotency-Keys that have expired; how many there were."""
    expired = (
        select(IdempotencyKey.tenant_id, IdempotencyKey.key).where(IdempotencyKey.expires_at <= now()).limit(limit)
    )
    rows = session.execute(expired).all()
    for tenant_id, keys in groupby(sorted(rows), key=lambda row: row.tenant_id):
        these = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key.in_([row.key for row in keys]))
        # Asked again: a caller may have taken the key anew meanwhile.
        session.execute(delete(IdempotencyKey).where(*these, IdempotencyKey.expires_at <= now()))
    return len(rows)


def remove_old_jobs(session: Session, *, older_than_seconds: float, limit: int = ROWS_A_TRANSACTION) -> list[str]:
    """Remove up to `limit` jobs that ended so long ago, with all that belongs to them; their ids."""
    old = _old(older_than_seconds)
    some = select(Job.id).where(*old).order_by(Job.finished_at).limit(limit)
    return list(session.scalars(delete(Job).where(Job.id.in_(some), *old).returning(Job.id)))


def collect_blobs(database: Database, blobs: BlobStore, *, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Delete the blobs that no artifact, complete upload or unfinished job names; their hashes."""
    before = datetime.now(UTC) - timedelta(seconds=grace_seconds)
    blobs.tidy(before)
    deleted = []
    for entry in unnamed_blobs(database, blobs, grace_seconds=grace_seconds):
        # Asked again: the bytes may have been put anew since they were listed.
        modified = blobs.modified(entry.sha256)
        if modified is not None and modified < before:
            blobs.delete(entry.sha256)
            deleted.append(entry.sha256)
    return deleted


def unnamed_blobs(
    database: Database, blobs: BlobStore, *, grace_seconds: float = GRACE_SECONDS, job_seconds: float | None = None
) -> Iterator[BlobEntry]:
    """The blobs that no artifact, complete upload or unfinished job names, and that nobody has put for `grace_seconds`.

    job_seconds   jobs that ended so long ago count as removed
    """
    before = datetime.now(UTC) - timedelta(seconds=grace_seconds)
    old = (entry for entry in blobs.entries() if entry.modified < before)
    while some := {entry.sha256: entry for entry in islice(old, HASHES_A_QUERY)}:
        with database.reading() as session:
            unnamed = set(some) - named_blobs(session, some, job_seconds)
        yield from (some[sha256] for sha256 in sorted(unnamed))


def count_old_jobs(session: Session, *, older_than_seconds: float) -> int:
    """Number of jobs that `remove_old_jobs` would remove, called until there are none."""
    return session.scalar(select(func.count()).select_from(Job).where(*_old(older_than_seconds))) or 0


def _old(seconds: float) -> tuple[ColumnElement[bool], ...]:
    return (Job.finished_at <= seconds_from_now(-seconds), Job.status.in_(FINAL_STATUSES))


def named_blobs(session: Session, hashes: Collection[str], job_seconds: float | None = None) -> set[str]:
    """Those of the hashes that an artifact, a complete upload or what is kept of a job names; see `unnamed_blobs`."""
    artifacts = select(Artifact.sha256).where(Artifact.sha256.in_(hashes))
    if job_seconds is not None:
        artifacts = artifacts.where(~exists().where(Job.id == Artifact.job_id, *_old(job_seconds)))
    uploads = (
        select(UploadFile.sha256)
        .join(Upload, Upload.id == UploadFile.upload_id)
        .where(UploadFile.sha256.in_(hashes), Upload.completed_at.is_not(None))
    )
    kept = select(KeptFile.sha256).where(KeptFile.sha256.in_(hashes))
    return set(session.scalars(artifacts)) | set(session.scalars(uploads)) | set(session.scalars(kept))
