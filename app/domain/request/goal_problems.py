"""Parts of a request that do not go with its goal."""

from collections.abc import Iterable
from typing import Protocol

from app.domain.adapters import AdapterSpec
from app.domain.formats import ExportFormat
from app.domain.methods import AtMost, Goal, WeightSpec
from bitwright.errors import FieldProblem

LEAST_SAMPLES = 4
"""Calibration sequences of which one can be held out."""


class Asked(Protocol):
    """A request, as far as a goal is concerned."""

    @property
    def quantization(self) -> WeightSpec: ...
    @property
    def formats(self) -> tuple[ExportFormat, ...]: ...
    @property
    def base_job(self) -> str | None: ...
    @property
    def adapter(self) -> AdapterSpec | None: ...


def goal_problems(request: Asked, samples: int) -> list[FieldProblem]:
    """Everything that does not go with the goal of a request, if it has one.

    samples   sequences that calibrate
    """
    spec = request.quantization
    goal, field = spec.goal(), f"quantization.{spec.field_of_choices()}"
    if goal is None or request.base_job is not None:
        return []
    problems = []
    if request.adapter is not None:
        detail = (
            "a goal is the quantized model's alone; leave adapter and finetune out, and finetune with base_job then"
        )
        problems.append(FieldProblem(field=field, code="conflicting_fields", detail=detail))
    if not sized_formats(request.formats) and not is_distance(goal):
        able = ", ".join(name.value for name in sized_formats(ExportFormat))
        detail = f"a size is of packed files, and no format of the request packs; ask for one of: {able}"
        problems.append(FieldProblem(field=field, code="conflicting_fields", detail=detail))
    if is_distance(goal) and samples < LEAST_SAMPLES:
        detail = (
            f"some calibration text is held out to measure: calibration.num_samples must be at least {LEAST_SAMPLES}"
        )
        problems.append(FieldProblem(field=field, code="conflicting_fields", detail=detail, value=samples))
    return problems


def is_distance(goal: Goal) -> bool:
    """True if a goal limits the distance from the original; else it limits bytes."""
    return isinstance(goal, AtMost) and goal.kl is not None


def sized_formats(formats: Iterable[ExportFormat]) -> tuple[ExportFormat, ...]:
    """Those of the formats whose checkpoints are smaller than the original, and whole."""
    return tuple(name for name in formats if not name.info.dense and not name.info.is_adapter)
