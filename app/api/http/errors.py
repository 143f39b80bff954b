"""Every error as an RFC 9457 problem document with a stable `code`, whoever raised it.

Errors of the domain carry their status and code; errors of the framework are mapped to them here. What nobody foresaw
becomes `internal_error`: the log has the cause, the caller gets the request's id and nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route

from app.api.openai.errors import error_response, is_openais
from app.api.tenancy.limit_headers import limit_of, tell_limit
from app.domain.full_disk import disk_full
from app.domain.request.problems import unknown_field
from bitwright.errors import (
    BitwrightError,
    BodyTooLarge,
    DiskFull,
    FieldProblem,
    InternalError,
    InvalidRequest,
    MalformedBody,
    MethodNotAllowed,
    NotFound,
    QuotaExceeded,
    RequestError,
    Unauthenticated,
    shorten,
)
from bitwright.views import Problem

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5
log = structlog.get_logger(__name__)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error that leaves an endpoint a problem document."""
    app.add_exception_handler(BitwrightError, _on_domain_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(OSError, _on_system_error)


def problem_response(
    error: BitwrightError, *, instance: str, request_id: str | None, headers: Mapping[str, str] | None = None
) -> Response:
    """The problem document of an error, with the headers that its status asks for; OpenAI's paths have its shape."""
    extra = _headers(error, headers)
    if is_openais(instance):
        return error_response(error, request_id=request_id, headers=extra)
    problem = Problem(
        type=f"urn:bitwright:problem:{error.code}",
        title=error.title,
        status=error.status,
        code=error.code,
        detail=error.detail,
        instance=instance,
        field=error.field,
        value=error.value,
        hint=error.hint,
        errors=list(error.errors),
        violated_policies=[error.policy] if isinstance(error, QuotaExceeded) else None,
        request_id=request_id,
    )
    content = problem.model_dump(mode="json", exclude_none=True, by_alias=True)
    return JSONResponse(content, status_code=error.status, headers=extra, media_type=MEDIA_TYPE)


def _headers(error: BitwrightError, headers: Mapping[str, str] | None) -> dict[str, str]:
    extra = dict(headers or {})
    if error.status == HTTPStatus.UNAUTHORIZED:
        extra["WWW-Authenticate"] = 'Bearer realm="bitwright"'
    if error.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        seconds = error.retry_after_seconds if isinstance(error, QuotaExceeded) else RETRY_AFTER_SECONDS
        extra["Retry-After"] = str(seconds)
    return extra


def respond(request: Request, error: BitwrightError, headers: Mapping[str, str] | None = None) -> Response:
    """`problem_response` for a request at hand."""
    request_id = request.scope.get("bitwright.request_id")
    return problem_response(error, instance=request.url.path, request_id=request_id, headers=headers)


def _on_domain_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, BitwrightError):
        raise error
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("request_failed", code=error.code, detail=error.detail, exc_info=error)
    limit = limit_of(error) if isinstance(error, QuotaExceeded) else None
    if limit is not None:
        tell_limit(request.scope, limit)
    return respond(request, error, getattr(error, "headers", None))


def _on_system_error(request: Request, error: Exception) -> Response:
    """A full disk is told as what it is, wherever it is met; all else nobody foresaw."""
    if not disk_full(error):
        raise error
    return _on_domain_error(request, DiskFull("the service's disk is full"))


def _on_validation_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    field = getattr(request.scope.get("route"), "body_field", None)
    model = None if field is None else field.field_info.annotation
    return respond(request, error_from_validation(error, model if hasattr(model, "model_fields") else None))


def error_from_validation(error: RequestValidationError, model: type[BaseModel] | None = None) -> RequestError:
    """Our error for what FastAPI found wrong with parameters or body; `model` is the body's."""
    items = error.errors()
    if any(item["type"] == "json_invalid" for item in items):
        position = items[0]["loc"][-1]
        cause = items[0].get("ctx", {}).get("error", "not JSON")
        return MalformedBody(f"the body is not JSON: {cause} at character {position}", field="body")
    problems = tuple(
        FieldProblem(
            # The first part says where (body, query, path, header); a body's fields go by their own names.
            field=".".join(str(key) for key in (item["loc"][1:] if item["loc"][0] == "body" else item["loc"]))
            or "body",
            code="missing_field" if item["type"] == "missing" else _code(item["type"]),
            detail=unknown_field(model, tuple(item["loc"][1:]))
            if model is not None and item["type"] == "extra_forbidden"
            else item["msg"][0].lower() + item["msg"][1:],
            value=None if item["type"] == "missing" else shorten(item.get("input")),
        )
        for item in items
    )
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return InvalidRequest(f"{first.field}: {first.detail}{more}", errors=problems)


def _code(kind: str) -> str:
    if kind == "extra_forbidden":
        return "unknown_field"
    if kind.startswith(("greater_than", "less_than", "too_long", "too_short", "string_too")):
        return "out_of_range"
    return "wrong_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"


def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods_of(request))
    return respond(request, error_from_status(error.status_code, str(error.detail), request), headers)


def _methods_of(request: Request) -> list[str]:
    """All methods of the request's path: each is a route of its own, and the framework names those of the first one."""
    here = [route for route in _single_routes(request.app.routes) if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in here for method in route.methods or ()})


def _single_routes(routes: Iterable[BaseRoute]) -> Iterator[Route]:
    """The routes of an application and of the routers that it includes, which FastAPI keeps as they are."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _single_routes(included.routes)
        elif isinstance(route, Route):
            yield route


def error_from_status(status: int, detail: str, request: Request) -> BitwrightError:
    """Our error for an HTTP status that the framework chose."""
    if status == HTTPStatus.NOT_FOUND:
        return NotFound(f"there is nothing at {request.url.path}", hint="GET /openapi.json lists all paths")
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowed(
            f"{request.url.path} does not take {request.method}", hint="the Allow header lists what it takes"
        )
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return BodyTooLarge(detail)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Unauthenticated(detail)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return InternalError("an unexpected error; the service's log has it under the request id")
    return MalformedBody(detail)
