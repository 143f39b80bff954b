"""Files of OpenAI's interface: the service's uploads of one JSONL text, seen under its names."""

import shutil
from collections.abc import AsyncGenerator
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, BinaryIO, Literal

import structlog
from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.api.auth import Submitter
from app.api.deps import BlobsOf, DatabaseOf, SettingsOf
from app.api.http.content import stream
from app.api.http.documentation import binary
from app.api.openai.errors import openai_errors
from app.api.openai.views import DeletedFile, FileView, ListView, page_of
from app.api.tenancy.admission import actor
from app.api.uploads import delete_upload, require_room
from app.domain.access import Principal
from app.domain.inputs.inspection import is_plain_name
from app.domain.inputs.jsonl import numbered_records
from app.domain.inputs.rows import Conversation
from app.settings import Settings
from app.store.blobs import Blob, BlobStore
from app.store.ids import id_pattern
from app.store.models import Upload
from app.store.openai.fine_tuning import require_cursor
from app.store.openai.texts import SUFFIX, text_of, texts
from app.store.session import Database
from app.store.tenancy.audit import record
from app.store.tenancy.quotas import require_upload_room
from app.store.tenancy.tenants import policy_of
from app.store.tenancy.usage import add_usage
from app.store.uploads import NewUploadFile, UploadRepository
from bitwright.errors import BodyTooLarge, FieldProblem, InvalidDataset, InvalidRequest, MalformedBody, StorageError

router = APIRouter(tags=["openai"])
log = structlog.get_logger(__name__)

MAX_FILE_BYTES = 512 << 20
"""OpenAI's own limit; a larger text goes through /v1/uploads, and its id is a file's as well."""
ENVELOPE_BYTES = 64 << 10
"""Room for a form's other fields and boundaries."""
MOST_FIELDS = 16
PURPOSE = "fine-tune"
UNNAMED = "upload"
"""Name that OpenAI's clients give to bytes without one."""
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL, a row a line, each with `messages`.",
                        },
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
FileCursor = Annotated[
    str | None, Query(description="Id of the last file before.", json_schema_extra={"pattern": id_pattern("upl")})
]


@router.post(
    "/v1/files",
    summary="Send a file",
    operation_id="create_file",
    openapi_extra=BODY,
    response_model=FileView,
    responses=openai_errors("body_too_large", "invalid_dataset", "disk_full", "uploads_exceeded", "storage_exceeded"),
)
async def create_file(
    request: Request, principal: Submitter, settings: SettingsOf, database: DatabaseOf, blobs: BlobsOf
) -> FileView:
    """Send a text of conversations in one piece, up to 512 MB, for finetuning; every row is checked."""
    limit = min(MAX_FILE_BYTES, settings.max_upload_bytes)
    form = await _parse_form(request, limit)
    try:
        sent = _checked_fields(form)
        return await run_in_threadpool(_keep, sent, limit, principal, settings, database, blobs)
    finally:
        await form.close()


@router.get("/v1/files", summary="List files", operation_id="list_files", responses=openai_errors())
def list_files(
    *,
    principal: Submitter,
    database: DatabaseOf,
    after: FileCursor = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Files a page.")] = 100,
    order: Annotated[Literal["asc", "desc"], Query(description="By time: oldest first, or newest first.")] = "desc",
    purpose: Annotated[str | None, Query(max_length=64, description="Only files of this purpose.")] = None,
) -> ListView[FileView]:
    """All texts that were sent, through /v1/uploads too."""
    require_cursor("upl", after)
    if purpose not in (None, PURPOSE):
        return ListView(data=[], has_more=False)
    with database.reading() as session:
        page = texts(session, principal.tenant_id, after=after, limit=min(limit, 1000), newest_first=order == "desc")
        items = [file_view(upload) for upload in page.items]
    return ListView[FileView](**page_of(items, page.next_cursor is not None))


@router.get("/v1/files/{file_id}", summary="Get a file", operation_id="get_file", responses=openai_errors("not_found"))
def get_file(file_id: str, principal: Submitter, database: DatabaseOf) -> FileView:
    """A file's name and size."""
    with database.reading() as session:
        return file_view(text_of(session, principal.tenant_id, file_id))


@router.delete(
    "/v1/files/{file_id}",
    summary="Delete a file",
    operation_id="delete_file",
    responses=openai_errors("not_found", "conflict"),
)
def delete_file(file_id: str, principal: Submitter, settings: SettingsOf, database: DatabaseOf) -> DeletedFile:
    """Remove a file that no unfinished job reads."""
    with database.reading() as session:
        text_of(session, principal.tenant_id, file_id)
    delete_upload(file_id, principal, settings, database)
    return DeletedFile(id=file_id)


@router.get(
    "/v1/files/{file_id}/content",
    summary="Download a file",
    operation_id="get_file_content",
    response_class=Response,
    responses={200: binary("The bytes.", "application/jsonl"), **openai_errors("not_found", "storage_error")},
)
def get_file_content(file_id: str, principal: Submitter, database: DatabaseOf, blobs: BlobsOf) -> Response:
    """The bytes as they were sent."""
    with database.reading() as session:
        file = text_of(session, principal.tenant_id, file_id).files[0]
    if not blobs.exists(file.sha256):
        raise StorageError(f"the bytes of file {file_id} are missing in the blob store")
    headers = {"Content-Disposition": f'attachment; filename="{file_id}{SUFFIX}"'}
    chunks = blobs.read_range(file.sha256, 0, file.size)
    return stream(chunks, file.size, media_type="application/jsonl", headers=headers, status=200)


