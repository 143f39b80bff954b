"""`bitwright backup`, `restore` and `gc`: the operator's hands on all that a service keeps."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from app.cli.environment import use_data_dir
from app.cli.private_files import keep_private
from bitwright.cli.connection import DataDirOption
from bitwright.cli.render import err, out

DAY = 86_400.0
FolderArgument = Annotated[Path, typer.Argument(help="Folder of the backup.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def backup(folder: FolderArgument, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Copy the database and all blobs into a folder while the service runs; a second time, of the blobs what is new."""
    from app.store.blobs import open_blobs  # noqa: PLC0415
    from app.store.session import Database  # noqa: PLC0415
    from app.store.upkeep.backup import back_up  # noqa: PLC0415 (needs the `api` extra)

    settings = use_data_dir(data_dir)
    database = Database(settings.database_url)
    try:
        manifest = back_up(database, open_blobs(settings.blob_url), folder)
    finally:
        database.close()
    if as_json:
        typer.echo(json.dumps(asdict(manifest)))
    else:
        out().print(f"{sum(manifest.rows.values())} rows of schema {manifest.revision} and {manifest.blobs} blobs")
    if manifest.missing:
        said = "the blob store lacks {} blobs that jobs or uploads name: their downloads fail, here and after a restore"
        err().print(said.format(len(manifest.missing)))


def restore(folder: FolderArgument, data_dir: DataDirOption = None) -> None:
    """Bring a backup into a new database and the blob store. The database may be of the other kind."""
    from app.store.blobs import open_blobs  # noqa: PLC0415
    from app.store.upkeep.backup import restore as bring_back  # noqa: PLC0415 (needs the `api` extra)

    settings = use_data_dir(data_dir)
    keep_private(settings)
    manifest = bring_back(settings.database_url, open_blobs(settings.blob_url), folder)
    out().print(f"{sum(manifest.rows.values())} rows and {manifest.blobs} blobs of {manifest.taken_at} are back")
    out().print("keys are as they were then; jobs that ran are taken up again")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete now what a sweep deletes every ten minutes: expired uploads and jobs, and bytes that nothing names."""
    from app.store.blobs import open_blobs  # noqa: PLC0415 (needs the `api` extra)
    from app.store.session import Database  # noqa: PLC0415
    from app.store.upkeep.garbage import collect_blobs, count_old_jobs, remove_old_jobs, unnamed_blobs  # noqa: PLC0415
    from app.store.uploads import count_expired_uploads, remove_expired_uploads  # noqa: PLC0415

    settings = use_data_dir(data_dir)
    database, blobs = Database(settings.database_url), open_blobs(settings.blob_url)
    seconds = None if settings.job_retention_days is None else settings.job_retention_days * DAY
    try:
        with database.reading() as session:
            jobs = 0 if seconds is None else count_old_jobs(session, older_than_seconds=seconds)
            uploads = count_expired_uploads(session)
        if not dry_run:
            with database.transaction() as session:
                removed = remove_expired_uploads(session)
            for upload_id in removed:
                shutil.rmtree(settings.upload_dir / upload_id, ignore_errors=True)
            while seconds is not None:
                with database.transaction() as session:
                    if not remove_old_jobs(session, older_than_seconds=seconds):
                        break
        entries = list(unnamed_blobs(database, blobs, job_seconds=seconds))
        if not dry_run:
            deleted = set(collect_blobs(database, blobs))
            entries = [entry for entry in entries if entry.sha256 in deleted]
    finally:
        database.close()
    told = {"jobs": jobs, "uploads": uploads, "blobs": len(entries), "bytes": sum(entry.size for entry in entries)}
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **told}))
        return
    verb = "would be deleted" if dry_run else "deleted"
    out().print(f"{verb}: {jobs} jobs, {uploads} uploads, {told['blobs']} blobs of {told['bytes']} bytes")
