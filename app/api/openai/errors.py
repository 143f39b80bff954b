"""Errors in OpenAI's shape, for the paths that its clients call."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from bitwright.errors import ERRORS, BitwrightError, QuotaExceeded

PATHS = re.compile(r"/v1/(?:files|fine_tuning)(?:/.*)?", re.DOTALL)
ALWAYS = ("unauthenticated", "missing_scope", "malformed_body", "invalid_request", "unavailable", "internal_error")
"""Codes that any of these routes may answer with."""


class OpenAIErrorBody(BaseModel):
    """An error."""

    message: str = Field(description="One sentence about what is wrong, and the way out.")
    type: str = Field(description="`invalid_request_error`, `rate_limit_error` or `server_error`.")
    param: str | None = Field(description="The field at fault.")
    code: str | None = Field(description="A stable code: of the field's problem, or of the error.")
    request_id: str | None = None


class OpenAIError(BaseModel):
    """An answer that is an error."""

    error: OpenAIErrorBody


def is_openais(path: str) -> bool:
    """True for the paths of OpenAI's interface."""
    return PATHS.fullmatch(path) is not None


def status_of(error: BitwrightError | type[BitwrightError]) -> int:
    """The HTTP status: OpenAI's service says 400 where ours says 422, and its clients have a class for each."""
    return HTTPStatus.BAD_REQUEST if error.status == HTTPStatus.UNPROCESSABLE_ENTITY else error.status


def error_response(error: BitwrightError, *, request_id: str | None, headers: Mapping[str, str]) -> Response:
    """The answer for an error; with several problems, the first one's field and code."""
    first = error.errors[0] if error.errors else None
    body = OpenAIErrorBody(
        message=f"{error.detail}; {error.hint}" if error.hint else error.detail,
        type=_type(status_of(error), isinstance(error, QuotaExceeded)),
        param=first.field if first is not None else error.field,
        code=first.code if first is not None else error.code,
        request_id=request_id,
    )
    # The clients repeat a 409 by themselves, and a state does not change by being asked again.
    again = {"x-should-retry": "false"} if error.status == HTTPStatus.CONFLICT else {}
    content = OpenAIError(error=body).model_dump(mode="json")
    return JSONResponse(content, status_code=status_of(error), headers={**headers, **again})


def openai_errors(*codes: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these codes and those that each route has."""
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys((*codes, "rate_limit_exceeded", *ALWAYS)):
        by_status.setdefault(status_of(ERRORS[code]), []).append(code)
    return {
        status: {
            "description": "; ".join(f"`{code}`: {ERRORS[code].title}" for code in found),
            "model": OpenAIError,
        }
        for status, found in sorted(by_status.items())
    }


def _type(status: int, is_quota: bool) -> str:
    if is_quota:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
