"""Storage of an open upload's parts until it is complete: one folder per upload, one file per uploaded file.

The database says how many bytes of a file count; bytes on disk beyond them are a torn write and are overwritten.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path

from bitwright.errors import RequestInProgress


class PartsFolder:
    """The parts of one upload. `upload_id` must come from the store, which checks its shape."""

    def __init__(self, root: Path, upload_id: str) -> None:
        self._upload_id = upload_id
        self._folder = root / upload_id

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one, among all processes, who writes or completes this upload.

        Raises:
            RequestInProgress: another request is at it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                detail = f"another request is writing upload {self._upload_id}"
                raise RequestInProgress(detail, hint="send its parts one after the other") from error
            yield
        finally:
            os.close(descriptor)

    def path(self, position: int) -> Path:
        """The file for the upload's file at this position; its name is never taken from the caller."""
        return self._folder / f"{position:04d}.part"

    def open_at(self, position: int, offset: int) -> FileIO:
        """The file, cut to `offset` bytes and open for what follows; not buffered: a full disk is told by the write."""
        descriptor = os.open(self.path(position), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        file = FileIO(descriptor, "r+b")
        file.truncate(offset)
        file.seek(offset)
        return file

    def present(self, position: int) -> int:
        """Bytes on disk; 0 if nothing has arrived, or the folder is on another machine."""
        try:
            return self.path(position).stat().st_size
        except FileNotFoundError:
            return 0

    def open_whole(self, position: int) -> BufferedReader:
        """The file, open for reading. One of no bytes need not have been sent."""
        self.open_at(position, self.present(position)).close()
        return self.path(position).open("rb")

    def discard(self, position: int) -> None:
        """Delete the file."""
        self.path(position).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self._folder, ignore_errors=True)
