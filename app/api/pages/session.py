"""Guards of pages: the session's cookie, the name of the host, and forms that come from our own pages.

A cookie opens pages and nothing else: /v1 reads the header `Authorization` alone.
"""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any
from urllib.parse import parse_qsl, quote, urlsplit

import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from app.api.deps import DatabaseOf, SettingsOf, StateOf
from app.api.http.errors import RETRY_AFTER_SECONDS, error_from_status, error_from_validation
from app.api.pages.rendering import page, path_of, root_of
from app.domain.access import Principal, Scope
from app.settings import Settings
from app.store.tenancy.page_sessions import LIFE_SECONDS, find_session
from bitwright.errors import BitwrightError, ForeignPage, MissingScope, Unauthenticated, UnknownHost

log = structlog.get_logger(__name__)

PLAIN_COOKIE, SECURE_COOKIE = "bitwright_session", "__Host-bitwright_session"
MOST_FIELDS = 2000
TOKEN_FIELD, TOKEN_HEADER = "token", "X-Form-Token"
FORM: dict[str, Any] = {"requestBody": {"content": {"application/x-www-form-urlencoded": {}}}}
"""`openapi_extra` of a route that reads a form."""
SEE_OTHER = 303
Form = Mapping[str, tuple[str, ...]]
"""Values of a form by name, in order."""


@dataclass(frozen=True)
class Visitor:
    """The owner of a session.

    token   what our own pages send with their forms
    """

    principal: Principal
    token: str

    @property
    def may_submit(self) -> bool:
        return self.principal.allows(Scope.SUBMIT)

    @property
    def is_admin(self) -> bool:
        return self.principal.allows(Scope.ADMIN)

    def demand(self, scope: Scope) -> None:
        """Nothing, if the session's key has the scope.

        Raises:
            MissingScope: it has not.
        """
        if not self.principal.allows(scope):
            hint = f"log in with a key with it; `bitwright keys create --scope {scope.value}` makes one"
            raise MissingScope(f"this needs a key with the scope {scope.value}", value=scope.value, hint=hint)


def cookie_name(request: Request) -> str:
    """Of the session; under TLS one that browsers take from this host alone, with Secure."""
    return SECURE_COOKIE if request.url.scheme == "https" else PLAIN_COOKIE


