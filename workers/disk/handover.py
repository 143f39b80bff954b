"""Files of a job in the hands of another user: a worker that runs as root gives its attempts a user of their own.

A file that is also a blob of the store (a hard link) is copied first: whoever owns one name of a file owns all.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from bitwright.errors import InvalidSettings

UNFINISHED = ".handed-over"


def hand_over(folder: Path, user: int) -> None:
    """Give a folder and all in it to a user; links stay as they are, and what they lead to."""
    for path in _all(folder):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            copy = path.with_name(path.name + UNFINISHED)
            shutil.copyfile(path, copy)
            copy.replace(path)
        os.chown(path, user, user, follow_symlinks=False)


def take_back(folder: Path) -> None:
    """Own a folder and all in it again, once no process of the other user is left."""
    for path in _all(folder):
        os.chown(path, os.getuid(), os.getgid(), follow_symlinks=False)


def demand_way(place: Path, user: int) -> None:
    """Check that another user gets to a folder or file of the worker; the message is its operator's alone.

    Raises:
        InvalidSettings: a folder above it is closed to that user.
    """
    for above in reversed(place.resolve().parents):
        status = above.stat()
        if status.st_uid != user and not status.st_mode & stat.S_IXOTH:
            raise InvalidSettings(
                f"BITWRIGHT_ATTEMPT_USER is {user}, who may not pass through {above}",
                hint=f"let others pass (chmod o+x {above}), or keep {place} elsewhere",
            )


def _all(folder: Path) -> Iterator[Path]:
    yield folder
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))
