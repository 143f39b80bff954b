"""Memory and processors that this process may use, and its cgroup's out-of-memory kills."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def host_memory(root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP) -> int:
    """Bytes of the machine, or of the smallest of this process's cgroup and those above it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (_read(folder / "memory.max").strip() for folder in _cgroups(root, membership))
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])


def oom_kills(root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP) -> int:
    """Processes of this process's cgroup that the kernel has killed for want of memory; 0 where nobody counts."""
    for folder in _cgroups(root, membership):
        if events := _read(folder / "memory.events"):
            with suppress(ValueError):
                return int(dict(line.split() for line in events.splitlines()).get("oom_kill", 0))
    return 0


def available_threads(root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP) -> int:
    """Processors that the affinity mask, cgroups' quotas and OMP_NUM_THREADS leave to this process, at least 1."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    quotas = [_read(folder / "cpu.max") for folder in _cgroups(root, membership)]
    # Version 1 has two files.
    quotas.append(_read(root / "cpu/cpu.cfs_quota_us") + _read(root / "cpu/cpu.cfs_period_us"))
    for quota, period in (words for text in quotas if len(words := text.split()) == 2):
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            limits.append(int(int(quota) / int(period)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit():
        limits.append(int(asked))
    return max(1, min(limits))


def _cgroups(root: Path, membership: Path) -> Iterator[Path]:
    """Folders of this process's cgroup (version 2) and of those above it, whose limits hold as well; `root` last."""
    for line in _read(membership).splitlines():
        if line.startswith("0::"):
            own = root / line.removeprefix("0::").strip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))
            return


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
