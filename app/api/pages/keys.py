"""Keys of the visitor's tenant, for admins: looked at, made, rotated and revoked.

The text of a new key stands in the answer that made it, and nowhere else.
"""

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import RedirectResponse, Response

from app.api.admin.keys import create_key, revoke_key, rotate_key
from app.api.deps import DatabaseOf, KeysOf
from app.api.pages.rendering import page, root_of
from app.api.pages.session import FORM, SEE_OTHER, Form, OwnForm, Visitor, VisitorOf, page_router
from app.domain.access import Scope
from app.store.session import Database
from app.store.tenancy.keys import list_keys
from bitwright.tenancy import KeyRequest, NewKeyView, RotationRequest

router = page_router()


@router.get("/keys")
def show_keys(request: Request, found: VisitorOf, database: DatabaseOf) -> Response:
    """The keys of the visitor's tenant, of which only the first characters are known."""
    found.demand(Scope.ADMIN)
    return _page(request, found, database)


@router.post("/keys", openapi_extra=FORM)
def make_key(request: Request, form: OwnForm, found: VisitorOf, database: DatabaseOf) -> Response:
    """A new key of the visitor's tenant."""
    found.demand(Scope.ADMIN)
    try:
        asked = KeyRequest.model_validate(_fields(form))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{'.'.join(map(str, first['loc'][:1]))}: {first['msg']}"
        return _page(request, found, database, status=422, problem=problem, given=form)
    made = create_key(found.principal.tenant_id, asked, found.principal, database)
    return _page(request, found, database, status=201, made=made)


@router.post("/keys/{key_id}/rotate", openapi_extra=FORM)
def replace_key(
    request: Request, key_id: str, _form: OwnForm, found: VisitorOf, database: DatabaseOf, known: KeysOf
) -> Response:
    """A new key in place of one, which is valid for a day more."""
    found.demand(Scope.ADMIN)
    made = rotate_key(found.principal.tenant_id, key_id, RotationRequest(), found.principal, database, known)
    return _page(request, found, database, status=201, made=made)


@router.post("/keys/{key_id}/revoke", openapi_extra=FORM)
def end_key(
    request: Request, key_id: str, _form: OwnForm, found: VisitorOf, database: DatabaseOf, known: KeysOf
) -> Response:
    """End a key's life, and back to the list; with the session's own key the session ends."""
    found.demand(Scope.ADMIN)
    revoke_key(found.principal.tenant_id, key_id, found.principal, database, known)
    return RedirectResponse(f"{root_of(request)}/keys", SEE_OTHER)


def _fields(form: Form) -> dict[str, object]:
    """A form's fields as the API takes them; a number of days that is none is left to its validation."""
    days = next(iter(form.get("expires_in_days", ())), "").strip()
    asked: dict[str, object] = {
        "name": next(iter(form.get("name", ())), "").strip(),
        "scopes": list(form.get("scopes", ())),
    }
    return asked | ({"expires_in_days": days} if days else {})


def _page(
    request: Request,
    found: Visitor,
    database: Database,
    *,
    status: int = 200,
    made: NewKeyView | None = None,
    problem: str | None = None,
    given: Form | None = None,
) -> Response:
    """The keys, with the one that was just made, or what was wrong with the form."""
    with database.reading() as session:
        keys = list_keys(session, found.principal.tenant_id)
    values = {name: " ".join(texts) for name, texts in (given or {}).items()}
    return page(
        request,
        "keys",
        status=status,
        headers={"Cache-Control": "no-store"},
        visitor=found,
        keys=keys,
        made=made,
        problem=problem,
        given=values,
        scopes=[scope.value for scope in Scope],
        replaced={key.replaces for key in keys if key.replaces is not None},
    )
