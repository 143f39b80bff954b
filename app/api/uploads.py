"""Uploads: a checkpoint or a text in parts, resumed where a connection broke, checked by hash when complete."""

import hashlib
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.auth import Submitter
from app.api.deps import BlobsOf, DatabaseOf, IdempotencyHeader, SettingsOf
from app.api.http.documentation import problems, text_header
from app.api.representations import upload_view
from app.api.tenancy.admission import actor
from app.api.upload_parts import PartsFolder
from app.api.upload_receiving import Target, TornPart, find_file, parse_content_range, receive_part
from app.domain.inputs.foreign_files import PICKLED, foreign_files, gguf_file
from app.domain.inputs.inspection import CONFIG, is_plain_name
from app.domain.inputs.jsonl import check_jsonl
from app.settings import Settings
from app.store.blobs import BlobStore, blob_folder
from app.store.idempotency import Idempotency
from app.store.ids import id_pattern
from app.store.models import Upload, UploadFile
from app.store.session import Database
from app.store.tenancy.audit import record
from app.store.tenancy.quotas import require_upload_room
from app.store.tenancy.tenants import policy_of
from app.store.tenancy.usage import add_usage
from app.store.uploads import SEND_THE_REST, NewUploadFile, UploadRepository
from bitwright.errors import (
    BodyTooLarge,
    Conflict,
    DiskFull,
    FieldProblem,
    InputError,
    InvalidRequest,
    MalformedBody,
    RequestError,
    StorageError,
    UnsafeCheckpoint,
)
from bitwright.views import Page, UploadRequest, UploadView

router = APIRouter(tags=["uploads"])
log = structlog.get_logger(__name__)

SPARE_BYTES = 256 << 20
"""Left free for the database and the logs."""
OFFSET = {"Upload-Offset": text_header("Bytes of the file that have arrived; the next part starts here.", "integer")}
CREATED = {
    "description": "Open for parts; with a repeated Idempotency-Key, the earlier upload as it is by now.",
    "headers": {
        "Location": text_header("The upload."),
        "Idempotency-Replayed": text_header("`true` if an earlier request had made the upload."),
    },
}
PART_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of the part.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "/v1/uploads",
    summary="Begin an upload",
    operation_id="create_upload",
    status_code=201,
    responses={
        201: CREATED,
        **problems(
            *("body_too_large", "unsafe_checkpoint", "unsupported_checkpoint", "idempotency_key_reused", "disk_full"),
            *("rate_limit_exceeded", "uploads_exceeded", "storage_exceeded"),
        ),
    },
)
def create_upload(
    body: UploadRequest,
    response: Response,
    principal: Submitter,
    settings: SettingsOf,
    database: DatabaseOf,
    idempotency_key: IdempotencyHeader = None,
) -> UploadView:
    """Announce names, sizes and hashes: one `.jsonl` file of text, the files of a checkpoint, or one GGUF file."""
    idempotency = None if idempotency_key is None else Idempotency.of(idempotency_key, body)
    if idempotency is not None:
        with database.reading() as session:
            earlier = UploadRepository(session, principal.tenant_id).find_replayed(idempotency)
        if earlier is not None:
            return _created(earlier, response)
    check_files(body, settings)
    files = [NewUploadFile(file.name, file.size, file.sha256) for file in body.files]
    with database.reading() as session:
        pending = UploadRepository(session, principal.tenant_id).pending_bytes()
    require_room(settings, sum(file.size for file in files), pending)
    with database.transaction() as session:
        policy = policy_of(session, principal.tenant_id, settings.tenant_quotas)
        require_upload_room(session, principal.tenant_id, policy.quotas, sum(file.size for file in files))
        upload = UploadRepository(session, principal.tenant_id).create(files, idempotency=idempotency)
        if not upload.replayed:
            record(session, actor(principal), "upload.created", upload.id)
        return _created(upload, response)


def _created(upload: Upload, response: Response) -> UploadView:
    response.headers["Location"] = f"/v1/uploads/{upload.id}"
    if upload.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return upload_view(upload)


