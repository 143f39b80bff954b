"""Objects of OpenAI's interface, with the fields and names that its clients read."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

Item = TypeVar("Item")
Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]


class FileView(BaseModel):
    """A text: an upload of one JSONL file."""

    id: str = Field(description="Id of the upload.", examples=["upl_0123456789abcdefghjkmnpqrs"])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None


class DeletedFile(BaseModel):
    """A file that is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ListView(BaseModel, Generic[Item]):
    """A page of a list; the id of its last item goes into `after` of the next request."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class JobError(BaseModel):
    """Cause of a failed job's end."""

    code: str
    message: str
    param: str | None = None


class Hyperparameters(BaseModel):
    """Hyperparameters as they were asked for."""

    n_epochs: int | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"


class FineTuningJobView(BaseModel):
    """A finetuning job."""

    id: str = Field(description="The job's id, under /v1/jobs too.", examples=["job_0123456789abcdefghjkmnpqrs"])
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int = Field(description="Seconds since 1970.")
    finished_at: int | None = None
    estimated_finish: int | None = None
    status: Status = Field(description="A paused job is queued, and `held`.")
    held: bool = Field(description="Paused: no worker takes it until it is resumed.")
    error: JobError | None = None
    model: str
    fine_tuned_model: str | None = Field(default=None, description="Name of the result under `/hub`, once succeeded.")
    method: dict[str, Any]
    hyperparameters: Hyperparameters
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = Field(default_factory=list)
    trained_tokens: int | None = None
    seed: int
    user_provided_suffix: str | None = None
    integrations: list[dict[str, Any]] = Field(default_factory=list)
    metadata: dict[str, str] = Field(default_factory=dict)
    organization_id: str = Field(description="The tenant.")


class FineTuningEventView(BaseModel):
    """An event of a finetuning job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"] = "info"
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class CheckpointMetrics(BaseModel):
    """Losses at a step, nats per token with a label."""

    step: int
    train_loss: float | None = None
    valid_loss: float | None = None


class FineTuningCheckpointView(BaseModel):
    """The result of a job that succeeded, as the one checkpoint of it that can be used."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


def page_of(items: list[Any], more: bool) -> dict[str, Any]:
    """Fields of a `ListView` of these items."""
    ids = [item.id for item in items]
    return {"data": items, "has_more": more, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
