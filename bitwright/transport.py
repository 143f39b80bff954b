"""HTTP requests with retries where that is safe, and error responses as classes of `bitwright.errors`."""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

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
USER_AGENT = "bitwright-client"


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


class Transport:
    """An httpx client with the key, the retry policy and the error mapping. Use as a context manager, or `close`."""

    def __init__(self, url: str, key: str | None, *, retry: RetryPolicy, timeout: float) -> None:
        headers = {"User-Agent": USER_AGENT, "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.url = url.rstrip("/")
        self.retry = retry
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout, connect=5.0))

    def close(self) -> None:
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: object = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """One request, tried again while that is safe and useful; the 2xx answer.

        A request whose outcome is unknown (the connection broke after it was sent) is repeated only if its method is
        idempotent or it carries an Idempotency-Key.

        Raises:
            Unavailable: the service could not be reached, or stayed busy.
            BitwrightError: the class of the code that the service answered.
        """
        repeatable = method in IDEMPOTENT_METHODS or "Idempotency-Key" in (headers or {})
        for attempt in range(self.retry.attempts):
            last = attempt + 1 == self.retry.attempts
            try:
                response = self._http.request(method, path, params=params, json=json, content=content, headers=headers)
            except httpx.TransportError as error:
                if last or not (repeatable or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)):
                    raise self.unreachable(error) from error
                time.sleep(self.retry.delay(attempt))
                continue
            if response.is_success:
                return response
            if last or not _worth_another(response, repeatable):
                raise error_from_response(response)
            time.sleep(self.retry.delay(attempt, response))
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def stream(self, path: str, *, headers: Mapping[str, str], read_timeout: float) -> Iterator[httpx.Response]:
        """One GET whose body is read as it comes. Not retried here: the caller knows where to resume.

        Raises:
            httpx.TransportError: the connection could not be made, or broke.
            BitwrightError: the service refused.
        """
        timeout = httpx.Timeout(read_timeout, connect=5.0)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                raise error_from_response(response)
            yield response

    def unreachable(self, error: Exception) -> Unavailable:
        """The error for a request that got no answer from the network."""
        return Unavailable(
            f"no answer from {self.url}: {str(error) or type(error).__name__}",
            hint="start the service with `bitwright serve`, or give its address with --url or BITWRIGHT_URL",
        )


def _worth_another(response: httpx.Response, repeatable: bool) -> bool:
    if response.status_code in {429, 503}:
        return True
    if response.status_code in BUSY_STATUSES:
        return repeatable
    # A previous try of this very request is still in progress: its answer is replayed when it is there.
    return response.status_code == 409 and b"request_in_progress" in response.content
