"""Answers of the API, as types that the API and the client share.

Views ignore fields that they do not know: an older client reads a newer service.
"""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bitwright.errors import FieldProblem
from bitwright.events import ErrorData, Event, ProgressEvent
from bitwright.job_states import JobStatus, PublicationStatus
from bitwright.money import Money
from bitwright.report import Report
from bitwright.request import RequestView
from bitwright.whole_numbers import with_whole_numbers


class View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


ItemT = TypeVar("ItemT")
RequestT = TypeVar("RequestT")


class Page(View, Generic[ItemT]):
    """One page of a list. `next_cursor` goes into `after` of the next request; null at the end."""

    items: list[ItemT]
    next_cursor: str | None = None


class AttemptView(View):
    """One try at a job."""

    number: int
    worker_id: str | None = None
    status: str
    started_at: datetime
    finished_at: datetime | None = None
    error: ErrorData | None = None
    blocks_done: int = 0


class QueueView(View):
    """Place of a queued job as of now: later jobs of higher priority, or of other tenants, may overtake it."""

    position: int = Field(description="1 is the next one, among the jobs that the same workers may take.")
    eta_seconds: float | None = Field(
        default=None,
        description="Until it begins, by measured durations of jobs of the same model and method; null where no worker "
        "is alive, or nothing like a job before it has succeeded yet.",
    )


class JobRecord(View, Generic[RequestT]):
    """A job as its tenant sees it; the service fills it with its strict request, the client reads a tolerant one."""

    id: str = Field(examples=["job_01k6z3f8c2v9q4w7x5y1t0r8ab"])
    status: JobStatus
    method: str
    recipe: str | None = Field(default=None, description="What was asked for as method, where that is short for more.")
    model: str = Field(description="Shorthand of the model source.")
    request: RequestT
    attempt: int = Field(default=0, description="Number of the latest attempt; 0 before the first.")
    attempts: list[AttemptView] = Field(default_factory=list, description="Oldest first; filled for a single job only.")
    cancel_requested: bool = False
    held: bool = Field(
        default=False,
        description="Paused: no worker takes it until it is resumed. Of a running job, still to be paused.",
    )
    queue: QueueView | None = Field(default=None, description="Of a queued job, unless a thousand are before it.")
    progress: ProgressEvent | None = None
    error: ErrorData | None = None
    report: Report | None = Field(
        default=None, description="Once succeeded, of a single job; null if another version's is not understood."
    )
    metadata: dict[str, str] = Field(default_factory=dict)
    last_event: int = Field(default=0, description="Sequence number of the newest event.")
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    not_checked: Literal["hub"] | None = Field(
        default=None, description="In the answer to a submission: where the model is, and nobody has looked at it yet."
    )


class JobView(JobRecord[RequestView]):
    """A job as its tenant sees it."""


class EventView(View):
    """A stored event. `sequence` counts up by one within a job and is the SSE id."""

    sequence: int
    created_at: datetime
    attempt: int
    event: Event


class EventPage(View):
    """Events in order. `next_after` goes into `after` of the next request; null when these were the newest."""

    items: list[EventView]
    next_after: int | None = None


class PublicationView(View):
    """A result on its way to the Hub. The job stays succeeded, however this ends."""

    job_id: str
    status: PublicationStatus
    hub: str = Field(description="Repository.")
    private: bool
    force: bool
    format: str | None = Field(description="Checkpoint; null: the job's result.")
    attempts: int
    url: str | None = Field(description="The Hub's page of the commit.")
    commit: str | None
    error: ErrorData | None = Field(description="Of the attempt that ended last.")
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None


class ArtifactView(View):
    """A stored file of a succeeded job. `path` is relative to the format's checkpoint folder."""

    id: str
    job_id: str
    format: str
    path: str
    sha256: str = Field(description="Of the content, hexadecimal; the strong ETag as well.")
    size: int
    media_type: str
    created_at: datetime


