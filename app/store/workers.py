"""Queries on workers, queue depth and the sweep's lease."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import and_, delete, func, select, update
from sqlalchemy.orm import Session

from app.store.clock import now, seconds_from_now
from app.store.models import Job, SweepLease, Tenant, Worker
from app.store.upsert import upsert
from bitwright.job_states import DeviceClass, JobStatus

FRESH_SECONDS = 90.0
"""A worker that has not been seen for this long is not listed."""


CLOCK_READINGS = 3
"""The one with the shortest way there and back counts."""


@dataclass(frozen=True)
class WorkerState:
    """A worker and the job that it runs; None if it is idle."""

    worker: Worker
    job_id: str | None


def register(
    session: Session, worker_id: str, device_class: DeviceClass, capacity: Mapping[str, object] | None = None
) -> None:
    """Say that a worker has started and what it can hold (device name, memory and disk in bytes, versions)."""
    values = {"device_class": device_class.value, "capacity": dict(capacity or {}), "last_seen_at": now()}
    fresh = {**values, "started_at": now()}
    statement = upsert(session, Worker).values(id=worker_id, **fresh)
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=fresh))


def heartbeat(session: Session, worker_id: str) -> bool:
    """Say that a worker is alive; False if it is not registered (any more)."""
    seen = update(Worker).where(Worker.id == worker_id).values(last_seen_at=now()).returning(Worker.id)
    return session.execute(seen).one_or_none() is not None


def gone(session: Session, worker_id: str) -> None:
    """Say that a worker has ended."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def describe(session: Session, worker_id: str, capacity: Mapping[str, object]) -> None:
    """Say anew what a registered worker can hold and what is known of its machine."""
    session.execute(update(Worker).where(Worker.id == worker_id).values(capacity=dict(capacity)))


def live_classes(session: Session, *, fresh_seconds: float = FRESH_SECONDS) -> frozenset[DeviceClass]:
    """The classes of device that a worker seen in the last `fresh_seconds` serves."""
    seen = select(Worker.device_class).where(Worker.last_seen_at > seconds_from_now(-fresh_seconds)).distinct()
    return frozenset(map(DeviceClass, session.scalars(seen)))


def clock_skew(session: Session) -> float:
    """Seconds by which this host's clock is ahead of the database's, to within the round trip."""
    tried = []
    for _ in range(CLOCK_READINGS):
        asked = datetime.now(UTC)
        theirs = session.scalars(select(now())).one()
        answered = datetime.now(UTC)
        tried.append((answered - asked, asked + (answered - asked) / 2 - theirs))
    return min(tried)[1].total_seconds()


def list_workers(session: Session, *, fresh_seconds: float = FRESH_SECONDS) -> Sequence[WorkerState]:
    """The workers seen in the last `fresh_seconds`, by id."""
    running = and_(Job.worker_id == Worker.id, Job.status == JobStatus.RUNNING)
    query = (
        select(Worker, func.min(Job.id))
        .outerjoin(Job, running)
        .where(Worker.last_seen_at > seconds_from_now(-fresh_seconds))
        .group_by(Worker.id)
        .order_by(Worker.id)
    )
    return [WorkerState(worker, job_id) for worker, job_id in session.execute(query)]


def forget_workers(session: Session, *, unseen_seconds: float) -> None:
    """Remove workers that ended without a word."""
    session.execute(delete(Worker).where(Worker.last_seen_at <= seconds_from_now(-unseen_seconds)))


def waiting(session: Session) -> dict[str, int]:
    """Number of jobs that could be claimed now, by device: `any`, `cpu` or `cuda`."""
    query = (
        select(Job.device, func.count())
        .where(Job.status == JobStatus.QUEUED, Job.held.is_(False), Job.available_at <= now())
        .group_by(Job.device)
    )
    return {row[0]: row[1] for row in session.execute(query)}


@dataclass(frozen=True)
class Waiting:
    """Jobs of one class that could be claimed now: how many, and for how long the first of them has waited."""

    jobs: int
    oldest_seconds: float


def waiting_times(session: Session) -> dict[str, Waiting]:
    """Of each class of device, `any`, `cpu` or `cuda`, for metrics; jobs of suspended tenants are not counted."""
    query = (
        select(Job.device, func.count(), func.min(Job.available_at), now())
        .join(Tenant, Tenant.id == Job.tenant_id)
        .where(
            Job.status == JobStatus.QUEUED,
            Job.held.is_(False),
            Job.available_at <= now(),
            Tenant.suspended_at.is_(None),
        )
        .group_by(Job.device)
    )
    rows = {row[0]: Waiting(row[1], max((row[3] - row[2]).total_seconds(), 0.0)) for row in session.execute(query)}
    return dict.fromkeys(("any", "cpu", "cuda"), Waiting(0, 0.0)) | rows


def count_live(session: Session, *, fresh_seconds: float = FRESH_SECONDS) -> dict[str, int]:
    """Number of live workers of each class."""
    query = (
        select(Worker.device_class, func.count())
        .where(Worker.last_seen_at > seconds_from_now(-fresh_seconds))
        .group_by(Worker.device_class)
    )
    return dict.fromkeys((device.value for device in DeviceClass), 0) | {
        row[0]: row[1] for row in session.execute(query)
    }


def sweep_lease(session: Session, holder: str, seconds: float) -> bool:
    """Take or renew the right to sweep for `seconds`; False while another holds it."""
    lease = {"holder": holder, "expires_at": seconds_from_now(seconds)}
    free = (SweepLease.expires_at <= now()) | (SweepLease.holder == holder)
    statement = (
        upsert(session, SweepLease)
        .values(name="sweep", **lease)
        .on_conflict_do_update(index_elements=["name"], set_=lease, where=free)
        .returning(SweepLease.holder)
    )
    return session.execute(statement).one_or_none() is not None
