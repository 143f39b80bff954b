"""GET /v1/workers."""

from fastapi import APIRouter
from sqlalchemy.orm import Session

from app.api.auth import Reader
from app.api.deps import DatabaseOf
from app.api.http.documentation import problems
from app.store.jobs import JobRepository
from app.store.workers import WorkerState, list_workers
from bitwright.errors import NotFound
from bitwright.views import CLOCK_SKEW, RUNTIMES, Page, WorkerView

router = APIRouter(tags=["catalogue"])


@router.get("/v1/workers", summary="List workers", operation_id="list_workers", responses=problems())
def get_workers(principal: Reader, database: DatabaseOf) -> Page[WorkerView]:
    """The workers that were alive a moment ago. A worker's job is named only if it is yours."""
    with database.reading() as session:
        return Page(items=[_worker_view(session, principal.tenant_id, state) for state in list_workers(session)])


def _worker_view(session: Session, tenant_id: str, state: WorkerState) -> WorkerView:
    capacity = dict(state.worker.capacity)
    skew, runtimes = capacity.pop(CLOCK_SKEW, None), capacity.pop(RUNTIMES, None)
    return WorkerView(
        id=state.worker.id,
        device=state.worker.device_class,
        capacity=capacity,
        clock_skew_seconds=skew,
        runtimes=runtimes,
        job_id=_own_job(session, tenant_id, state.job_id),
        last_seen_at=state.worker.last_seen_at,
    )


def _own_job(session: Session, tenant_id: str, job_id: str | None) -> str | None:
    if job_id is None:
        return None
    try:
        return JobRepository(session, tenant_id).get(job_id).id
    except NotFound:
        return None
