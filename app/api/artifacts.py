"""The files that a job made: listed, or sent with everything that a careful downloader asks for."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.auth import Reader
from app.api.deps import BlobsOf, DatabaseOf, LaterOf
from app.api.http.content import (
    IMMUTABLE,
    Span,
    conditions,
    representation_headers,
    selected_span,
    sha256_digest,
    stream,
)
from app.api.http.documentation import binary, problems, text_header
from app.api.representations import artifact_view
from app.api.tenancy.downloads import note_download
from app.api.tenancy.later import WrittenLater
from app.domain.access import Principal
from app.domain.media_types import MEDIA_TYPES, TENSORS
from app.store.artifacts import ArtifactRepository
from app.store.blobs import BlobStore
from app.store.models import Artifact
from app.store.session import Database
from bitwright.errors import StorageError
from bitwright.views import ArtifactView, Page

router = APIRouter(tags=["artifacts"])

HEADERS = {
    "ETag": "The content's SHA-256, in quotes; strong.",
    "Repr-Digest": "SHA-256 of the whole content (RFC 9530).",
    "Accept-Ranges": "`bytes`.",
    "Content_Disposition": "`attachment` with the file's name.",
    "Content_Length": "Bytes of this answer.",
}
KINDS = tuple(dict.fromkeys([TENSORS, *MEDIA_TYPES.values()]))
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: binary("The whole content.", *KINDS, **HEADERS),
    206: binary("The range asked for.", *KINDS, Content_Range="Its place.", **HEADERS),
    304: {"description": "The caller has it already.", "headers": {"ETag": text_header("As in If-None-Match.")}},
    **problems("not_found", "precondition_failed", "range_not_satisfiable"),
}


@router.get(
    "/v1/jobs/{job_id}/artifacts",
    summary="List a job's artifacts",
    operation_id="list_artifacts",
    responses=problems("not_found"),
)
def list_artifacts(job_id: str, principal: Reader, database: DatabaseOf) -> Page[ArtifactView]:
    """All files of a job by format and path; none before it has succeeded."""
    with database.reading() as session:
        artifacts = ArtifactRepository(session, principal.tenant_id).of_job(job_id)
        return Page(items=[artifact_view(artifact) for artifact in artifacts])


@router.get(
    "/v1/artifacts/{artifact_id}/content",
    summary="Download an artifact",
    operation_id="get_artifact_content",
    response_class=Response,
    responses=RESPONSES,
)
def get_content(
    artifact_id: str, request: Request, principal: Reader, database: DatabaseOf, blobs: BlobsOf, later: LaterOf
) -> Response:
    """The bytes of a file, or one range of them. With several ranges, or one that does not parse, all of it comes."""
    with database.reading() as session:
        artifact = ArtifactRepository(session, principal.tenant_id).get(artifact_id)
    return send_artifact(artifact, request, principal, database, blobs, later)


@router.head(
    "/v1/artifacts/{artifact_id}/content",
    summary="Headers of an artifact's content",
    operation_id="head_artifact_content",
    response_class=Response,
    responses=RESPONSES,
)
def head_content(
    artifact_id: str, request: Request, principal: Reader, database: DatabaseOf, blobs: BlobsOf, later: LaterOf
) -> Response:
    """Headers of the GET, without the bytes."""
    return get_content(artifact_id, request, principal, database, blobs, later)


def send_artifact(
    artifact: Artifact,
    request: Request,
    principal: Principal,
    database: Database,
    blobs: BlobStore,
    later: WrittenLater,
    *,
    more_headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer to a GET or HEAD of an artifact's content, with more headers, or others in place of its own."""
    etag = f'"{artifact.sha256}"'
    own = representation_headers(etag, PurePosixPath(artifact.path).name, IMMUTABLE)
    own |= {"Repr-Digest": sha256_digest(artifact.sha256), "Accept-Ranges": "bytes"}
    headers = {**own, **(more_headers or {})}
    if conditions(request.headers, etag):
        return Response(status_code=304, headers={"ETag": etag, "Cache-Control": headers["Cache-Control"]})
    span = selected_span(request.headers, etag, artifact.size) if request.method == "GET" else None
    if not blobs.exists(artifact.sha256):
        raise StorageError(f"the bytes of artifact {artifact.id} are missing in the blob store")
    status, extent = 200, span or Span(0, artifact.size)
    if span is not None:
        status = 206
        headers["Content-Range"] = f"bytes {span.start}-{span.start + span.length - 1}/{artifact.size}"
    if request.method == "GET":
        note_download(later, database, principal, "artifact.downloaded", artifact.id, extent.length)
    elsewhere = accelerated(request, blobs, artifact.sha256)
    if elsewhere is not None:
        headers.pop("Content-Range", None)  # the proxy looks at the range itself
        return Response(headers={**headers, "X-Accel-Redirect": elsewhere}, media_type=artifact.media_type)
    chunks = (
        iter(())
        if request.method == "HEAD"
        else blobs.read_range(artifact.sha256, extent.start, extent.start + extent.length)
    )
    return stream(chunks, extent.length, media_type=artifact.media_type, headers=headers, status=status)


def accelerated(request: Request, blobs: BlobStore, sha256: str) -> str | None:
    """Path by which the proxy finds a blob's file; None where this process sends the bytes.

    A range of a certain version (`If-Range`) is sent from here: nginx does not know the versions of our files.
    """
    path: str = request.app.state.bitwright.settings.accelerated_path
    file = blobs.path(sha256) if path and request.method == "GET" and "if-range" not in request.headers else None
    return None if file is None else f"{path}/{file.parent.name}/{file.name}"
