"""Memory and processors that this process may use, and its cgroup's out-of-memory kills."""

import os
from contextlib import suppress
from pathlib import Path


def host_memory() -> int:
    """Bytes of the machine, or of the cgroup where that is smaller."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine


CGROUP_ROOT = Path("/sys/fs/cgroup")


def oom_kills(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """How often the kernel has killed in this process's cgroup for want of memory; 0 where nobody counts."""
    with suppress(OSError, ValueError):
        own = [line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")]
        for folder in (*(root / path.strip("/") for path in own), *([root] if own else [])):
            events = folder / "memory.events"
            if events.exists():
                counts = dict(line.split() for line in events.read_text().splitlines())
                return int(counts.get("oom_kill", 0))
    return 0


def available_threads() -> int:
    """Processors that the affinity mask, the cgroup's quota and OMP_NUM_THREADS leave to this process, at least 1."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    quota = _cgroup_processors(Path("/sys/fs/cgroup"))
    if quota is not None:
        limits.append(int(quota))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit():
        limits.append(int(asked))
    return max(1, min(limits))


def _cgroup_processors(root: Path) -> float | None:
    """Quota over period, of cgroup v2 or v1; None where there is no limit."""
    for quota_file, period_file in (("cpu.max", "cpu.max"), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota = (root / quota_file).read_text().split()[0]
            period = (root / period_file).read_text().split()[-1]
        except (OSError, IndexError):
            continue
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            return int(quota) / int(period)
    return None
