"""Rows of the store as the views that the API answers with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from app.api.views import JobView
from app.domain.request.job_request import JobRequest
from app.store.events import StoredEvent
from app.store.models import Artifact, Attempt, Job, JsonObject, Upload
from app.store.waiting import Place
from bitwright.events import ErrorData, ProgressEvent
from bitwright.report import Report
from bitwright.views import (
    ArtifactView,
    AttemptView,
    EventView,
    QueueView,
    UploadFileView,
    UploadView,
)

Part = TypeVar("Part", bound=BaseModel)
KEPT_REQUESTS = 2000
KEPT_SIZE = 16_384
"""Characters of the longest request that is kept understood."""
_REQUESTS: dict[str, "_Understood"] = {}
log = structlog.get_logger(__name__)


def job_view(
    job: Job,
    attempts: Sequence[Attempt] | None = None,
    place: Place | None = None,
    *,
    not_checked: Literal["hub"] | None = None,
) -> JobView:
    """A job; `attempts` is None in lists, where the report is left out too: it has a line for every linear.

    place   of a queued job, where it stands

    A job that another version of the service has stored is shown as far as this one understands it.
    """
    understood = _understood_request(job.id, job.request)
    view = JobView(
        id=job.id,
        status=job.status,
        method=job.method,
        recipe=job.recipe,
        model=job.model,
        request=job.request if understood is None else understood.request,
        attempt=job.attempt,
        attempts=[attempt_view(attempt) for attempt in attempts or ()],
        cancel_requested=job.cancel_requested,
        held=job.held,
        queue=None if place is None else QueueView(position=place.position, eta_seconds=place.eta_seconds),
        progress=_understood(ProgressEvent, job.progress, job.id),
        error=_understood(ErrorData, job.error, job.id),
        report=_understood(Report, job.report, job.id) if attempts is not None else None,
        metadata=job.metadata_,
        last_event=job.last_event,
        created_at=job.created_at,
        updated_at=job.updated_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        not_checked=not_checked,
    )
    return view.with_written(job.request if understood is None else understood.written)


def attempt_view(attempt: Attempt) -> AttemptView:
    """One try at a job."""
    return AttemptView(
        number=attempt.number,
        worker_id=attempt.worker_id,
        status=attempt.status.value,
        started_at=attempt.started_at,
        finished_at=attempt.finished_at,
        error=_understood(ErrorData, attempt.error, attempt.job_id),
        blocks_done=attempt.blocks_done,
    )


@dataclass(frozen=True)
class _Understood:
    """A stored request as this version understands it, and as it writes it into an answer."""

    stored: JsonObject
    request: JobRequest
    written: JsonObject


def understand(job: Job, request: JobRequest) -> None:
    """Keep what a job's stored request stands for, as whoever has just stored it knows."""
    _keep(job.id, _Understood(job.request, request, job.request))


def _understood_request(job_id: str, stored: JsonObject) -> _Understood | None:
    """A job's request, kept for the next look: to check one again takes longer than all else of a list."""
    kept = _REQUESTS.get(job_id)
    if kept is not None and kept.stored == stored:
        return kept
    request = _understood(JobRequest, stored, job_id)
    if request is None:
        return None
    understood = _Understood(stored, request, request.model_dump(mode="json"))
    _keep(job_id, understood)
    return understood


def _keep(job_id: str, understood: _Understood) -> None:
    if len(json.dumps(understood.stored)) <= KEPT_SIZE:
        if len(_REQUESTS) >= KEPT_REQUESTS:
            _REQUESTS.clear()
        _REQUESTS[job_id] = understood


def _understood(kind: type[Part], stored: JsonObject | None, job_id: str) -> Part | None:
    if stored is None:
        return None
    try:
        return kind.model_validate(stored)
    except ValidationError as error:
        log.warning("stored_part_not_understood", job_id=job_id, part=kind.__name__, problems=error.error_count())
        return None


def event_view(stored: StoredEvent) -> EventView:
    """A stored event."""
    return EventView(sequence=stored.sequence, created_at=stored.created_at, attempt=stored.attempt, event=stored.event)


def artifact_view(artifact: Artifact) -> ArtifactView:
    """A stored file."""
    return ArtifactView(
        id=artifact.id,
        job_id=artifact.job_id,
        format=artifact.format,
        path=artifact.path,
        sha256=artifact.sha256,
        size=artifact.size,
        media_type=artifact.media_type,
        created_at=artifact.created_at,
    )


def upload_view(upload: Upload) -> UploadView:
    """An upload and how much of each file has arrived."""
    files = [
        UploadFileView(name=file.name, size=file.size, sha256=file.sha256, offset=file.offset) for file in upload.files
    ]
    status = "complete" if upload.complete else "open"
    return UploadView(id=upload.id, status=status, files=files, created_at=upload.created_at)
