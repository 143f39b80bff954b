"""States of a job, and the classes of devices that jobs ask for."""

from enum import StrEnum

from bitwright.errors import Conflict


class JobStatus(StrEnum):
    """Status of a job; `TRANSITIONS` has the allowed changes."""

    QUEUED = "queued"
    """Waits for a worker. A worker's claim moves it to running; a cancel ends it at once."""
    RUNNING = "running"
    """A worker holds its lease. Ends when the worker reports it, or goes back to queued when the lease expires."""
    SUCCEEDED = "succeeded"
    """Its artifacts are stored and its report is written. Final."""
    FAILED = "failed"
    """Its last attempt's error says why. `retry` queues it again."""
    CANCELLED = "cancelled"
    """A caller ended it. `retry` queues it again."""


class PublicationStatus(StrEnum):
    """Status of a result on its way to the Hub, of a job that stays succeeded."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    """The Hub has committed it. Final."""
    FAILED = "failed"
    """Its error says why. Publish again to try once more."""


FINAL_STATUSES = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


def without_result(job_id: str, status: JobStatus, missing: str = "result") -> Conflict:
    """The error of asking for what a job only has once it has succeeded, with what to do instead."""
    ended = f"`bitwright show {job_id}` says why; `bitwright retry {job_id}` queues it again"
    hint = ended if status in FINAL_STATUSES else f"`bitwright watch {job_id}` waits for its end"
    return Conflict(f"job {job_id} is {status.value} and has no {missing}", value=status.value, hint=hint)


class DeviceClass(StrEnum):
    """Device that a worker computes on. A job may request one, or take any."""

    CPU = "cpu"
    CUDA = "cuda"
