"""Place of a result on the Hub, as a request names it.

"publish": {"hub": "org/name"}
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from app.domain.formats import ExportFormat
from bitwright.errors import FieldProblem
from bitwright.formats import ADAPTER_FOLDER, NATIVE

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
PATTERN = rf"^{_SEGMENT}/{_SEGMENT}$"


def _check(repository: str) -> str:
    if (
        "--" in repository
        or ".." in repository
        or any(part.endswith((".git", ".", "-")) for part in repository.split("/"))
    ):
        raise ValueError("the Hub takes no -- or .. in a name, and no point, dash or .git at its end")
    return repository


HubRepository = Annotated[str, StringConstraints(pattern=PATTERN), AfterValidator(_check)]


class Publish(BaseModel):
    """A repository on the Hub that gets the result, card and report included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hub: HubRepository = Field(description="Repository, `org/name`; it is made if it is not there.")
    private: bool = Field(default=True, strict=True, description="Whether it is private, where it is made.")
    force: bool = Field(
        default=False,
        strict=True,
        description="Commit to a repository whose last commit is not of Bitwright; its other files are kept.",
    )
    format: ExportFormat | Literal["adapter"] | None = Field(
        default=None, description="The checkpoint to publish; null: the job's result, as `main` under /hub has it."
    )


def publishing_problems(publish: Publish | None, formats: Sequence[ExportFormat], trains: bool) -> list[FieldProblem]:
    """A problem, if what is to be published is none of what the job will keep."""
    kept = [*formats, NATIVE, *([ADAPTER_FOLDER] if trains else [])]
    if publish is None or publish.format is None or publish.format in kept:
        return []
    detail = f"the job keeps no {publish.format}; it will have: {', '.join(kept)}"
    return [FieldProblem(field="publish.format", code="conflicting_fields", detail=detail, value=publish.format)]
