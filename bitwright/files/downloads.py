"""Files of a download on this machine: their paths, and the partial file that waits for its last byte."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Self

from bitwright.errors import StorageError
from bitwright.views import ArtifactView

CHUNK = 1 << 20
READ_TIMEOUT_SECONDS = 60.0

OnBytes = Callable[[int], None]
"""Callback with the number of bytes that are newly on disk; negative if bytes were discarded."""


def ignore_bytes(_count: int) -> None:
    """An `OnBytes` that does nothing."""


def target_path(folder: Path, artifact: ArtifactView) -> Path:
    """The path of the artifact under `folder`.

    Raises:
        StorageError: its path would leave the folder.
    """
    path = PurePosixPath(artifact.path)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in artifact.path or "\0" in artifact.path:
        raise StorageError(f"artifact {artifact.id} has the path {artifact.path!r}, which leaves its folder")
    return folder.joinpath(*path.parts)


def subfolder(folder: Path, name: str) -> Path:
    """The folder of one checkpoint of several below `folder`.

    Raises:
        StorageError: the name cannot be that of a folder.
    """
    if name in {"", ".", ".."} or "\0" in name or PurePosixPath(name).name != name or "\\" in name:
        raise StorageError(f"a checkpoint is named {name!r}, which leaves its folder")
    return folder / name


def partial_path(target: Path, sha256: str) -> Path:
    """The path of an incomplete download. The hash in the name keeps different contents apart."""
    return target.with_name(f"{target.name}.{sha256[:12]}.partial")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_there(target: Path, artifact: ArtifactView) -> bool:
    """True if the file is the artifact already, byte for byte."""
    return target.is_file() and target.stat().st_size == artifact.size and sha256_of(target) == artifact.sha256


def content_headers(artifact: ArtifactView, start: int) -> dict[str, str]:
    """Headers of the request for an artifact's bytes from `start` on."""
    headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
    if start:
        # The strong ETag is the content's hash: If-Range makes the service send all of it if it has changed.
        headers |= {"Range": f"bytes={start}-", "If-Range": f'"{artifact.sha256}"'}
    return headers


def damaged(artifact: ArtifactView, received: str) -> StorageError:
    """The error for bytes with the SHA-256 `received` instead of the promised one."""
    return StorageError(
        f"{artifact.path} arrived with SHA-256 {received}, not {artifact.sha256}",
        field="sha256",
        value=received,
        hint="the stored artifact or the connection is damaged; try again, or run the job again",
    )


class PartialFile:
    """The bytes of an artifact that have arrived so far, with their SHA-256. Use as a context manager.

    Args:
        path: the file, as of `partial_path`.
        longest: size of the artifact; a longer file of an earlier run is emptied.
    """

    def __init__(self, path: Path, longest: int) -> None:
        self._file = path.open("a+b")
        self._digest = hashlib.sha256()
        if self._file.seek(0, os.SEEK_END) > longest:
            self._file.truncate(0)
        self._file.seek(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes that are read or written."""
        return self._file.tell()

    def reread(self) -> int:
        """Hash the next chunk that an earlier run left; its size, 0 after the last."""
        chunk = self._file.read(CHUNK)
        self._digest.update(chunk)
        return len(chunk)

    def write(self, chunk: bytes) -> None:
        """Append bytes, after the last `reread`."""
        self._file.write(chunk)
        self._digest.update(chunk)

    def finish(self) -> str:
        """Force the bytes to disk; their SHA-256, hexadecimal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()