def set_cookie(request: Request, response: Response, text: str) -> None:
    """Give the browser a session; an empty text ends it."""
    response.set_cookie(
        cookie_name(request),
        text,
        max_age=LIFE_SECONDS if text else 0,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def session_text(request: Request) -> str | None:
    """The session that the browser shows."""
    return request.cookies.get(cookie_name(request)) or None


def visitor(request: Request, state: StateOf, database: DatabaseOf) -> Visitor:
    """The visitor of a page; the use of the session's key is noted.

    Raises:
        Unauthenticated: there is no session, or it is over.
    """
    text = session_text(request)
    if text is not None:
        with database.reading() as session:
            principal = find_session(session, text)
        if principal is not None:
            state.later.note_use(principal.key_id)
            return Visitor(principal, form_token(text))
    raise Unauthenticated("log in first", hint="the page asks for an API key")


async def name_visitor(found: Annotated[Visitor, Depends(visitor)]) -> Visitor:
    """The visitor, named on every log line of the request; a coroutine as `name_caller` is."""
    structlog.contextvars.bind_contextvars(tenant_id=found.principal.tenant_id, key_id=found.principal.key_id)
    return found


VisitorOf = Annotated[Visitor, Depends(name_visitor)]


def form_token(text: str) -> str:
    """The token of a session's forms, which tells nothing of the session."""
    return hmac.new(text.encode(), b"form", hashlib.sha256).hexdigest()


async def read_form(request: Request) -> Form:
    """The fields of a form."""
    body = (await request.body()).decode(errors="replace")
    fields: dict[str, tuple[str, ...]] = {}
    for name, value in parse_qsl(body, keep_blank_values=True, max_num_fields=MOST_FIELDS):
        fields[name] = (*fields.get(name, ()), value)
    return fields


FormOf = Annotated[Form, Depends(read_form)]


def own_page(request: Request, form: FormOf) -> Form:
    """The form of a request that changes something, which came from a page of ours.

    Raises:
        ForeignPage: its origin is another one, or it has neither an origin nor the session's token.
    """
    origin, text = request.headers.get("origin"), session_text(request)
    if origin is not None:
        if is_own(origin, request):
            return form
    elif text is not None:
        sent = request.headers.get(TOKEN_HEADER) or next(iter(form.get(TOKEN_FIELD, ())), "")
        if hmac.compare_digest(sent.encode(), form_token(text).encode()):
            return form
    raise ForeignPage("this did not come from a page of this service", value=origin, hint="load the page anew")


OwnForm = Annotated[Form, Depends(own_page)]


def is_own(origin: str, request: Request) -> bool:
    """True if the origin is this service as the browser sees it. A proxy may speak TLS where we do not."""
    parts = urlsplit(origin)
    schemes = {request.url.scheme, "https"}
    return parts.scheme in schemes and parts.netloc.lower() == request.headers.get("host", "").lower()


def check_host(request: Request, settings: SettingsOf) -> None:
    """Nothing, if the service goes by the name that the browser asked for.

    A page elsewhere can point a name of its own at this machine; it cannot do so with an address, nor with a name that
    is not its own.

    Raises:
        UnknownHost: the name is not on the list.
    """
    name = host_of(request.headers.get("host", ""))
    if not is_known(name, settings):
        hint = "open it by its address, or set BITWRIGHT_PAGE_HOSTS"
        raise UnknownHost(f"pages are not shown under the name {name[:100]!r}", field="Host", value=name, hint=hint)


def host_of(header: str) -> str:
    """The name or address in a Host header, without port or brackets, in lower case."""
    try:
        return (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_known(name: str, settings: Settings) -> bool:
    """True if pages may be opened under a name."""
    if "*" in settings.page_hosts or name in settings.page_hosts:
        return True
    if name in own_names() or name == settings.host.lower():
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@cache
def own_names() -> frozenset[str]:
    """localhost, and the machine's own name."""
    own = socket.gethostname().lower()
    return frozenset({"localhost", own, own.partition(".")[0]})


class PageRoute(APIRoute):
    """A route whose errors are pages; without a session it leads to the log-in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Unauthenticated:
                return to_log_in(request)
            except BitwrightError as error:
                return error_page(request, error)
            except RequestValidationError as error:
                return error_page(request, error_from_validation(error))
            except HTTPException as error:
                return error_page(request, error_from_status(error.status_code, str(error.detail), request))

        return handle


def error_page(request: Request, error: BitwrightError) -> Response:
    """An error in words, with the way out."""
    if error.status >= 500:
        log.error("request_failed", code=error.code, detail=error.detail, exc_info=error)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status in (429, 503) else {}
    request_id = request.scope.get("bitwright.request_id")
    return page(request, "error", status=error.status, headers=headers, error=error, request_id=request_id)


def to_log_in(request: Request) -> Response:
    """The way to the log-in, and back from there to a page that was asked for."""
    wanted = path_of(request) + (f"?{request.url.query}" if request.url.query else "")
    back = f"?next={quote(wanted, safe='')}" if request.method == "GET" and wanted != "/" else ""
    return RedirectResponse(f"{root_of(request)}/login{back}", SEE_OTHER, headers={"Vary": "Accept, Cookie"})


def local_path(wanted: str | None) -> str:
    """A path of this service that a log-in may lead to; the first page in place of anything else."""
    if wanted is None or not wanted.startswith("/") or wanted.startswith("//"):
        return "/"
    return "/" if "\\" in wanted or not wanted.isprintable() else wanted


def page_router() -> APIRouter:
    """A router for pages."""
    return APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[Depends(check_host)])
