"""A job: what is asked for, the states it goes through, and what is reported of it.

`JobRequest.parse` takes the shorthand or the full form and names every problem at once.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from app.domain.errors import FieldProblem, InvalidRequest, shorten
from app.domain.formats import ExportFormat, format_problems
from app.domain.methods import METHODS, PRESETS, RECIPES, QuantizationSpec, SignRoundSpec
from app.domain.sources import BuiltinText, DatasetSource, ModelSource, expand_source


class JobStatus(StrEnum):
    """`TRANSITIONS` says which status follows which."""

    QUEUED = "queued"
    """Waits for a worker. A worker's claim moves it to running; a cancel ends it at once."""
    RUNNING = "running"
    """A worker holds its lease. Ends by the worker's word, or goes back to queued when the lease runs out."""
    SUCCEEDED = "succeeded"
    """Its artifacts are stored and its report is written. Final."""
    FAILED = "failed"
    """Its last attempt's error says why. `retry` queues it again."""
    CANCELLED = "cancelled"
    """A caller ended it. `retry` queues it again."""


TRANSITIONS: MappingProxyType[JobStatus, frozenset[JobStatus]] = MappingProxyType(
    {
        JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
        JobStatus.RUNNING: frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.QUEUED}),
        JobStatus.SUCCEEDED: frozenset(),
        JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
        JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
    }
)

FINAL_STATUSES = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})

MAX_ATTEMPTS_WITHOUT_PROGRESS = 3


class DeviceClass(StrEnum):
    """What a worker computes on. A job may ask for one, or take any."""

    CPU = "cpu"
    CUDA = "cuda"


class RequestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(RequestPart):
    """Text that the method observes: `num_samples` sequences of `sequence_length` tokens."""

    dataset: DatasetSource = BuiltinText()
    num_samples: int = Field(default=128, strict=True, ge=1, le=65_536, description="Sequences.")
    sequence_length: int = Field(default=2048, strict=True, ge=16, le=131_072, description="Tokens a sequence.")


class Evaluation(RequestPart):
    """Text that judges the result; never text that calibrated it."""

    dataset: DatasetSource = BuiltinText()
    num_samples: int = Field(default=32, strict=True, ge=1, le=65_536, description="Windows.")
    sequence_length: int = Field(default=1024, strict=True, ge=16, le=131_072, description="Tokens a window.")


