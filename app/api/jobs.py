"""Jobs: submit, look, cancel, pause, resume, retry, delete."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, BackgroundTasks, Body, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.api.auth import Reader, Submitter
from app.api.deps import (
    DatabaseOf,
    HubTokenHeader,
    KeysOf,
    QueueOf,
    SettingsOf,
    State,
    VaultOf,
    WrittenJobsOf,
)
from app.api.http.documentation import problems, text_header
from app.api.lists.labels import labels_of, labels_parameter
from app.api.lists.written_jobs import page_json
from app.api.representations import job_view, understand
from app.api.submission.alternatives import near_by
from app.api.submission.base_jobs import find_base_job
from app.api.submission.call import Call, CallOf
from app.api.submission.capacity import capacity_warnings, workers_for, workers_now
from app.api.submission.job_examples import REQUEST_BODY
from app.api.submission.kept import Kept
from app.api.submission.preflight import Preflight, find_sources, judge_model, look_at_hub
from app.api.tenancy.admission import NO_ROOM, actor, require_allowed
from app.api.tenancy.queueing import (
    estimated_cost,
    policy_and_settings,
    queue_job,
    require_hub,
)
from app.api.views import JobView, PreflightView
from app.domain.request.asked_recipe import asked_recipe
from app.domain.request.job_request import JobRequest
from app.domain.request.sources import LocalModel
from app.queue import notify_workers
from app.settings import Settings
from app.store.artifacts import ArtifactRepository
from app.store.idempotency import Idempotency
from app.store.ids import id_pattern
from app.store.job_pages import JobFilters, ListedJob
from app.store.jobs import JobRepository
from app.store.models import Job, Worker
from app.store.session import Database
from app.store.tenancy.audit import record
from app.store.tenancy.hub_tokens import TOKEN_FIELD, checked_token, keep_token
from app.store.tenancy.quotas import require_queue_room
from app.store.uploads import UploadRepository
from app.store.waiting import LONGEST_QUEUE, Place
from app.store.workers import live_classes
from bitwright.job_states import DeviceClass, JobStatus
from bitwright.views import Page
from bitwright.whole_numbers import with_whole_numbers

router = APIRouter(tags=["jobs"])
log = structlog.get_logger(__name__)

POLL_AFTER_SECONDS = 2
LABELS = labels_parameter(r"^metadata\..+$", "metadata.commit=abc123", style="form")
Cursor = Annotated[
    str | None, Query(description="`next_cursor` of the page before.", json_schema_extra={"pattern": id_pattern("job")})
]
INPUT_PROBLEMS = (
    "source_not_found",
    "source_forbidden",
    "source_gated",
    "base_job_unusable",
    "unsupported_architecture",
    "unsafe_checkpoint",
    "unsupported_checkpoint",
    "corrupt_checkpoint",
    "group_size_does_not_divide",
    "invalid_dataset",
    "over_limit",
    "unknown_module",
)
ACCEPTED_HEADERS = {
    "Location": text_header("The job."),
    "Retry-After": text_header("Seconds to wait before asking for it.", "integer"),
    "Idempotency-Replayed": text_header("`true` if an earlier request had made the job."),
}
ACCEPTED = {
    "description": "The job is queued, or was by an earlier request with the same Idempotency-Key.",
    "headers": ACCEPTED_HEADERS,
}


@router.post(
    "/v1/jobs",
    summary="Submit a job",
    operation_id="create_job",
    status_code=202,
    response_model=JobView,
    openapi_extra=REQUEST_BODY,
    responses={
        200: {"description": "Dry run: nothing is stored.", "model": PreflightView},
        202: ACCEPTED,
        **problems("body_too_large", "idempotency_key_reused", "exceeds_capacity", *NO_ROOM, *INPUT_PROBLEMS),
    },
)
def create_job(
    body: Annotated[Any, Body()],
    call: CallOf,
    dry_run: Annotated[bool, Query(description="Check, expand and estimate; store nothing.")] = False,
) -> Any:
    """Queue a job from its shorthand or its full form. All problems of a request are reported at once.

    A local path must lie under a configured folder. A checkpoint that the service can see is looked at: its
    architecture, its shapes against the group size, its safetensors headers; and of a model on the Hub its file list,
    configuration and index, where the operator has switched that on and the Hub answers within ten seconds.

    With `base_job`, or a job's id as `model`, finetuning starts from that job's result instead of quantizing.
    """
    made = submit_job(body, call, dry_run=dry_run)
    return made if isinstance(made, Response) else _answer_of(made, call.response)


def submit_job(
    body: Any, call: Call, *, dry_run: bool = False, then: Callable[[Session, Job], None] | None = None
) -> Any:
    """The answer to a submission; see `create_job`.

    then   done with a new job in the transaction that queues it
    """
    state, principal = call.state, call.principal
    database, queue, key = state.database, state.queue, call.idempotency_key
    body = with_whole_numbers(body)
    with database.reading() as session:
        tenant = (session, principal.tenant_id)
        jobs = JobRepository(*tenant)
        replayed = None if key is None or dry_run else jobs.made_by(key)
        base_job = find_base_job(body, jobs, ArtifactRepository(*tenant), state.blobs, replayed)
    request = JobRequest.parse(body, base_job)
    idempotency = None if key is None else Idempotency.of(key, request)
    token = None if call.hub_token is None else checked_token(call.hub_token)
    if idempotency is not None and not dry_run:
        with database.reading() as session:
            # Before anything is looked at: the model may be gone by now, and the job is there all the same.
            replayed_job = JobRepository(session, principal.tenant_id).find_replayed(idempotency)
        if replayed_job is not None:
            return accepted(replayed_job, call.response, queue)
    policy, settings = policy_and_settings(state.keys, principal, state.settings)
    if not isinstance(request.model, LocalModel):  # of a local one the real path counts
        require_allowed(policy, request)
    require_hub(settings, request.publish)
    # Not for a tenant with a token of its own: this looks with the service's.
    seen = look_at_hub(request, None if policy.own_token or token is not None else call.hub)
    with database.reading() as session:
        preflight, model = find_sources(request, settings, UploadRepository(session, principal.tenant_id), state.blobs)
        require_allowed(policy, preflight.request)
    judge_model(preflight, model, state.inspector, principal.tenant_id, seen)
    alive = workers_for(preflight.request, preflight.estimates, state.workers)
    if dry_run:
        return _checked(call, preflight, settings)
    with database.transaction() as session:
        job = queue_job(
            session,
            call.http,
            principal,
            policy,
            preflight.request,
            recipe=asked_recipe(body, preflight.request),
            idempotency=idempotency,
            vault=state.vault,
            token=token,
        )
        if then is not None and not job.replayed:
            then(session, job)
    queue.forget()
    if not job.replayed:
        understand(job, preflight.request)
        _tell_of_new(call, job, alive)
    return accepted(job, call.response, queue, None if job.replayed else preflight.not_checked)


def _checked(call: Call, preflight: Preflight, settings: Settings) -> Response:
    """The answer to a dry run."""
    alive = workers_now(call.state.workers)
    warnings = preflight.warnings + capacity_warnings(preflight.request, preflight.estimates, alive)
    view = PreflightView(
        request=preflight.request,
        estimates=preflight.estimates,
        warnings=warnings,
        not_checked=preflight.not_checked,
        cost=estimated_cost(preflight.estimates, settings),
        alternatives=near_by(call.state.database, call.principal.tenant_id, preflight),
    )
    return Response(view.model_dump_json(), media_type="application/json")


def _tell_of_new(call: Call, job: Job, alive: Sequence[Worker]) -> None:
    """Count a job that was queued, note it in the log, and notify workers."""
    call.state.metrics.submitted.labels(job.method).inc()
    log.info("job_queued", job_id=job.id, method=job.method, device=job.device)
    if call.state.settings.broker_url:
        # After the commit, and after the answer: a broker that is down keeps no caller waiting.
        call.background.add_task(_notify, call.state, job.device, alive)


def _notify(state: State, device: str, alive: Sequence[Worker]) -> None:
    if not alive:  # a moment ago
        alive = workers_now(state.workers)
    notify_workers(device, frozenset(DeviceClass(worker.device_class) for worker in alive))


def accepted(
    job: Job, response: Response, queue: Kept[Mapping[str, Place]], not_checked: Literal["hub"] | None = None
) -> JobView:
    """The view of a job that was queued, whose headers go into `response`."""
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    response.headers["Retry-After"] = str(POLL_AFTER_SECONDS)
    if job.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    # Whoever submits by the hundred waits for no place.
    place = queue().get(job.id) if job.status is JobStatus.QUEUED else None
    return job_view(job, [], place, not_checked=not_checked)


def _answer_of(view: JobView, response: Response) -> Response:
    """The answer to a submission, with the headers that `accepted` has set."""
    headers = {name: response.headers[name] for name in ACCEPTED_HEADERS if name in response.headers}
    return _written(view, status_code=202, headers=headers)


def _places(jobs: Sequence[Job] | Sequence[ListedJob], queue: Kept[Mapping[str, Place]]) -> Mapping[str, Place]:
    """Places of those that are queued and not held. A reader waits for the place of a job that has just come."""
    waiting = [job.id for job in jobs if job.status == JobStatus.QUEUED and not job.held]
    if not waiting:
        return {}
    places = queue()
    # Behind so many a job has no place, however long one waits.
    if len(places) < LONGEST_QUEUE and not all(job_id in places for job_id in waiting):
        places = queue(wait=True)
    return {job_id: places[job_id] for job_id in waiting if job_id in places}  # another one may have begun since


@router.get(
    "/v1/jobs",
    summary="List jobs",
    operation_id="list_jobs",
    response_model=Page[JobView],
    responses=problems(),
    openapi_extra=LABELS,
)
def list_jobs(
    *,
    request: Request,
    principal: Reader,
    database: DatabaseOf,
    queue: QueueOf,
    written: WrittenJobsOf,
    after: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Jobs a page.")] = 50,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this status.")] = None,
    method: Annotated[str | None, Query(max_length=64, description="Only jobs of this method or recipe.")] = None,
    model: Annotated[
        str | None, Query(max_length=4096, description="Only jobs on this model, as lists show it.")
    ] = None,
) -> Response:
    """Jobs, newest first. Attempts and report are left out; GET of a single job has them.

    Labels filter by `metadata.<name>=<value>`.
    """
    filters = JobFilters(status=status, method=method, model=model, labels=labels_of(request.query_params))
    with database.reading() as session:
        repository = JobRepository(session, principal.tenant_id)
        page = repository.listed(after=after, limit=limit, filters=filters)
        texts = written.of(page.items)
        others = [job.id for job in page.items if job.id not in texts]
        if others:
            texts |= written.write(page.items, repository.listed_jobs(others))
    places = _places(page.items, queue)
    jobs = [(job.id, texts[job.id]) for job in page.items if job.id in texts]  # one may have been deleted meanwhile
    return Response(page_json(jobs, places, page.next_cursor), media_type="application/json")


def _written(view: BaseModel, **options: Any) -> Response:
    """An answer as pydantic writes it: the framework would check each field again, which takes as long as all else."""
    return Response(view.model_dump_json(by_alias=True), media_type="application/json", **options)


@router.get(
    "/v1/jobs/{job_id}",
    summary="Get a job",
    operation_id="get_job",
    response_model=JobView,
    responses=problems("not_found"),
)
def get_job(job_id: str, principal: Reader, database: DatabaseOf, queue: QueueOf) -> Response:
    """A job with its request in full, its progress, its attempts, and its report once it has succeeded."""
    return _written(read_job(database, principal.tenant_id, job_id, queue))


def read_job(database: Database, tenant_id: str, job_id: str, queue: Kept[Mapping[str, Place]]) -> JobView:
    """The job as it is now, attempts and report included."""
    with database.reading() as session:
        repository = JobRepository(session, tenant_id)
        job = repository.get(job_id)
        attempts = repository.attempts_of(job)
    return job_view(job, attempts, _places([job], queue).get(job.id))


@router.delete(
    "/v1/jobs/{job_id}",
    summary="Delete a job",
    operation_id="delete_job",
    status_code=204,
    responses=problems("not_found", "conflict"),
)
def delete_job(job_id: str, principal: Submitter, database: DatabaseOf) -> None:
    """Remove a final job with its events and artifacts. Cancel one that is not final first."""
    with database.transaction() as session:
        JobRepository(session, principal.tenant_id).delete(job_id)
        record(session, actor(principal), "job.deleted", job_id)
    log.info("job_deleted", job_id=job_id)


@router.post(
    "/v1/jobs/{job_id}/cancel",
    summary="Cancel a job",
    operation_id="cancel_job",
    status_code=202,
    responses={
        202: {"description": "Cancelled, or asked of the worker: see `status` and `cancel_requested`."},
        **problems("not_found", "illegal_transition"),
    },
)
def cancel_job(job_id: str, principal: Submitter, database: DatabaseOf, queue: QueueOf) -> JobView:
    """End a queued job at once; a running one's process ends within seconds."""
    with database.transaction() as session:
        JobRepository(session, principal.tenant_id).cancel(job_id)
        record(session, actor(principal), "job.cancelled", job_id)
    queue.forget()
    log.info("job_cancel_requested", job_id=job_id)
    return read_job(database, principal.tenant_id, job_id, queue)