def require_room(settings: Settings, size: int, pending: int) -> None:
    """Check that an upload of `size` bytes finds room, beside the `pending` ones that the tenant has announced before.

    Each byte is needed twice where parts and blobs share a disk: parts stay until all is stored.

    Raises:
        DiskFull: a disk has less left.
    """
    wanted = (settings.upload_dir, blob_folder(settings.blob_url))
    folders = [_nearest(folder) for folder in wanted if folder is not None]
    devices = [folder.stat().st_dev for folder in folders]
    for folder, device in zip(folders, devices, strict=True):
        free = shutil.disk_usage(folder).free - SPARE_BYTES
        if size * devices.count(device) + pending > free:
            detail = f"the files have {size} bytes together; the disk for uploads has {max(free, 0)} left for them"
            hint = "send less, delete uploads that are no longer needed, or ask the operator for room"
            raise DiskFull(detail, field="files", value=size, hint=hint)


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that is there already."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def check_files(body: UploadRequest, settings: Settings) -> None:
    """Check that these files can become something that a job reads.

    Raises:
        InvalidRequest: bad names, or neither a text nor a checkpoint.
        UnsafeCheckpoint: pickled weights among them.
        UnsupportedCheckpoint: a model in files of another kind.
        BodyTooLarge: together larger than the service takes.
    """
    names = [file.name for file in body.files]
    bad = tuple(
        FieldProblem(
            field=f"files.{index}.name",
            code="invalid_value",
            detail="a name is a plain file name, without folders and control characters",
            value=name,
        )
        for index, name in enumerate(names)
        if not is_plain_name(name)
    )
    if bad:
        raise InvalidRequest(f"{bad[0].field}: {bad[0].detail}", field=bad[0].field, value=bad[0].value, errors=bad)
    pickled = next((name for name in names if name.endswith(PICKLED)), None)
    if pickled is not None:
        hint = "convert the weights to safetensors and leave this file out"
        raise UnsafeCheckpoint(f"{pickled} runs code when it is loaded", field="files", value=pickled, hint=hint)
    foreign = foreign_files(names)
    if foreign is not None and (CONFIG not in names or not foreign.file.endswith(".safetensors")):
        raise foreign.refusal("files")
    text = len(names) == 1 and names[0].endswith(".jsonl")
    checkpoint = CONFIG in names and any(name.endswith(".safetensors") for name in names)
    if not text and not checkpoint and gguf_file(names) is None:
        hint = (
            "send one file named *.jsonl, or config.json with *.safetensors and the tokenizer's files, or one GGUF file"
        )
        raise InvalidRequest("these files are neither a text nor a checkpoint", field="files", value=names, hint=hint)
    total = sum(file.size for file in body.files)
    if total > settings.max_upload_bytes:
        detail = f"the files have {total} bytes together; the service takes {settings.max_upload_bytes}"
        hint = "leave files out that no job reads, or ask the operator to raise BITWRIGHT_MAX_UPLOAD_BYTES"
        raise BodyTooLarge(detail, field="files", value=total, hint=hint)


