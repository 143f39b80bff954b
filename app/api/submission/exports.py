"""POST /v1/jobs/{id}/exports: other formats of a job's result, made by a job of its own."""

from typing import Annotated, Any

import structlog
from fastapi import APIRouter, BackgroundTasks, Query, Request, Response

from app.api.auth import Submitter
from app.api.deps import BlobsOf, DatabaseOf, IdempotencyHeader, KeysOf, MetricsOf, QueueOf, SettingsOf
from app.api.http.documentation import problems
from app.api.jobs import ACCEPTED, accepted
from app.api.submission.base_jobs import exported_job
from app.api.tenancy.admission import NO_ROOM, require_allowed_priority
from app.api.tenancy.queueing import policy_and_settings, queue_job
from app.api.views import JobView, PreflightView
from app.domain.fit import refusal
from app.domain.request.exports import ExportOf, ExportRequest, export_advice, export_problems, export_request
from app.queue import notify_workers
from app.store.artifacts import ArtifactRepository
from app.store.idempotency import Idempotency
from app.store.jobs import JobRepository
from app.store.workers import live_classes

router = APIRouter(tags=["jobs"])
log = structlog.get_logger(__name__)


@router.post(
    "/v1/jobs/{job_id}/exports",
    summary="Export a job's result in other formats",
    operation_id="export_job",
    status_code=202,
    response_model=JobView,
    responses={
        200: {"description": "Dry run: nothing is stored.", "model": PreflightView},
        202: ACCEPTED,
        **problems(
            *("not_found", "base_job_unusable", "format_cannot_hold", "offset_not_representable"),
            *("idempotency_key_reused", *NO_ROOM),
        ),
    },
)
def export_job(
    *,
    job_id: str,
    body: ExportRequest,
    response: Response,
    background: BackgroundTasks,
    principal: Submitter,
    settings: SettingsOf,
    database: DatabaseOf,
    blobs: BlobsOf,
    metrics: MetricsOf,
    http: Request,
    queue: QueueOf,
    known: KeysOf,
    dry_run: Annotated[bool, Query(description="Check and advise; store nothing.")] = False,
    idempotency_key: IdempotencyHeader = None,
) -> Any:
    """Queue a job that makes other formats from the kept native checkpoint of a job that succeeded.

    It has states and events of its own, needs no GPU, and computes nothing: codes are the same, and scales, too, unless
    a format stores them in another dtype, which the report says. Not for results with an adapter in a file of its own.
    """
    asked = ExportOf(base_job=job_id, **body.model_dump())
    idempotency = None if idempotency_key is None else Idempotency.of(idempotency_key, asked)
    with database.reading() as session:
        tenant = (session, principal.tenant_id)
        jobs = JobRepository(*tenant)
        earlier = None if idempotency is None or dry_run else jobs.find_replayed(idempotency)
        if earlier is not None:
            return accepted(earlier, response, queue)
        base, kept = exported_job(job_id, jobs, ArtifactRepository(*tenant), blobs)
    found = export_problems(base, kept, body.formats)
    if found:
        raise refusal(found)
    request = export_request(base, job_id, body)
    if dry_run:
        checked = PreflightView(request=request, warnings=export_advice(kept, body.formats))
        return Response(checked.model_dump_json(), media_type="application/json")
    policy, _ = policy_and_settings(known, principal, settings)
    require_allowed_priority(policy, request)
    with database.transaction() as session:
        job = queue_job(session, http, principal, policy, request, idempotency=idempotency)
        alive = live_classes(session)
    queue.forget()
    view = accepted(job, response, queue)
    if not job.replayed:
        metrics.submitted.labels(job.method).inc()
        log.info("export_queued", job_id=job.id, base_job=job_id, formats=[name.value for name in body.formats])
        background.add_task(notify_workers, job.device, alive)
    return view
