"""Rules on required runtimes: one of the formats must be loaded by each, and something must be read."""

from collections.abc import Sequence
from typing import Literal

from app.domain.formats import ExportFormat
from app.domain.runtimes import Runtime
from bitwright.errors import FieldProblem


def loading_problems(
    verify: Literal["block", "files", "off"], loads: Sequence[Runtime] | None, formats: Sequence[ExportFormat]
) -> list[FieldProblem]:
    """Required runtimes that can never be shown to load the result."""
    if not loads:
        return []
    if verify == "off":
        detail = "nothing is read with verify off: leave it out, or ask for block or files"
        return [FieldProblem(field="verify", code="conflicting_fields", detail=detail, value=verify)]
    able = {runtime for name in formats for runtime in name.info.read_by}
    problems = []
    for index, runtime in enumerate(loads):
        if runtime not in able:
            by = sorted(name.value for name in ExportFormat if runtime in name.info.read_by)
            detail = f"{runtime.value} reads none of the job's formats; it reads {', '.join(by)}"
            problems.append(
                FieldProblem(field=f"require.loads.{index}", code="conflicting_fields", detail=detail, value=runtime)
            )
    adapters_alone = verify == "block" and all(name.info.is_adapter for name in formats)
    if adapters_alone and not problems:
        detail = "an adapter is no block, and only verify files reads it"
        problems.append(FieldProblem(field="verify", code="conflicting_fields", detail=detail, value=verify))
    return problems
