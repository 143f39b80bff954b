"""Questions to the child that looks at the Hub, and its answers: a line of JSON each."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from app.domain.inputs.architectures import read_dimensions
from app.domain.inputs.inspection import Inspection
from bitwright.events import ErrorData

LOOK_SECONDS, LOOK_BYTES, LOOKS_AT_ONCE = 10.0, 64 << 20, 4
"""Limits of the looks: of each, and of their number."""


class Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Opening(Line):
    """The first line to a child: the Hub that it asks, and with which token."""

    endpoint: str | None = None
    token: str | None = None


class Question(Line):
    """A repository to look at; `any_type` as `inspect_checkpoint` has it."""

    number: int
    id: str
    revision: str
    any_type: bool


class Found(Line):
    """A checkpoint as configuration, index and file list show it."""

    config: dict[str, Any]
    accepted: bool
    tensor_bytes: int
    weights: int
    tokenizer: bool
    quantized: str | None = None

    @classmethod
    def of(cls, inspection: Inspection) -> "Found":
        return cls(
            config=dict(inspection.config),
            accepted=inspection.dimensions is not None,
            tensor_bytes=inspection.tensor_bytes,
            weights=inspection.weights,
            tokenizer=inspection.tokenizer,
            quantized=inspection.quantized,
        )

    def inspection(self) -> Inspection:
        """The same for whoever judges a request by it."""
        dimensions = read_dimensions(self.config) if self.accepted else None
        known = (self.tensor_bytes, self.weights, self.tokenizer)
        return Inspection(self.config, dimensions, *known, quantized=self.quantized)


class Answer(Line):
    """The checkpoint or an error; and the message about a repository that has another name now."""

    number: int
    found: Found | None = None
    error: ErrorData | None = None
    renamed: str | None = None
