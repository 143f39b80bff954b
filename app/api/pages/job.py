"""One job: its progress while it runs, its curves, its report, its files, and what can be done with it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import structlog
from fastapi import BackgroundTasks, Query, Request
from starlette.responses import RedirectResponse, Response

from app.api.artifacts import get_content
from app.api.deps import BlobsOf, DatabaseOf, KeysOf, LaterOf, QueueOf, SettingsOf, VaultOf
from app.api.http.archive import Kept, get_archive
from app.api.jobs import cancel_job, delete_job, retry_job
from app.api.pages.curves import EVENT_TYPES, of_events, of_report
from app.api.pages.rendering import page, root_of
from app.api.pages.session import FORM, SEE_OTHER, OwnForm, VisitorOf, page_router
from app.api.representations import job_view
from app.api.views import JobView
from app.domain.access import Scope
from app.domain.request.job_request import JobRequest
from app.report_page.page import FILE as REPORT_PAGE
from app.report_page.page import POLICY as REPORT_POLICY
from app.report_page.page import loading, report_page
from app.store.artifacts import ArtifactRepository
from app.store.blobs import BlobStore
from app.store.events import EventRepository, StoredEvent
from app.store.jobs import JobRepository
from app.store.models import Artifact
from app.store.waiting import places
from bitwright.errors import Conflict, NotFound, StorageError
from bitwright.events import LogEvent, Stage, StatusEvent, WarningEvent
from bitwright.files.delivery import delivery
from bitwright.job_states import FINAL_STATUSES, JobStatus

router = page_router()
log = structlog.get_logger(__name__)

CURVE_EVENTS = 1000
TOLD_EVENTS, TOLD_TYPES = 40, ("status", "warning", "log")
CARD = "README.md"
CARD_BYTES = 128 << 10
REPORT_BYTES = 16 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A folder of a job's result.

    delivered   whether a download without a format brings it
    """

    name: str
    size: int
    files: tuple[Artifact, ...]
    delivered: bool


@router.get("/jobs/{job_id}")
def show_job(request: Request, job_id: str, found: VisitorOf, database: DatabaseOf, blobs: BlobsOf) -> Response:
    """A job as it is now."""
    tenant_id = found.principal.tenant_id
    with database.reading() as session:
        repository, events = JobRepository(session, tenant_id), EventRepository(session, tenant_id)
        job = repository.get(job_id)
        queued = job.status is JobStatus.QUEUED
        view = job_view(job, repository.attempts(job_id), places(session).get(job.id) if queued else None)
        told = events.latest_of(job_id, TOLD_TYPES, TOLD_EVENTS)
        running = view.report is None
        charts = of_events(events.latest_of(job_id, EVENT_TYPES, CURVE_EVENTS)) if running else []
        artifacts = ArtifactRepository(session, tenant_id).of_job(job_id)
    if view.report is not None:
        charts = of_report(view.report)
    checkpoints = checkpoints_of(view, artifacts)
    return page(
        request,
        "job",
        visitor=found,
        job=view,
        final=view.status in FINAL_STATUSES,
        stages=stages_of(view),
        told=[line for stored in reversed(told) if (line := event_line(stored)) is not None],
        charts=charts,
        checkpoints=checkpoints,
        load=_load(blobs, checkpoints),
        request_json=_indented(view),
    )


@router.get("/jobs/{job_id}/report")
def show_report(
    job_id: str,
    found: VisitorOf,
    database: DatabaseOf,
    blobs: BlobsOf,
    export_format: Annotated[str | None, Query(alias="format", max_length=64)] = None,
) -> Response:
    """The page of a job's report, without this service's origin: it is shown in a frame that may do nothing."""
    with database.reading() as session:
        view = job_view(JobRepository(session, found.principal.tenant_id).get(job_id), [])
        artifacts = ArtifactRepository(session, found.principal.tenant_id).of_job(job_id)
    pages = [one for one in artifacts if one.path == REPORT_PAGE and export_format in (None, one.format)]
    first = {name: number for number, name in enumerate(_delivered(view, artifacts))}
    if pages:
        made = min(pages, key=lambda one: (first.get(one.format, len(first)), one.format))
        text = _content(blobs, made, REPORT_BYTES)
    elif view.report is not None:
        text = report_page(view.report, title=f"{view.model}, {view.method}").encode()
    else:
        detail = f"job {job_id} is {view.status.value} and has no report"
        raise Conflict(detail, value=view.status.value, hint="wait for its end")
    headers = {
        "Content-Security-Policy": f"{REPORT_POLICY}; sandbox; frame-ancestors 'self'",
        "X-Frame-Options": "SAMEORIGIN",
    }
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)


@router.get("/jobs/{job_id}/files/{artifact_id}")
def download_file(
    request: Request,
    job_id: str,
    artifact_id: str,
    found: VisitorOf,
    database: DatabaseOf,
    blobs: BlobsOf,
    later: LaterOf,
) -> Response:
    """A file of a job, to keep."""
    with database.reading() as session:
        if ArtifactRepository(session, found.principal.tenant_id).get(artifact_id).job_id != job_id:
            raise NotFound(f"job {job_id} has no artifact {artifact_id}", value=artifact_id)
    return get_content(artifact_id, request, found.principal, database, blobs, later)


@router.get("/jobs/{job_id}/archive")
def download_archive(
    request: Request,
    job_id: str,
    found: VisitorOf,
    database: DatabaseOf,
    blobs: BlobsOf,
    later: LaterOf,
    export_format: Annotated[Kept | None, Query(alias="format")] = None,
) -> Response:
    """A job's result as one tar."""
    return get_archive(
        job_id=job_id,
        request=request,
        principal=found.principal,
        database=database,
        blobs=blobs,
        later=later,
        export_format=export_format,
    )


