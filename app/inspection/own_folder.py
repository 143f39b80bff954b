"""The temporary folder of a process that looks at checkpoints: its own while it lives, and removed after it."""

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "bitwright-inspection-"
YOUNG_SECONDS = 60.0
"""A younger folder may be one that its process has not locked yet."""


class OwnFolder:
    """A new folder that is locked while its process lives, however that ends. Those of ended processes are removed."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for other in self.path.parent.glob(f"{PREFIX}*"):
            with suppress(OSError):
                remove_left(other)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._handle)


def remove_left(folder: Path) -> None:
    """Remove a folder of this user whose process has ended.

    Raises:
        OSError: it is another user's, no folder, or in use.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(handle)
        if status.st_uid == os.geteuid() and time.time() - status.st_mtime > YOUNG_SECONDS:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    finally:
        os.close(handle)
