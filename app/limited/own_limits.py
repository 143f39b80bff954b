"""Limits that a process sets for itself, in one direction: whatever it does later, it does not take them back."""

import resource
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")
SLACK_BYTES = 512 << 20
"""Of address space: of thread stacks and allocators, reserved and never touched."""


def limit_memory(room: int) -> None:
    """Let this process allocate `room` bytes beyond what it has, mapped files not counted; MemoryError then."""
    held = _bytes_of("VmData:")
    _lower(resource.RLIMIT_DATA, held + room)


def limit_address_space(room: int) -> None:
    """The same of everything that it maps, files included."""
    _lower(resource.RLIMIT_AS, _bytes_of("VmSize:") + room + SLACK_BYTES)


def limit_processor(seconds: float) -> None:
    """Let this process compute for so many seconds beyond those that it has; the kernel ends it then."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + seconds) + 1)


def limit_files(file_bytes: int, open_files: int) -> None:
    """Let no file that it writes grow beyond `file_bytes`, and no more than `open_files` be open; dump no core."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    _lower(resource.RLIMIT_NOFILE, open_files)


def _lower(kind: int, limit: int) -> None:
    _, most = resource.getrlimit(kind)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    with suppress(ValueError, OSError):  # macOS knows some kinds and sets none
        resource.setrlimit(kind, (limit, limit))


def _bytes_of(name: str) -> int:
    """A size of this process by its name in the kernel's status; 0 where the system has none."""
    with suppress(OSError, ValueError, IndexError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) << 10
    return 0
