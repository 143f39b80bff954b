"""Retention in the sweep: uploads that were never completed go with the parts that lie in a folder."""

from pathlib import Path

from sqlalchemy import select, update

from app.settings import Settings
from app.store.blobs import open_blobs
from app.store.clock import seconds_from_now
from app.store.models import AuditEntry, Upload
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant
from app.store.uploads import NewUploadFile, UploadRepository
from workers.sweep import Sweep


def test_an_expired_upload_goes_with_its_parts(tmp_path: Path, sqlite_url: str) -> None:
    settings = Settings(data_dir=tmp_path, database_url=sqlite_url)
    database = Database(sqlite_url)
    with database.transaction() as session:
        uploads = UploadRepository(session, ensure_tenant(session, "first").id)
        late, fresh = (uploads.create([NewUploadFile("a.jsonl", 3, "0" * 64)]).id for _ in range(2))
        session.execute(update(Upload).where(Upload.id == late).values(expires_at=seconds_from_now(-1)))
    for upload_id in (late, fresh):
        (settings.upload_dir / upload_id).mkdir(parents=True)
        (settings.upload_dir / upload_id / "0000.part").write_bytes(b"ab")
    Sweep(settings, database, open_blobs(settings.blob_url), "sweep-1").throw_away()
    assert [folder.name for folder in settings.upload_dir.iterdir()] == [fresh]
    database.close()


def test_entries_of_the_audit_log_go_when_they_are_old(tmp_path: Path, sqlite_url: str) -> None:
    database = Database(sqlite_url)
    for days in (10, 400):
        with database.transaction() as session:
            at = seconds_from_now(-days * 86_400.0)
            session.add(AuditEntry(id=f"aud_{days}", at=at, tenant_id="tnt_x", action="job.submitted", subject="s"))

    def left(**settings: object) -> list[str]:
        given = Settings.model_validate({"data_dir": tmp_path, "database_url": sqlite_url, **settings})
        Sweep(given, database, open_blobs(given.blob_url), "sweep-1").throw_away()
        with database.reading() as session:
            return sorted(session.scalars(select(AuditEntry.id)))

    assert left(audit_retention_days=None) == ["aud_10", "aud_400"]
    assert left() == ["aud_10"]
    assert left(audit_retention_days=5) == []
    database.close()
