"""GET /v1/admin/audit."""

from typing import Annotated

from fastapi import APIRouter, Query

from app.api.auth import Administrator
from app.api.deps import DatabaseOf
from app.api.http.documentation import problems
from app.store.ids import id_pattern
from app.store.tenancy.audit import audit_page
from bitwright.tenancy import AuditView
from bitwright.views import Page

router = APIRouter(tags=["admin"])


@router.get("/v1/admin/audit", summary="Read the audit log", operation_id="list_audit", responses=problems())
def list_audit(
    *,
    principal: Administrator,  # noqa: ARG001 (it must be one)
    database: DatabaseOf,
    after: Annotated[
        str | None,
        Query(description="`next_cursor` of the page before.", json_schema_extra={"pattern": id_pattern("aud")}),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Entries a page.")] = 50,
    tenant_id: Annotated[str | None, Query(max_length=64, description="Only what this tenant's keys did.")] = None,
    action: Annotated[str | None, Query(max_length=64, description="Only this action.")] = None,
    subject: Annotated[str | None, Query(max_length=64, description="Only what was done to this id.")] = None,
) -> Page[AuditView]:
    """Entries of who did what, newest first. Never changed; `BITWRIGHT_AUDIT_RETENTION_DAYS` says when they go."""
    with database.reading() as session:
        page = audit_page(session, after=after, limit=limit, tenant_id=tenant_id, action=action, subject=subject)
        items = [
            AuditView(
                id=entry.id,
                at=entry.at,
                tenant_id=entry.tenant_id,
                key_id=entry.key_id,
                action=entry.action,
                subject=entry.subject,
                request_id=entry.request_id,
                details=entry.details or {},
            )
            for entry in page.items
        ]
        return Page(items=items, next_cursor=page.next_cursor)
