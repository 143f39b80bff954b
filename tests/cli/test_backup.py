"""`bitwright backup`, `restore` and `gc` on both databases, as an operator types them."""

import json
import os
from pathlib import Path

from sqlalchemy import update

from app.store.blobs import FolderBlobs
from app.store.clock import seconds_from_now
from app.store.jobs import JobRepository
from app.store.models import Job, Upload
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant
from app.store.upkeep.garbage import GRACE_SECONDS
from app.store.uploads import NewUploadFile, UploadRepository
from bitwright.errors import NotFound
from tests.cli.processes import command
from tests.store.samples import add
from tests.store.test_backup import everything, succeed


def test_a_backup_is_restored_elsewhere(database_url: str, tmp_path: Path) -> None:
    source, target, folder = tmp_path / "source", tmp_path / "target", str(tmp_path / "backup")
    database = Database(database_url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "t").id
    succeed(database, tenant, FolderBlobs(source / "blobs"), tmp_path, b"content")
    made = command("backup", folder, "--data-dir", str(source), BITWRIGHT_DATABASE_URL=database_url)
    assert (made.returncode, made.stderr) == (0, "")
    assert "1 blobs" in made.stdout
    back = command("restore", folder, "--data-dir", str(target))
    assert (back.returncode, back.stderr) == (0, "")
    restored = Database(f"sqlite:///{target / 'bitwright.db'}")
    assert everything(restored) == everything(database)
    (blob,) = FolderBlobs(target / "blobs").entries()
    twice = command("restore", folder, "--data-dir", str(target))
    assert (twice.returncode, "tenants already" in twice.stderr) == (2, True)
    FolderBlobs(source / "blobs").delete(blob.sha256)
    told = command(
        "backup", str(tmp_path / "other"), "--json", "--data-dir", str(source), BITWRIGHT_DATABASE_URL=database_url
    )
    assert json.loads(told.stdout)["missing"] == [blob.sha256]
    assert "lacks 1 blobs" in told.stderr
    for opened in (database, restored):
        opened.close()


def test_what_would_go_is_told_and_then_goes(database_url: str, tmp_path: Path) -> None:
    blobs, database = FolderBlobs(tmp_path / "blobs"), Database(database_url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "t").id
        upload = UploadRepository(session, tenant).create([NewUploadFile("a.jsonl", 3, "0" * 64)])
        session.execute(update(Upload).values(expires_at=seconds_from_now(-1)))
    (tmp_path / "uploads" / upload.id).mkdir(parents=True)
    old = succeed(database, tenant, blobs, tmp_path, b"old")
    kept = succeed(database, tenant, blobs, tmp_path, b"kept")
    queued = add(database, tenant)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id.in_([old, queued])).values(finished_at=seconds_from_now(-3 * 86_400)))
        JobRepository(session, tenant).delete(kept)
    for entry in blobs.entries():
        place, then = blobs.path(entry.sha256), entry.modified.timestamp() - GRACE_SECONDS - 60
        assert place is not None
        os.utime(place, (then, then))

    def gc(*words: str, **environment: str) -> dict[str, object]:
        where = {"BITWRIGHT_DATABASE_URL": database_url, **environment}
        done = command("gc", "--json", "--data-dir", str(tmp_path), *words, **where)
        assert done.returncode == 0
        told: dict[str, object] = json.loads(done.stdout)
        return told

    assert gc("--dry-run") == {"dry_run": True, "jobs": 0, "uploads": 1, "blobs": 1, "bytes": 4}
    two_days = {"BITWRIGHT_JOB_RETENTION_DAYS": "2"}
    assert gc("--dry-run", **two_days) == {"dry_run": True, "jobs": 1, "uploads": 1, "blobs": 2, "bytes": 7}
    assert len(list(blobs.entries())) == 2
    assert gc(**two_days) == {"dry_run": False, "jobs": 1, "uploads": 1, "blobs": 2, "bytes": 7}
    assert list(blobs.entries()) == []
    assert not (tmp_path / "uploads" / upload.id).exists()
    assert gc(**two_days) == {"dry_run": False, "jobs": 0, "uploads": 0, "blobs": 0, "bytes": 0}
    with database.reading() as session:
        assert JobRepository(session, tenant).get(queued).id == queued
        try:
            JobRepository(session, tenant).get(old)
        except NotFound:
            pass
        else:
            raise AssertionError("the old job is still there")
    database.close()
