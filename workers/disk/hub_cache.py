"""The models that a machine has fetched from the Hub: a folder each, shared by all jobs, held while one is used.

A folder's file `.used` tells by its time when the model was last used, and is locked, shared, by whoever uses it.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

USED = ".used"
REMOVED = ".removed-"


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a model's folder, made if it is not there: nobody prunes it meanwhile, in whatever process."""
    handle = _locked(folder)
    try:
        os.utime(folder / USED)
        yield
        os.utime(folder / USED)
    finally:
        os.close(handle)


def prune_models(root: Path, *, unused_seconds: float) -> list[str]:
    """Delete the folders that nobody holds and nobody has used for `unused_seconds`; their names."""
    pruned = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name.startswith(REMOVED):
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            with suppress(FileNotFoundError):  # another worker of this machine was faster
                _stamp(folder)
                removed = _take_away(folder, unused_seconds)
                if removed is not None:
                    shutil.rmtree(removed, ignore_errors=True)
                    pruned.append(folder.name)
    return pruned


def _locked(folder: Path) -> int:
    """The open, locked file of a folder that is still in its place once it is locked."""
    while True:
        with suppress(FileExistsError):  # pathlib's own doubt, if the folder goes while it is made
            folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # taken away just now: once more
            handle = os.open(folder / USED, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(handle, fcntl.LOCK_SH)
            if _is_in_place(handle, folder):
                return handle
            os.close(handle)


def _take_away(folder: Path, unused_seconds: float) -> Path | None:
    """Rename a folder under its exclusive lock, so that nobody finds it any more; None if it is held or was used."""
    handle = os.open(folder / USED, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        age = time.time() - os.fstat(handle).st_mtime
        if age <= unused_seconds or not _is_in_place(handle, folder):
            return None
        return folder.rename(folder.with_name(f"{REMOVED}{folder.name}.{os.getpid()}"))
    except BlockingIOError:
        return None
    finally:
        os.close(handle)


def _is_in_place(handle: int, folder: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(folder / USED))
    return False


def _stamp(folder: Path) -> None:
    """Give a folder that has no stamp, since an older version made it, the time of its last change."""
    changed = folder.stat().st_mtime
    with suppress(FileExistsError):
        os.close(os.open(folder / USED, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        os.utime(folder / USED, (changed, changed))
