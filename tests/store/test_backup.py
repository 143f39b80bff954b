"""A backup that is taken while jobs come, end and go is restored whole, into either kind of database."""

import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, select, text

from app.domain.access import Scope
from app.store.attempts import AttemptWriter, NewArtifact
from app.store.blobs import FolderBlobs
from app.store.endings import requeue_lost
from app.store.jobs import JobRepository
from app.store.models import Artifact, Base, Job
from app.store.session import Database, schema_serves
from app.store.tenancy.keys import authenticate, issue_key
from app.store.upkeep.backup import MANIFEST, back_up, read_manifest, restore
from app.store.upkeep.garbage import collect_blobs
from app.store.uploads import NewUploadFile, UploadRepository
from bitwright.errors import Conflict, CorruptCheckpoint
from tests import servers
from tests.reports import report
from tests.store.samples import add, progress, take, tell

PASSING = {"worker", "sweep_lease"}


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


@pytest.fixture(params=["sqlite", "postgresql"])
def target_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each kind of database in turn, without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'restored.db'}"
        return
    postgres: URL = request.getfixturevalue("postgres")
    with servers.postgres_database(postgres) as url:
        yield servers.text(url)


def succeed(database: Database, tenant: str, blobs: FolderBlobs, folder: Path, content: bytes) -> str:
    """A succeeded job with one file."""
    job_id = add(database, tenant, metadata={"n": str(len(content))})
    held = take(database)
    source = folder / f"made-{job_id}"
    source.write_bytes(content)
    blob = blobs.put(source)
    tell(database, held, progress(1.5))
    with database.transaction() as session:
        made = [NewArtifact("native", "a.bin", blob.sha256, blob.size, "x/y")]
        AttemptWriter(session, held.job_id, held.attempt).succeed(report(), made)
    return held.job_id


def everything(database: Database) -> dict[str, list[tuple[object, ...]]]:
    """All rows that are to be kept, as this release reads them."""
    with database.reading() as session:
        return {
            table.name: sorted((tuple(map(repr, row)) for row in session.execute(select(table))), key=str)
            for table in Base.metadata.sorted_tables
            if table.name not in PASSING
        }


def test_all_rows_and_blobs_come_back(
    database: Database, tenant: str, stranger: str, blobs: FolderBlobs, tmp_path: Path, target_url: str
) -> None:
    for owner in (tenant, stranger):
        succeed(database, owner, blobs, tmp_path, f"of {owner}".encode())
    add(database, tenant)
    running = take(database)
    with database.transaction() as session:
        _, key = issue_key(session, tenant, name="k", scopes=frozenset({Scope.READ}))
        UploadRepository(session, tenant).create([NewUploadFile("a.jsonl", 3, "0" * 64)])
    before = everything(database)
    manifest = back_up(database, blobs, tmp_path / "backup")
    assert (manifest.rows["job"], manifest.blobs, manifest.gone, manifest.missing) == (3, 2, [], [])
    other = FolderBlobs(tmp_path / "other")
    restore(target_url, other, tmp_path / "backup")
    restored = Database(target_url)
    assert schema_serves(restored)
    assert everything(restored) == before
    with restored.reading() as session:
        assert authenticate(session, key).tenant_id == tenant
        hashes = set(session.scalars(select(Artifact.sha256)))
        assert session.scalar(text("SELECT count(*) FROM job WHERE error IS NULL")) == 3  # and not JSON's null
    assert {entry.sha256 for entry in other.entries()} == hashes
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o700
    with restored.transaction() as session:  # its lease is over, as after any outage
        session.execute(text("UPDATE job SET lease_expires_at = created_at WHERE status = 'running'"))
        assert [job_id for job_id, _ in requeue_lost(session)] == [running.job_id]
    with pytest.raises(Conflict, match="tenants already"):
        restore(target_url, other, tmp_path / "backup")
    restored.close()


