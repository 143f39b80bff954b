"""Middleware of every request: id, log line, metrics, a limit on its body, headers that browsers obey.

Plain ASGI, so that streams pass through untouched.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from secrets import token_hex

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.http.errors import problem_response
from app.api.tenancy.limit_headers import limit_headers
from app.tracing import RequestTrace, Tracing, of_request
from bitwright.errors import BodyTooLarge, InternalError

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
UPLOAD_PART = re.compile(r"PUT /v1/uploads/[^/]+/files/[^/]+|POST /v1/files")
QUIET_PATHS = ("/livez", "/readyz", "/metrics")

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}

log = structlog.get_logger(__name__)
Observe = Callable[[str, str, int, float], None]
"""observe(method, route, status, seconds)"""


class RequestContext:
    """The outermost layer: request id, access line, metrics, security headers, and an answer to unforeseen errors."""

    def __init__(self, app: ASGIApp, observe: Observe, tracing: Tracing | None = None) -> None:
        self.app = app
        self.observe = observe
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope["bitwright.request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started, status, answered_after = time.perf_counter(), 0, 0.0

        async def send_with_headers(message: Message) -> None:
            nonlocal status, answered_after
            if message["type"] == "http.response.start":
                status, answered_after = message["status"], time.perf_counter() - started
                _add_headers(MutableHeaders(scope=message), request_id, limit_headers(scope))
            await send(message)

        # Jobs are made by POST; what looks at them all the time would only fill a collector.
        trace = None if self.tracing is None or scope["method"] != "POST" else RequestTrace(_traceparent(scope))
        try:
            with nullcontext() if trace is None else of_request(trace):
                await self.app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request_failed", method=scope["method"], path=scope["path"])
            if status:
                raise  # The answer has begun: only a broken connection can tell the caller.
            await _answer_internal_error(scope, receive, send_with_headers, request_id)
        finally:
            # A stream may last for hours: the metric is the time to the first byte, the log line has the whole.
            route = getattr(scope.get("route"), "path", "unmatched")
            self.observe(scope["method"], route, status, answered_after)
            if trace is not None and self.tracing is not None:
                trace.attributes["bitwright.request_id"] = request_id
                self.tracing.tell(trace.ended(scope["method"], route, status))
            _log_access(scope, status, time.perf_counter() - started)


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    level = log.debug if scope["path"] in QUIET_PATHS else log.info
    milliseconds = round(seconds * 1000, 1)
    level("request_served", method=scope["method"], path=scope["path"], status=status, milliseconds=milliseconds)


def _traceparent(scope: Scope) -> str | None:
    """The caller's place in a trace of its own: ours goes on there."""
    return Headers(scope=scope).get("traceparent")


def _request_id(given: str | None) -> str:
    """The caller's id if it is harmless, else a new one."""
    return given if given and REQUEST_ID.fullmatch(given) else token_hex(16)


def _add_headers(headers: MutableHeaders, request_id: str, limits: Mapping[str, str]) -> None:
    headers["X-Request-ID"] = request_id
    headers.update(limits)
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)


async def _answer_internal_error(scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
    error = InternalError("an unexpected error; the service's log has it under the request id")
    await problem_response(error, instance=scope["path"], request_id=request_id)(scope, receive, send)


class BodyLimit:
    """Refuses a body of more than `limit` bytes with 413, by its Content-Length or as soon as it has sent more.

    Parts of an upload and files are exempt: their sizes are checked where they are received.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or UPLOAD_PART.fullmatch(f"{scope['method']} {scope['path']}"):
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.limit:
            await self._refuse(scope, receive, send)
            return
        messages, size = [], 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self.limit:
                await self._refuse(scope, receive, send)
                return
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        replay = iter(messages)

        async def receive_again() -> Message:
            return next(replay, None) or await receive()

        await self.app(scope, receive_again, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = BodyTooLarge(
            f"the body is larger than {self.limit} bytes",
            field="body",
            hint="send files through /v1/uploads; a job request is small",
        )
        response = problem_response(
            error,
            instance=scope["path"],
            request_id=scope.get("bitwright.request_id"),
            headers={"Connection": "close"},
        )
        await response(scope, receive, send)
