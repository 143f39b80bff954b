"""Policy for repeating requests, and answers turned into errors of `bitwright.errors`."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx
from pydantic import ValidationError

from bitwright.errors import (
    ERRORS,
    BitwrightError,
    InternalError,
    RequestError,
    Unauthenticated,
    Unavailable,
)
from bitwright.views import Problem

IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "PUT", "DELETE"})
BUSY_STATUSES = frozenset({429, 502, 503, 504})
STANDING = (b'"queued_jobs_exceeded"', b'"storage_exceeded"', b'"uploads_exceeded"')
"""Codes of quotas that seconds do not free: the caller is told at once."""


@dataclass(frozen=True)
class RetryPolicy:
    """Number of tries and their delays. Delays double from `first_seconds`, with full jitter; Retry-After wins."""

    attempts: int = 6
    first_seconds: float = 0.25
    longest_seconds: float = 15.0

    def delay(self, attempt: int, response: httpx.Response | None = None) -> float:
        """Seconds to wait after the failed try number `attempt` (from 0)."""
        asked = retry_after(response) if response is not None else None
        if asked is not None:
            # Jitter on top, so that clients that were refused together do not come back together.
            return min(asked, self.longest_seconds) + random.uniform(0, self.first_seconds)  # noqa: S311
        ceiling = min(self.longest_seconds, self.first_seconds * 2**attempt)
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311


def retry_after(response: httpx.Response) -> float | None:
    """Seconds of the Retry-After header (a number or a date); None where it is absent or unreadable."""
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def error_from_response(response: httpx.Response) -> BitwrightError:
    """The error that a problem document names by its code; a class by status where there is none."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        return _error_by_status(response)
    kind = ERRORS.get(problem.code, _class_by_status(response.status_code))
    hint = problem.hint
    if response.status_code >= 500 and problem.request_id:
        hint = f"{hint + '; ' if hint else ''}request id {problem.request_id}"
    return kind(problem.detail, field=problem.field, value=problem.value, hint=hint, errors=tuple(problem.errors))


def _error_by_status(response: httpx.Response) -> BitwrightError:
    request = response.request
    return _class_by_status(response.status_code)(
        f"{request.method} {request.url.path} answered {response.status_code} without a problem document"
    )


def _class_by_status(status: int) -> type[BitwrightError]:
    if status in {502, 503, 504}:
        return Unavailable
    if status >= 500:
        return InternalError
    return Unauthenticated if status == 401 else RequestError


def unreachable(url: str, error: Exception) -> Unavailable:
    """The error for a service from which no answer comes."""
    return Unavailable(
        f"no answer from {url}: {str(error) or type(error).__name__}",
        hint="start the service with `bitwright serve`, or give its address with --url or BITWRIGHT_URL",
    )


def is_repeatable(method: str, headers: Mapping[str, str] | None) -> bool:
    """True if a request whose outcome is unknown may be sent again: idempotent by its method or by its key."""
    return method in IDEMPOTENT_METHODS or "Idempotency-Key" in (headers or {})


def worth_another(response: httpx.Response, repeatable: bool) -> bool:
    """True if the same request may be answered otherwise after a delay."""
    if response.status_code == 429 and any(code in response.content for code in STANDING):
        return False
    if response.status_code in {429, 503}:
        return True
    if response.status_code in BUSY_STATUSES:
        return repeatable
    # A previous try of this very request is still in progress: its answer is replayed when it is there.
    return response.status_code == 409 and b"request_in_progress" in response.content
