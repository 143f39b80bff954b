"""Files of what a running job has finished: put into the blob store now and then, and brought to another machine.

The files are those of the workspace's `state`: finished blocks, and whatever else a next attempt adopts. Each says of
itself what it belongs to, so that an attempt which finds other, older or fewer files than it could computes more and
nothing wrong. They were made by a process that computes for a stranger: links are no files of it.
"""

import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog
from pydantic import ValidationError

from app.store.attempts import Claim
from app.store.blobs import materialise
from app.store.upkeep.kept_files import Kept, keep, kept_state
from bitwright.errors import AttemptSuperseded, BitwrightError, StorageError
from workers.disk.orders import AttemptOrder
from workers.disk.workspace import Workspace
from workers.supervise.attempt.lease import JobCancelled
from workers.supervise.context import WorkerContext

Seen = tuple[int, int, int]
"""Inode, size and time of a file: the same for as long as nobody replaces it."""

log = structlog.get_logger(__name__)


def bring_state(context: WorkerContext, claim: Claim, workspace: Workspace) -> None:
    """Put what an attempt on another machine had finished into the workspace, unless this machine's own is newer.

    What cannot be brought is computed again.

    Raises:
        Unavailable: the database is away.
        OSError: this machine's disk does not take it.
    """
    if context.settings.keep_state_seconds is None:
        return
    with context.database.reading() as session:
        kept = kept_state(session, claim.job_id)
    if kept.attempt <= last_attempt(workspace):
        return
    began = time.monotonic()
    _remove(workspace.state)
    try:
        for file in kept.files:
            target = workspace.state / file.path
            if not target.resolve().is_relative_to(workspace.state.resolve()):
                raise StorageError("a kept file is named outside its folder", value=file.path)
            if not materialise(context.blobs, file.sha256, target):
                raise StorageError("a kept file is damaged in the store", value=file.path)
    except BitwrightError as error:
        log.warning("state_not_brought", error=error.code, detail=error.detail)
        _remove(workspace.state)
        return
    size = sum(file.size for file in kept.files)
    seconds = round(time.monotonic() - began, 2)
    log.info("state_brought", of_attempt=kept.attempt, files=len(kept.files), bytes=size, seconds=seconds)


def last_attempt(workspace: Workspace) -> int:
    """Number of the attempt that computed in this workspace last; 0 if none did."""
    try:
        return AttemptOrder.model_validate_json(workspace.order.read_bytes()).attempt
    except (OSError, ValidationError):
        return 0


@contextmanager
def keeping(context: WorkerContext, claim: Claim, workspace: Workspace) -> Iterator[None]:
    """Keep what the job has finished every `keep_state_seconds` while the body runs, and once more if it fails."""
    seconds = context.settings.keep_state_seconds
    if seconds is None:
        yield
        return
    keeper = StateKeeper(context, claim, workspace)
    done = threading.Event()
    thread = threading.Thread(target=keeper.keep_until, args=(done, seconds), name="keeper", daemon=True)
    thread.start()
    try:
        yield
    except (AttemptSuperseded, JobCancelled):
        raise
    except BaseException:
        done.set()
        thread.join()
        keeper.keep()
        raise
    finally:
        done.set()
        thread.join()


class StateKeeper:
    """Files of one attempt's `state` in the blob store, and the rows that name them."""

    def __init__(self, context: WorkerContext, claim: Claim, workspace: Workspace) -> None:
        self._context = context
        self._claim = claim
        self._workspace = workspace
        self._stored: dict[str, tuple[Seen, Kept]] = {}
        self._superseded = False

    def keep_until(self, done: threading.Event, seconds: float) -> None:
        """Keep at every interval until `done`."""
        while not done.wait(seconds):
            self.keep()

    def keep(self) -> None:
        """Store what is new, and name it; no fault of store or database is worth the attempt."""
        if self._superseded:
            return
        try:
            self._keep()
        except AttemptSuperseded:
            self._superseded = True
        except (BitwrightError, OSError) as error:
            log.warning("state_not_kept", job_id=self._claim.job_id, error=type(error).__name__)

    def _keep(self) -> None:
        before = {path: kept for path, (_, kept) in self._stored.items()}
        self._stored = dict(self._store_files())
        files = {path: kept for path, (_, kept) in self._stored.items()}
        if files == before:
            return
        with self._context.database.transaction() as session:
            lease = self._context.settings.lease_seconds
            keep(session, self._claim.job_id, self._claim.attempt, list(files.values()), lease)
        new = len(set(files.values()) - set(before.values()))
        log.info("state_kept", job_id=self._claim.job_id, files=len(files), new=new)

    def _store_files(self) -> Iterator[tuple[str, tuple[Seen, Kept]]]:
        # Those that name others come first, so that what they name is stored, too.
        for path in sorted(_paths(self._workspace.state), key=lambda path: (not path.endswith(".json"), path)):
            with _opened(self._workspace.state, path) as descriptor:
                if descriptor is None:
                    continue
                status = os.fstat(descriptor)
                seen = (status.st_ino, status.st_size, status.st_mtime_ns)
                known = self._stored.get(path)
                if known is not None and known[0] == seen:
                    yield path, known
                    continue
                blob = self._context.blobs.put(Path(f"/proc/self/fd/{descriptor}"))
                yield path, (seen, Kept(path, blob.sha256, blob.size))


def _paths(state: Path) -> list[str]:
    """Paths of the files in a folder, without those that are being written."""
    found: list[str] = []
    if not state.is_dir():
        return found
    for place, _, names, _ in os.fwalk(state):
        found += [(Path(place) / name).relative_to(state).as_posix() for name in names if not name.startswith(".")]
    return found


@contextmanager
def _opened(state: Path, path: str) -> Iterator[int | None]:
    """A descriptor of a regular file in a folder, to read from; None if it is none, or is reached through a link."""
    *folders, name = path.split("/")
    opened: list[int] = []
    try:
        with suppress(OSError):
            opened.append(os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
            for folder in folders:
                opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1])
            opened.append(descriptor)
        regular = len(opened) == len(folders) + 2 and stat.S_ISREG(os.fstat(opened[-1]).st_mode)
        yield opened[-1] if regular else None
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
