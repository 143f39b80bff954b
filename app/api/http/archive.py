"""A whole checkpoint as one tar, made while it is sent: known length, the same bytes every time, no file on the way."""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api.auth import Reader
from app.api.deps import BlobsOf, DatabaseOf, LaterOf
from app.api.http.content import REVALIDATED, conditions, representation_headers, stream
from app.api.http.documentation import binary, problems, text_header
from app.api.tenancy.downloads import note_download
from app.domain.formats import ExportFormat
from app.store.artifacts import ArtifactRepository
from app.store.blobs import BlobStore
from app.store.jobs import JobRepository
from app.store.models import Artifact, Job
from bitwright.errors import Conflict, NotFound, StorageError
from bitwright.files.delivery import delivery

router = APIRouter(tags=["artifacts"])
MEDIA_TYPE = "application/x-tar"
LAYOUT = b"bitwright tar 1\n"
"""Part of the ETag: a change of how archives are laid out changes it."""
END = b"\0" * (2 * tarfile.BLOCKSIZE)

HEADERS = {
    "ETag": "Over names, sizes and hashes of all members; strong.",
    "Content_Length": "Bytes of the archive.",
    "Content_Disposition": "`attachment` with the archive's name.",
}
RESPONSES = {
    200: binary("The archive.", MEDIA_TYPE, **HEADERS),
    304: {"description": "The caller has it already.", "headers": {"ETag": text_header("As in If-None-Match.")}},
    **problems("not_found", "conflict", "precondition_failed"),
}
Kept = ExportFormat | Literal["adapter"]
"""Files that a job may keep: checkpoints, and the adapter file of one that trains (`ADAPTER_FOLDER`)."""
FormatName = Annotated[
    Kept | None,
    Query(
        alias="format",
        description="Which checkpoint, or `adapter`. If none is named, the first checkpoint that is not `native`; with "
        "the adapter that belongs to it, each in a folder of its format's name.",
    ),
]
FolderName = Annotated[
    str | None,
    Query(
        alias="folder",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$",
        description="Name of the folder that the tar unpacks to; otherwise job and format name it.",
    ),
]


@dataclass(frozen=True)
class Member:
    """A file of an archive: its header block, its blob, and the zeros after it."""

    header: bytes
    sha256: str
    size: int

    @property
    def padding(self) -> int:
        """Zeros that fill the last block."""
        return -self.size % tarfile.BLOCKSIZE

    @property
    def length(self) -> int:
        """Bytes in the archive."""
        return len(self.header) + self.size + self.padding


@router.get(
    "/v1/jobs/{job_id}/archive",
    summary="Download a checkpoint as one tar",
    operation_id="get_archive",
    response_class=Response,
    responses=RESPONSES,
)
def get_archive(
    *,
    job_id: str,
    request: Request,
    principal: Reader,
    database: DatabaseOf,
    blobs: BlobsOf,
    later: LaterOf,
    export_format: FormatName = None,
    folder: FolderName = None,
) -> Response:
    """A job's result in one folder: the files of a checkpoint, or folders of a base and of the adapter for it.

    Not compressed: weights do not shrink.
    """
    with database.reading() as session:
        job = JobRepository(session, principal.tenant_id).get(job_id)
        artifacts = ArtifactRepository(session, principal.tenant_id).of_job(job_id)
    chosen = choose_formats(job, artifacts, export_format)
    artifacts = [artifact for artifact in artifacts if artifact.format in chosen]
    name = folder or (f"{job_id}-{chosen[0]}" if len(chosen) == 1 else job_id)
    members = [
        tar_member(member_name(name, artifact, chosen), artifact.size, artifact.sha256) for artifact in artifacts
    ]
    etag = f'"{archive_digest(members)}"'
    # Under this URL the bytes change: a job that missed a requirement keeps its files, and may be retried.
    headers = representation_headers(etag, f"{name}.tar", REVALIDATED)
    if conditions(request.headers, etag):
        return Response(status_code=304, headers={"ETag": etag, "Cache-Control": headers["Cache-Control"]})
    for artifact in artifacts:
        if not blobs.exists(artifact.sha256):
            raise StorageError(f"the bytes of artifact {artifact.id} are missing in the blob store")
    length = sum(member.length for member in members) + len(END)
    if request.method == "GET":
        note_download(later, database, principal, "archive.downloaded", job_id, length)
    chunks = iter(()) if request.method == "HEAD" else write_tar(blobs, members)
    return stream(chunks, length, media_type=MEDIA_TYPE, headers=headers, status=200)


@router.head(
    "/v1/jobs/{job_id}/archive",
    summary="Headers of a checkpoint's tar",
    operation_id="head_archive",
    response_class=Response,
    responses=RESPONSES,
)
def head_archive(
    *,
    job_id: str,
    request: Request,
    principal: Reader,
    database: DatabaseOf,
    blobs: BlobsOf,
    later: LaterOf,
    export_format: FormatName = None,
    folder: FolderName = None,
) -> Response:
    """Headers of the GET, without the bytes."""
    return get_archive(
        job_id=job_id,
        request=request,
        principal=principal,
        database=database,
        blobs=blobs,
        later=later,
        export_format=export_format,
        folder=folder,
    )


def choose_formats(job: Job, artifacts: Sequence[Artifact], wanted: Kept | None) -> tuple[str, ...]:
    """The formats to pack: the one that is wanted, or those that are the job's result together.

    Raises:
        Conflict: the job has no artifacts yet.
        NotFound: it has none of this format.
    """
    formats = list(dict.fromkeys(artifact.format for artifact in artifacts))
    if not formats:
        hint = "wait for the status succeeded"
        detail = f"job {job.id} is {job.status.value} and has no artifacts"
        raise Conflict(detail, value=job.status.value, hint=hint)
    if wanted is None:
        return delivery(formats, job.request)
    if wanted not in formats:
        there = ", ".join(formats)
        raise NotFound(f"job {job.id} has no {wanted} checkpoint; it has: {there}", field="format", value=wanted)
    return (str(wanted),)


def member_name(folder: str, artifact: Artifact, chosen: Sequence[str]) -> str:
    """Path of a file in the archive."""
    return f"{folder}/{artifact.path}" if len(chosen) == 1 else f"{folder}/{artifact.format}/{artifact.path}"


def tar_member(name: str, size: int, sha256: str) -> Member:
    """A member whose header depends on its name and size alone: no times, no owners."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return Member(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"), sha256, size)


def archive_digest(members: Sequence[Member]) -> str:
    """Hexadecimal SHA-256 over all that decides an archive's bytes."""
    digest = hashlib.sha256(LAYOUT)
    for member in members:
        digest.update(member.header + bytes.fromhex(member.sha256))
    return digest.hexdigest()


def write_tar(blobs: BlobStore, members: Sequence[Member]) -> Iterator[bytes]:
    """The archive's bytes."""
    for member in members:
        yield member.header
        yield from blobs.read_range(member.sha256, 0, member.size)
        if member.padding:
            yield b"\0" * member.padding
    yield END
