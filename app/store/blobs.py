"""Bytes by their sha256: in a local folder or in a bucket, behind one protocol.

A blob's name is made of 64 hexadecimal digits and nothing else, so no name can lead out of the store. A blob is
complete or absent, never half there. References to blobs are rows of the database; `app.store.upkeep.garbage` frees
the rest.
"""

import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import unquote, urlsplit

from app.domain.full_disk import disk_full
from bitwright.errors import DiskFull, StorageError

CHUNK = 1 << 20
SHA256_SHAPE = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """Bytes that the store holds."""

    sha256: str
    size: int


@dataclass(frozen=True)
class BlobEntry:
    """A blob as listed; `modified` is when it was last put, in UTC."""

    sha256: str
    size: int
    modified: datetime


class BlobStore(Protocol):
    """Operations of every blob store. All but `put` raise StorageError for a name that is not a sha256."""

    def put(self, path: Path, *, give: bool = False) -> Blob:
        """Store a file's bytes; if they are there already, only their `modified` changes.

        give   nobody else has the file or writes to it, and it may be gone afterwards: a store of files on the same
               disk takes it instead of a copy

        Raises:
            DiskFull: there is no room.
            StorageError: the bytes could not be stored.
        """

    def open(self, sha256: str, start: int = 0) -> BinaryIO:
        """A reader from byte `start` on. StorageError if there is no such blob."""

    def read_range(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """Chunks of bytes `start` up to, not including, `stop`. StorageError if the blob is shorter or missing."""

    def exists(self, sha256: str) -> bool:
        """True if the blob is there."""

    def delete(self, sha256: str) -> None:
        """Remove the blob; no fault if it is not there."""

    def path(self, sha256: str) -> Path | None:
        """Path of the blob as a local file; None if the store has no files."""

    def entries(self) -> Iterator[BlobEntry]:
        """Every blob, in no order."""

    def modified(self, sha256: str) -> datetime | None:
        """The time at which the blob was last put; None if it is not there."""

    def tidy(self, before: datetime) -> None:
        """Remove what a `put` that was killed has left, if nobody has written to it since `before`."""


def blob_folder(url: str) -> Path | None:
    """The folder of the store at `url`; None if it is a bucket."""
    parts = urlsplit(url)
    if parts.scheme not in {"", "file"}:
        return None
    return Path(unquote(parts.path) if parts.scheme else url).expanduser()


def open_blobs(url: str) -> BlobStore:
    """The store at `url`: a folder (`file:///folder` or a path), or `s3://bucket/prefix` and the like."""
    folder = blob_folder(url)
    if folder is not None:
        return FolderBlobs(folder)
    from obstore.store import from_url  # noqa: PLC0415 - only a bucket needs it

    return BucketBlobs(from_url(url))


def materialise(blobs: BlobStore, sha256: str, target: Path) -> bool:
    """Bring a blob as the file `target`: a hard link where that is possible (same disk), else a copy; all or nothing.

    False, without a file, if its bytes have another hash: the store is damaged.

    Raises:
        StorageError: there is no such blob.
        OSError: the file cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    arriving = target.with_name(f".{target.name}.{os.getpid()}")
    arriving.unlink(missing_ok=True)
    try:
        linked = _linked(blobs.path(sha256), arriving)
        if (_hash_file(arriving) if linked else _download(blobs, sha256, arriving)) != sha256:
            return False
        arriving.replace(target)
    finally:
        arriving.unlink(missing_ok=True)
    return True


class FolderBlobs:
    """Blobs as files `ab/abcd...` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._incoming = folder / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def put(self, path: Path, *, give: bool = False) -> Blob:
        """See `BlobStore.put`: written beside, synced, then renamed, so a power cut leaves all or nothing."""
        try:
            return self._put(path, give)
        except OSError as error:
            raise _storage_error(error, f"{path.name} could not be stored") from error

    def _put(self, path: Path, give: bool) -> Blob:
        with tempfile.NamedTemporaryFile(dir=self._incoming, delete=False) as target:
            try:
                with path.open("rb") as source:
                    taken = give and _moved(source, path, Path(target.name))
                    blob = _hash(source) if taken else _copy(source, target)
                if taken:
                    os.utime(target.name)
                else:
                    target.flush()
                    os.fsync(target.fileno())
                place = self._place(blob.sha256)
                place.parent.mkdir(exist_ok=True)
                Path(target.name).replace(place)
            except BaseException:
                Path(target.name).unlink(missing_ok=True)
                raise
        _sync_folder(place.parent)
        _sync_folder(self._folder)
        return blob

    def open(self, sha256: str, start: int = 0) -> BinaryIO:
        """See `BlobStore.open`."""
        place = self._place(sha256)
        try:
            reader = place.open("rb")
        except OSError as error:
            raise _storage_error(error, f"blob {sha256} cannot be read") from error
        reader.seek(start)
        return reader

    def read_range(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """See `BlobStore.read_range`."""
        return _read_range(self.open(sha256, start), sha256, stop - start)

    def exists(self, sha256: str) -> bool:
        """See `BlobStore.exists`."""
        return self._place(sha256).is_file()

    def delete(self, sha256: str) -> None:
        """See `BlobStore.delete`; who reads the blob now reads on."""
        self._place(sha256).unlink(missing_ok=True)

    def path(self, sha256: str) -> Path | None:
        """See `BlobStore.path`."""
        return self._place(sha256)

    def entries(self) -> Iterator[BlobEntry]:
        """See `BlobStore.entries`."""
        for place in self._folder.glob("[0-9a-f][0-9a-f]/*"):
            if not SHA256_SHAPE.fullmatch(place.name):  # a file system's own, such as NFS's .nfs0000...
                continue
            with suppress(FileNotFoundError):
                status = place.stat()
                yield BlobEntry(place.name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def modified(self, sha256: str) -> datetime | None:
        """See `BlobStore.modified`."""
        try:
            return datetime.fromtimestamp(self._place(sha256).stat().st_mtime, UTC)
        except FileNotFoundError:
            return None

    def tidy(self, before: datetime) -> None:
        """See `BlobStore.tidy`."""
        for file in self._incoming.iterdir():
            with suppress(FileNotFoundError):
                if file.stat().st_mtime < before.timestamp():
                    file.unlink()

    def _place(self, sha256: str) -> Path:
        return self._folder / _checked(sha256)[:2] / sha256


class BucketBlobs:
    """Blobs as objects of an S3-compatible bucket, or any other store that obstore speaks to."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def put(self, path: Path, *, give: bool = False) -> Blob:  # noqa: ARG002 - a bucket takes no files
        """See `BlobStore.put`: an object appears only when its upload is complete."""
        import obstore  # noqa: PLC0415 - only a bucket needs it

        try:
            with path.open("rb") as source:
                blob = _hash(source)
                source.seek(0)
                obstore.put(self._store, _key(blob.sha256), source)
        except (OSError, obstore.exceptions.BaseError) as error:
            raise _storage_error(error, f"{path.name} could not be stored") from error
        return blob

    def open(self, sha256: str, start: int = 0) -> BinaryIO:
        """See `BlobStore.open`."""
        import obstore  # noqa: PLC0415

        try:
            raw = obstore.open_reader(self._store, _key(sha256))
        except (OSError, obstore.exceptions.BaseError) as error:
            raise _storage_error(error, f"blob {sha256} cannot be read") from error
        raw.seek(start)
        return cast(BinaryIO, BufferedReader(_BucketReader(raw), CHUNK))

    def read_range(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """See `BlobStore.read_range`."""
        return _read_range(self.open(sha256, start), sha256, stop - start)

    def exists(self, sha256: str) -> bool:
        """See `BlobStore.exists`."""
        return self.modified(sha256) is not None

    def delete(self, sha256: str) -> None:
        """See `BlobStore.delete`."""
        import obstore  # noqa: PLC0415

        try:
            obstore.delete(self._store, _key(sha256))
        except FileNotFoundError:
            pass
        except (OSError, obstore.exceptions.BaseError) as error:
            raise _storage_error(error, f"blob {sha256} could not be removed") from error

    def path(self, sha256: str) -> Path | None:
        """None: a bucket has no files."""
        _checked(sha256)
        return None

    def entries(self) -> Iterator[BlobEntry]:
        """See `BlobStore.entries`."""
        import obstore  # noqa: PLC0415

        for page in obstore.list(self._store):
            for meta in page:
                name = meta["path"].rsplit("/", 1)[-1]
                if SHA256_SHAPE.fullmatch(name):
                    yield BlobEntry(name, meta["size"], meta["last_modified"])

    def modified(self, sha256: str) -> datetime | None:
        """See `BlobStore.modified`."""
        import obstore  # noqa: PLC0415

        try:
            return cast(datetime, obstore.head(self._store, _key(sha256))["last_modified"])
        except FileNotFoundError:
            return None
        except (OSError, obstore.exceptions.BaseError) as error:
            raise _storage_error(error, f"blob {sha256} could not be looked up") from error

    def tidy(self, before: datetime) -> None:
        """See `BlobStore.tidy`: the parts of an upload that was not completed are the bucket's own to expire."""


class _BucketReader(RawIOBase):
    """obstore's reader as a Python file, so that both stores hand out the same thing."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = memoryview(self._raw.read(len(buffer)))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def _linked(place: Path | None, target: Path) -> bool:
    """True if `target` is now another name of the store's file; False for a bucket or another disk."""
    if place is None:
        return False
    try:
        target.hardlink_to(place)
    except OSError:
        return False
    return True


def _hash_file(file: Path) -> str:
    with file.open("rb") as source:
        return _hash(source).sha256


def _download(blobs: BlobStore, sha256: str, target: Path) -> str:
    with blobs.open(sha256) as source, target.open("wb") as copy:
        blob = _copy(source, copy)
        copy.flush()
        os.fsync(copy.fileno())  # its name and size say later that it is whole
        return blob.sha256


def _read_range(reader: BinaryIO, sha256: str, length: int) -> Iterator[bytes]:
    chunks = _chunks(reader, sha256, length)
    # A generator that was never started closes nothing when it is closed, as for a caller who has gone away.
    next(chunks)
    return chunks


def _chunks(reader: BinaryIO, sha256: str, length: int) -> Iterator[bytes]:
    with closing(reader):
        yield b""
        while length > 0:
            try:
                chunk = reader.read(min(CHUNK, length))
            except OSError as error:
                raise _storage_error(error, f"blob {sha256} cannot be read") from error
            if not chunk:
                raise StorageError(f"blob {sha256} is {length} bytes shorter than recorded")
            length -= len(chunk)
            yield chunk


def _checked(sha256: str) -> str:
    if not SHA256_SHAPE.fullmatch(sha256):
        raise StorageError("a blob's name is 64 hexadecimal digits in lower case", value=sha256)
    return sha256


def _key(sha256: str) -> str:
    return f"{_checked(sha256)[:2]}/{sha256}"


def _moved(source: BinaryIO, path: Path, target: Path) -> bool:
    """True if the open file at `path` now has the name `target` and no other, so that nobody finds it to write to it.

    False where it lies on another disk or has more names, which may be a user's.
    """
    opened = os.fstat(source.fileno())
    if not stat.S_ISREG(opened.st_mode) or opened.st_nlink != 1 or path.is_symlink():
        return False
    os.fsync(source.fileno())
    try:
        path.replace(target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EACCES):
            return False
        raise
    here = target.stat()
    if (here.st_dev, here.st_ino, here.st_nlink) != (opened.st_dev, opened.st_ino, 1):
        raise OSError(errno.ESTALE, "the file was replaced or linked while it was stored")
    target.chmod(0o600)
    return True


def _copy(source: BinaryIO, target: Any) -> Blob:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return Blob(digest.hexdigest(), size)


def _hash(source: BinaryIO) -> Blob:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return Blob(digest.hexdigest(), size)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(error: Exception, detail: str) -> StorageError | DiskFull:
    return DiskFull(detail + ": the disk is full") if disk_full(error) else StorageError(detail)
