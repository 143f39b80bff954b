"""States of a job, the transitions between them, and the classes of devices that jobs ask for."""

from types import MappingProxyType

from bitwright.job_states import JobStatus

TRANSITIONS: MappingProxyType[JobStatus, frozenset[JobStatus]] = MappingProxyType(
    {
        JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
        JobStatus.RUNNING: frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.QUEUED}),
        JobStatus.SUCCEEDED: frozenset(),
        JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
        JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
    }
)


MAX_RETRIES_WITHOUT_PROGRESS = 3
"""After the first attempt of a row of attempts that finish no new block: three retries, four attempts in all."""
