"""Requests, events and artifacts that the store's tests are about."""

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import update

from app.domain.request.job_request import JobRequest
from app.store.attempts import AttemptWriter, Claim, NewArtifact, claim
from app.store.clock import now, seconds_from_now
from app.store.jobs import JobRepository
from app.store.models import Job
from app.store.session import Database
from bitwright.events import BlockEvent, CheckpointEvent, ProgressEvent, Stage
from bitwright.job_states import DeviceClass
from tests.reports import report


def request(**fields: Any) -> JobRequest:
    """A small valid request with these fields changed."""
    return JobRequest.parse({"model": "org/model", "method": "rtn", **fields})


def add(database: Database, tenant: str, **fields: Any) -> str:
    """Queue a job; its id."""
    with database.transaction() as session:
        return JobRepository(session, tenant).add(request(**fields)).id


def get(database: Database, tenant: str, job_id: str) -> Job:
    """The job as it is now."""
    with database.reading() as session:
        return JobRepository(session, tenant).get(job_id)


def take(database: Database, worker: str = "w1", device: DeviceClass = DeviceClass.CPU, lease: float = 60) -> Claim:
    """Claim the next job; there must be one."""
    held = try_take(database, worker, device, lease)
    assert held is not None
    return held


def try_take(
    database: Database, worker: str = "w1", device: DeviceClass = DeviceClass.CPU, lease: float = 60
) -> Claim | None:
    """Claim the next job, if there is one."""
    with database.transaction() as session:
        return claim(session, worker_id=worker, device_class=device, lease_seconds=lease)


def succeed(database: Database, held: Claim, artifacts: Sequence[NewArtifact] = ()) -> None:
    """End a job well, with these files."""
    with database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).succeed(report(), artifacts)


def tell(database: Database, held: Claim, *events: BlockEvent | CheckpointEvent | ProgressEvent) -> None:
    """Append events to an attempt."""
    with database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).append(events)


def end_back_off(database: Database, job_id: str) -> None:
    """Let the time pass that a job waits before it may be claimed again."""
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(available_at=now()))


def let_lease_run_out(database: Database, job_id: str) -> None:
    """Let the time pass for which a worker holds the job."""
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=seconds_from_now(-1)))


def block(index: int) -> BlockEvent:
    """Block `index` of eight is finished."""
    return BlockEvent(index=index, total=8, name=f"model.layers.{index}", seconds=0.5)


def progress(done: float) -> ProgressEvent:
    """`done` of eight blocks are finished."""
    return ProgressEvent(stage=Stage.QUANTIZE, done=done, total=8, unit="blocks")


def artifact(path: str = "model.safetensors", sha256: str = "a" * 64, size: int = 3) -> NewArtifact:
    """A file of the native checkpoint."""
    return NewArtifact("native", path, sha256, size, "application/octet-stream")


def wait_until(deadline_seconds: float, condition: Any) -> None:
    """Wait for a condition; AssertionError when it does not come true in time."""
    deadline = time.monotonic() + deadline_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