def test_a_backup_under_load_is_of_one_moment(
    database: Database, tenant: str, blobs: FolderBlobs, tmp_path: Path
) -> None:
    """Jobs are added, ended and deleted with their bytes all the while: what comes back is whole."""
    made = [succeed(database, tenant, blobs, tmp_path, bytes([n]) * 1000) for n in range(20)]
    stopping, faults = threading.Event(), list[BaseException]()

    def work() -> None:
        number = 20
        try:
            while not stopping.is_set():
                succeed(database, tenant, blobs, tmp_path, f"{number}".encode() * 300)
                with database.transaction() as session:
                    JobRepository(session, tenant).delete(made.pop())
                collect_blobs(database, blobs, grace_seconds=0)
                number += 1
                if not made:
                    return
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    target = f"sqlite:///{tmp_path / 'restored.db'}"
    manifest = back_up(database, blobs, tmp_path / "backup")
    stopping.set()
    thread.join()
    assert faults == []
    other = FolderBlobs(tmp_path / "other")
    restore(target, other, tmp_path / "backup")
    restored = Database(target)
    with restored.reading() as session:
        jobs = session.scalars(select(Job)).all()
        named = {row.job_id: row.sha256 for row in session.scalars(select(Artifact))}
    assert len(jobs) == manifest.rows["job"] - len(manifest.gone)
    assert {job.id for job in jobs if job.status == "succeeded"} == set(named)
    assert all(other.exists(sha256) for sha256 in named.values())
    restored.close()


def test_bytes_that_went_while_it_ran_take_their_jobs_with_them(
    database: Database, tenant: str, blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, kept = (succeed(database, tenant, blobs, tmp_path, content) for content in (b"gone", b"kept"))
    exists, looked = blobs.exists, list[str]()

    def delete_first(sha256: str) -> bool:
        if not looked:
            looked.append(sha256)
            with database.transaction() as session:
                JobRepository(session, tenant).delete(gone)
            collect_blobs(database, blobs, grace_seconds=0)
        return exists(sha256)

    monkeypatch.setattr(blobs, "exists", delete_first)
    manifest = back_up(database, blobs, tmp_path / "backup")
    assert (manifest.rows["job"], len(manifest.gone), manifest.missing) == (2, 1, [])
    restore(f"sqlite:///{tmp_path / 'r.db'}", FolderBlobs(tmp_path / "other"), tmp_path / "backup")
    restored = Database(f"sqlite:///{tmp_path / 'r.db'}")
    with restored.reading() as session:
        assert session.scalars(select(Job.id)).all() == [kept]
    restored.close()


def test_a_second_backup_copies_what_is_new(
    database: Database, tenant: str, blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed(database, tenant, blobs, tmp_path, b"first")
    back_up(database, blobs, tmp_path / "backup")
    succeed(database, tenant, blobs, tmp_path, b"second")
    opened, read = blobs.open, list[str]()

    def count(sha256: str) -> object:
        read.append(sha256)
        return opened(sha256)

    monkeypatch.setattr(blobs, "open", count)
    assert back_up(database, blobs, tmp_path / "backup").blobs == 2
    assert len(read) == 1


def test_a_blob_that_the_store_lacks_is_told(
    database: Database, tenant: str, blobs: FolderBlobs, tmp_path: Path
) -> None:
    succeed(database, tenant, blobs, tmp_path, b"lost")
    (entry,) = blobs.entries()
    blobs.delete(entry.sha256)
    assert back_up(database, blobs, tmp_path / "backup").missing == [entry.sha256]


def test_a_backup_that_was_changed_or_never_ended_is_refused(
    database: Database, tenant: str, blobs: FolderBlobs, tmp_path: Path
) -> None:
    folder = tmp_path / "backup"
    succeed(database, tenant, blobs, tmp_path, b"content")
    back_up(database, blobs, folder)
    target, other = f"sqlite:///{tmp_path / 'r.db'}", FolderBlobs(tmp_path / "other")
    file = folder / "rows" / "job.jsonl.gz"
    whole = file.read_bytes()
    file.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(CorruptCheckpoint, match="rows of job"):
        restore(target, other, folder)
    file.write_bytes(whole)
    (blob,) = FolderBlobs(folder / "blobs").entries()
    place = folder / "blobs" / blob.sha256[:2] / blob.sha256
    place.write_bytes(b"other")
    with pytest.raises(CorruptCheckpoint, match="was changed"):
        restore(target, other, folder)
    place.unlink()
    with pytest.raises(CorruptCheckpoint, match="0 of 1 blobs"):
        restore(target, other, folder)
    told = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**told, "revision": "9999", "blobs": 0}))
    with pytest.raises(Conflict, match="does not know the schema 9999"):
        restore(target, other, folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(Conflict, match="no finished backup"):
        read_manifest(folder)
