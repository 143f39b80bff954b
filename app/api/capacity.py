"""Whether any worker that is alive could run a job. Only for warnings: estimates are rough, and workers come and go."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.jobs import JobRequest
from app.store.models import Worker

SIZES = {
    "host_memory_bytes": "memory",
    "device_memory_bytes": "GPU memory",
    "disk_bytes": "free disk",
}
"""Name in a worker's capacity and in the estimates -> word for people."""
GIB = 1 << 30


def capacity_warnings(request: JobRequest, estimates: Mapping[str, Any], workers: Sequence[Worker]) -> list[str]:
    """What makes the job wait, or probably fail, on the workers that there are."""
    able = [worker for worker in workers if request.device in ("any", worker.device_class)]
    if not able:
        kind = "worker" if request.device == "any" else f"{request.device} worker"
        return [f"no {kind} is alive now; the job will wait for one"]
    warnings = []
    for name, word in SIZES.items():
        needed = estimates.get(name)
        sizes = [worker.capacity.get(name) for worker in able]
        known = [size for size in sizes if isinstance(size, int)]
        if needed is not None and known and len(known) == len(sizes) and max(known) < needed:
            have, need = max(known) / GIB, needed / GIB
            warnings.append(f"the job needs about {need:.1f} GiB of {word}; the largest worker has {have:.1f} GiB")
    return warnings
