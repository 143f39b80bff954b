"""Another format of a job's result: a job of its own that reads the kept native checkpoint and computes nothing.

    POST /v1/jobs/{id}/exports    {"formats": ["gguf", "mlx"]}

Its request is that of the job that it starts from, as far as the result's description needs it, with `base_job` and no
`finetune`: that is what tells it from a job that trains on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.domain.format_rules import head_problems, model_problems, other_formats, stored_problems
from app.domain.formats import EmbeddingRule, ExportFormat, Offsets
from app.domain.inputs.architectures import read_dimensions
from app.domain.methods import Form, Scheme
from app.domain.request.job_request import JobRequest, MetadataKey, MetadataValue
from bitwright.errors import CorruptCheckpoint, FieldProblem, UnsupportedArchitecture
from bitwright.whole_numbers import with_whole_numbers

KEPT_ALREADY = "the job keeps it already: download it from there, or leave it out"


class ExportRequest(BaseModel):
    """Body of POST /v1/jobs/{id}/exports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    formats: tuple[ExportFormat, ...] = Field(
        min_length=1, max_length=8, description="Checkpoints to write; `native` is the job's own."
    )
    verify: Literal["files", "off"] = Field(
        default="off",
        description="files: the worker's runtimes read the finished checkpoints, and write 16 tokens; off: nothing.",
    )
    device: Literal["cpu", "any"] = Field(
        default="cpu", description="Class of the worker; no accelerator is used on either."
    )
    priority: int = Field(default=0, strict=True, ge=-100, le=100, description="Higher runs first.")
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict, max_length=16, description="Up to 16 labels of your own; lists filter by them."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_whole_numbers(cls, body: Any) -> Any:
        return with_whole_numbers(body)


class ExportOf(ExportRequest):
    """An export with the job that it starts from: what an Idempotency-Key stands for."""

    base_job: str


@dataclass(frozen=True)
class Kept:
    """A job's native checkpoint, as its files describe it.

    linears   entries of `bitwright.json` by quantized linear
    config    config.json, decoded
    inputs    whether it has sums of the linears' squared inputs
    """

    linears: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, object]
    inputs: bool = False

    @property
    def schemes(self) -> frozenset[Scheme]:
        """All schemes of its linears."""
        return frozenset(
            Scheme(
                bits=linear["bits"],
                group_size=linear["group_size"],
                symmetric=linear["symmetric"],
                name=linear.get("scheme_name"),
            )
            for linear in self.linears.values()
        )

    @property
    def forms(self) -> frozenset[Form]:
        """All forms of its linears, low-rank factors among them."""
        forms = {Form(linear["form"]) for linear in self.linears.values()}
        factors = any("low_rank" in linear for linear in self.linears.values())
        return frozenset(forms | ({Form.LOW_RANK} if factors else set()))

    @property
    def tied(self) -> bool:
        """True if its head is its embeddings, as far as its configuration tells; a worker sees its tensors."""
        try:
            return read_dimensions(self.config).tied_embeddings
        except (CorruptCheckpoint, UnsupportedArchitecture):
            return True

    @property
    def has_offsets(self) -> bool:
        """True if an adapter lies in its weights as fractional offsets."""
        return any(linear.get("offset") for linear in self.linears.values())


def export_request(base: JobRequest, job_id: str, asked: ExportRequest) -> JobRequest:
    """The full request of the export of the job `job_id`, whose own one is `base`."""
    changed = {
        "base_job": job_id,
        "formats": asked.formats,
        "adapter": None,
        "finetune": None,
        "merge": None,
        "round_offset": False,
        "evaluation": None,
        "verify": asked.verify,
        "require": None,
        "device": asked.device,
        "priority": asked.priority,
        "time_limit_seconds": None,
        "metadata": asked.metadata,
        "name": None,
        "publish": None,
    }
    return base.model_copy(update=changed)


def export_problems(base: JobRequest, kept: Kept, formats: Sequence[ExportFormat]) -> list[FieldProblem]:
    """Everything in a job's result that one of the formats cannot hold."""
    problems = [
        FieldProblem(field=f"formats.{index}", code="conflicting_fields", detail=KEPT_ALREADY, value=name)
        for index, name in enumerate(formats)
        if name.info.always_kept
    ]
    asked = tuple(formats)
    problems += stored_problems(base.quantization, asked, kept.schemes, kept.forms)
    problems += [problem for problem in _embedding_problems(base, kept, asked) if problem not in problems]
    if kept.has_offsets:
        able = [f'["{name.value}"]' for name in ExportFormat if name.info.offsets is not Offsets.NONE]
        problems += [
            FieldProblem(
                field=f"formats.{index}",
                code="offset_not_representable",
                detail=f"{name.value} stores integer zero points, and an adapter lies in these weights as an offset of "
                f"each group; ask for formats: {' or '.join(able)}",
                value=name,
            )
            for index, name in enumerate(formats)
            if name.info.offsets is Offsets.NONE and not name.info.is_adapter
        ]
    return problems + model_problems(asked, str(kept.config.get("model_type")), {}, kept.config)


LEGACY = (
    "gguf stores these codes and scales as they are, in llama.cpp's older types of 32 weights (Q4_0, Q4_1, Q5_0, Q5_1, "
    "Q8_0): K types have scales of scales, so they would be rounded anew. For those submit a job whose scheme is one, "
    "such as q4_k, or a mix of them, such as q4_k_m"
)
NO_IMPORTANCE = (
    "gguf is written without model.imatrix: the job kept no sums of squared inputs, since it read no calibration text "
    "or was made by an earlier version"
)


def export_advice(kept: Kept, formats: Sequence[ExportFormat]) -> list[str]:
    """Words on what an export will not have, though one might expect it."""
    if ExportFormat.GGUF not in formats:
        return []
    legacy = any(scheme.blocks is None for scheme in kept.schemes)
    return [*([LEGACY] if legacy else []), *([] if kept.inputs else [NO_IMPORTANCE])]


def _embedding_problems(base: JobRequest, kept: Kept, formats: tuple[ExportFormat, ...]) -> list[FieldProblem]:
    """Formats that do not hold a result's quantized embeddings, or not in schemes such as it has."""
    if base.quantization.embeddings_scheme() is None:
        return []
    one_of_integers = {scheme.name for scheme in kept.schemes} == {None} and len(kept.schemes) == 1
    said = {
        EmbeddingRule.NONE: "holds no quantized embeddings, as this result has",
        EmbeddingRule.UNIFORM: "with quantized embeddings loads with one scheme of integers for linears, head and "
        "embeddings alone, and this result has others",
    }
    problems = [
        FieldProblem(
            field=f"formats.{index}",
            code="format_cannot_hold",
            detail=f"{name.value} {said[name.info.embeddings]}; {other_formats()}",
            value=name,
        )
        for index, name in enumerate(formats)
        if name.info.embeddings is EmbeddingRule.NONE
        or (name.info.embeddings is EmbeddingRule.UNIFORM and not one_of_integers)
    ]
    return problems or head_problems(formats, base.quantization, tied=kept.tied)
