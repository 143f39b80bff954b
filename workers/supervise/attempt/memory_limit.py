"""The memory that an attempt may have: by its job's plan, watched, and held by a cgroup where the worker may make one.

An attempt says what its job is estimated to need before it takes it (`workers.child.needs`). From then on it may hold
twice that and a few gigabytes, of memory that no file can give back: within a cgroup the kernel ends it beyond that,
elsewhere the watch does, within a moment. On a CPU it also limits itself, so that an allocation fails first.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from app.limited.process import held_memory
from workers.child.needs import MemorySetting, over_limit
from workers.machine import CGROUP_ROOT, MEMBERSHIP

END_SECONDS, LOOK_AGAIN_SECONDS = 0.5, 0.01
"""That the kernel may take to end a process that was killed."""
PREFIX = "bitwright-"
DELEGATED = ("user.delegate", "trusted.delegate")
"""Attributes by which systemd marks a cgroup that its service may divide."""

log = structlog.get_logger(__name__)


class MemoryWatch:
    """The memory of an attempt's processes, from its start to its end."""

    def __init__(self, pids: Sequence[int], group: "MemoryGroup | None" = None) -> None:
        self._pids = pids
        self._group = group
        self.limit: int | None = None

    def limit_to(self, limit: int | None) -> None:
        """Let them hold no more than this from now on."""
        if limit is not None:
            self.limit = limit
            log.info("memory_limited", bytes=limit, cgroup=self._group is not None)
            if self._group is not None:
                self._group.limit_to(limit)

    def check(self) -> None:
        """Raises:
        OverLimit: they hold more than they may.
        """
        if self.limit is not None and (held := sum(map(held_memory, self._pids))) > self.limit:
            raise over_limit(self.limit, held)

    def overstepped(self) -> bool:
        """True if the kernel has ended one of them for its cgroup's limit."""
        return self._group is not None and self._group.kills() > 0


class MemoryGroup:
    """A cgroup of an attempt's own, of version 1 or 2."""

    def __init__(self, folder: Path, limit_file: str, events_file: str) -> None:
        self.folder = folder
        self._limit, self._events = limit_file, events_file

    @classmethod
    def make(cls, name: str, root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP) -> "MemoryGroup | None":
        """A new one beside or below this process's own; None where it may not make one.

        name   begins with `PREFIX`
        """
        for parent, limit_file, events_file in _parents(root, membership):
            for old in parent.glob(f"{PREFIX}*"):
                with suppress(OSError):  # one that is in use stays
                    old.rmdir()
            group = cls(parent / name, limit_file, events_file)
            with suppress(OSError):
                group.folder.mkdir(exist_ok=True)
                if (group.folder / limit_file).exists():
                    return group
                group.remove()
        return None

    def add(self, pid: int) -> None:
        """Move a process into it, with all that it starts from then on."""
        with suppress(OSError):
            (self.folder / "cgroup.procs").write_text(str(pid))

    def limit_to(self, limit: int) -> None:
        """Let the kernel end what holds more than that together and gives nothing back."""
        with suppress(OSError):
            (self.folder / self._limit).write_text(str(limit))

    def kills(self) -> int:
        """Processes that the kernel has ended for the limit."""
        with suppress(OSError, ValueError):
            lines = (line.split() for line in (self.folder / self._events).read_text().splitlines())
            return int(dict(line for line in lines if len(line) == 2).get("oom_kill", 0))
        return 0

    def remove(self, seconds: float = END_SECONDS) -> None:
        """Take it away, once the processes in it have ended; the next one takes away what is left of this."""
        until = time.monotonic() + seconds
        while self.folder.exists():
            try:
                self.folder.rmdir()
            except OSError:
                if time.monotonic() > until:
                    return
                time.sleep(LOOK_AGAIN_SECONDS)


@contextmanager
def watched(name: str, pids: Sequence[int], setting: MemorySetting) -> Iterator[MemoryWatch]:
    """A watch on processes, in a cgroup of their own where that can be."""
    group = None if setting == "off" else MemoryGroup.make(name)
    try:
        if group is not None:
            for pid in pids:
                group.add(pid)
        yield MemoryWatch(pids, group)
    except BaseException:
        if group is not None:
            group.remove(0)  # they still run, and whoever raised wants to end them at once
        raise
    if group is not None:
        group.remove()


def _parents(root: Path, membership: Path) -> Iterator[tuple[Path, str, str]]:
    """Cgroups in which this process may make others, and the names of their limit and of the kernel's counts."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if "memory" in controllers.split(","):
            yield root / "memory" / path.strip("/"), "memory.limit_in_bytes", "memory.oom_control"
        elif not controllers:
            # Groups with processes of their own have none below them with limits: systemd's DelegateSubgroup= puts the
            # service one level down.
            above = (root / path.strip("/")).parent
            if above.is_relative_to(root) and _is_delegated(above) and "memory" in _words(above):
                yield above, "memory.max", "memory.events"


def _is_delegated(folder: Path) -> bool:
    for name in DELEGATED:
        with suppress(OSError, AttributeError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _words(folder: Path) -> list[str]:
    with suppress(OSError):
        return (folder / "cgroup.subtree_control").read_text().split()
    return []
