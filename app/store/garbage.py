"""What nobody needs any more: expired rows, and blobs that no row names."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from app.domain.jobs import FINAL_STATUSES
from app.store.blobs import BlobStore
from app.store.clock import now, seconds_from_now
from app.store.models import Artifact, IdempotencyKey, Job, Upload, UploadFile
from app.store.session import Database

GRACE_SECONDS = 3600.0
"""A blob is stored before the row that names it is committed; one put more recently than this is left alone."""


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
    deleted = []
    for entry in blobs.entries():
        if entry.modified >= before:
            continue
        with database.reading() as session:
            if is_referenced(session, entry.sha256):
                continue
        # Asked again: the bytes may have been put anew since they were listed.
        modified = blobs.modified(entry.sha256)
        if modified is not None and modified < before:
            blobs.delete(entry.sha256)
            deleted.append(entry.sha256)
    return deleted


def is_referenced(session: Session, sha256: str) -> bool:
    """Whether an artifact or a complete upload of any tenant names these bytes."""
    artifact = exists().where(Artifact.sha256 == sha256)
    upload = (
        exists()
        .where(UploadFile.sha256 == sha256)
        .where(Upload.id == UploadFile.upload_id, Upload.completed_at.is_not(None))
    )
    return bool(session.scalar(select(artifact | upload)))
