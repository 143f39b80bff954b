"""A recorder of writes, syncs and renames that says which files a power cut would take."""

import os
import stat
from pathlib import Path

import pytest

Inode = tuple[int, int]


class PowerCut:
    """Watches `os.fsync`, `os.replace` and `os.rename` of this process, which pathlib calls, too.

    torn   files that got their names, or whose folder did, before their bytes were on the disk
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.torn: list[str] = []
        self.renamed: list[str] = []
        self._written: dict[Inode, bytes] = {}
        self._named: set[Inode] = set()
        self._unnamed: dict[Inode, str] = {}
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._renaming(getattr(os, name)))

    def lost(self) -> list[str]:
        """Folders in which a name was given that is not on the disk."""
        return list(self._unnamed.values())

    def unsynced(self, folder: Path) -> set[str]:
        """Files below a folder whose bytes are not on the disk, and folders in it whose names are not."""
        return {str(path.relative_to(folder)) for path in (folder, *folder.rglob("*")) if not self._is_safe(path)}

    def _is_safe(self, path: Path) -> bool:
        if path.is_dir():
            return _inode(path.stat()) in self._named
        return self._written.get(_inode(path.stat())) == path.read_bytes()

    def _sync(self, handle: int) -> None:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            self._named.add(_inode(status))
            self._unnamed.pop(_inode(status), None)
        else:
            self._written[_inode(status)] = Path(f"/proc/self/fd/{handle}").read_bytes()
        self._fsync(handle)

    def _renaming(self, really: "type(os.rename)") -> "type(os.rename)":  # type: ignore[valid-type]
        def rename(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
            old, new = Path(source), Path(target)
            self.torn += [path.name for path in (old, *old.rglob("*")) if not self._is_safe(path)]
            really(source, target)
            self.renamed.append(new.name)
            self._unnamed[_inode(new.parent.stat())] = str(new.parent)

        return rename


def _inode(status: os.stat_result) -> Inode:
    return status.st_dev, status.st_ino
