"""States of a job, and the classes of devices that jobs ask for."""

from enum import StrEnum


class JobStatus(StrEnum):
    """`TRANSITIONS` says which status follows which."""

    QUEUED = "queued"
    """Waits for a worker. A worker's claim moves it to running; a cancel ends it at once."""
    RUNNING = "running"
    """A worker holds its lease. Ends by the worker's word, or goes back to queued when the lease runs out."""
    SUCCEEDED = "succeeded"
    """Its artifacts are stored and its report is written. Final."""
    FAILED = "failed"
    """Its last attempt's error says why. `retry` queues it again."""
    CANCELLED = "cancelled"
    """A caller ended it. `retry` queues it again."""


FINAL_STATUSES = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


class DeviceClass(StrEnum):
    """What a worker computes on. A job may ask for one, or take any."""

    CPU = "cpu"
    CUDA = "cuda"
