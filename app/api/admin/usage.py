"""Use: of the caller's own tenant, and for operators of any."""

from fastapi import APIRouter
from sqlalchemy.orm import Session

from app.api.auth import Administrator, Reader
from app.api.deps import DatabaseOf, SettingsOf
from app.api.http.documentation import problems
from app.settings import Settings
from app.store.tenancy.quotas import used_by
from app.store.tenancy.tenants import get_tenant, own_quotas
from app.store.tenancy.usage import months_of
from bitwright.tenancy import UsageView

router = APIRouter()


@router.get(
    "/v1/usage",
    tags=["catalogue"],
    summary="Your quotas and use",
    operation_id="get_usage",
    responses=problems("not_found"),
)
def get_usage(principal: Reader, settings: SettingsOf, database: DatabaseOf) -> UsageView:
    """Quotas of your tenant, what is used of them now, and what it used month by month."""
    with database.reading() as session:
        return usage_view(session, principal.tenant_id, settings)


@router.get(
    "/v1/admin/tenants/{tenant_id}/usage",
    tags=["admin"],
    summary="A tenant's quotas and use",
    operation_id="get_tenant_usage",
    responses=problems("not_found"),
)
def get_tenant_usage(
    tenant_id: str,
    principal: Administrator,  # noqa: ARG001 (it must be one)
    settings: SettingsOf,
    database: DatabaseOf,
) -> UsageView:
    """The same of any tenant."""
    with database.reading() as session:
        return usage_view(session, tenant_id, settings)


def usage_view(session: Session, tenant_id: str, settings: Settings) -> UsageView:
    """Quotas and use of a tenant.

    Raises:
        NotFound: there is no such tenant.
    """
    tenant = get_tenant(session, tenant_id)
    return UsageView(
        tenant_id=tenant.id,
        tenant=tenant.name,
        quotas=own_quotas(tenant.quotas).over(settings.tenant_quotas),
        used=used_by(session, tenant_id),
        months=list(months_of(session, tenant_id, settings.price_currency)),
    )
