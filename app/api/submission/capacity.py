"""Checks that a live worker could run a job.

Estimates are rough, so a job is refused only where it needs more than twice of what every worker has; below that, a
dry run warns. Nothing is refused while no worker of its device class is alive: one that comes may be larger.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from app.api.submission.kept import Kept
from app.domain.capacity import GIB, SIZES, too_small
from app.domain.request.job_request import JobRequest
from app.store.models import Worker
from bitwright.errors import ExceedsCapacity
from bitwright.views import RUNTIMES


def capacity_warnings(request: JobRequest, estimates: Mapping[str, Any], workers: Sequence[Worker]) -> list[str]:
    """Warnings on live workers that make the job wait, or probably fail."""
    able = _of_its_class(request, workers)
    if not able:
        kind = "worker" if request.device == "any" else f"{request.device} worker"
        return [f"no {kind} is alive now; the job will wait for one"]
    warnings = _runtime_warnings(request, able)
    for name, word in SIZES.items():
        needed = estimates.get(name)
        sizes = [worker.capacity.get(name) for worker in able]
        known = [size for size in sizes if isinstance(size, int)]
        if needed is not None and known and len(known) == len(sizes) and max(known) < needed:
            have, need = max(known) / GIB, needed / GIB
            warnings.append(f"the job needs about {need:.1f} GiB of {word}; the largest worker has {have:.1f} GiB")
    return warnings


def workers_for(request: JobRequest, estimates: Mapping[str, Any], kept: Kept[Sequence[Worker]]) -> Sequence[Worker]:
    """The live workers, as of a moment ago, after the check that one of them could hold the job.

    Raises:
        ExceedsCapacity: none could, of those that are alive now.
    """
    workers = kept()
    try:
        require_capacity(request, estimates, workers)
    except ExceedsCapacity:
        workers = workers_now(kept)
        require_capacity(request, estimates, workers)
    return workers


def workers_now(kept: Kept[Sequence[Worker]]) -> Sequence[Worker]:
    """The workers that are alive now."""
    kept.forget()
    return kept(wait=True)


def require_capacity(request: JobRequest, estimates: Mapping[str, Any], workers: Sequence[Worker]) -> None:
    """Refuse a job that none of the workers could ever hold.

    Raises:
        ExceedsCapacity: each of them is too small by far, or lacks a runtime that is required; the detail tells what
            the last of them lacks.
    """
    _require_runtimes(request, workers)
    reasons = [too_small(estimates, worker.capacity) for worker in _of_its_class(request, workers)]
    if reasons and all(reasons):
        hint = "fewer or shorter calibration sequences need less; or start a larger worker"
        raise ExceedsCapacity(f"no worker that is alive could hold this job: {reasons[-1]}", field="model", hint=hint)


def _runtime_warnings(request: JobRequest, able: Sequence[Worker]) -> list[str]:
    """Required runtimes that not every worker is known to have, which may take the job all the same."""
    asked = () if request.require is None else request.require.loads or ()
    known = [worker.capacity.get(RUNTIMES) for worker in able]
    return [
        f"not every worker that may take the job is known to have {runtime.value}; one without it ends the job"
        for runtime in asked
        if not all(isinstance(runtimes, dict) and runtime in runtimes for runtimes in known)
    ]


def _require_runtimes(request: JobRequest, workers: Sequence[Worker]) -> None:
    asked = set() if request.require is None else set(request.require.loads or ())
    able = _of_its_class(request, workers)
    known = [set(worker.capacity[RUNTIMES]) for worker in able if isinstance(worker.capacity.get(RUNTIMES), dict)]
    if asked and known and len(known) == len(able) and not any(asked <= runtimes for runtimes in known):
        lacking = min(runtime.value for runtime in asked - max(known, key=lambda runtimes: len(asked & runtimes)))
        detail = f"no worker that is alive has {lacking}, which the request requires"
        hint = "GET /v1/workers says what each has; start one that has it, or leave it out of require.loads"
        raise ExceedsCapacity(detail, field="require.loads", value=lacking, hint=hint)


def _of_its_class(request: JobRequest, workers: Sequence[Worker]) -> list[Worker]:
    return [worker for worker in workers if request.device in ("any", worker.device_class)]
