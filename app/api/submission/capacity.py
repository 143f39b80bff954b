"""Checks that a live worker could run a job.

Estimates are rough, so a job is refused only where it needs more than twice of what every worker has; below that, a
dry run warns. Nothing is refused while no worker of its device class is alive: one that comes may be larger.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.request.job_request import JobRequest
from app.store.models import Worker
from bitwright.errors import ExceedsCapacity

SIZES = {
    "host_memory_bytes": "memory",
    "device_memory_bytes": "GPU memory",
    "disk_bytes": "free disk",
}
"""Name in a worker's capacity and in the estimates -> word for people."""
MARGIN = 2.0
"""Estimates are right within a factor of about two."""
GIB = 1 << 30


def capacity_warnings(request: JobRequest, estimates: Mapping[str, Any], workers: Sequence[Worker]) -> list[str]:
    """Warnings on live workers that make the job wait, or probably fail."""
    able = _of_its_class(request, workers)
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


def require_capacity(request: JobRequest, estimates: Mapping[str, Any], workers: Sequence[Worker]) -> None:
    """Refuse a job that none of the workers could ever hold.

    Raises:
        ExceedsCapacity: each of them is too small by far; the detail tells what the last of them lacks.
    """
    reasons = [_too_small(estimates, worker.capacity) for worker in _of_its_class(request, workers)]
    if reasons and all(reasons):
        hint = "fewer or shorter calibration sequences need less; or start a larger worker"
        raise ExceedsCapacity(f"no worker that is alive could hold this job: {reasons[-1]}", field="model", hint=hint)


def _of_its_class(request: JobRequest, workers: Sequence[Worker]) -> list[Worker]:
    return [worker for worker in workers if request.device in ("any", worker.device_class)]


def _too_small(estimates: Mapping[str, Any], capacity: Mapping[str, Any]) -> str | None:
    """The shortage of a worker by more than the margin; None if nothing is short, or if it does not report it."""
    host, device = capacity.get("host_memory_bytes"), capacity.get("device_memory_bytes")
    available = {
        # Activations lie in either.
        "host_memory_bytes": host and host + (device or 0),
        "device_memory_bytes": device,
        # Free disk changes while a worker lives; the disk does not.
        "disk_bytes": capacity.get("disk_total_bytes"),
    }
    for name, have in available.items():
        needed = estimates.get(name)
        if isinstance(have, int) and needed is not None and needed > MARGIN * have:
            word = SIZES[name].removeprefix("free ")
            return f"it needs about {needed / GIB:.1f} GiB of {word}, and {have / GIB:.1f} GiB is what there is"
    return None
