"""The audit log: rows that are only ever added, and thrown away when they are old."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, insert, select
from sqlalchemy.orm import Session

from app.store.clock import seconds_from_now
from app.store.ids import is_id, new_id
from app.store.jobs import Page
from app.store.models import AuditEntry, table_of
from bitwright.errors import InvalidRequest

REMOVED_AT_ONCE = 5000
"""Rows of one round of retention: it holds no lock for long."""


@dataclass(frozen=True)
class Actor:
    """Whoever does something: a tenant's key in a request, or without a key the operator's command line."""

    tenant_id: str
    key_id: str | None = None
    request_id: str | None = None


def record(
    session: Session, actor: Actor, action: str, subject: str, details: Mapping[str, object] | None = None
) -> None:
    """Add an entry, in the transaction of what it tells of: both are there, or neither is."""
    session.execute(insert(table_of(AuditEntry)), entry_of(actor, action, subject, details))


def entry_of(actor: Actor, action: str, subject: str, details: Mapping[str, object] | None = None) -> dict[str, object]:
    """The row of an entry, for whoever stores it together with what it tells of."""
    return {
        "id": new_id("aud"),
        "tenant_id": actor.tenant_id,
        "key_id": actor.key_id,
        "action": action,
        "subject": subject[:64],
        "request_id": None if actor.request_id is None else actor.request_id[:64],
        "details": dict(details) if details else None,
    }


def audit_page(
    session: Session,
    *,
    after: str | None,
    limit: int,
    tenant_id: str | None = None,
    action: str | None = None,
    subject: str | None = None,
) -> Page[AuditEntry]:
    """Up to `limit` entries, newest first, that match every filter given.

    Raises:
        InvalidRequest: `after` is no cursor.
    """
    if after is not None and not is_id("aud", after):
        detail, hint = "the cursor is not one that a page gave", "start without one"
        raise InvalidRequest(detail, field="after", value=after, hint=hint)
    where: list[ColumnElement[bool]] = []
    where += [AuditEntry.id < after] if after is not None else []
    for column, value in (
        (AuditEntry.tenant_id, tenant_id),
        (AuditEntry.action, action),
        (AuditEntry.subject, subject),
    ):
        if value is not None and "\0" in value:
            return Page(items=[], next_cursor=None)
        where += [column == value] if value is not None else []
    rows = session.scalars(select(AuditEntry).where(*where).order_by(AuditEntry.id.desc()).limit(limit + 1)).all()
    items = rows[:limit]
    return Page(items=items, next_cursor=items[-1].id if len(rows) > limit else None)


def remove_old_entries(session: Session, *, older_than_seconds: float) -> int:
    """Remove up to `REMOVED_AT_ONCE` entries that are so old; how many there were."""
    old = select(AuditEntry.id).where(AuditEntry.at <= seconds_from_now(-older_than_seconds))
    some = session.scalars(old.order_by(AuditEntry.at).limit(REMOVED_AT_ONCE)).all()
    for start in range(0, len(some), 500):
        session.execute(delete(AuditEntry).where(AuditEntry.id.in_(some[start : start + 500])))
    return len(some)
