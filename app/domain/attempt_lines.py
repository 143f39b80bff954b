"""Lines that a child process writes to its supervisor: events, and at the end a result, fetched sources or an error."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from bitwright.events import (
    BlockEvent,
    CheckpointEvent,
    ErrorData,
    LogEvent,
    Message,
    MetricEvent,
    ProgressEvent,
    WarningEvent,
)
from bitwright.report import Report

SPAN_ID = "^[0-9a-f]{16}$"


class ResultLine(Message):
    """The attempt is done: what it made, under the workspace's `output` folder."""

    type: Literal["result"] = "result"
    report: Report
    checkpoints: dict[str, str] = Field(description="Export format to its folder, relative to the workspace.")


class FetchedLine(Message):
    """The fetch is done: absolute local paths of the request's sources."""

    type: Literal["fetched"] = "fetched"
    model_path: str
    model_revision: str | None = Field(default=None, description="Commit of the Hub repository.")
    calibration_path: str | None = None
    evaluation_path: str | None = None
    finetuning_path: str | None = None
    other_texts: dict[str, str] = Field(
        default_factory=dict, description="Further texts, by the fields that name them."
    )


class PublishedLine(Message):
    """The result is published: the Hub's answer to the commit."""

    type: Literal["published"] = "published"
    url: str
    commit: str


class RefusedLine(Message):
    """The result is not published."""

    type: Literal["refused"] = "refused"
    error: ErrorData
    wait_seconds: int = Field(default=0, description="That the Hub asks for before another attempt.")


PublicationLine = Annotated[PublishedLine | RefusedLine, Field(discriminator="type")]


class FailedLine(Message):
    """The attempt ends with an error."""

    type: Literal["failed"] = "failed"
    error: ErrorData


class SpanLine(Message):
    """A span of a trace that has ended: of a job whose request was traced. Its ids are hexadecimal digits."""

    type: Literal["span"] = "span"
    name: str = Field(max_length=100)
    span_id: str = Field(pattern=SPAN_ID)
    parent_id: str = Field(pattern=SPAN_ID)
    start_ns: int = Field(ge=0, description="Nanoseconds since the epoch.")
    end_ns: int = Field(ge=0)
    attributes: dict[str, str | int | float | bool] = Field(default_factory=dict)


AttemptEvent = ProgressEvent | BlockEvent | CheckpointEvent | MetricEvent | WarningEvent | LogEvent


AttemptLine = Annotated[
    ProgressEvent
    | BlockEvent
    | CheckpointEvent
    | MetricEvent
    | WarningEvent
    | LogEvent
    | ResultLine
    | FetchedLine
    | FailedLine
    | SpanLine,
    Field(discriminator="type"),
]


ATTEMPT_LINE: TypeAdapter[AttemptLine] = TypeAdapter(AttemptLine)
