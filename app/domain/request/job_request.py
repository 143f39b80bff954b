"""A job: what is asked for, the states it goes through, and what is reported of it.

`JobRequest.parse` takes the shorthand or the full form and names every problem at once.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from app.domain.adapters import AdapterSpec
from app.domain.format_rules import default_for
from app.domain.formats import ExportFormat, Result
from app.domain.job_states import MAX_RETRIES_WITHOUT_PROGRESS, TRANSITIONS
from app.domain.methods import QuantizationSpec
from app.domain.request.base_job import JOB_ID, BaseJob, Folded
from app.domain.request.combination_rules import result_problems
from app.domain.request.evaluation_tasks import EvaluationTask, TaskRequirement
from app.domain.request.finetuning import Finetune
from app.domain.request.goal_problems import goal_problems
from app.domain.request.job_name import JobName
from app.domain.request.loading_rules import loading_problems
from app.domain.request.mixtures import MixedPart, demand_whole
from app.domain.request.problems import MAX_PROBLEMS, as_written, field_problems, text_problems, with_new_problems
from app.domain.request.publishing import Publish, publishing_problems
from app.domain.request.shorthand import ALL_SHORTHAND, SHORTHAND, Expansion, expand
from app.domain.request.sources import BuiltinText, CalibrationSource, DatasetSource, ModelSource
from app.domain.request.task_problems import task_problems
from app.domain.runtimes import Runtime
from bitwright.errors import FieldProblem, InvalidRequest, shorten
from bitwright.job_states import FINAL_STATUSES, DeviceClass, JobStatus

__all__ = [
    "FINAL_STATUSES",
    "MAX_RETRIES_WITHOUT_PROGRESS",
    "SHORTHAND",
    "TRANSITIONS",
    "Calibration",
    "DeviceClass",
    "Evaluation",
    "JobRequest",
    "JobStatus",
    "Requirements",
]


class RequestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(RequestPart):
    """Text that the method observes: `num_samples` sequences of `sequence_length` tokens."""

    dataset: CalibrationSource = BuiltinText()
    mixture: tuple[MixedPart, ...] = Field(
        default=(),
        max_length=16,
        description="Several datasets with shares, in place of `dataset`; a list there means the same.",
    )
    num_samples: int = Field(default=128, strict=True, ge=1, le=65_536, description="Sequences.")
    sequence_length: int = Field(default=2048, strict=True, ge=16, le=131_072, description="Tokens a sequence.")
    further_samples: int = Field(
        default=0,
        strict=True,
        ge=0,
        le=65_536,
        description="Sequences of the rest of the text, as many as there are, that only the end-to-end steps of "
        "`signround` see (`scale_steps`).",
    )
    written_samples: int = Field(
        default=0,
        strict=True,
        ge=0,
        le=4096,
        description="Sequences that the model writes itself, for the same steps: half of them after a token drawn from "
        "all, and up to half after places of the text, as many as it has fewer than `further_samples`.",
    )

    @property
    def sequences(self) -> int:
        """Of the whole text."""
        return self.num_samples

    @field_validator("mixture")
    @classmethod
    def _adds_up(cls, mixture: tuple[MixedPart, ...]) -> tuple[MixedPart, ...]:
        demand_whole(mixture)
        return mixture

    @property
    def tokens_read(self) -> int:
        """Tokens of the dataset that are read at the most."""
        return (self.num_samples + self.further_samples) * self.sequence_length


class Evaluation(RequestPart):
    """Text that validates the result; never text that calibrated it."""

    dataset: DatasetSource = BuiltinText()
    num_samples: int = Field(default=32, strict=True, ge=1, le=65_536, description="Sequences.")
    sequence_length: int = Field(default=1024, strict=True, ge=16, le=131_072, description="Tokens per sequence.")
    seeds: int = Field(
        default=1,
        strict=True,
        ge=1,
        le=16,
        description="Draws of `num_samples` sequences, none in two of them: their figures differ by the noise.",
    )
    tasks: tuple[EvaluationTask, ...] = Field(
        default=(), max_length=16, description="Rows with known answers that both models are asked besides."
    )

    @field_validator("tasks")
    @classmethod
    def _has_different_names(cls, tasks: tuple[EvaluationTask, ...]) -> tuple[EvaluationTask, ...]:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError("must have a different name for each task")
        return tasks

    @property
    def sequences(self) -> int:
        """Of all draws together."""
        return self.num_samples * self.seeds

    @property
    def tokens_read(self) -> int:
        """Tokens of the dataset that are read at the most."""
        return self.sequences * self.sequence_length


class Requirements(RequestPart):
    """Limits that the result must keep. A job that misses one fails with `requirement_missed`; its artifacts stay."""

    max_perplexity_ratio: float | None = Field(
        default=None, strict=True, gt=0, allow_inf_nan=False, description="Perplexity after over before, at most this."
    )
    max_kl_divergence: float | None = Field(
        default=None, strict=True, gt=0, allow_inf_nan=False, description="Nats a token against the original model."
    )
    min_top1_agreement: float | None = Field(
        default=None,
        strict=True,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of tokens where the most likely next token is the same.",
    )
    max_kl_of_kinds: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        allow_inf_nan=False,
        description="Nats a token on held-out rows of each part of `calibration.mixture`.",
    )
    loads: tuple[Runtime, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=len(Runtime),
        description="Runtimes that must load the result. With verify block the one block counts, with files the files.",
    )
    tasks: tuple[TaskRequirement, ...] | None = Field(
        default=None, min_length=1, max_length=64, description="Limits on figures of `evaluation.tasks`."
    )


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobRequest(RequestPart):
    """The full form of a request, every default filled in."""

    model: ModelSource
    quantization: QuantizationSpec
    base_job: str | None = Field(
        default=None,
        pattern=JOB_ID,
        description="An earlier job of yours that succeeded: finetuning starts from its result, bit for bit. `model` "
        "and `quantization` are that job's and may be left out, and so is `adapter` if it trained one, which goes on.",
        examples=["job_0123456789abcdefghjkmnpqrs"],
    )
    adapter: AdapterSpec | None = Field(
        default=None, description="What is trained beside the quantized linears; with `finetune` alone, a LoRA."
    )
    finetune: Finetune | None = Field(default=None, description="The text that the adapter learns, and how long.")
    merge: Literal["quantized", "16bit"] | None = Field(
        default=None,
        description="quantized: fold the adapter into the groups' offsets, codes and scales as they are. 16bit: add it "
        "to dequantized weights. null: it stays apart.",
    )
    round_offset: bool = Field(
        default=False,
        strict=True,
        description="With merge quantized: integer zero points, which every runtime takes, at the cost of an error "
        "that the report tells.",
    )
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    formats: tuple[ExportFormat, ...] = Field(
        default=(default_for(Result.AFFINE),),
        max_length=8,
        description="Checkpoints to write; `native` is kept besides. Where the method makes other forms than affine "
        "weights, the default is what holds them: see GET /v1/formats.",
    )
    seed: int = Field(
        default=0, strict=True, ge=0, le=2**63 - 1, description="Same request, device and plan: same codes."
    )
    verify: Literal["block", "files", "off"] = Field(
        default="block",
        description="What a worker's runtimes read of the result. block: one block, before the rest is made; files: "
        "that, and the finished checkpoints, which write 16 tokens; off: nothing.",
    )
    require: Requirements | None = None
    device: Literal["any", "cpu", "cuda"] = Field(default="any", description="Device class that may run the job.")
    priority: int = Field(default=0, strict=True, ge=-100, le=100, description="Higher runs first.")
    time_limit_seconds: int | None = Field(
        default=None, strict=True, ge=1, le=30 * 86_400, description="An attempt that runs longer fails."
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict, max_length=16, description="Up to 16 labels of your own; lists filter by them."
    )
    name: JobName | None = Field(
        default=None,
        description="Name of the result for clients of a Hub: `name` is read as `jobs/name`, `org/name` as it is. One "
        "job of yours has it, until that job is deleted.",
        examples=["llama-w4"],
    )
    publish: Publish | None = Field(
        default=None, description="Repository on the Hub that gets the result once the job has succeeded."
    )

    @property
    def exports(self) -> bool:
        """True if the job makes other formats of its base job's result, and computes nothing."""
        return self.base_job is not None and self.finetune is None

    @classmethod
    def parse(cls, body: object, base_job: BaseJob | None = None) -> Self:
        """The request from a decoded JSON body, in shorthand or full form.

        base_job  the job that the body starts from (`app.domain.request.base_job.named_job`)

        Raises:
            InvalidRequest: with every problem found in `errors`.
        """
        if not isinstance(body, Mapping):
            detail = f"the body must be a JSON object, not {_json_type(body)}"
            problem = FieldProblem(field="body", code="wrong_type", detail=detail, value=shorten(body))
            raise InvalidRequest(detail, field="body", value=body, errors=(problem,))
        expansion = expand(body, base_job)
        problems = with_new_problems(expansion.problems, text_problems(body))
        try:
            request = cls.model_validate(expansion.body)
            found = [*goal_problems(request, request.calibration.num_samples), *_mixture_problems(request)]
            written = [p.model_copy(update={"field": as_written(body, p.field)}) for p in found]
            problems = with_new_problems(problems, written)
        except ValidationError as error:
            problems = with_new_problems(problems, field_problems(error, cls, body, ALL_SHORTHAND))
        else:
            loads = None if request.require is None else request.require.loads
            problems = with_new_problems(problems, loading_problems(request.verify, loads, request.formats))
            problems = with_new_problems(problems, _task_problems(request))
            problems = with_new_problems(
                problems, publishing_problems(request.publish, request.formats, request.finetune is not None)
            )
        problems += _adapter_problems(expansion)
        problems += _format_problems(expansion, body, None if base_job is None else base_job.folded)
        if problems:
            raise InvalidRequest(_summary(problems), errors=tuple(problems[:MAX_PROBLEMS]))
        return request


