"""Downloads of artifacts: resumed after a broken connection, and checked by SHA-256 before they get their name."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import httpx

from bitwright.errors import StorageError, TooManyRequests, Unavailable
from bitwright.transport import Transport
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


def download_artifact(transport: Transport, artifact: ArtifactView, folder: Path, on_bytes: OnBytes) -> Path:
    """The artifact as a file under `folder`. A file that is there with the right hash is kept as it is.

    Raises:
        StorageError: the bytes do not have the hash that the service promised, twice.
        Unavailable: the connection broke more often in a row than the retry policy allows.
    """
    target = target_path(folder, artifact)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and target.stat().st_size == artifact.size and sha256_of(target) == artifact.sha256:
        on_bytes(artifact.size)
        return target
    partial = partial_path(target, artifact.sha256)
    for _ in range(2):  # a partial file of an interrupted run may be damaged: then once more, from the first byte
        received = _fetch(transport, artifact, partial, on_bytes)
        if received == artifact.sha256:
            os.replace(partial, target)
            return target
        on_bytes(-partial.stat().st_size)
        partial.unlink()
    raise StorageError(
        f"{artifact.path} arrived with SHA-256 {received}, not {artifact.sha256}",
        field="sha256",
        value=received,
        hint="the stored artifact or the connection is damaged; try again, or run the job again",
    )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(transport: Transport, artifact: ArtifactView, partial: Path, on_bytes: OnBytes) -> str:
    """Append to `partial` until it is as long as the artifact; returns the SHA-256 of the complete file."""
    digest = hashlib.sha256()
    with partial.open("a+b") as file:
        _adopt(file, artifact.size, digest.update, on_bytes)
        failures = 0
        while (start := file.tell()) < artifact.size or artifact.size == start == 0:
            try:
                _receive(transport, artifact, file, digest.update, on_bytes)
                if file.tell() == artifact.size:
                    break
                raise Unavailable(f"{artifact.path} ended after {file.tell()} of {artifact.size} bytes")
            except (httpx.TransportError, Unavailable, TooManyRequests) as error:
                failures = 0 if file.tell() > start else failures + 1
                if failures >= transport.retry.attempts:
                    raise _final(transport, error) from error
                time.sleep(transport.retry.delay(failures))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _adopt(file: BinaryIO, size: int, update: Callable[[bytes], None], on_bytes: OnBytes) -> None:
    """Reuse the bytes that an interrupted run left; none of them if they are more than the artifact has."""
    if file.seek(0, os.SEEK_END) > size:
        file.truncate(0)
    file.seek(0)
    while chunk := file.read(CHUNK):
        update(chunk)
        on_bytes(len(chunk))


def _receive(
    transport: Transport,
    artifact: ArtifactView,
    file: BinaryIO,
    update: Callable[[bytes], None],
    on_bytes: OnBytes,
) -> None:
    start = file.tell()
    headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
    if start:
        # The strong ETag is the content's hash: If-Range makes the service send all of it if it has changed.
        headers |= {"Range": f"bytes={start}-", "If-Range": f'"{artifact.sha256}"'}
    path = f"/v1/artifacts/{artifact.id}/content"
    with transport.stream(path, headers=headers, read_timeout=READ_TIMEOUT_SECONDS) as response:
        # The complete file came although a range was requested (a proxy may drop Range): skip what is on disk already.
        skip = 0 if response.status_code == httpx.codes.PARTIAL_CONTENT else start
        for received in response.iter_bytes():
            chunk, skip = received[skip:], max(0, skip - len(received))
            file.write(chunk)
            update(chunk)
            on_bytes(len(chunk))


def _final(transport: Transport, error: Exception) -> Exception:
    return transport.unreachable(error) if isinstance(error, httpx.TransportError) else error
