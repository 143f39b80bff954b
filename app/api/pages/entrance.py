"""Logging in with a key, logging out, and the files that pages load."""

from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from app.api.deps import DatabaseOf, LogInsOf, StateOf
from app.api.pages.rendering import ASSETS, FOREVER, asset_bytes, asset_hash, page, root_of
from app.api.pages.session import FORM, SEE_OTHER, OwnForm, local_path, page_router, session_text, set_cookie
from app.store.tenancy.keys import authenticate
from app.store.tenancy.page_sessions import end_session, open_session
from bitwright.errors import NotFound, TooManyRequests, Unauthenticated

router = page_router()
assets = APIRouter(include_in_schema=False)
log = structlog.get_logger(__name__)

NextPage = Annotated[str | None, Query(alias="next", max_length=2000)]


@router.get("/login")
def ask_for_key(request: Request, wanted: NextPage = None) -> Response:
    """The form that takes a key."""
    return page(request, "login", wanted=local_path(wanted), problem=None)


@router.post("/login", openapi_extra=FORM)
def log_in(request: Request, form: OwnForm, state: StateOf, database: DatabaseOf, log_ins: LogInsOf) -> Response:
    """A session for a key."""
    address = request.client.host if request.client is not None else ""
    wanted = local_path(next(iter(form.get("next", ())), None))
    try:
        log_ins.check(address)
        with database.transaction() as session:
            principal = authenticate(session, next(iter(form.get("key", ())), "").strip())
            text = open_session(session, principal)
    except Unauthenticated as error:
        log_ins.failed(address)
        log.warning("log_in_refused")
        return page(request, "login", status=401, wanted=wanted, problem=error.detail)
    except TooManyRequests as error:
        problem = f"{error.detail}; {error.hint}"
        return page(request, "login", status=429, wanted=wanted, problem=problem)
    state.later.note_use(principal.key_id)
    log.info("logged_in", tenant_id=principal.tenant_id, key_id=principal.key_id)
    response = RedirectResponse(root_of(request) + wanted, SEE_OTHER)
    set_cookie(request, response, text)
    return response


@router.post("/logout", openapi_extra=FORM)
def log_out(request: Request, _form: OwnForm, database: DatabaseOf) -> Response:
    """The session ends, here and in the store."""
    text = session_text(request)
    if text is not None:
        with database.transaction() as session:
            end_session(session, text)
    response = RedirectResponse(f"{root_of(request)}/login", SEE_OTHER)
    set_cookie(request, response, "")
    return response


@assets.get("/assets/{digest}/{name}")
def asset(digest: str, name: str) -> Response:
    """A script, style or image of the pages, which caches may keep for ever."""
    if name not in ASSETS or digest != asset_hash(name):
        raise NotFound(f"there is no asset {name[:64]!r} of that hash", value=name, hint="load the page anew")
    return Response(asset_bytes(name), media_type=ASSETS[name], headers={"Cache-Control": FOREVER})
