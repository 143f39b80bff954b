"""Files that a tenant sends, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sqlalchemy import ColumnElement, delete, exists, func, select, update
from sqlalchemy.orm import Session

from app.store.blobs import SHA256_SHAPE
from app.store.clock import now, seconds_from_now
from app.store.idempotency import Idempotency, find_key, take_key
from app.store.ids import is_id, new_id, require_id
from app.store.jobs import Page
from app.store.models import IdempotencyKey, Job, JobUpload, Upload, UploadFile
from bitwright.errors import Conflict, FieldProblem, InvalidRequest, NotFound
from bitwright.job_states import FINAL_STATUSES

OPEN_SECONDS = 24 * 3600
"""An upload that is not complete by then is removed."""
MAX_FILES = 1024
MAX_NAME = 255
SEND_THE_REST = "send the rest, then complete it; HEAD of a file tells its offset"
BEGIN_ANEW = "begin another upload for other files"


@dataclass(frozen=True)
class NewUploadFile:
    """A file that a caller will send."""

    name: str
    """A plain file name."""
    size: int
    sha256: str


class UploadRepository:
    """The uploads of one tenant."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def create(self, files: Sequence[NewUploadFile], *, idempotency: Idempotency | None = None) -> Upload:
        """A new upload of these files, none of whose bytes have arrived. For a repeated key, the earlier upload.

        Raises:
            InvalidRequest: with every problem of names, sizes and hashes in `errors`.
            KeyReused: the key was used for another request.
        """
        upload_id = new_id("upl")
        if idempotency is not None:
            standing = take_key(self._session, self._tenant_id, idempotency, IdempotencyKey.upload_id, upload_id)
            if standing != upload_id:
                return self._replayed(standing)
        problems = _problems(files)
        if problems:
            raise InvalidRequest(problems[0].detail, errors=tuple(problems))
        upload = Upload(id=upload_id, tenant_id=self._tenant_id, expires_at=seconds_from_now(OPEN_SECONDS))
        self._session.add(upload)
        self._session.flush()
        owner = {"upload_id": upload.id, "tenant_id": self._tenant_id}
        self._session.add_all(UploadFile(position=i, **owner, **vars(file)) for i, file in enumerate(files))
        self._session.flush()
        return self.get(upload.id)

    def pending_bytes(self) -> int:
        """Bytes of the tenant's open uploads that have not arrived."""
        query = select(func.coalesce(func.sum(UploadFile.size - UploadFile.offset), 0)).join(
            Upload, Upload.id == UploadFile.upload_id
        )
        return int(self._session.scalar(query.where(*self._open())) or 0)

    def find_replayed(self, idempotency: Idempotency) -> Upload | None:
        """The upload that an earlier request with this key made, with `replayed` set; None if the key is free.

        Raises:
            KeyReused: the key was used for another request.
        """
        standing = find_key(self._session, self._tenant_id, idempotency, IdempotencyKey.upload_id)
        return None if standing is None else self._replayed(standing)

    def get(self, upload_id: str) -> Upload:
        """The upload and, in `files`, how much of each has arrived.

        Raises:
            NotFound: the tenant has no such upload.
        """
        return self._one(upload_id, lock=False)

    def page(self, *, after: str | None, limit: int, complete: bool | None = None) -> Page[Upload]:
        """Up to `limit` uploads, newest first; `after` is a page's `next_cursor`; complete ones or open ones alone.

        Raises:
            InvalidRequest: `after` is no cursor.
        """
        if after is not None and not is_id("upl", after):
            raise InvalidRequest(
                "the cursor is not one that a page gave", field="after", value=after, hint="start without one"
            )
        where: list[ColumnElement[bool]] = [Upload.tenant_id == self._tenant_id]
        where += [Upload.id < after] if after is not None else []
        if complete is not None:
            where.append(Upload.completed_at.is_not(None) if complete else Upload.completed_at.is_(None))
        rows = self._session.scalars(select(Upload).where(*where).order_by(Upload.id.desc()).limit(limit + 1)).all()
        items = rows[:limit]
        return Page(items=items, next_cursor=items[-1].id if len(rows) > limit else None)

    def advance(self, upload_id: str, name: str, *, start: int, end: int) -> Upload:
        """Note that bytes from `start` up to `end` of a file have arrived; `start` must be where the last part ended.

        Raises:
            NotFound: no such upload, or no such file in it.
            Conflict: another part came first, or the upload is complete; the detail tells the offset.
            InvalidRequest: the part runs past the file's size.
        """
        upload, file = self._open_file(upload_id, name)
        if not 0 <= start <= end <= file.size:
            detail = f"bytes {start} to {end} are not within the {file.size} bytes announced for {name}"
            raise InvalidRequest(
                detail, field="Content-Range", value=f"{start}-{end}", hint="HEAD tells where to go on"
            )
        if start != file.offset:
            detail = f"{name} has {file.offset} bytes; the next part starts there"
            raise Conflict(detail, value=file.offset, hint="send from that offset on")
        self._set_offset(upload, name, end)
        return self.get(upload_id)

    def restart(self, upload_id: str, name: str) -> Upload:
        """Forget a file's bytes, because they do not have the announced hash.

        Raises:
            NotFound: no such upload, or no such file in it.
            Conflict: the upload is complete.
        """
        upload, _ = self._open_file(upload_id, name)
        self._set_offset(upload, name, 0)
        return self.get(upload_id)

    def complete(self, upload_id: str) -> Upload:
        """Declare that every file has arrived and is in the blob store; a second call changes nothing.

        Raises:
            NotFound: the tenant has no such upload.
            Conflict: bytes are missing; the detail names the files.
        """
        upload = self._one(upload_id, lock=True)
        missing = [
            f"{file.name} ({file.offset} of {file.size} bytes)" for file in upload.files if file.offset < file.size
        ]
        if missing:
            raise Conflict(f"not all bytes have arrived: {', '.join(missing[:10])}", hint=SEND_THE_REST)
        unfinished = (Upload.id == upload_id, Upload.completed_at.is_(None))
        self._session.execute(update(Upload).where(*unfinished).values(completed_at=now()))
        return self.get(upload_id)

    def delete(self, upload_id: str) -> None:
        """Remove an upload; a later sweep frees bytes that nobody names.

        Raises:
            NotFound: the tenant has no such upload.
            Conflict: a job that has not ended reads it.
        """
        upload = self._one(upload_id, lock=True)
        readers = select(Job.id).join(JobUpload, JobUpload.job_id == Job.id)
        reader = self._session.scalars(
            readers.where(JobUpload.upload_id == upload_id, Job.status.not_in(FINAL_STATUSES)).limit(1)
        ).one_or_none()
        if reader is not None:
            detail = f"job {reader} reads upload {upload_id} and has not ended"
            raise Conflict(detail, value=reader, hint="cancel it first, or wait for its end")
        self._session.execute(delete(Upload).where(Upload.id == upload_id))
        self._session.expunge(upload)

    def _open(self) -> tuple[ColumnElement[bool], ...]:
        return (Upload.tenant_id == self._tenant_id, Upload.completed_at.is_(None), Upload.expires_at > now())

    def _replayed(self, upload_id: str) -> Upload:
        earlier = self.get(upload_id)
        earlier.replayed = True
        return earlier

    def _one(self, upload_id: str, *, lock: bool) -> Upload:
        require_id("upl", upload_id, "upload")
        query = select(Upload).where(Upload.id == upload_id, Upload.tenant_id == self._tenant_id)
        query = query.with_for_update() if lock else query
        upload = self._session.scalars(query.execution_options(populate_existing=True)).one_or_none()
        if upload is None:
            raise NotFound(f"there is no upload {upload_id}", value=upload_id)
        return upload

    def _open_file(self, upload_id: str, name: str) -> tuple[Upload, UploadFile]:
        upload = self._one(upload_id, lock=True)
        file = next((file for file in upload.files if file.name == name), None)
        if file is None:
            raise NotFound(f"upload {upload_id} has no file {name[:MAX_NAME]!r}", value=name)
        if upload.complete:
            raise Conflict(
                f"upload {upload_id} is complete and takes no more bytes", value=file.offset, hint=BEGIN_ANEW
            )
        return upload, file

    def _set_offset(self, upload: Upload, name: str, offset: int) -> None:
        this = (UploadFile.upload_id == upload.id, UploadFile.name == name)
        self._session.execute(update(UploadFile).where(*this).values(offset=offset))


