"""One part of an upload's file: where it goes, how its bytes are received, and what counts of a broken one."""

import os
import re
from dataclasses import dataclass
from io import FileIO

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.api.upload_parts import PartsFolder
from app.domain.full_disk import disk_full
from app.store.models import Upload, UploadFile
from app.store.session import Database
from app.store.uploads import BEGIN_ANEW, UploadRepository
from bitwright.errors import Conflict, DiskFull, InvalidRequest, NotFound

CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
BUFFER = 1 << 20


def find_file(uploads: UploadRepository, upload_id: str, name: str) -> tuple[Upload, UploadFile]:
    """A file of an upload.

    Raises:
        NotFound: the tenant has no such upload, or it has no such file.
    """
    upload = uploads.get(upload_id)
    file = next((file for file in upload.files if file.name == name), None)
    if file is None:
        raise NotFound(f"upload {upload_id} has no file {name[:255]!r}", value=name)
    return upload, file


@dataclass(frozen=True)
class Target:
    """A file of a tenant's upload, as the store knows it."""

    database: Database
    tenant_id: str
    upload_id: str
    name: str

    def find(self) -> UploadFile:
        """The file, which still takes bytes.

        Raises:
            NotFound: the tenant has no such upload, or it has no such file.
            Conflict: the upload is complete.
        """
        with self.database.reading() as session:
            upload, file = find_file(UploadRepository(session, self.tenant_id), self.upload_id, self.name)
        if upload.complete:
            raise Conflict(f"upload {self.upload_id} is complete and takes no more bytes", hint=BEGIN_ANEW)
        return file

    def advance(self, start: int, end: int) -> None:
        """Note that these bytes are on disk."""
        with self.database.transaction() as session:
            UploadRepository(session, self.tenant_id).advance(self.upload_id, self.name, start=start, end=end)

    def restart(self) -> None:
        """Forget the file's bytes."""
        with self.database.transaction() as session:
            UploadRepository(session, self.tenant_id).restart(self.upload_id, self.name)


class TornPart(Exception):
    """A body that is not as long as its Content-Range says; `reached` is the offset up to which it counts."""

    def __init__(self, detail: str, reached: int) -> None:
        super().__init__(detail)
        self.detail = detail
        self.reached = reached


def parse_content_range(value: str | None, size: int) -> tuple[int, int]:
    """First byte and the byte after the last one of the part.

    Raises:
        InvalidRequest: not a range of this file.
    """
    if value is None:
        return 0, size
    match = CONTENT_RANGE.fullmatch(value.strip())
    if match is None:
        detail, hint = "Content-Range is `bytes first-last/size`", "e.g. `bytes 0-1023/4096`, or leave it out"
        raise InvalidRequest(detail, field="Content-Range", value=value, hint=hint)
    first, last, total = map(int, match.groups())
    if total != size or last < first or last >= size:
        detail = f"the part must lie within the {size} bytes that were announced"
        hint = "HEAD tells where to go on; a file of another size needs an upload of its own"
        raise InvalidRequest(detail, field="Content-Range", value=value, hint=hint)
    return first, last + 1


async def receive_part(request: Request, parts: PartsFolder, position: int, start: int, end: int) -> int:
    """Write the body to disk; the offset reached, which is `end`.

    Raises:
        TornPart: the body ended early or is too long. What counts is on disk.
        DiskFull: it is; the bytes of this part are freed, those of parts before stay.
    """
    file = await run_in_threadpool(parts.open_at, position, start)
    with file:
        try:
            reached, detail = await _receive(request, file, start, end)
        except OSError as error:
            if not disk_full(error):
                raise
            await run_in_threadpool(file.truncate, start)
            hint = "send the part again when the operator has made room; HEAD tells where to go on"
            raise DiskFull("the disk that takes uploads is full", value=start, hint=hint) from error
    if detail or reached < end:
        raise TornPart(detail or f"the body ended {end - reached} bytes early", reached)
    return reached


async def _receive(request: Request, file: FileIO, start: int, end: int) -> tuple[int, str]:
    """Write the body up to `end`; the offset reached, all of it on disk, and what ended it early, if anything did."""
    reached, buffer, detail = start, bytearray(), ""
    try:
        async for chunk in request.stream():
            if reached + len(buffer) + len(chunk) > end:
                detail = "the body is longer than its Content-Range says"
                break
            buffer += chunk
            if len(buffer) >= BUFFER:
                reached += await run_in_threadpool(_write, file, bytes(buffer))
                buffer.clear()
    except ClientDisconnect:
        detail = "the connection broke"
    reached += await run_in_threadpool(_write, file, bytes(buffer))
    await run_in_threadpool(_sync, file)
    return reached, detail


def _write(file: FileIO, content: bytes) -> int:
    """Write all of it: the operating system may take less at once, as before a full disk. Bytes written."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    return len(content)


def _sync(file: FileIO) -> None:
    os.fsync(file.fileno())
