"""Removal of expired rows, and of blobs that no row names."""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from itertools import islice

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.store.blobs import BlobStore
from app.store.clock import now, seconds_from_now
from app.store.models import Artifact, IdempotencyKey, Job, Upload, UploadFile
from app.store.session import Database
from bitwright.job_states import FINAL_STATUSES

GRACE_SECONDS = 24 * 3600.0
"""A blob is stored before the row that names it is committed, and a large checkpoint or upload takes hours to store."""
HASHES_A_QUERY = 500


def remove_expired_keys(session: Session) -> None:
    """Remove Idempotency-Keys that have expired."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.expires_at <= now()))


def remove_old_jobs(session: Session, *, older_than_seconds: float) -> list[str]:
    """Remove jobs that ended so long ago, with all that belongs to them; their ids."""
    old = (Job.status.in_(FINAL_STATUSES), Job.finished_at <= seconds_from_now(-older_than_seconds))
    return list(session.scalars(delete(Job).where(*old).returning(Job.id)))


def collect_blobs(database: Database, blobs: BlobStore, *, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Delete the blobs that no artifact and no complete upload names; their hashes."""
    before = datetime.now(UTC) - timedelta(seconds=grace_seconds)
    blobs.tidy(before)
    deleted = []
    old = (entry.sha256 for entry in blobs.entries() if entry.modified < before)
    while some := list(islice(old, HASHES_A_QUERY)):
        with database.reading() as session:
            unnamed = set(some) - named_blobs(session, some)
        for sha256 in sorted(unnamed):
            # Asked again: the bytes may have been put anew since they were listed.
            modified = blobs.modified(sha256)
            if modified is not None and modified < before:
                blobs.delete(sha256)
                deleted.append(sha256)
    return deleted


def named_blobs(session: Session, hashes: Collection[str]) -> set[str]:
    """Those of the hashes that an artifact or a complete upload of any tenant names."""
    artifacts = select(Artifact.sha256).where(Artifact.sha256.in_(hashes))
    uploads = (
        select(UploadFile.sha256)
        .join(Upload, Upload.id == UploadFile.upload_id)
        .where(UploadFile.sha256.in_(hashes), Upload.completed_at.is_not(None))
    )
    return set(session.scalars(artifacts)) | set(session.scalars(uploads))
