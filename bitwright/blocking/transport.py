# Made from bitwright/asynchronous/transport.py by `make client`: change it there.
"""HTTP connections with the key, the retries and the error mapping."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from bitwright.blocking.waits import sleep
from bitwright.retries import RetryPolicy, error_from_response, is_repeatable, unreachable, worth_another

USER_AGENT = "bitwright-client"
CONNECT_SECONDS = 5.0
# Each event stream holds a connection: a bound on them would make a hundred waits wait for each other.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)


class Transport:
    """An httpx client with the key, the retry policy and the error mapping; `close` it."""

    def __init__(self, url: str, key: str | None, *, retry: RetryPolicy, timeout: float) -> None:
        headers = {"User-Agent": USER_AGENT, "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.url = url.rstrip("/")
        self.retry = retry
        limit = httpx.Timeout(timeout, connect=CONNECT_SECONDS)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=limit, limits=LIMITS)

    def close(self) -> None:
        """Close the connections."""
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
        repeatable = is_repeatable(method, headers)
        for attempt in range(self.retry.attempts):
            last = attempt + 1 == self.retry.attempts
            try:
                response = self._http.request(method, path, params=params, json=json, content=content, headers=headers)
            except httpx.TransportError as error:
                if last or not (repeatable or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)):
                    raise unreachable(self.url, error) from error
                sleep(self.retry.delay(attempt))
                continue
            if response.is_success:
                return response
            if last or not worth_another(response, repeatable):
                raise error_from_response(response)
            sleep(self.retry.delay(attempt, response))
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def stream(self, path: str, *, headers: Mapping[str, str], read_timeout: float) -> Iterator[httpx.Response]:
        """One GET whose body is read as it comes. Not retried here: the caller knows where to resume.

        Raises:
            httpx.TransportError: the connection could not be made, or broke.
            BitwrightError: the service refused.
        """
        limit = httpx.Timeout(read_timeout, connect=CONNECT_SECONDS)
        with self._http.stream("GET", path, headers=headers, timeout=limit) as response:
            if not response.is_success:
                response.read()
                raise error_from_response(response)
            yield response

    def last_error(self, error: Exception) -> Exception:
        """The error with which a stream ends that broke too often: `Unavailable` for one of the network."""
        return unreachable(self.url, error) if isinstance(error, httpx.TransportError) else error
