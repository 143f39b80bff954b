"""Position of queued jobs and an estimate of their start, from the durations of jobs that succeeded."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from math import inf
from statistics import median

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session, aliased

from app.store.clock import now
from app.store.models import Attempt, Job, Tenant, Worker
from app.store.workers import list_workers
from bitwright.job_states import JobStatus

LONGEST_QUEUE = 1000
"""Jobs behind these get no place and no time."""
MEASURED_JOBS = 200
"""So many of the latest that succeeded are looked at for durations."""

Kind = tuple[str, str]
"""Model, and recipe or method: jobs of one kind take about as long."""


@dataclass(frozen=True)
class Place:
    """Position of a queued job, and its estimated start.

    position      1 is the next one, among those that the same workers may take
    eta_seconds   until it begins; None where no worker is alive, or a job before it has no measured duration
    """

    position: int
    eta_seconds: float | None


@dataclass(frozen=True)
class _Waiting:
    job_id: str
    device: str
    kind: Kind
    available_in: float


def places(session: Session) -> dict[str, Place]:
    """The place of every queued job that is not held, whoever's it is, by its id.

    The order is that of the next claims, in which tenants take turns. Later ones may differ: what runs will have ended,
    and whether a tenant may have more jobs running is not looked at.
    """
    at = session.scalars(select(now())).one()
    queue, durations = _queue(session, at), _durations(session)
    free = _free_in(session, at, durations)
    places: dict[str, Place] = {}
    before = Counter[str]()
    for job in queue:
        position = 1 + (before.total() if job.device == "any" else before["any"] + before[job.device])
        before[job.device] += 1
        able = [worker for worker, (device, _) in free.items() if job.device in ("any", device)]
        first = min(able, key=lambda worker: free[worker][1], default=None)
        begins = inf if first is None else max(free[first][1], job.available_in)
        if first is not None:
            free[first] = (free[first][0], begins + durations.get(job.kind, inf))
        places[job.job_id] = Place(position, None if begins == inf else round(begins, 1))
    return places


def _queue(session: Session, at: datetime) -> list[_Waiting]:
    """Queued jobs in the order in which the next claim would look at them."""
    busy = aliased(Job, name="busy")
    running = (
        select(busy.tenant_id, func.count().label("running"))
        .where(busy.status == JobStatus.RUNNING)
        .group_by(busy.tenant_id)
        .subquery("load")
    )
    # Each claim makes its tenant have one more running: its second job of a priority counts as if the first one ran.
    turn = func.row_number().over(partition_by=(Job.tenant_id, Job.priority), order_by=Job.id)
    query = (
        select(Job.id, Job.device, Job.model, Job.method, Job.recipe, Job.available_at)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .outerjoin(running, running.c.tenant_id == Job.tenant_id)
        .where(Job.status == JobStatus.QUEUED, Job.held.is_(False))
        .order_by(
            Job.priority.desc(),
            func.coalesce(running.c.running, 0) + turn,
            Tenant.served_at.asc().nulls_first(),
            Job.id,
        )
        .limit(LONGEST_QUEUE)
    )
    return [
        _Waiting(row.id, row.device, (row.model, row.recipe or row.method), max(0.0, _seconds(at, row.available_at)))
        for row in session.execute(query)
    ]


def _durations(session: Session) -> Mapping[Kind, float]:
    """Seconds that a job of each kind took, the median of the latest that succeeded."""
    # The ids first, by the index alone: rows of jobs that succeeded are long, and sorting would read all of them.
    latest = select(Job.id).where(Job.status == JobStatus.SUCCEEDED).order_by(Job.id.desc()).limit(MEASURED_JOBS)
    query = select(Job.model, Job.method, Job.recipe, Job.started_at, Job.finished_at).where(
        Job.id.in_(select(latest.subquery("latest").c.id))
    )
    taken: defaultdict[Kind, list[float]] = defaultdict(list)
    for row in session.execute(query):
        if row.started_at is not None and row.finished_at is not None:
            taken[row.model, row.recipe or row.method].append(_seconds(row.started_at, row.finished_at))
    return {kind: median(seconds) for kind, seconds in taken.items()}


def _free_in(session: Session, at: datetime, durations: Mapping[Kind, float]) -> dict[str, tuple[str, float]]:
    """Each live worker with its device and the seconds until it takes another job; infinite if that is unknown."""
    current_attempt = and_(Attempt.job_id == Job.id, Attempt.number == Job.attempt)
    query = (
        select(Job.worker_id, Job.model, Job.method, Job.recipe, Attempt.started_at)
        .join(Attempt, current_attempt)
        .where(Job.status == JobStatus.RUNNING)
    )
    busy: dict[str, float] = {}
    for row in session.execute(query):
        left = durations.get((row.model, row.recipe or row.method), inf) - _seconds(row.started_at, at)
        busy[row.worker_id] = left if left > 0 else inf  # it takes longer than others did: nobody knows how long
    alive: list[Worker] = [state.worker for state in list_workers(session)]
    return {worker.id: (worker.device_class, busy.get(worker.id, 0.0)) for worker in alive}


def _seconds(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds()