@router.post(
    "/v1/jobs/{job_id}/pause",
    summary="Pause a job",
    operation_id="pause_job",
    status_code=202,
    responses={
        202: {"description": "Held, or asked of the worker: see `status` and `held`."},
        **problems("not_found", "illegal_transition"),
    },
)
def pause_job(job_id: str, principal: Submitter, database: DatabaseOf, queue: QueueOf) -> JobView:
    """Hold a queued job; a running one is queued again within seconds, and held. It counts as a queued job.

    What it had finished is kept: it goes on from its last block, or from its last checkpoint of training.
    """
    with database.transaction() as session:
        JobRepository(session, principal.tenant_id).pause(job_id)
        record(session, actor(principal), "job.paused", job_id)
    queue.forget()
    log.info("job_paused", job_id=job_id)
    return read_job(database, principal.tenant_id, job_id, queue)


@router.post(
    "/v1/jobs/{job_id}/resume",
    summary="Resume a job",
    operation_id="resume_job",
    status_code=202,
    responses={202: {"description": "No longer held."}, **problems("not_found", "illegal_transition")},
)
def resume_job(
    job_id: str, principal: Submitter, database: DatabaseOf, queue: QueueOf, background: BackgroundTasks
) -> JobView:
    """Let workers take a paused job again."""
    with database.transaction() as session:
        job = JobRepository(session, principal.tenant_id).resume(job_id)
        record(session, actor(principal), "job.resumed", job_id)
        alive = live_classes(session)
    queue.forget()
    log.info("job_resumed", job_id=job_id)
    background.add_task(notify_workers, job.device, alive)
    return read_job(database, principal.tenant_id, job_id, queue)


