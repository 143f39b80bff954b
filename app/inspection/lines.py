"""Lines of JSON, and bytes of files, between an API and its child that looks at checkpoints."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.domain.request.job_request import JobRequest
from bitwright.errors import FieldProblem
from bitwright.events import ErrorData

COUNT_BYTES = 8
"""Before the bytes of a file: how many they are, little-endian. `REFUSED` of them: the file cannot be read."""
REFUSED = (1 << 64) - 1


class Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Look(Line):
    """A request to judge against a checkpoint, of which names and sizes are told and bytes are given when asked for.

    memory_bytes, seconds   of processor time, that the look may take
    """

    request: JobRequest
    sizes: dict[str, int]
    memory_bytes: int
    seconds: float


class Wanted(Line):
    """Bytes of a file that the child wants."""

    name: str
    start: int = Field(ge=0)
    length: int = Field(ge=0)


class Verdict(Line):
    """The outcome: what is wrong with the checkpoint, or how the request fits it."""

    error: ErrorData | None = None
    problems: list[FieldProblem] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    estimates: dict[str, Any] = Field(default_factory=dict)


class Said(Line):
    """A line of the child: one of the two."""

    wanted: Wanted | None = None
    verdict: Verdict | None = None
