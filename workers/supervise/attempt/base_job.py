"""The base job's checkpoints, brought from the blob store for a job that starts from them.

    sources/<job id>/native/...     the files that `app.domain.request.base_job.is_read` names, each checked by its hash
    sources/<job id>/adapter/...

The folder gets its name when it is whole. From then on the base job may be deleted: a retry finds all it needs here.
"""

import shutil
from pathlib import Path, PurePosixPath

from app.domain.full_disk import disk_full
from app.domain.request.base_job import is_read
from app.store.artifacts import ArtifactRepository
from app.store.blobs import materialise
from app.store.jobs import JobRepository
from bitwright.errors import CorruptCheckpoint, DiskFull, NotFound, SourceForbidden, SourceNotFound
from workers.disk.durable import sync_folder, sync_tree
from workers.disk.workspace import Workspace
from workers.supervise.context import WorkerContext

ANEW = "submit the request without base_job: it is quantized anew"


def base_job_folder(
    context: WorkerContext, tenant_id: str, job_id: str | None, workspace: Workspace, *, exports: bool = False
) -> str | None:
    """The folder with a base job's checkpoints, brought unless an earlier attempt did it; None without such a job.

    exports   whether other formats are to be made of its native checkpoint, all of which is brought then

    Raises:
        SourceNotFound: the job or its native checkpoint has been deleted.
        SourceForbidden: a file is named outside its folder.
        CorruptCheckpoint: a file's bytes are not those that were stored.
        StorageError, DiskFull: a file cannot be read, or not be written here.
    """
    if job_id is None:
        return None
    folder = workspace.sources / job_id
    if folder.exists():
        return str(folder)
    files = _files(context, tenant_id, job_id, exports=exports)
    staged = workspace.sources / f".{job_id}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        for checkpoint, path, sha256 in files:
            if not materialise(context.blobs, sha256, _place(staged, f"{checkpoint}/{path}")):
                detail = f"{PurePosixPath(path).name} of the base job is damaged in the store"
                raise CorruptCheckpoint(detail, field="base_job", value=sha256, hint=ANEW)
        sync_tree(staged)
    except OSError as error:
        if disk_full(error):
            raise DiskFull("the worker's disk cannot hold the base job's checkpoints", field="base_job") from error
        raise
    staged.replace(folder)
    sync_folder(workspace.sources)
    return str(folder)


def _files(context: WorkerContext, tenant_id: str, job_id: str, *, exports: bool) -> list[tuple[str, str, str]]:
    """Checkpoint, path and hash of every file that is read."""
    with context.database.reading() as session:
        try:
            request = JobRepository(session, tenant_id).get(job_id).request
            stored = ArtifactRepository(session, tenant_id).of_job(job_id)
        except NotFound as error:
            detail = f"{job_id}, which this job starts from, has been deleted"
            raise SourceNotFound(detail, field="base_job", value=job_id, hint=ANEW) from error
        files = [
            (file.format, file.path, file.sha256)
            for file in stored
            if is_read(request, file.format, file.path, exports=exports)
        ]
    if not files:
        detail = f"{job_id}, which this job starts from, has no native checkpoint any more"
        raise SourceNotFound(detail, field="base_job", value=job_id, hint=ANEW)
    return files


def _place(folder: Path, name: str) -> Path:
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        detail = "the base job names a file outside its folder"
        raise SourceForbidden(detail, field="base_job", value=name, hint=ANEW)
    return target
