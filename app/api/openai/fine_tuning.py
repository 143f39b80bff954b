"""Finetuning jobs of OpenAI's interface: made, listed, paused, resumed, cancelled; their events and results."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Body, Query, Request
from sqlalchemy.orm import Session

from app.api.auth import Reader, Submitter
from app.api.deps import DatabaseOf, QueueOf
from app.api.jobs import INPUT_PROBLEMS, cancel_job, pause_job, resume_job, submit_job
from app.api.lists.labels import labels_of, labels_parameter
from app.api.openai.errors import openai_errors
from app.api.openai.progress import LOGGED, checkpoints_of, event_view, result_name, sequence_of
from app.api.openai.request import FineTuningRequest, in_openais_names, openais_name
from app.api.openai.views import (
    FineTuningCheckpointView,
    FineTuningEventView,
    FineTuningJobView,
    Hyperparameters,
    JobError,
    ListView,
    page_of,
)
from app.api.submission.call import CallOf
from app.api.tenancy.admission import NO_ROOM
from app.store.blobs import BlobStore
from app.store.ids import id_pattern
from app.store.jobs import JobRepository
from app.store.models import Job
from app.store.openai.fine_tuning import FineTuning, FineTuningRepository
from app.store.openai.texts import text_of
from app.store.session import Database
from bitwright.errors import BitwrightError, InvalidRequest, NotFound
from bitwright.events import ErrorData, ProgressEvent
from bitwright.job_states import JobStatus

router = APIRouter(tags=["openai"])

JOBS = "/v1/fine_tuning/jobs"
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/FineTuningRequest"},
                "examples": {
                    "qlora": {
                        "summary": "qlora at 4 bits",
                        "value": {
                            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
                            "training_file": "upl_0123456789abcdefghjkmnpqrs",
                            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
                        },
                    }
                },
            }
        },
    }
}
LABELS = labels_parameter(r"^[^\[\]&=]+$", "metadata[team]=search", style="deepObject")
Limit = Annotated[int, Query(ge=1, le=200, description="Items a page.")]


@router.post(
    JOBS,
    summary="Submit a finetuning job",
    operation_id="create_fine_tuning_job",
    response_model=FineTuningJobView,
    openapi_extra=REQUEST_BODY,
    responses=openai_errors(
        "body_too_large",
        "idempotency_key_reused",
        "exceeds_capacity",
        "not_found",
        "conflict",
        *NO_ROOM,
        *INPUT_PROBLEMS,
    ),
)
def create_fine_tuning_job(body: Annotated[Any, Body()], call: CallOf) -> FineTuningJobView:
    """Queue a job that quantizes a model and finetunes an adapter on it: qlora at 4 bits, unless `bitwright` says else.

    Supervised finetuning alone; other methods, integrations and a validation file are `unsupported_value`.
    """
    asked = FineTuningRequest.parse(body)
    database, tenant = call.state.database, call.principal.tenant_id
    rows = _rows(database, call.state.blobs, tenant, asked.training_file) if asked.counts_rows else None

    def note(session: Session, job: Job) -> None:
        FineTuningRepository(session, tenant).add(job, asked.kept())

    try:
        made = submit_job(asked.job_body(rows), call, then=note)
    except BitwrightError as error:
        raise in_openais_names(error) from error.__cause__
    call.response.headers["Location"] = f"{JOBS}/{made.id}"
    return _read(database, tenant, made.id)


@router.get(
    JOBS,
    summary="List finetuning jobs",
    operation_id="list_fine_tuning_jobs",
    openapi_extra=LABELS,
    responses=openai_errors(),
)
def list_fine_tuning_jobs(
    *,
    request: Request,
    principal: Reader,
    database: DatabaseOf,
    after: Annotated[
        str | None, Query(description="Id of the last job before.", json_schema_extra={"pattern": id_pattern("job")})
    ] = None,
    limit: Limit = 20,
) -> ListView[FineTuningJobView]:
    """Jobs that came through this interface, newest first."""
    labels = labels_of(request.query_params, "metadata[", "]")
    with database.reading() as session:
        page = FineTuningRepository(session, principal.tenant_id).page(after=after, limit=limit, labels=labels)
        items = [job_view(found) for found in page.items]
    return ListView[FineTuningJobView](**page_of(items, page.next_cursor is not None))


@router.get(
    f"{JOBS}/{{job_id}}",
    summary="Get a finetuning job",
    operation_id="get_fine_tuning_job",
    responses=openai_errors("not_found"),
)
def get_fine_tuning_job(job_id: str, principal: Reader, database: DatabaseOf) -> FineTuningJobView:
    """A job as it is now; under /v1/jobs the same id has all of it."""
    return _read(database, principal.tenant_id, job_id)


@router.post(
    f"{JOBS}/{{job_id}}/cancel",
    summary="Cancel a finetuning job",
    operation_id="cancel_fine_tuning_job",
    responses=openai_errors("not_found", "illegal_transition"),
)
def cancel_fine_tuning_job(
    job_id: str, principal: Submitter, database: DatabaseOf, queue: QueueOf
) -> FineTuningJobView:
    """End a queued job at once, and a running one within seconds."""
    _read(database, principal.tenant_id, job_id)
    cancel_job(job_id, principal, database, queue)
    return _read(database, principal.tenant_id, job_id)


@router.post(
    f"{JOBS}/{{job_id}}/pause",
    summary="Pause a finetuning job",
    operation_id="pause_fine_tuning_job",
    responses=openai_errors("not_found", "illegal_transition"),
)
def pause_fine_tuning_job(job_id: str, principal: Submitter, database: DatabaseOf, queue: QueueOf) -> FineTuningJobView:
    """Hold a job: a running one is queued again within seconds, with its finished blocks and last checkpoint."""
    _read(database, principal.tenant_id, job_id)
    pause_job(job_id, principal, database, queue)
    return _read(database, principal.tenant_id, job_id)


@router.post(
    f"{JOBS}/{{job_id}}/resume",
    summary="Resume a finetuning job",
    operation_id="resume_fine_tuning_job",
    responses=openai_errors("not_found", "illegal_transition"),
)
def resume_fine_tuning_job(
    job_id: str, principal: Submitter, database: DatabaseOf, queue: QueueOf, background: BackgroundTasks
) -> FineTuningJobView:
    """Let workers take a paused job again."""
    _read(database, principal.tenant_id, job_id)
    resume_job(job_id, principal, database, queue, background)
    return _read(database, principal.tenant_id, job_id)


@router.get(
    f"{JOBS}/{{job_id}}/events",
    summary="List a finetuning job's events",
    operation_id="list_fine_tuning_events",
    responses=openai_errors("not_found"),
)
def list_fine_tuning_events(
    *,
    job_id: str,
    principal: Reader,
    database: DatabaseOf,
    after: Annotated[
        str | None,
        Query(
            description="Id of the last event before.",
            json_schema_extra={"pattern": f"{id_pattern('job')[:-1]}\\.[0-9]{{1,9}}$"},
        ),
    ] = None,
    limit: Limit = 20,
) -> ListView[FineTuningEventView]:
    """Events, newest first: states, losses, checkpoints, warnings."""
    before = None if after is None else sequence_of(job_id, after)
    with database.reading() as session:
        repository = FineTuningRepository(session, principal.tenant_id)
        stored = repository.events(job_id, before=before, logged=LOGGED, limit=limit + 1)
    items = [event_view(event) for event in stored[:limit]]
    return ListView[FineTuningEventView](**page_of(items, len(stored) > limit))


@router.get(
    f"{JOBS}/{{job_id}}/checkpoints",
    summary="List a finetuning job's checkpoints",
    operation_id="list_fine_tuning_checkpoints",
    responses=openai_errors("not_found"),
)
def list_fine_tuning_checkpoints(
    *,
    job_id: str,
    principal: Reader,
    database: DatabaseOf,
    after: Annotated[
        str | None,
        Query(
            description="Id of the last checkpoint before.",
            json_schema_extra={"pattern": f"{id_pattern('job')[:-1]}\\.[0-9]{{1,9}}$"},
        ),
    ] = None,
    limit: Limit = 10,  # noqa: ARG001 (there is one at the most)
) -> ListView[FineTuningCheckpointView]:
    """The result, once the job has succeeded. Checkpoints of training are for its own attempts to go on from."""
    with database.reading() as session:
        found = FineTuningRepository(session, principal.tenant_id).get(job_id)
        job = JobRepository(session, principal.tenant_id).get(job_id)
        items = checkpoints_of(job, _result(found))
    if after is not None:
        sequence_of(job_id, after)
        items = []
    return ListView[FineTuningCheckpointView](**page_of(items, more=False))


def job_view(found: FineTuning) -> FineTuningJobView:
    """A finetuning job with OpenAI's fields."""
    job = found.job
    asked, shown = found.asked, Hyperparameters.model_validate(found.asked["hyperparameters"])
    return FineTuningJobView(
        id=job.id,
        created_at=int(job.created_at.timestamp()),
        finished_at=None if job.finished_at is None else int(job.finished_at.timestamp()),
        estimated_finish=_estimated_finish(found),
        status=job.status.value,
        held=job.held,
        error=_error(job.error) if job.status is JobStatus.FAILED else None,
        model=asked["model"],
        fine_tuned_model=_result(found) if job.status is JobStatus.SUCCEEDED else None,
        method={"type": "supervised", "supervised": {"hyperparameters": shown.model_dump()}},
        hyperparameters=shown,
        training_file=asked["training_file"],
        trained_tokens=found.trained_tokens,
        seed=int(job.request.get("seed", 0)),
        user_provided_suffix=asked["suffix"],
        metadata=job.metadata_,
        organization_id=job.tenant_id,
    )