class UploadFileSpec(View):
    """A file that the caller is going to send."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1,
        max_length=255,
        description="Plain file name, no folders.",
        json_schema_extra={"pattern": r'^[^\\/:*?"<>|\x00-\x1f\x7f]+$'},
    )
    size: int = Field(strict=True, ge=0, le=2**63 - 1, description="Bytes.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the content, hexadecimal.")


class UploadRequest(View):
    """Body of POST /v1/uploads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: list[UploadFileSpec] = Field(min_length=1, max_length=1024)

    @model_validator(mode="before")
    @classmethod
    def _take_whole_numbers(cls, body: Any) -> Any:
        return with_whole_numbers(body)


class UploadFileView(View):
    name: str
    size: int
    sha256: str
    offset: int = Field(description="Bytes received so far; the next part starts here.")


class UploadView(View):
    id: str
    status: str = Field(description="`open` or `complete`.")
    files: list[UploadFileView]
    created_at: datetime


class MethodView(View):
    """A quantization method."""

    name: str
    title: str
    summary: str
    paper: str | None = Field(default=None, description="arXiv number.")
    produces: list[str] = Field(description="Forms of what it makes of a linear: affine, codebook, float, low-rank.")
    schemes: list[str] = Field(default_factory=list, description="Values of `scheme` that it takes.")
    needs_calibration: bool
    presets: list[str] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(description="JSON Schema of `quantization` with this method.")


class RecipeView(View):
    """A shorthand `method` that stands for parts of a request."""

    name: str
    expands_to: dict[str, Any]


class AdapterView(View):
    """A kind of adapter that `adapter` of a request may name."""

    kind: str
    title: str
    summary: str
    paper: str = Field(description="arXiv number.")
    merges_quantized: bool = Field(description="Whether it folds into the offsets of affine weights, exactly.")
    stock_peft: bool = Field(description="Whether stock peft loads its factors.")
    learning_rate: float = Field(description="Of `finetune`, where the request is silent.")
    parameters: dict[str, Any] = Field(description="JSON Schema of `adapter` with this kind.")


class MethodList(View):
    items: list[MethodView]
    adapters: list[AdapterView] = Field(default_factory=list)
    recipes: list[RecipeView] = Field(default_factory=list)


class WidthsView(View):
    version: str
    bits: list[int]
    symmetric: list[bool]


class RuntimeView(View):
    """A runtime that loads a format; one whose limits depend on the device has one entry per device."""

    runtime: str
    version: str = Field(
        default="", description="Release that a test loaded the format in, or whose source the rules were read in."
    )
    devices: str = Field(default="", description="Devices that the entry speaks of; empty: all of the runtime's.")
    support: str = Field(description="tested: by a test or benchmark of Bitwright; by_rules: read in the source.")
    bits: list[int]
    asymmetric_bits: list[int] | None = Field(default=None, description="Widths with zero points; null: all of bits.")
    group_sizes: list[int] | None = Field(default=None, description="Null: all that the next two allow.")
    smallest_group: int = 1
    group_multiple: int = 1
    since: list[WidthsView] = Field(default_factory=list, description="Widths that earlier releases did not take.")
    schemes: list[str] = Field(default_factory=list, description="Schemes by name that it loads.")
    note: str = ""


class FormatView(View):
    """An export format and the runtimes that load it."""

    name: str
    title: str
    summary: str
    kinds: list[str] = Field(description="Forms of quantized weights that it holds.")
    low_rank: str = Field(
        default="beside",
        description="What it does with low-rank factors. keeps: holds them; merges: adds them to its weights, unless "
        "`peft` is asked for too; beside: holds the weights alone, only together with `peft`; is: holds them alone.",
    )
    bits: list[int]
    symmetric: list[bool]
    asymmetric_bits: list[int] | None = Field(default=None, description="Widths with zero points; null: all of bits.")
    group_multiple: int = Field(default=1, description="Groups are multiples of so many columns.")
    group_sizes: list[int] | None = Field(default=None, description="The only groups that it holds; null: any.")
    output_multiple: int = Field(default=1, description="Linears have a multiple of so many outputs.")
    uniform: bool = Field(default=False, description="Whether all linears of a checkpoint have one scheme.")
    architectures: list[str] | None = Field(default=None, description="`model_type`s that it takes; null: all.")
    schemes: list[str] = Field(default_factory=list, description="Schemes by name that it holds.")
    runtimes: list[RuntimeView]