def count_expired_uploads(session: Session) -> int:
    """Number of uploads that `remove_expired_uploads` would remove."""
    return session.scalar(select(func.count()).select_from(Upload).where(*_expired())) or 0


def remove_expired_uploads(session: Session) -> list[str]:
    """Remove uploads that were not completed in time; their ids, for whoever keeps their parts."""
    return list(session.scalars(delete(Upload).where(*_expired()).returning(Upload.id)))


def _expired() -> tuple[ColumnElement[bool], ...]:
    unread = ~exists().where(JobUpload.upload_id == Upload.id)
    return (Upload.completed_at.is_(None), Upload.expires_at <= now(), unread)


def _problems(files: Sequence[NewUploadFile]) -> list[FieldProblem]:
    if not 1 <= len(files) <= MAX_FILES:
        detail = f"an upload has 1 to {MAX_FILES} files, not {len(files)}"
        return [FieldProblem(field="files", code="out_of_range", detail=detail, value=len(files))]
    problems = []
    seen: set[str] = set()
    for index, file in enumerate(files):
        where = f"files.{index}."
        if not _is_plain_name(file.name) or file.name in seen:
            detail = f"a name is a plain file name of up to {MAX_NAME} characters, and each is given once"
            problems.append(FieldProblem(field=where + "name", code="invalid_value", detail=detail, value=file.name))
        if not 0 <= file.size < 2**63:
            detail = "a size is a number of bytes that is not negative"
            problems.append(FieldProblem(field=where + "size", code="out_of_range", detail=detail, value=file.size))
        if not SHA256_SHAPE.fullmatch(file.sha256):
            detail = "a sha256 is 64 hexadecimal digits in lower case"
            problems.append(
                FieldProblem(field=where + "sha256", code="invalid_value", detail=detail, value=file.sha256)
            )
        seen.add(file.name)
    return problems


def _is_plain_name(name: str) -> bool:
    plain = PurePosixPath(name).name == name and name not in {"", ".", ".."} and "\\" not in name and ":" not in name
    return plain and name.isprintable() and len(name) <= MAX_NAME
