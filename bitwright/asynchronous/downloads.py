"""Downloads of artifacts: resumed after a broken connection, and checked by SHA-256 before they get their name."""

import os
from pathlib import Path

import httpx

from bitwright.asynchronous.transport import AsyncTransport
from bitwright.asynchronous.waits import in_thread, sleep
from bitwright.errors import TooManyRequests, Unavailable
from bitwright.files.downloads import (
    READ_TIMEOUT_SECONDS,
    OnBytes,
    PartialFile,
    content_headers,
    damaged,
    is_there,
    partial_path,
    target_path,
)
from bitwright.views import ArtifactView


async def download_artifact(transport: AsyncTransport, artifact: ArtifactView, folder: Path, on_bytes: OnBytes) -> Path:
    """The artifact as a file under `folder`. A file that is there with the right hash is kept as it is.

    Raises:
        StorageError: the bytes do not have the hash that the service promised, twice.
        Unavailable: the connection broke more often in a row than the retry policy allows.
    """
    target = target_path(folder, artifact)
    target.parent.mkdir(parents=True, exist_ok=True)
    if await in_thread(is_there, target, artifact):
        on_bytes(artifact.size)
        return target
    partial = partial_path(target, artifact.sha256)
    for _ in range(2):  # a partial file of an interrupted run may be damaged: then once more, from the first byte
        received = await _fetch(transport, artifact, partial, on_bytes)
        if received == artifact.sha256:
            os.replace(partial, target)
            return target
        on_bytes(-partial.stat().st_size)
        partial.unlink()
    raise damaged(artifact, received)


async def _fetch(transport: AsyncTransport, artifact: ArtifactView, partial: Path, on_bytes: OnBytes) -> str:
    """Append to `partial` until it is as long as the artifact; returns the SHA-256 of the complete file."""
    with PartialFile(partial, artifact.size) as file:
        while count := await in_thread(file.reread):
            on_bytes(count)
        failures = 0
        while (start := file.size) < artifact.size or artifact.size == start == 0:
            try:
                await _receive(transport, artifact, file, on_bytes)
                if file.size == artifact.size:
                    break
                raise Unavailable(f"{artifact.path} ended after {file.size} of {artifact.size} bytes")
            except (httpx.TransportError, Unavailable, TooManyRequests) as error:
                failures = 0 if file.size > start else failures + 1
                if failures >= transport.retry.attempts:
                    raise transport.last_error(error) from error
                await sleep(transport.retry.delay(failures))
        return await in_thread(file.finish)


async def _receive(transport: AsyncTransport, artifact: ArtifactView, file: PartialFile, on_bytes: OnBytes) -> None:
    """The bytes of one connection."""
    start, path = file.size, f"/v1/artifacts/{artifact.id}/content"
    headers = content_headers(artifact, start)
    async with transport.stream(path, headers=headers, read_timeout=READ_TIMEOUT_SECONDS) as response:
        # The complete file came although a range was requested (a proxy may drop Range): skip what is on disk already.
        skip = 0 if response.status_code == httpx.codes.PARTIAL_CONTENT else start
        async for received in response.aiter_bytes():
            chunk, skip = received[skip:], max(0, skip - len(received))
            await in_thread(file.write, chunk)
            on_bytes(len(chunk))