@router.get("/v1/uploads", summary="List uploads", operation_id="list_uploads", responses=problems())
def list_uploads(
    *,
    principal: Submitter,
    database: DatabaseOf,
    after: Annotated[
        str | None,
        Query(description="`next_cursor` of the page before.", json_schema_extra={"pattern": id_pattern("upl")}),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Uploads a page.")] = 50,
    status: Annotated[Literal["open", "complete"] | None, Query(description="Only uploads in this status.")] = None,
) -> Page[UploadView]:
    """Uploads, newest first, and how much of each file has arrived. Open ones go when they are a day old."""
    complete = None if status is None else status == "complete"
    with database.reading() as session:
        page = UploadRepository(session, principal.tenant_id).page(after=after, limit=limit, complete=complete)
        return Page(items=[upload_view(upload) for upload in page.items], next_cursor=page.next_cursor)


@router.get(
    "/v1/uploads/{upload_id}",
    summary="Get an upload",
    operation_id="get_upload",
    responses=problems("not_found"),
)
def get_upload(upload_id: str, principal: Submitter, database: DatabaseOf) -> UploadView:
    """An upload and how much of each file has arrived."""
    with database.reading() as session:
        return upload_view(UploadRepository(session, principal.tenant_id).get(upload_id))


@router.delete(
    "/v1/uploads/{upload_id}",
    summary="Delete an upload",
    operation_id="delete_upload",
    status_code=204,
    responses=problems("not_found", "conflict"),
)
def delete_upload(upload_id: str, principal: Submitter, settings: SettingsOf, database: DatabaseOf) -> None:
    """Remove an upload that no unfinished job reads."""
    with database.transaction() as session:
        UploadRepository(session, principal.tenant_id).delete(upload_id)
        record(session, actor(principal), "upload.deleted", upload_id)
    PartsFolder(settings.upload_dir, upload_id).remove()


@router.head(
    "/v1/uploads/{upload_id}/files/{name}",
    summary="How much of a file has arrived?",
    operation_id="head_upload_file",
    response_class=Response,
    responses={200: {"description": "The offset.", "headers": OFFSET}, **problems("not_found")},
)
def head_file(upload_id: str, name: str, principal: Submitter, database: DatabaseOf) -> Response:
    """Offset from which to go on after a connection broke."""
    with database.reading() as session:
        _, file = find_file(UploadRepository(session, principal.tenant_id), upload_id, name)
    return Response(headers={"Upload-Offset": str(file.offset)})


@router.put(
    "/v1/uploads/{upload_id}/files/{name}",
    summary="Send a part of a file",
    operation_id="put_upload_part",
    status_code=204,
    response_class=Response,
    openapi_extra=PART_BODY,
    responses={
        204: {"description": "The part has arrived.", "headers": OFFSET},
        **problems("not_found", "conflict", "request_in_progress", "disk_full"),
    },
)
async def put_part(
    *,
    upload_id: str,
    name: str,
    request: Request,
    principal: Submitter,
    settings: SettingsOf,
    database: DatabaseOf,
    content_range: Annotated[
        str | None, Header(description="`bytes first-last/size`; without it, the body is the whole file.")
    ] = None,
) -> Response:
    """Append a part to a file. What arrived before a connection broke is kept: HEAD tells how far that is."""
    target = Target(database, principal.tenant_id, upload_id, name)
    await run_in_threadpool(target.find)  # before there is a folder, the upload must be the caller's
    parts = PartsFolder(settings.upload_dir, upload_id)
    with parts.locked():
        # Read again under the lock: the part before this one may just have been noted.
        file = await run_in_threadpool(target.find)
        start, end = parse_content_range(content_range, file.size)
        if start != file.offset:
            detail = f"{name} has {file.offset} bytes; the next part starts there"
            raise Conflict(detail, value=start, hint="send from that offset on")
        if parts.present(file.position) < start:
            await run_in_threadpool(target.restart)
            raise Conflict(f"the first bytes of {name} are lost", value=start, hint="send it from the start")
        reached = start
        try:
            reached = await receive_part(request, parts, file.position, start, end)
        except TornPart as torn:
            reached = torn.reached
            hint = "what counts is kept: HEAD tells where to go on"
            raise MalformedBody(torn.detail, field="Content-Range", value=content_range, hint=hint) from torn
        finally:
            if reached > start:
                await run_in_threadpool(target.advance, start, reached)
    return Response(status_code=204, headers={"Upload-Offset": str(reached)})


@router.post(
    "/v1/uploads/{upload_id}/complete",
    summary="Complete an upload",
    operation_id="complete_upload",
    responses=problems("not_found", "conflict", "request_in_progress", "invalid_dataset", "disk_full"),
)
def complete_upload(
    upload_id: str, principal: Submitter, settings: SettingsOf, database: DatabaseOf, blobs: BlobsOf
) -> UploadView:
    """Check every file against its hash, and every line of a text, and make the upload usable. May be repeated."""
    upload = _read(database, principal.tenant_id, upload_id)
    if upload.complete:
        return upload_view(upload)
    parts = PartsFolder(settings.upload_dir, upload.id)
    with parts.locked():
        # Read again under the lock: another request may just have completed it, and its parts are gone.
        upload = _read(database, principal.tenant_id, upload_id)
        if upload.complete:
            parts.remove()
            return upload_view(upload)
        _require_all_bytes(upload)
        for file in upload.files:
            _check(file, parts, database)
        for file in upload.files:
            _keep(file, parts, blobs)
        with database.transaction() as session:
            view = upload_view(UploadRepository(session, principal.tenant_id).complete(upload_id))
            add_usage(session, principal.tenant_id, uploaded_bytes=sum(file.size for file in view.files))
            record(session, actor(principal), "upload.completed", upload_id)
    parts.remove()
    log.info("upload_completed", upload_id=upload_id, files=len(view.files))
    return view


def _read(database: Database, tenant_id: str, upload_id: str) -> Upload:
    with database.reading() as session:
        return UploadRepository(session, tenant_id).get(upload_id)


def _require_all_bytes(upload: Upload) -> None:
    missing = [f"{file.name} ({file.offset} of {file.size} bytes)" for file in upload.files if file.offset < file.size]
    if missing:
        raise Conflict(f"not all bytes have arrived: {', '.join(missing[:10])}", hint=SEND_THE_REST)


def _check(file: UploadFile, parts: PartsFolder, database: Database) -> None:
    """Check that a file is what was announced, and a text is one. Otherwise its bytes are freed: it can be sent again.

    Raises:
        InvalidRequest: its hash is another one. That comes first: of bytes mangled on the way the content says nothing.
        InvalidDataset: a line of a text is no record.
    """
    with parts.open_whole(file.position) as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        try:
            if sha256 != file.sha256:
                detail = f"{file.name} arrived with SHA-256 {sha256}, not {file.sha256}"
                hint = "send the file again, or begin an upload with the right hash"
                raise InvalidRequest(detail, field=f"files.{file.position}.sha256", value=sha256, hint=hint)
            if file.name.endswith(".jsonl"):
                stream.seek(0)
                check_jsonl(stream, file.name)
        except (RequestError, InputError) as error:
            log.info("upload_refused", upload_id=file.upload_id, code=error.code)
            Target(database, file.tenant_id, file.upload_id, file.name).restart()
            parts.discard(file.position)
            raise


def _keep(file: UploadFile, parts: PartsFolder, blobs: BlobStore) -> None:
    """Copy a file, which has been checked, into the blob store.

    Raises:
        DiskFull: there is no room; what had been written is freed.
        StorageError: the store has other bytes than were checked.
    """
    blob = blobs.put(parts.path(file.position))
    if blob.sha256 != file.sha256:
        raise StorageError(
            f"{file.name} changed while it was stored", field=f"files.{file.position}", value=blob.sha256
        )
