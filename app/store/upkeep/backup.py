"""Backup of a whole installation into a folder, and the way back: rows of one moment, and the blobs that they name.

    folder/manifest.json            written last: a backup without it is none
    folder/rows/TABLE.jsonl.gz      one row a line, times as ISO 8601 in UTC
    folder/blobs/ab/abcd...         by hash, as a folder of blobs; of a second backup into the folder, new ones alone

Rows are read in one snapshot while the service runs. They go back into a database of either kind, with the schema that
they were read with, and are then migrated. Parts of open uploads are left out: their owners send them again.
"""

import base64
import gzip
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Connection, DateTime, LargeBinary, MetaData, Table, delete, func, insert, select
from sqlalchemy.exc import SAWarning

from app.store.blobs import BlobStore, FolderBlobs
from app.store.models import Artifact, Job, Upload, UploadFile
from app.store.session import READING, Database, migrate, revision_of
from app.store.upkeep.garbage import named_blobs
from bitwright.errors import Conflict, CorruptCheckpoint, DiskFull, StorageError

FORMAT = 1
MANIFEST = "manifest.json"
PASSING = frozenset({"worker", "sweep_lease", "alembic_version", "kept_file"})
"""Tables of what lives now: a restored service registers its own, and its workers begin unfinished jobs anew."""
ROWS_A_STATEMENT = 500
EXPRESSION = "Skipped unsupported reflection of expression-based index"


@dataclass(frozen=True)
class Manifest:
    """Contents of a backup."""

    revision: str
    """Of the schema."""
    taken_at: str
    rows: Mapping[str, int]
    digests: Mapping[str, str]
    """SHA-256 of each file of rows."""
    blobs: int = 0
    gone: list[str] = field(default_factory=list)
    """Blobs that were deleted while the backup ran, with the jobs or uploads that had them: those are not restored."""
    missing: list[str] = field(default_factory=list)
    """Blobs that a job or an upload still names and the store does not have: it was damaged before."""
    format: int = FORMAT


def back_up(database: Database, blobs: BlobStore, folder: Path) -> Manifest:
    """Write a backup into a folder, which may hold an earlier one: its rows are replaced, its blobs kept.

    Raises:
        DiskFull, StorageError: the folder cannot take it, or a blob is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "rows").mkdir(exist_ok=True)
    kept = FolderBlobs(folder / "blobs")
    with suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
    counts, digests = {}, {}
    with closing(_snapshot(database)) as connection:
        revision = revision_of(connection)
        for table in _tables(connection):
            counts[table.name], digests[table.name] = _write_rows(connection, table, folder)
        names = list(connection.scalars(_named()))
    absent = [sha256 for sha256 in names if not _copy_blob(blobs, kept, folder, sha256)]
    with database.reading() as session:
        missing = sorted(named_blobs(session, absent)) if absent else []
    manifest = Manifest(
        revision=revision,
        taken_at=datetime.now(UTC).isoformat(),
        rows=counts,
        digests=digests,
        blobs=len(names) - len(absent),
        gone=sorted(set(absent) - set(missing)),
        missing=missing,
    )
    _write_durably(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def restore(url: str, blobs: BlobStore, folder: Path) -> Manifest:
    """Bring a backup into an empty database and the blob store, then to the newest schema. All rows or none.

    Raises:
        Conflict: the database has tenants already, or this release does not know the backup's schema.
        CorruptCheckpoint: a file of the backup is missing or was changed.
    """
    manifest = read_manifest(folder)
    for name, digest in manifest.digests.items():
        if _digest(_rows_file(folder, name)) != digest:
            raise CorruptCheckpoint(f"the rows of {name} are not those of the backup", field="folder", value=name)
    kept = FolderBlobs(folder / "blobs")
    count = 0
    for entry in kept.entries():
        source = kept.path(entry.sha256)
        if source is None or blobs.put(source).sha256 != entry.sha256:
            raise CorruptCheckpoint(f"the blob {entry.sha256} was changed", field="folder", value=entry.sha256)
        count += 1
    if count < manifest.blobs:
        raise CorruptCheckpoint(f"the backup has {count} of {manifest.blobs} blobs", field="folder", value=count)
    migrate(url, manifest.revision)
    database = Database(url)
    try:
        with database.transaction() as session:
            _read_rows(session.connection(), folder, manifest)
            _drop_what_lost_blobs(session.connection(), manifest.gone)
    finally:
        database.close()
    migrate(url)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Contents of the backup in a folder.

    Raises:
        Conflict: there is none, or none that was finished, or one of another format.
    """
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**told)
    except (OSError, ValueError, TypeError) as error:
        hint = "name the folder that `bitwright backup` was given, and wait for its end"
        raise Conflict(f"{folder} holds no finished backup", field="folder", value=str(folder), hint=hint) from error
    if manifest.format != FORMAT:
        hint = "restore it with the release that made it, and upgrade then"
        detail = f"the backup has format {manifest.format}, and this release reads {FORMAT}"
        raise Conflict(detail, field="folder", value=manifest.format, hint=hint)
    return manifest


