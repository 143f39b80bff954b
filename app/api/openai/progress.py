"""Events and result of a finetuning job, as OpenAI's clients read them."""

import re
from collections.abc import Mapping
from typing import Any

from app.api.openai.views import CheckpointMetrics, FineTuningCheckpointView, FineTuningEventView
from app.domain.request.job_name import repository_of
from app.store.events import StoredEvent
from app.store.models import Job
from app.store.status import PAUSED, RESUMED
from bitwright.errors import InvalidRequest, NotFound
from bitwright.events import CheckpointEvent, LogEvent, MetricEvent, StatusEvent, WarningEvent
from bitwright.job_states import JobStatus
from bitwright.report import Report

LOGGED = (PAUSED, RESUMED)
"""Events of a job's log that are shown."""
EVENT_ID = re.compile(r"(job_[0-9a-z]{26})\.([0-9]{1,9})")
LOSSES = {"loss": ("train_loss", "training loss"), "validation_loss": ("valid_loss", "validation loss")}
"""A job's metrics -> OpenAI's names, and words for people."""
SAID = {
    JobStatus.QUEUED: "The job is queued",
    JobStatus.RUNNING: "Fine-tuning job started",
    JobStatus.SUCCEEDED: "The job has successfully completed",
    JobStatus.FAILED: "The job failed",
    JobStatus.CANCELLED: "The job was cancelled",
    PAUSED: "The job is paused",
    RESUMED: "The job is resumed",
}


def result_name(job_id: str, request: Mapping[str, Any]) -> str:
    """The name of a job's result under `/hub`: the one that its request gives, or its id."""
    return repository_of(request.get("name") or job_id)


def event_id(job_id: str, sequence: int) -> str:
    """The id of an event."""
    return f"{job_id}.{sequence}"


def sequence_of(job_id: str, text: str) -> int:
    """The number in the id of one of the job's events or checkpoints.

    Raises:
        InvalidRequest: it is no id.
        NotFound: it is another job's.
    """
    match = EVENT_ID.fullmatch(text)
    if match is not None and match[1] != job_id:
        raise NotFound(f"job {job_id} has no event {text}", field="query.after", value=text)
    if match is None:
        hint = "give the last id of the page before, or start without"
        raise InvalidRequest("the cursor is not an id that a page gave", field="query.after", value=text, hint=hint)
    return int(match[2])


def event_view(stored: StoredEvent) -> FineTuningEventView:
    """An event as people read it; with losses, `data` has them under OpenAI's names."""
    fields: dict[str, Any] = {"message": "", "data": {}}
    match stored.event:
        case StatusEvent(status=status, error=error):
            failed = status is JobStatus.FAILED
            why = f": {error.code}: {error.detail}" if error is not None else ""
            fields = {"message": f"{SAID[status]}{why}", "level": "error" if failed else "warn" if why else "info"}
        case MetricEvent(name=name, value=value, step=step):
            short, words = LOSSES.get(name, (name, name.replace("_", " ")))
            at = "" if step is None else f"Step {step}: "
            data = {short: value} if step is None else {"step": step, short: value}
            fields = {"message": f"{at}{words}={value:.6g}", "type": "metrics", "data": data}
        case CheckpointEvent(step=step, total=total):
            fields = {"message": f"Training is kept up to step {step}/{total}", "data": {"step": step, "total": total}}
        case WarningEvent(code=code, message=message):
            fields = {"message": message, "level": "warn", "data": {"code": code}}
        case LogEvent(event=name):
            fields = {"message": SAID.get(name, name)}
    return FineTuningEventView(
        id=event_id(stored.job_id, stored.sequence), created_at=int(stored.created_at.timestamp()), **fields
    )


def checkpoints_of(job: Job, name: str) -> list[FineTuningCheckpointView]:
    """The result of a job that has succeeded; nothing before."""
    if job.status is not JobStatus.SUCCEEDED or job.report is None or job.finished_at is None:
        return []
    trained = Report.model_validate(job.report).finetuning
    if trained is None:
        return []
    before = [point.loss for point in trained.losses if point.step <= trained.steps_kept]
    metrics = CheckpointMetrics(
        step=trained.steps_kept, train_loss=before[-1] if before else None, valid_loss=trained.loss_after
    )
    return [
        FineTuningCheckpointView(
            id=event_id(job.id, trained.steps_kept),
            created_at=int(job.finished_at.timestamp()),
            fine_tuned_model_checkpoint=name,
            fine_tuning_job_id=job.id,
            step_number=trained.steps_kept,
            metrics=metrics,
        )
    ]