class ArchitectureView(View):
    """A type of model that can be quantized."""

    model_type: str = Field(description="As config.json names it.")
    title: str
    model_class: str = Field(description="transformers' class.")
    format_refusals: dict[str, str] = Field(
        default_factory=dict, description="Formats that no checkpoint of this type can have, and why."
    )


class ArchitectureList(View):
    """Answer to `GET /v1/architectures`."""

    items: list[ArchitectureView]
    refused: dict[str, str] = Field(
        default_factory=dict, description="`model_type`s that are known and not accepted, and why."
    )


CLOCK_SKEW = "clock_skew_seconds"
"""Name of the difference between a worker's clock and the database's, among the facts of its machine."""


RUNTIMES = "runtimes"
"""Name of the runtimes that a worker has, by name their release, among the facts of its machine."""


class WorkerView(View):
    id: str
    device: str
    capacity: dict[str, Any] = Field(default_factory=dict)
    job_id: str | None = None
    last_seen_at: datetime
    runtimes: dict[str, str] | None = Field(
        default=None,
        description="Release of each runtime that it reads results in, by name; null: an older worker, which says not.",
    )
    clock_skew_seconds: float | None = Field(
        default=None, description="By how much the clock of the worker's machine is ahead of the database's."
    )


class FigureView(View):
    """A figure of a result that is not there yet, or of one like it."""

    name: str = Field(examples=["bytes", "seconds", "kl"])
    value: float
    basis: Literal["estimated", "measured"] = Field(
        description="estimated: from shapes, right within a factor of about two. measured: of the latest job of yours "
        "with this model and quantization."
    )
    device: str | None = Field(default=None, description="What it was measured on, or is estimated for.")
    job_id: str | None = Field(default=None, description="The job that was measured.")


class AlternativeRecord(View, Generic[RequestT]):
    """A request that differs a little from the one that was checked."""

    why: Literal["smaller", "quicker", "nearer"] = Field(description="What it is better in.")
    changes: dict[str, Any] = Field(description="Fields of `quantization` that differ.")
    figures: list[FigureView] = Field(description="Its figures; `asked_for` has those of the request itself.")
    asked_for: list[FigureView] = Field(description="The same figures of the request that was checked.")
    request: RequestT = Field(description="The whole request, to be sent as it is.")


class PreflightRecord(View, Generic[RequestT]):
    """Answer to `POST /v1/jobs?dry_run=true`."""

    request: RequestT
    estimates: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    not_checked: Literal["hub"] | None = Field(
        default=None, description="Where the model is, if nobody has looked at it: estimates are empty then."
    )
    cost: dict[str, Money] = Field(
        default_factory=dict,
        description="For the estimated seconds, by class of device (`cpu`, `cuda`); empty: no price or no estimate.",
    )
    alternatives: list[AlternativeRecord[RequestT]] = Field(
        default_factory=list,
        description="Up to three requests: a smaller, a quicker and a nearer one, where the figures say that they are.",
    )


class PreflightView(PreflightRecord[RequestView]):
    """Answer to `POST /v1/jobs?dry_run=true`."""


class Problem(View):
    """RFC 9457 problem document."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    type: str
    title: str
    status: int
    code: str
    detail: str
    instance: str | None = None
    field: str | None = None
    value: Any = None
    hint: str | None = None
    errors: list[FieldProblem] = Field(default_factory=list)
    violated_policies: list[str] | None = Field(
        default=None,
        alias="violated-policies",
        description="Of a quota that is used up: its names in `RateLimit-Policy`.",
    )
    request_id: str | None = None
