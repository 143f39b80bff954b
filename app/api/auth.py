"""Authentication and scopes: `Authorization: Bearer bw_...`, checked on every route under /v1."""

from typing import Annotated

import structlog
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from app.api.deps import StateOf
from app.api.tenancy.admission import count_post, posts_per_minute
from app.domain.access import Principal, Scope
from bitwright.errors import MissingScope, Unauthenticated

bearer = HTTPBearer(
    auto_error=False,
    scheme_name="ApiKey",
    bearerFormat="bw_ and 38 letters and digits",
    description="An API key, sent as `Authorization: Bearer bw_…`. Its scopes are read, submit, admin; each includes "
    "those before it. `bitwright keys create` makes one.",
)


async def find_principal(
    request: Request,
    state: StateOf,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Principal:
    """The owner of the request's key, whose use is noted; a POST is counted.

    A key that is known costs no thread: of those there are few.

    Raises:
        Unauthenticated: no key, or none that is valid.
        RateLimitExceeded: the tenant sends too many POST requests.
    """
    if credentials is None:
        hint = "send the header `Authorization: Bearer bw_…`; `bitwright keys create` makes a key"
        raise Unauthenticated("the request has no API key", hint=hint)
    principal = state.keys.known(credentials.credentials)
    if principal is None:
        principal = await run_in_threadpool(state.keys.look_up, credentials.credentials)
    state.later.note_use(principal.key_id)
    per_minute = posts_per_minute(request, principal, state.settings)
    if per_minute is not None:
        await run_in_threadpool(count_post, request, principal, per_minute, state.database)
    return principal


async def name_caller(principal: Annotated[Principal, Depends(find_principal)]) -> Principal:
    """The caller, named on every log line of the request from here on.

    A coroutine, because what a function binds in the thread pool ends with its call.
    """
    structlog.contextvars.bind_contextvars(tenant_id=principal.tenant_id, key_id=principal.key_id)
    return principal


Caller = Annotated[Principal, Depends(name_caller)]


async def reader(principal: Caller) -> Principal:
    """The caller, who may read."""
    return _allow(principal, Scope.READ)


async def submitter(principal: Caller) -> Principal:
    """The caller, who may submit, cancel and upload."""
    return _allow(principal, Scope.SUBMIT)


async def administrator(principal: Caller) -> Principal:
    """The caller, who may look after all tenants."""
    return _allow(principal, Scope.ADMIN)


def _allow(principal: Principal, needed: Scope) -> Principal:
    if not principal.allows(needed):
        have = ", ".join(sorted(principal.scopes)) or "none"
        detail = f"this needs a key with the scope {needed.value}; yours has: {have}"
        raise MissingScope(detail, value=needed.value, hint=f"`bitwright keys create --scope {needed.value}` makes one")
    return principal


Reader = Annotated[Principal, Depends(reader)]
Submitter = Annotated[Principal, Depends(submitter)]
Administrator = Annotated[Principal, Depends(administrator)]
