"""Tenants: made, changed, suspended, deleted, and their Hub tokens."""

from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from app.api.auth import Administrator
from app.api.deps import DatabaseOf, KeysOf, SettingsOf, VaultOf
from app.api.http.documentation import problems, text_header
from app.api.tenancy.admission import actor
from app.domain.inputs.roots import lies_under
from app.settings import Settings
from app.store.ids import id_pattern
from app.store.models import Tenant
from app.store.tenancy import tenants
from app.store.tenancy.audit import record
from app.store.tenancy.hub_tokens import checked_token, erase_token, keep_token
from app.store.tenancy.tenants import own_quotas, tenants_with_token
from bitwright.errors import FieldProblem, InvalidRequest
from bitwright.tenancy import HubTokenRequest, TenantChange, TenantRequest, TenantView
from bitwright.views import Page

router = APIRouter(tags=["admin"])
log = structlog.get_logger(__name__)


@router.post(
    "/v1/admin/tenants",
    summary="Make a tenant",
    operation_id="create_tenant",
    status_code=201,
    responses={
        201: {"description": "Made; it has no key yet.", "headers": {"Location": text_header("The tenant.")}},
        **problems("conflict"),
    },
)
def create_tenant(
    body: TenantRequest, response: Response, principal: Administrator, settings: SettingsOf, database: DatabaseOf
) -> TenantView:
    """Make a tenant with quotas, folders and models of its own, where it has any."""
    check_roots(body.model_roots, settings)
    with database.transaction() as session:
        tenant = tenants.create_tenant(session, body)
        record(session, actor(principal), "tenant.created", tenant.id, {"name": tenant.name})
        response.headers["Location"] = f"/v1/admin/tenants/{tenant.id}"
        return tenant_view(session, tenant)


@router.get("/v1/admin/tenants", summary="List tenants", operation_id="list_tenants", responses=problems())
def list_tenants(
    *,
    principal: Administrator,  # noqa: ARG001 (it must be one)
    database: DatabaseOf,
    after: Annotated[
        str | None,
        Query(description="`next_cursor` of the page before.", json_schema_extra={"pattern": id_pattern("tnt")}),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Tenants a page.")] = 50,
) -> Page[TenantView]:
    """Tenants, oldest first."""
    with database.reading() as session:
        page = tenants.tenants_page(session, after=after, limit=limit)
        with_token = tenants_with_token(session, [tenant.id for tenant in page.items])
        items = [_view(tenant, tenant.id in with_token) for tenant in page.items]
        return Page(items=items, next_cursor=page.next_cursor)


@router.get(
    "/v1/admin/tenants/{tenant_id}",
    summary="Get a tenant",
    operation_id="get_tenant",
    responses=problems("not_found"),
)
def get_tenant(tenant_id: str, principal: Administrator, database: DatabaseOf) -> TenantView:  # noqa: ARG001
    """A tenant with its own quotas; `GET /v1/admin/tenants/{tenant_id}/usage` shows those in force and what is used."""
    with database.reading() as session:
        return tenant_view(session, tenants.get_tenant(session, tenant_id))


@router.patch(
    "/v1/admin/tenants/{tenant_id}",
    summary="Change or suspend a tenant",
    operation_id="change_tenant",
    responses=problems("not_found"),
)
def change_tenant(
    tenant_id: str,
    body: TenantChange,
    principal: Administrator,
    settings: SettingsOf,
    database: DatabaseOf,
    known: KeysOf,
) -> TenantView:
    """Fields that the body leaves out stay. Of a suspended tenant keys are refused, streams end, queued jobs wait."""
    check_roots(body.model_roots, settings)
    with known.changing(database) as session:
        tenant = tenants.change_tenant(session, tenant_id, body)
        changed = dict.fromkeys(sorted(body.model_fields_set), True)
        record(session, actor(principal), "tenant.changed", tenant_id, {**changed, "suspended": body.suspended})
        return tenant_view(session, tenant)


@router.delete(
    "/v1/admin/tenants/{tenant_id}",
    summary="Delete a tenant",
    operation_id="delete_tenant",
    status_code=204,
    responses=problems("not_found", "conflict"),
)
def delete_tenant(tenant_id: str, principal: Administrator, database: DatabaseOf, known: KeysOf) -> None:
    """Remove a tenant that has no job and no upload, with its keys and its use. The audit log stays."""
    with known.changing(database) as session:
        tenants.delete_tenant(session, tenant_id)
        record(session, actor(principal), "tenant.deleted", tenant_id)
    log.info("tenant_deleted", deleted=tenant_id)


@router.put(
    "/v1/admin/tenants/{tenant_id}/hub-token",
    summary="Set a tenant's Hub token",
    operation_id="set_hub_token",
    status_code=204,
    responses=problems("not_found"),
)
def set_hub_token(
    *,
    tenant_id: str,
    body: HubTokenRequest,
    principal: Administrator,
    database: DatabaseOf,
    vault: VaultOf,
    known: KeysOf,
) -> None:
    """The token with which the tenant's models are fetched, in place of the service's. It is kept encrypted, and never
    shown.
    """
    token = checked_token(body.token, "token")
    with known.changing(database) as session:
        tenants.get_tenant(session, tenant_id)
        keep_token(session, vault, token, tenant_id=tenant_id, field="token")
        record(session, actor(principal), "hub_token.set", tenant_id)


@router.delete(
    "/v1/admin/tenants/{tenant_id}/hub-token",
    summary="Erase a tenant's Hub token",
    operation_id="erase_hub_token",
    status_code=204,
    responses=problems("not_found"),
)
def erase_hub_token(tenant_id: str, principal: Administrator, database: DatabaseOf, known: KeysOf) -> None:
    """From then on the tenant's models are fetched with the service's token. May be repeated."""
    with known.changing(database) as session:
        tenants.get_tenant(session, tenant_id)
        erase_token(session, tenant_id)
        record(session, actor(principal), "hub_token.erased", tenant_id)


def check_roots(roots: list[str] | None, settings: Settings) -> None:
    """Check that the folders of a tenant lie under the service's.

    Raises:
        InvalidRequest: names each that does not.
    """
    detail = "the folder lies under none of BITWRIGHT_MODEL_ROOTS; a tenant reads at most what the service reads"
    bad = tuple(
        FieldProblem(field=f"model_roots.{index}", code="invalid_value", detail=detail, value=root)
        for index, root in enumerate(roots or ())
        if "\0" in root or not root.startswith("/") or not lies_under(root, settings.model_roots)
    )
    if bad:
        raise InvalidRequest(f"{bad[0].field}: {detail}", field=bad[0].field, value=bad[0].value, errors=bad)


def tenant_view(session: Session, tenant: Tenant) -> TenantView:
    """A tenant as an operator sees it."""
    return _view(tenant, bool(tenants_with_token(session, [tenant.id])))


def _view(tenant: Tenant, has_hub_token: bool) -> TenantView:
    return TenantView(
        id=tenant.id,
        name=tenant.name,
        created_at=tenant.created_at,
        suspended_at=tenant.suspended_at,
        quotas=own_quotas(tenant.quotas),
        model_roots=tenant.model_roots,
        allowed_models=tenant.allowed_models,
        has_hub_token=has_hub_token,
    )
