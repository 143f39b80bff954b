"""Errors as clients of a Hub understand them: by the headers `X-Error-Code` and `X-Error-Message`.

Without them a client that meets 401 or 404 at an address of http cannot tell a repository that is not there from a
service that is none, and tries other ways for a while. The body stays a problem document.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from app.api.http.errors import respond
from bitwright.errors import BitwrightError, NotFound, Unauthenticated

BAD_CREDENTIALS = "Invalid credentials in Authorization header"
"""The message by which clients tell a wrong token from a private repository."""


class NoRepository(NotFound):
    """The tenant has no such repository."""

    hub_code = "RepoNotFound"


class NoRevision(NotFound):
    """The repository has no such revision."""

    hub_code = "RevisionNotFound"


class NoEntry(NotFound):
    """The repository has no such file or folder in this revision, whose commit the answer names."""

    hub_code = "EntryNotFound"

    def __init__(self, detail: str, commit: str) -> None:
        super().__init__(detail)
        self.commit = commit


class HubRoute(APIRoute):
    """A route for clients of a Hub: its refusals have their headers, its query may hold what other Hubs read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint with its dependencies, and the headers of what it raises."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except (Unauthenticated, NotFound) as error:
                return respond(request, error, error_headers(error, with_key="authorization" in request.headers))

        return answer


def error_headers(error: BitwrightError, *, with_key: bool) -> dict[str, str]:
    """Headers of a refusal; `with_key`: the request had a key, or a token of another Hub."""
    if isinstance(error, Unauthenticated):
        # Clients send the token of the public Hub by themselves: to them a repository is there for other keys alone.
        return {"X-Error-Message": BAD_CREDENTIALS} if with_key else {"X-Error-Code": NoRepository.hub_code}
    headers = {"X-Error-Message": "".join(c if c.isascii() and c.isprintable() else "?" for c in error.detail)}
    if isinstance(error, NoRepository | NoRevision | NoEntry):
        headers["X-Error-Code"] = error.hub_code
    if isinstance(error, NoEntry):
        headers["X-Repo-Commit"] = error.commit
    return headers