def _snapshot(database: Database) -> Connection:
    """A connection that sees one moment for as long as it is open, and keeps no writer waiting."""
    options: dict[str, Any] = {READING: True}
    if database.engine.dialect.name == "postgresql":
        options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    return database.engine.connect().execution_options(**options)


def _tables(connection: Connection) -> list[Table]:
    """All tables to keep, as the database itself has them, each after those that it refers to."""
    found = MetaData()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", EXPRESSION, SAWarning)  # indexes are the migrations' business
        found.reflect(connection)
    for column in (column for table in found.tables.values() for column in table.columns):
        if isinstance(column.type, JSON):
            column.type = JSON(none_as_null=True)  # as in `app.store.models`
    return [table for table in found.sorted_tables if table.name not in PASSING]


def _write_rows(connection: Connection, table: Table, folder: Path) -> tuple[int, str]:
    """Write a table's rows; how many, and the SHA-256 of the file."""
    file, count = _rows_file(folder, table.name), 0
    query = select(table).execution_options(yield_per=ROWS_A_STATEMENT)
    with file.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=3, mtime=0) as packed:
        for row in connection.execute(query):
            packed.write(json.dumps(dict(row._mapping), default=_plain, separators=(",", ":")).encode() + b"\n")
            count += 1
        packed.close()
        raw.flush()
        os.fsync(raw.fileno())
    return count, _digest(file)


def _read_rows(connection: Connection, folder: Path, manifest: Manifest) -> None:
    tables = {table.name: table for table in _tables(connection)}
    if unknown := set(manifest.rows) - set(tables):
        hint = "restore it with the release that made it, or a newer one"
        raise Conflict(f"this database has no table {min(unknown)}", field="folder", value=min(unknown), hint=hint)
    if connection.scalar(select(func.count()).select_from(tables["tenant"])):
        hint = "restore into a new database: BITWRIGHT_DATABASE_URL, or --data-dir of an empty folder"
        raise Conflict("the database has tenants already", field="database_url", hint=hint)
    for name in (name for name in tables if name in manifest.rows):
        for part in _parts(_rows_file(folder, name), tables[name], connection.dialect.name):
            connection.execute(insert(tables[name]), part)


def _parts(file: Path, table: Table, dialect: str) -> Iterator[list[dict[str, Any]]]:
    times = [column.name for column in table.columns if isinstance(column.type, DateTime)]
    octets = [column.name for column in table.columns if isinstance(column.type, LargeBinary)]
    part: list[dict[str, Any]] = []
    with gzip.open(file, "rb") as lines:
        for line in lines:
            row = json.loads(line)
            for name in times:
                row[name] = _time(row[name], dialect)
            for name in octets:
                row[name] = None if row[name] is None else base64.b64decode(row[name])
            part.append(row)
            if len(part) == ROWS_A_STATEMENT:
                yield part
                part = []
    if part:
        yield part


def _plain(value: object) -> str:
    """A value that JSON has no word for."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _time(text: str | None, dialect: str) -> datetime | None:
    if text is None:
        return None
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=None) if dialect == "sqlite" else time  # as `app.store.clock.Instant` keeps it


def _named() -> Any:
    """The hashes that rows name, each once."""
    complete = select(UploadFile.sha256).join(Upload).where(Upload.completed_at.is_not(None))
    return select(Artifact.sha256).union(complete)


def _copy_blob(blobs: BlobStore, kept: FolderBlobs, folder: Path, sha256: str) -> bool:
    """Bring a blob into the backup, unless it is there; False if the store has it no more.

    Raises:
        StorageError: its bytes have another hash.
    """
    if kept.exists(sha256):
        return True
    if not blobs.exists(sha256):
        return False
    arriving = folder / f"arriving.{os.getpid()}"
    try:
        with closing(blobs.open(sha256)) as source, arriving.open("wb") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
        stored = kept.put(arriving, give=True)
    except StorageError:
        if not blobs.exists(sha256):
            return False
        raise
    except OSError as error:
        raise DiskFull(f"the backup's folder cannot take {sha256}: {error.strerror}") from error
    finally:
        arriving.unlink(missing_ok=True)
    if stored.sha256 != sha256:
        kept.delete(stored.sha256)
        raise StorageError(f"blob {sha256} is damaged in the store", value=stored.sha256)
    return True


def _drop_what_lost_blobs(connection: Connection, gone: list[str]) -> None:
    """Remove jobs and uploads whose bytes were deleted, with them, after the rows had been read."""
    for start in range(0, len(gone), ROWS_A_STATEMENT):
        some = gone[start : start + ROWS_A_STATEMENT]
        jobs = select(Artifact.job_id).where(Artifact.sha256.in_(some))
        connection.execute(delete(Job).where(Job.id.in_(jobs)))
        uploads = select(UploadFile.upload_id).where(UploadFile.sha256.in_(some))
        connection.execute(delete(Upload).where(Upload.id.in_(uploads), Upload.completed_at.is_not(None)))


def _rows_file(folder: Path, table: str) -> Path:
    return folder / "rows" / f"{table}.jsonl.gz"


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _write_durably(file: Path, content: bytes) -> None:
    fresh = file.with_suffix(".new")
    with fresh.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