@router.post("/jobs/{job_id}/cancel", openapi_extra=FORM)
def cancel(
    request: Request, job_id: str, _form: OwnForm, found: VisitorOf, database: DatabaseOf, queue: QueueOf
) -> Response:
    """End the job, and back to its page."""
    found.demand(Scope.SUBMIT)
    cancel_job(job_id, found.principal, database, queue)
    return RedirectResponse(f"{root_of(request)}/jobs/{job_id}", SEE_OTHER)


@router.post("/jobs/{job_id}/retry", openapi_extra=FORM)
def retry(
    request: Request,
    job_id: str,
    _form: OwnForm,
    found: VisitorOf,
    settings: SettingsOf,
    database: DatabaseOf,
    vault: VaultOf,
    queue: QueueOf,
    known: KeysOf,
    background: BackgroundTasks,
) -> Response:
    """Queue the job again, and back to its page."""
    found.demand(Scope.SUBMIT)
    retry_job(
        job_id=job_id,
        principal=found.principal,
        settings=settings,
        database=database,
        vault=vault,
        queue=queue,
        known=known,
        background=background,
    )
    return RedirectResponse(f"{root_of(request)}/jobs/{job_id}", SEE_OTHER, background=background)


@router.post("/jobs/{job_id}/delete", openapi_extra=FORM)
def delete(request: Request, job_id: str, _form: OwnForm, found: VisitorOf, database: DatabaseOf) -> Response:
    """Remove the job, and back to the list."""
    found.demand(Scope.SUBMIT)
    delete_job(job_id, found.principal, database)
    return RedirectResponse(f"{root_of(request)}/", SEE_OTHER)


def stages_of(job: JobView) -> list[tuple[str, str, float | None]]:
    """The stages that the job goes through: name, `done`, `now` or `next`, and the seconds that a finished one took."""
    if job.report is not None:
        return [(name, "done", spent) for name, spent in job.report.seconds.items() if name != "total"]
    wanted = [stage for stage in Stage if _goes_through(job, stage)]
    progress = job.progress if job.status is JobStatus.RUNNING else None
    if progress is None:
        return [(stage.value, "next", None) for stage in wanted] if job.status not in FINAL_STATUSES else []
    order = list(Stage)
    at = order.index(progress.stage)
    wanted = sorted({*wanted, progress.stage}, key=order.index)
    return [
        (stage.value, "done" if order.index(stage) < at else "now" if stage is progress.stage else "next", None)
        for stage in wanted
    ]


def _goes_through(job: JobView, stage: Stage) -> bool:
    """True if a request asks for a stage; those that follow from the method are shown when they come."""
    request = job.request
    if not isinstance(request, JobRequest):
        return stage not in (Stage.SCALES, Stage.CALIBRATE, Stage.FINETUNE, Stage.VERIFY)
    if stage in (Stage.SCALES, Stage.CALIBRATE):
        return False
    if stage is Stage.FINETUNE:
        return request.finetune is not None
    if stage is Stage.EVALUATE:
        return request.evaluation is not None
    return stage is not Stage.VERIFY or request.verify == "files"


def event_line(stored: StoredEvent) -> tuple[StoredEvent, str, str] | None:
    """An event with its kind and words; None for numbers, which the page shows otherwise."""
    event = stored.event
    if isinstance(event, StatusEvent):
        error = "" if event.error is None else f": {event.error.code}"
        return stored, "status", f"{event.status.value}, attempt {event.attempt}{error}"
    if isinstance(event, WarningEvent):
        return stored, "warning", event.message
    if isinstance(event, LogEvent):
        fields = ", ".join(f"{name} {value}" for name, value in event.fields.items())
        return stored, event.level, event.event.replace("_", " ") + (f": {fields}" if fields else "")
    return None


def checkpoints_of(job: JobView, artifacts: Sequence[Artifact]) -> list[Checkpoint]:
    """The folders of a job's result, those that a download brings first."""
    by_name: dict[str, list[Artifact]] = {}
    for artifact in artifacts:
        by_name.setdefault(artifact.format, []).append(artifact)
    brought = _delivered(job, artifacts)
    made = [
        Checkpoint(name, sum(file.size for file in files), tuple(files), name in brought)
        for name, files in by_name.items()
    ]
    return sorted(made, key=lambda one: (not one.delivered, one.name))


def _delivered(job: JobView, artifacts: Sequence[Artifact]) -> tuple[str, ...]:
    names = list(dict.fromkeys(artifact.format for artifact in artifacts))
    return delivery(names, job.request) if names else ()


def _load(blobs: BlobStore, checkpoints: Sequence[Checkpoint]) -> Sequence[tuple[bool, str]]:
    """The section "Load" of the first checkpoint's card: whether it is code, and the text."""
    cards = [file for one in checkpoints[:1] for file in one.files if file.path == CARD and file.size <= CARD_BYTES]
    if not cards:
        return ()
    try:
        text = _content(blobs, cards[0], CARD_BYTES).decode(errors="replace")
    except StorageError:
        return ()
    _, found, rest = text.partition("\n## Load\n")
    section = loading([rest.split("\n## ", 1)[0]]) if found else None
    return () if section is None else section.code


def _content(blobs: BlobStore, artifact: Artifact, most: int) -> bytes:
    if not blobs.exists(artifact.sha256) or artifact.size > most:
        raise StorageError(f"the bytes of artifact {artifact.id} cannot be shown")
    return b"".join(blobs.read_range(artifact.sha256, 0, artifact.size))


def _indented(job: JobView) -> str:
    request = job.request.model_dump(mode="json") if isinstance(job.request, JobRequest) else job.request
    return json.dumps(request, indent=2)
