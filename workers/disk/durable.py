"""Files that are there whole or not at all, also after a power cut."""

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file, fsync and rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Make everything under a folder durable, its files before the names in it: before it is said to be whole."""
    for place, _, names in os.walk(folder, topdown=False):
        for file in (Path(place, name) for name in names):
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