class Requirements(RequestPart):
    """Limits that the result must keep; a job that misses one fails with `requirement_missed` and keeps its artifacts."""

    max_perplexity_ratio: float | None = Field(
        default=None, gt=0, description="Perplexity after over before, at most this."
    )
    max_kl_divergence: float | None = Field(default=None, gt=0, description="Nats a token against the original model.")
    min_top1_agreement: float | None = Field(
        default=None, ge=0, le=1, description="Share of tokens where the most likely next token is the same."
    )


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobRequest(RequestPart):
    """The full form of a request, every default filled in."""

    model: ModelSource
    quantization: QuantizationSpec
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    formats: tuple[ExportFormat, ...] = Field(
        default=(ExportFormat.COMPRESSED_TENSORS,),
        max_length=8,
        description="Checkpoints to write; `native` is kept besides.",
    )
    seed: int = Field(
        default=0, strict=True, ge=0, le=2**63 - 1, description="Same request, device and plan: same codes."
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

    @classmethod
    def parse(cls, body: object) -> Self:
        """The request from a decoded JSON body, in shorthand or full form.

        Raises:
            InvalidRequest: with every problem found in `errors`.
        """
        if not isinstance(body, Mapping):
            raise InvalidRequest(f"the body must be a JSON object, not {type(body).__name__}", value=body)
        expanded, problems = expand(dict(body))
        request = None
        try:
            request = cls.model_validate(expanded)
        except ValidationError as error:
            reported = {p.field for p in problems}
            problems += [p for p in _field_problems(error) if p.field not in reported]
        if request is not None:
            problems += format_problems(request.quantization, request.formats)
        if problems or request is None:
            raise InvalidRequest(_summary(problems), errors=tuple(problems))
        return request


SHORTHAND = ("method", *sorted(SignRoundSpec.model_fields.keys() - {"method", "modules"}))
"""Fields of `quantization` that may stand at the top of the request instead."""


def expand(body: dict[str, object]) -> tuple[dict[str, object], list[FieldProblem]]:
    """The full form of a shorthand body, not yet validated, and the problems that only expansion can see."""
    problems: list[FieldProblem] = []
    given = {name: body.pop(name) for name in SHORTHAND if name in body}
    quantization = body.get("quantization")
    if given and quantization is not None:
        names = ", ".join(given)
        detail = f"give {names} either at the top or inside quantization, not both"
        problems.append(FieldProblem(field="quantization", code="conflicting_fields", detail=detail))
    elif quantization is None:
        quantization = given
    if isinstance(quantization, Mapping):
        quantization, found = _expand_quantization(dict(quantization), at_top=bool(given))
        problems += found
    body["quantization"] = quantization
    if "model" in body:
        body["model"] = expand_source(body["model"])
    for part in ("calibration", "evaluation"):
        section = body.get(part)
        if isinstance(section, Mapping) and "dataset" in section:
            body[part] = {**section, "dataset": expand_source(section["dataset"])}
    _apply_preset(body)
    return body, problems


def _expand_quantization(given: dict[str, object], at_top: bool) -> tuple[dict[str, object], list[FieldProblem]]:
    prefix = "" if at_top else "quantization."
    name = given.get("method")
    if isinstance(name, str) and name in RECIPES:
        given = {**given, **RECIPES[name]}
        name = given["method"]
    if isinstance(name, str) and name in METHODS:
        return given, []
    known = ", ".join([*METHODS, *RECIPES])
    if name is None:
        detail = f"name a method; there are: {known}"
        return given, [FieldProblem(field="quantization", code="missing_field", detail=detail)]
    detail = f"there is no method {shorten(name)!r}; there are: {known}"
    problem = FieldProblem(field=prefix + "method", code="unknown_method", detail=detail, value=shorten(name))
    return {**given, "method": "rtn"} if set(given) <= {"method", "bits", "group_size"} else given, [problem]


def _apply_preset(body: dict[str, object]) -> None:
    """Fill steps and the calibration's size from the preset where the request is silent."""
    quantization = body.get("quantization")
    if not isinstance(quantization, dict) or quantization.get("method") != "signround":
        return
    preset = PRESETS.get(str(quantization.get("preset", "default")))
    if preset is None:
        return
    quantization.setdefault("steps", preset.steps)
    calibration = body.get("calibration", {})
    if isinstance(calibration, Mapping):
        size = {"num_samples": preset.num_samples, "sequence_length": preset.sequence_length}
        body["calibration"] = size | dict(calibration)


CODES = MappingProxyType(
    {"missing": "missing_field", "extra_forbidden": "unknown_field", "json_invalid": "malformed_body"}
)
"""Our code for pydantic's error types that have one of their own; the rest fall into three classes."""


def _field_problems(error: ValidationError) -> list[FieldProblem]:
    return [
        FieldProblem(
            field=_path(item["loc"]),
            code=_problem_code(item["type"]),
            detail=_problem_detail(item["type"], item["msg"]),
            value=None if item["type"] == "missing" else shorten(item["input"]),
        )
        for item in error.errors(include_url=False)
    ]


TAGS = frozenset({"rtn", "signround", "hub", "local", "upload", "builtin"})
"""Tags of discriminated unions: pydantic puts them into a path, a request body does not."""


def _path(location: tuple[int | str, ...]) -> str:
    parts = [part for i, part in enumerate(location) if i == 0 or part not in TAGS]
    return ".".join(str(part) for part in parts if part != "[key]")


def _problem_code(kind: str) -> str:
    if kind in CODES:
        return CODES[kind]
    if kind.startswith(("greater_than", "less_than", "too_long", "too_short", "string_too")):
        return "out_of_range"
    return "invalid_value" if kind.startswith(("literal", "enum", "union", "value", "string_pattern")) else "wrong_type"


def _problem_detail(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "there is no such field; remove it, or see GET /v1/methods for the fields of each method"
    if kind == "missing":
        return "this field is needed"
    return message[0].lower() + message[1:]


def _summary(problems: list[FieldProblem]) -> str:
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{first.field}: {first.detail}{more}"
