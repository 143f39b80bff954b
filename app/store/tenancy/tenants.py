"""Tenants: made, found, changed, suspended, deleted; and what each may do."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.store.clock import now
from app.store.ids import is_id, new_id, require_id
from app.store.jobs import Page
from app.store.models import HubToken, Job, Tenant, Upload
from bitwright.errors import Conflict, InvalidRequest, NotFound
from bitwright.tenancy import Quotas, TenantChange, TenantRequest


@dataclass(frozen=True)
class Policy:
    """Rights of a tenant.

    quotas           in force
    model_roots      folders that it may read; None: all that the service reads
    allowed_models   patterns of models; None: all
    own_token        whether a Hub token of its own fetches for it
    """

    quotas: Quotas
    model_roots: tuple[str, ...] | None = None
    allowed_models: tuple[str, ...] | None = None
    own_token: bool = False


def policy_of(session: Session, tenant_id: str, defaults: Quotas) -> Policy:
    """The policy of a tenant; `defaults` are the service's quotas."""
    own_token = exists().where(HubToken.owner == tenant_id).label("own_token")
    query = select(Tenant.quotas, Tenant.model_roots, Tenant.allowed_models, own_token).where(Tenant.id == tenant_id)
    row = session.execute(query).one_or_none()
    if row is None:
        return Policy(defaults)
    return Policy(
        quotas=own_quotas(row.quotas).over(defaults),
        model_roots=None if row.model_roots is None else tuple(row.model_roots),
        allowed_models=None if row.allowed_models is None else tuple(row.allowed_models),
        own_token=row.own_token,
    )


def tenant_name(session: Session, tenant_id: str) -> str:
    """The name of a tenant that is there."""
    return session.scalars(select(Tenant.name).where(Tenant.id == tenant_id)).one()


def own_quotas(stored: Mapping[str, object] | None) -> Quotas:
    """A tenant's own quotas; names that a later release has stored are left out."""
    known = {name: value for name, value in (stored or {}).items() if name in Quotas.model_fields}
    return Quotas.model_validate(known)


def create_tenant(session: Session, asked: TenantRequest) -> Tenant:
    """A new tenant.

    Raises:
        Conflict: there is one of this name.
    """
    tenant = Tenant(
        id=new_id("tnt"),
        name=asked.name,
        quotas=asked.quotas.model_dump(exclude_none=True),
        model_roots=asked.model_roots,
        allowed_models=asked.allowed_models,
    )
    try:
        with session.begin_nested():
            session.add(tenant)
            session.flush()
    except IntegrityError as error:
        detail = f"there is a tenant named {asked.name} already"
        raise Conflict(
            detail, field="name", value=asked.name, hint="change that one, or choose another name"
        ) from error
    return get_tenant(session, tenant.id)


def get_tenant(session: Session, tenant_id: str) -> Tenant:
    """The tenant of this id.

    Raises:
        NotFound: there is none.
    """
    require_id("tnt", tenant_id, "tenant")
    query = select(Tenant).where(Tenant.id == tenant_id).execution_options(populate_existing=True)
    tenant = session.scalars(query).one_or_none()
    if tenant is None:
        raise NotFound(f"there is no tenant {tenant_id}", value=tenant_id)
    return tenant


def tenants_page(session: Session, *, after: str | None, limit: int) -> Page[Tenant]:
    """Up to `limit` tenants, oldest first.

    Raises:
        InvalidRequest: `after` is no cursor.
    """
    if after is not None and not is_id("tnt", after):
        detail, hint = "the cursor is not one that a page gave", "start without one"
        raise InvalidRequest(detail, field="after", value=after, hint=hint)
    where = [Tenant.id > after] if after is not None else []
    rows = session.scalars(select(Tenant).where(*where).order_by(Tenant.id).limit(limit + 1)).all()
    items = rows[:limit]
    return Page(items=items, next_cursor=items[-1].id if len(rows) > limit else None)


def change_tenant(session: Session, tenant_id: str, change: TenantChange) -> Tenant:
    """Set what the change gives; what it leaves out stays.

    Raises:
        NotFound: there is no such tenant.
    """
    tenant = get_tenant(session, tenant_id)
    given = change.model_fields_set
    values: dict[str, object] = {name: getattr(change, name) for name in ("model_roots", "allowed_models")}
    values = {name: value for name, value in values.items() if name in given}
    if change.quotas is not None:
        named = {name: getattr(change.quotas, name) for name in change.quotas.model_fields_set}
        merged = {**(tenant.quotas or {}), **named}
        values["quotas"] = {name: value for name, value in merged.items() if value is not None}
    if change.suspended is not None:
        values["suspended_at"] = func.coalesce(Tenant.suspended_at, now()) if change.suspended else None
    if values:
        session.execute(update(Tenant).where(Tenant.id == tenant_id).values(values))
    return get_tenant(session, tenant_id)


def delete_tenant(session: Session, tenant_id: str) -> None:
    """Remove a tenant that has no job and no upload, with its keys, tokens and use; the audit log keeps its entries.

    Raises:
        NotFound: there is no such tenant.
        Conflict: it has a job or an upload.
    """
    get_tenant(session, tenant_id)
    for table, what in ((Job, "jobs"), (Upload, "uploads")):
        if session.scalar(select(exists().where(table.tenant_id == tenant_id))):
            hint = f"suspend it, or delete its {what} first"
            raise Conflict(f"tenant {tenant_id} still has {what}", value=tenant_id, hint=hint)
    session.execute(delete(Tenant).where(Tenant.id == tenant_id))


def tenants_with_token(session: Session, tenant_ids: list[str]) -> set[str]:
    """Those of the tenants that have a Hub token of their own."""
    return set(session.scalars(select(HubToken.owner).where(HubToken.owner.in_(tenant_ids))))