class _FormatPart(BaseModel):
    """The fields that decide whether a format can hold the result; judged even if others are wrong."""

    quantization: QuantizationSpec
    formats: tuple[ExportFormat, ...] = (default_for(Result.AFFINE),)
    adapter: AdapterSpec | None = None
    merge: Literal["quantized", "16bit"] | None = None
    round_offset: bool = False


def _adapter_problems(expansion: Expansion) -> list[FieldProblem]:
    if expansion.body.get("finetune") is not None:
        return []
    if expansion.body.get("base_job") is not None:
        detail = 'a job starts from an earlier one to finetune: this field is needed, e.g. {"dataset": "upl_..."}'
        return [FieldProblem(field="finetune", code="missing_field", detail=detail)]
    if expansion.body.get("adapter") is None:
        return []
    detail = 'an adapter is trained on a text: this field is needed, e.g. {"dataset": "upl_..."}'
    return [FieldProblem(field="finetune", code="missing_field", detail=detail)]


def _mixture_problems(request: JobRequest) -> list[FieldProblem]:
    calibration = request.calibration
    if not calibration.mixture or calibration.dataset == BuiltinText():
        return []
    detail = "a mixture stands in place of a dataset: give one of them"
    return [FieldProblem(field="calibration.mixture", code="conflicting_fields", detail=detail)]


def _task_problems(request: JobRequest) -> list[FieldProblem]:
    tasks = () if request.evaluation is None else request.evaluation.tasks
    required = None if request.require is None else request.require.tasks
    return task_problems(tasks, required, computes=not request.exports)


def _format_problems(expansion: Expansion, body: Mapping[str, object], folded: Folded | None) -> list[FieldProblem]:
    try:
        fields = _FormatPart.model_validate(expansion.body)
    except ValidationError:
        return []
    merging = (fields.merge, fields.round_offset, folded)
    problems = result_problems(fields.quantization, fields.formats, fields.adapter, *merging)
    # What a stand-in for an unknown method produces says nothing of the method that was meant.
    fitting = [problem for problem in problems if expansion.method_known or not problem.field.startswith("formats.")]
    return [problem.model_copy(update={"field": as_written(body, problem.field)}) for problem in fitting]


def _json_type(value: object) -> str:
    names = {str: "a string", list: "an array", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _summary(problems: list[FieldProblem]) -> str:
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{first.field}: {first.detail}{more}"
