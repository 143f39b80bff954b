"""The views that carry a request, with the service's strict form of it."""

from typing import Any, Self

from pydantic import Field, PrivateAttr, field_serializer

from app.domain.request.job_request import JobRequest
from bitwright.views import JobRecord, PreflightRecord


class JobView(JobRecord[JobRequest | dict[str, Any]]):
    """A job as its tenant sees it."""

    request: JobRequest | dict[str, Any] = Field(
        union_mode="left_to_right",
        description="The full form, every default filled in. What another version of the service has stored, and this "
        "one does not understand, is an object as it was stored.",
    )
    _written: dict[str, Any] | None = PrivateAttr(None)

    def with_written(self, request: dict[str, Any]) -> Self:
        """The view with what its request looks like in an answer, which takes longer to find than all else of it."""
        self._written = request
        return self

    # A lambda, which says nothing of what it returns: the document keeps the field's own schema, and what is written
    # already is not held against it.
    _as_written = field_serializer("request", mode="wrap")(
        lambda self, request, write: write(request) if self._written is None else self._written
    )


class PreflightView(PreflightRecord[JobRequest]):
    """Answer to `POST /v1/jobs?dry_run=true`."""
