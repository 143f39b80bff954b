"""The views that carry a request, with the service's strict form of it."""

from typing import Any

from pydantic import Field

from app.domain.request.job_request import JobRequest
from bitwright.views import JobRecord, PreflightRecord


class JobView(JobRecord[JobRequest | dict[str, Any]]):
    """A job as its tenant sees it."""

    request: JobRequest | dict[str, Any] = Field(
        union_mode="left_to_right",
        description="The full form, every default filled in. What another version of the service has stored, and this "
        "one does not understand, is an object as it was stored.",
    )


class PreflightView(PreflightRecord[JobRequest]):
    """Answer to `POST /v1/jobs?dry_run=true`."""
