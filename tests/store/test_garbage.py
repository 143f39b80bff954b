import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import update

from app.store.attempts import AttemptWriter, NewArtifact
from app.store.blobs import Blob, FolderBlobs
from app.store.clock import seconds_from_now
from app.store.idempotency import Idempotency
from app.store.jobs import JobRepository
from app.store.models import IdempotencyKey, Job
from app.store.session import Database
from app.store.upkeep import garbage
from app.store.upkeep.garbage import GRACE_SECONDS, collect_blobs, remove_expired_keys, remove_old_jobs
from app.store.uploads import NewUploadFile, UploadRepository
from bitwright.errors import NotFound
from tests.reports import report
from tests.store.samples import add, get, request, take


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


def put(blobs: FolderBlobs, tmp_path: Path, content: str, age: float = GRACE_SECONDS + 60) -> Blob:
    source = tmp_path / "source"
    source.write_text(content)
    blob = blobs.put(source)
    place = blobs.path(blob.sha256)
    assert place is not None
    then = datetime.now(UTC).timestamp() - age
    os.utime(place, (then, then))
    return blob


def finish(database: Database, tenant: str, *files: Blob) -> str:
    """A succeeded job with these files."""
    job_id = add(database, tenant)
    held = take(database)
    made = [NewArtifact("native", f"{n}.bin", file.sha256, file.size, "x/y") for n, file in enumerate(files)]
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).succeed(report(), made)
    return job_id


def delete(database: Database, tenant: str, job_id: str) -> None:
    with database.transaction() as session:
        JobRepository(session, tenant).delete(job_id)


def test_a_blob_lives_as_long_as_any_job_names_it(
    database: Database, tenant: str, stranger: str, blobs: FolderBlobs, tmp_path: Path
) -> None:
    shared, own = put(blobs, tmp_path, "shared"), put(blobs, tmp_path, "own")
    first = finish(database, tenant, shared, own)
    second = finish(database, stranger, shared)
    assert collect_blobs(database, blobs) == []
    delete(database, tenant, first)
    assert collect_blobs(database, blobs) == [own.sha256]
    delete(database, stranger, second)
    assert collect_blobs(database, blobs) == [shared.sha256]
    assert list(blobs.entries()) == []


def test_more_blobs_than_one_query_asks_for(
    database: Database, tenant: str, blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "HASHES_A_QUERY", 2)
    made = [put(blobs, tmp_path, f"blob {number}") for number in range(5)]
    finish(database, tenant, made[0], made[3])
    assert set(collect_blobs(database, blobs)) == {made[n].sha256 for n in (1, 2, 4)}
    assert {entry.sha256 for entry in blobs.entries()} == {made[0].sha256, made[3].sha256}


def test_bytes_that_were_just_put_are_left_alone(database: Database, blobs: FolderBlobs, tmp_path: Path) -> None:
    fresh, old = put(blobs, tmp_path, "fresh", age=GRACE_SECONDS - 60), put(blobs, tmp_path, "old")
    assert collect_blobs(database, blobs) == [old.sha256]
    assert blobs.exists(fresh.sha256)


def test_bytes_put_anew_while_they_are_looked_at_stay(
    database: Database, blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = put(blobs, tmp_path, "again")
    listed = list(blobs.entries())
    blobs.put(tmp_path / "source")
    monkeypatch.setattr(blobs, "entries", lambda: iter(listed))
    assert collect_blobs(database, blobs) == []
    assert blobs.exists(blob.sha256)


def test_a_complete_upload_keeps_its_blobs(database: Database, tenant: str, blobs: FolderBlobs, tmp_path: Path) -> None:
    blob = put(blobs, tmp_path, "uploaded")
    with database.transaction() as session:
        uploads = UploadRepository(session, tenant)
        upload = uploads.create([NewUploadFile("a", blob.size, blob.sha256)])
        uploads.advance(upload.id, "a", start=0, end=blob.size)
        uploads.complete(upload.id)
    assert collect_blobs(database, blobs) == []
    with database.transaction() as session:
        UploadRepository(session, tenant).delete(upload.id)
    assert collect_blobs(database, blobs) == [blob.sha256]


def test_an_open_upload_claims_no_bytes_by_their_hash(
    database: Database, tenant: str, blobs: FolderBlobs, tmp_path: Path
) -> None:
    blob = put(blobs, tmp_path, "someone else's")
    with database.transaction() as session:
        UploadRepository(session, tenant).create([NewUploadFile("a", blob.size, blob.sha256)])
    assert collect_blobs(database, blobs) == [blob.sha256]


def test_retention_removes_old_ended_jobs_only(database: Database, tenant: str) -> None:
    old, recent = finish(database, tenant), finish(database, tenant)
    queued = add(database, tenant)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id.in_([old, queued])).values(finished_at=seconds_from_now(-1000)))
        assert remove_old_jobs(session, older_than_seconds=900) == [old]
    with pytest.raises(NotFound):
        get(database, tenant, old)
    assert get(database, tenant, recent)
    assert get(database, tenant, queued)


def test_expired_keys_go_and_others_stay(database: Database, tenant: str) -> None:
    for key in ("old", "new"):
        with database.transaction() as session:
            JobRepository(session, tenant).add(request(), idempotency=Idempotency.of(key, request()))
    with database.transaction() as session:
        old = IdempotencyKey.key == "old"
        session.execute(update(IdempotencyKey).where(old).values(expires_at=seconds_from_now(-1)))
        remove_expired_keys(session)
    with database.reading() as session:
        assert session.get(IdempotencyKey, (tenant, "old")) is None
        assert session.get(IdempotencyKey, (tenant, "new")) is not None
