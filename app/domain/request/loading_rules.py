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
    problems = []
    for index, runtime in enumerate(loads):
        read = [name for name in formats if runtime in name.info.read_by]
        if not read:
            by = sorted(name.value for name in ExportFormat if runtime in name.info.read_by)
            detail = f"{runtime.value} reads none of the job's formats; it reads {', '.join(by)}"
        elif verify == "block" and all(name.info.is_adapter for name in read):
            detail = f"{runtime.value} reads an adapter, which is no block: ask for verify files"
        else:
            continue
        field = f"require.loads.{index}"
        problems.append(FieldProblem(field=field, code="conflicting_fields", detail=detail, value=runtime))
    return problems