@router.post(
    "/v1/jobs/{job_id}/retry",
    summary="Retry a job",
    operation_id="retry_job",
    status_code=202,
    responses={202: {"description": "Queued again."}, **problems("not_found", "illegal_transition", *NO_ROOM)},
)
def retry_job(
    *,
    job_id: str,
    principal: Submitter,
    settings: SettingsOf,
    database: DatabaseOf,
    vault: VaultOf,
    queue: QueueOf,
    known: KeysOf,
    background: BackgroundTasks,
    hub_token: HubTokenHeader = None,
) -> JobView:
    """Queue a failed or cancelled job again. Blocks that were finished are not computed again.

    The job's own Hub token was erased at its end: send it again if the model is still to be fetched.
    """
    token = None if hub_token is None else checked_token(hub_token)
    policy, _ = policy_and_settings(known, principal, settings)
    with database.transaction() as session:
        job = JobRepository(session, principal.tenant_id).retry(job_id)
        # Behind the retry, which tells whether there is such a job; a refusal takes it back.
        require_queue_room(session, principal.tenant_id, policy.quotas, queued=1)
        if token is not None:
            keep_token(session, vault, token, tenant_id=principal.tenant_id, job_id=job_id, field=TOKEN_FIELD)
        record(session, actor(principal), "job.retried", job_id)
        alive = live_classes(session)
    queue.forget()
    log.info("job_retried", job_id=job_id)
    background.add_task(notify_workers, job.device, alive)
    return read_job(database, principal.tenant_id, job_id, queue)
