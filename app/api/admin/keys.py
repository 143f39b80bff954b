"""Keys of a tenant: made, listed, rotated, revoked."""

from fastapi import APIRouter

from app.api.auth import Administrator
from app.api.deps import DatabaseOf, KeysOf
from app.api.http.documentation import problems
from app.api.tenancy.admission import actor
from app.domain.access import Scope
from app.store.models import ApiKey
from app.store.tenancy import keys
from app.store.tenancy.audit import record
from app.store.tenancy.tenants import get_tenant
from bitwright.tenancy import KeyRequest, KeyView, NewKeyView, RotationRequest
from bitwright.views import Page

router = APIRouter(tags=["admin"])
KEYS = "/v1/admin/tenants/{tenant_id}/keys"
DAY = 86_400.0


@router.post(KEYS, summary="Make a key", operation_id="create_key", status_code=201, responses=problems("not_found"))
def create_key(tenant_id: str, body: KeyRequest, principal: Administrator, database: DatabaseOf) -> NewKeyView:
    """Make a key of a tenant. Its text is in this answer alone."""
    seconds = None if body.expires_in_days is None else body.expires_in_days * DAY
    with database.transaction() as session:
        get_tenant(session, tenant_id)
        scopes = frozenset(map(Scope, body.scopes))
        key, text = keys.issue_key(session, tenant_id, name=body.name, scopes=scopes, expires_in_seconds=seconds)
        record(session, actor(principal), "key.created", key.id, {"tenant": tenant_id, "scopes": " ".join(key.scopes)})
        return NewKeyView(**_fields(key), key=text)


@router.get(KEYS, summary="List a tenant's keys", operation_id="list_keys", responses=problems("not_found"))
def list_keys(tenant_id: str, principal: Administrator, database: DatabaseOf) -> Page[KeyView]:  # noqa: ARG001
    """All keys of a tenant, revoked and expired ones too, oldest first, with their last uses."""
    with database.reading() as session:
        get_tenant(session, tenant_id)
        return Page(items=[KeyView(**_fields(key)) for key in keys.list_keys(session, tenant_id)])


@router.delete(
    KEYS + "/{key_id}",
    summary="Revoke a key",
    operation_id="revoke_key",
    status_code=204,
    responses=problems("not_found"),
)
def revoke_key(tenant_id: str, key_id: str, principal: Administrator, database: DatabaseOf, known: KeysOf) -> None:
    """End a key's life at once, and its event streams within seconds. May be repeated."""
    with known.changing(database) as session:
        get_tenant(session, tenant_id)
        keys.revoke_key(session, tenant_id, key_id)
        record(session, actor(principal), "key.revoked", key_id, {"tenant": tenant_id})


@router.post(
    KEYS + "/{key_id}/rotate",
    summary="Rotate a key",
    operation_id="rotate_key",
    status_code=201,
    responses=problems("not_found", "conflict"),
)
def rotate_key(
    tenant_id: str, key_id: str, body: RotationRequest, principal: Administrator, database: DatabaseOf, known: KeysOf
) -> NewKeyView:
    """A new key in place of one, which is valid until the overlap ends, so that programs can change over one by one."""
    with known.changing(database) as session:
        get_tenant(session, tenant_id)
        key, text = keys.rotate_key(session, tenant_id, key_id, overlap_seconds=body.overlap_seconds)
        record(session, actor(principal), "key.rotated", key_id, {"tenant": tenant_id, "new_key": key.id})
        return NewKeyView(**_fields(key), key=text)


def _fields(key: ApiKey) -> dict[str, object]:
    names = set(KeyView.model_fields)
    return {name: getattr(key, name) for name in names}
