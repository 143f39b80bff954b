"""Retention in the sweep: uploads that were never completed go with the parts that lie in a folder."""

from pathlib import Path

from sqlalchemy import update

from app.settings import Settings
from app.store.blobs import open_blobs
from app.store.clock import seconds_from_now
from app.store.keys import ensure_tenant
from app.store.models import Upload
from app.store.session import Database
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
