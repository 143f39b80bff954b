"""Events of a running job: one vocabulary for the attempt's pipe, the event table, SSE and the client.

An attempt writes one JSON object per line (`AttemptLine`): events, and at the end `result` or `failed`. The supervisor
validates each line and stores the events.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, TypeAdapter, model_serializer

from bitwright.errors import ERRORS, BitwrightError, GoalOutOfReach, InternalError
from bitwright.frontier import FrontierPoint
from bitwright.job_states import JobStatus


class Stage(StrEnum):
    """The stages of a job, in order."""

    FETCH = "fetch"
    LOAD = "load"
    CALIBRATE = "calibrate"
    QUANTIZE = "quantize"
    SCALES = "scales"
    FINETUNE = "finetune"
    EVALUATE = "evaluate"
    EXPORT = "export"
    VERIFY = "verify"
    STORE = "store"


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ErrorData(Message):
    """An error as it is stored and sent: see `bitwright.errors`."""

    code: str
    detail: str
    field: str | None = None
    value: str | int | float | bool | None = None
    hint: str | None = None
    frontier: tuple[FrontierPoint, ...] | None = Field(
        default=None, description="Of goal_out_of_reach: the sizes and distances that can be reached, smallest first."
    )

    @model_serializer(mode="wrap")
    def _without_an_empty_frontier(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Clients of earlier releases refuse fields that they do not know."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "frontier" or value is not None}

    @classmethod
    def of(cls, error: BitwrightError) -> "ErrorData":
        """The error as it travels: over a pipe, into the table, to the caller."""
        value = error.value if isinstance(error.value, str | int | float | bool) else None
        frontier = (error.frontier or None) if isinstance(error, GoalOutOfReach) else None
        return cls(
            code=error.code, detail=error.detail, field=error.field, value=value, hint=error.hint, frontier=frontier
        )

    def exception(self) -> BitwrightError:
        """The original exception; an `InternalError` for an unknown code."""
        kind = ERRORS.get(self.code, InternalError)
        if issubclass(kind, GoalOutOfReach):
            return kind(self.detail, field=self.field, value=self.value, hint=self.hint, frontier=self.frontier or ())
        return kind(self.detail, field=self.field, value=self.value, hint=self.hint)


class StatusEvent(Message):
    """The job entered `status`; written by the store alone."""

    type: Literal["status"] = "status"
    status: JobStatus
    attempt: int
    error: ErrorData | None = None


class ProgressEvent(Message):
    """`done` of `total` units of a stage are finished. At most one per second is kept."""

    type: Literal["progress"] = "progress"
    stage: Stage
    done: float
    total: float
    unit: str = Field(description="What done and total count.", examples=["blocks", "bytes"])
    eta_seconds: float | None = Field(default=None, description="To the end of the job, from measured block times.")


class BlockEvent(Message):
    """A block is quantized and durable."""

    type: Literal["block"] = "block"
    index: int
    total: int
    name: str
    loss_initial: float | None = Field(
        default=None, description="Mean squared error of the block's output before tuning."
    )
    loss: float | None = Field(default=None, description="The same after tuning.")
    expert_tokens_least: int | None = Field(
        default=None, description="Fewest calibration tokens that an expert of the block got; null: it has none."
    )
    experts_starved: int | None = Field(default=None, description="Experts that got too few.")
    seconds: float
    milestone: int | None = Field(
        default=None,
        description="Number of what the job has finished before, blocks and checkpoints together; null: the index. "
        "With a goal the blocks of every round count.",
    )


class CheckpointEvent(Message):
    """Training up to `step` is durable: a retry goes on from there."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    total: int
    milestone: int = Field(description="Number of what the job has finished before, blocks and checkpoints together.")


class MetricEvent(Message):
    """A measured number, e.g. perplexity."""

    type: Literal["metric"] = "metric"
    name: str
    value: float
    step: int | None = None


class WarningEvent(Message):
    """Something the caller should know; `code` is stable."""

    type: Literal["warning"] = "warning"
    code: str
    message: str


class LogEvent(Message):
    """A log line, for finding the cause of a problem."""

    type: Literal["log"] = "log"
    level: Literal["debug", "info", "warning", "error"] = "info"
    event: str
    fields: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


TEXT_ROLES: Mapping[str, str] = MappingProxyType(
    {"calibration.dataset": "calibration", "evaluation.dataset": "evaluation", "finetune.dataset": "finetuning"}
)
"""Field of a request that names a text -> its role in orders, where the file is `<role>_path`."""


Event = Annotated[
    StatusEvent | ProgressEvent | BlockEvent | CheckpointEvent | MetricEvent | WarningEvent | LogEvent,
    Field(discriminator="type"),
]

EVENT: TypeAdapter[Event] = TypeAdapter(Event)
