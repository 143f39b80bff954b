"""Transfer of an attempt's output from its workspace into the blob store."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.domain.attempt_lines import ResultLine
from app.domain.full_disk import disk_full
from app.domain.media_types import media_type
from app.store.attempts import NewArtifact
from app.store.blobs import BlobStore
from bitwright.errors import DiskFull, InternalError, StorageError
from bitwright.events import ProgressEvent, Stage
from workers.disk.workspace import Workspace, output_files
from workers.supervise.attempt.events import EventBuffer
from workers.supervise.attempt.lease import LeaseKeeper

FILES_AT_ONCE = 4
"""That are hashed and stored beside each other."""


def store_outputs(
    blobs: BlobStore, workspace: Workspace, result: ResultLine, lease: LeaseKeeper, events: EventBuffer
) -> list[NewArtifact]:
    """Hash and store every file of every checkpoint, which the workspace gives away where the store takes it.

    Several at a time: a hash takes a processor, and each file waits for the disk.

    Raises:
        InternalError: the result names a folder outside the workspace's output, or an empty one.
        StorageError, DiskFull: the blob store does not take a file.
        and what `LeaseKeeper.check` raises, between two files. No file is being stored any more then.
    """
    files = [
        (checkpoint, path, name)
        for checkpoint, folder in sorted(result.checkpoints.items())
        for path, name in _checked_files(workspace, folder)
    ]
    total = sum(path.stat().st_size for _, path, _ in files)
    artifacts: list[NewArtifact] = []
    done = 0
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="store") as threads:
        stored = [threads.submit(_stored, blobs, *file) for file in files]
        try:
            for each in stored:
                lease.check()
                artifacts.append(each.result())
                done += artifacts[-1].size
                events.add(ProgressEvent(stage=Stage.STORE, done=done, total=total, unit="bytes"))
                events.flush_if_due()
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    lease.check()
    return artifacts


def _stored(blobs: BlobStore, checkpoint: str, path: Path, name: str) -> NewArtifact:
    """One file, in the store."""
    try:
        blob = blobs.put(path, give=True)
    except OSError as error:
        if disk_full(error):
            raise DiskFull("the blob store's disk is full", value=f"{checkpoint}/{name}") from error
        raise StorageError("the blob store did not take a file", value=f"{checkpoint}/{name}") from error
    return NewArtifact(format=checkpoint, path=name, sha256=blob.sha256, size=blob.size, media_type=media_type(name))


def _checked_files(workspace: Workspace, folder: str) -> list[tuple[Path, str]]:
    root = (workspace.folder / folder).resolve()
    if not root.is_relative_to(workspace.output.resolve()):
        raise InternalError("the attempt's result names a folder outside its output", value=folder)
    files = list(output_files(root))
    if not files:
        raise InternalError("the attempt's result names an empty folder", value=folder)
    return files