def file_view(upload: Upload) -> FileView:
    """The text of an upload as a file."""
    file = upload.files[0]
    return FileView(id=upload.id, bytes=file.size, created_at=int(upload.created_at.timestamp()), filename=file.name)


async def _parse_form(request: Request, limit: int) -> FormData:
    """The form of a request; its file lies on the disk.

    Raises:
        BodyTooLarge: it is larger than a file may be.
        MalformedBody: it is no form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        detail = f"send a form, multipart/form-data; the body came as {kind or 'nothing'}"
        raise MalformedBody(detail, field="header.Content-Type", value=kind, hint="give `file` and `purpose`")

    async def counted() -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit + ENVELOPE_BYTES:
                raise _too_large(limit)
            yield chunk

    parser = MultiPartParser(request.headers, counted(), max_files=1, max_fields=MOST_FIELDS, max_part_size=1024)
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise MalformedBody("the body is not a form of `file` and `purpose`", field="body") from error


def _checked_fields(form: FormData) -> UploadFile:
    """The file of a form that asks for nothing else.

    Raises:
        InvalidRequest: a field is missing, unknown, or has a value that is not taken.
    """
    given = form.multi_items()
    names = [name for name, _ in given]
    problems = []
    for name in dict.fromkeys(names):
        if name not in ("file", "purpose"):
            detail = "a file is kept until it is deleted" if name.startswith("expires_after") else "is not read"
            problems.append(FieldProblem(field=name[:64], code="unsupported_value", detail=f"{detail}; leave it out"))
        elif names.count(name) > 1:
            problems.append(FieldProblem(field=name, code="given_twice", detail="send it once"))
    purpose, file = form.get("purpose"), form.get("file")
    if purpose != PURPOSE:
        code = "missing_field" if purpose is None else "unsupported_value"
        detail, value = f"the purpose is {PURPOSE}", purpose if isinstance(purpose, str) else None
        problems.append(FieldProblem(field="purpose", code=code, detail=detail, value=value))
    if not isinstance(file, UploadFile):
        code = "missing_field" if file is None else "wrong_type"
        problems.append(FieldProblem(field="file", code=code, detail="give a file, with its name"))
        raise InvalidRequest(f"{problems[0].field}: {problems[0].detail}", errors=tuple(problems))
    if not is_plain_name(_name_of(file)):
        detail = "a name is a plain file name of up to 255 characters, without folders and control characters"
        problems.append(
            FieldProblem(field="file", code="invalid_value", detail=detail, value=(file.filename or "")[:200])
        )
    if problems:
        raise InvalidRequest(f"{problems[0].field}: {problems[0].detail}", errors=tuple(problems))
    return file


def _name_of(file: UploadFile) -> str:
    """The file's name; with the suffix of a text where it has none, as bytes without a name have."""
    name = file.filename or UNNAMED
    return name if PurePosixPath(name).suffix else f"{name}{SUFFIX}"


def _keep(
    sent: UploadFile, limit: int, principal: Principal, settings: Settings, database: Database, blobs: BlobStore
) -> FileView:
    """The file as it is kept: an upload that is complete.

    Raises:
        InvalidRequest: its name is not that of a text.
        InvalidDataset: a row, named by its line, is no conversation.
        BodyTooLarge, UploadsExceeded, StorageExceeded, DiskFull: there is no room for it.
    """
    name, size = _name_of(sent), sent.size or 0
    if not name.endswith(SUFFIX):
        detail, hint = "a file is a text, named *.jsonl", "give each row a line of JSON"
        raise InvalidRequest(detail, field="file", value=name, hint=hint)
    if size > limit:
        raise _too_large(limit)
    check_conversations(sent.file, name)
    with database.reading() as session:
        policy = policy_of(session, principal.tenant_id, settings.tenant_quotas)
        require_upload_room(session, principal.tenant_id, policy.quotas, size)
        require_room(settings, size, UploadRepository(session, principal.tenant_id).pending_bytes())
    blob = _store(sent.file, settings, blobs)
    with database.transaction() as session:
        require_upload_room(session, principal.tenant_id, policy.quotas, size)
        uploads = UploadRepository(session, principal.tenant_id)
        upload = uploads.create([NewUploadFile(name, blob.size, blob.sha256)])
        uploads.advance(upload.id, name, start=0, end=blob.size)
        view = file_view(uploads.complete(upload.id))
        add_usage(session, principal.tenant_id, uploaded_bytes=blob.size)
        record(session, actor(principal), "upload.completed", upload.id)
    log.info("upload_completed", upload_id=view.id, files=1)
    return view


def check_conversations(text: BinaryIO, name: str) -> None:
    """Check that each row of a text has messages.

    Raises:
        InvalidDataset: one, named by its line, has none, or is no row at all.
    """
    text.seek(0)
    try:
        for line in numbered_records(text, name):
            if not isinstance(line.row, Conversation):
                hint = 'give a JSON object a line, with "messages"; other rows go through /v1/uploads'
                raise InvalidDataset(f"{name}: line {line.number} has no messages", field="file", hint=hint)
    except InvalidDataset as error:
        error.field = "file"
        raise


def _store(source: BinaryIO, settings: Settings, blobs: BlobStore) -> Blob:
    """The bytes of a file, put into the blob store."""
    settings.upload_dir.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=settings.upload_dir) as copy:
        source.seek(0)
        shutil.copyfileobj(source, copy)
        copy.flush()
        return blobs.put(Path(copy.name))


def _too_large(limit: int) -> BodyTooLarge:
    hint = "send it through /v1/uploads, whose id is a file's too"
    return BodyTooLarge(f"a file has up to {limit} bytes here", field="file", hint=hint)