def _result(found: FineTuning) -> str:
    return result_name(found.job.id, found.job.request)


def _error(stored: Mapping[str, Any] | None) -> JobError:
    error = ErrorData.model_validate(stored)
    message = f"{error.detail}; {error.hint}" if error.hint else error.detail
    return JobError(code=error.code, message=message, param=None if error.field is None else openais_name(error.field))


def _estimated_finish(found: FineTuning) -> int | None:
    job = found.job
    if job.status is not JobStatus.RUNNING or job.progress is None:
        return None
    seconds = ProgressEvent.model_validate(job.progress).eta_seconds
    return None if seconds is None else int(job.updated_at.timestamp() + seconds)


def _read(database: Database, tenant_id: str, job_id: str) -> FineTuningJobView:
    with database.reading() as session:
        return job_view(FineTuningRepository(session, tenant_id).get(job_id))


def _rows(database: Database, blobs: BlobStore, tenant_id: str, file_id: str) -> int:
    """Rows of a training file.

    Raises:
        InvalidRequest: there is no such file.
    """
    try:
        with database.reading() as session:
            file = text_of(session, tenant_id, file_id).files[0]
    except NotFound as error:
        hint = "POST /v1/files makes one"
        raise InvalidRequest(error.detail, field="training_file", value=file_id, hint=hint) from None
    with blobs.open(file.sha256) as text:
        return sum(bool(line.strip()) for line in text)
