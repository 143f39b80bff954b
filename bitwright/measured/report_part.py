"""A part of a report: frozen, and without a field that nobody knows."""

from pydantic import BaseModel, ConfigDict


class ReportPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
