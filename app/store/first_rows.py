"""The rows that a new job begins with, stored in one statement where the database can: PostgreSQL.

A round trip and the making of a statement each cost more than the row that it stores; with five of them a submission
would spend most of its time on them. The statements here are made once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Executable,
    Insert,
    String,
    Table,
    bindparam,
    exists,
    func,
    insert,
    select,
)
from sqlalchemy.orm import Session

from app.store.models import AuditEntry, Event, Job, JobLabel, table_of
from app.store.webhooks.tables import WebhookEndpoint

Row = Mapping[str, Any]
JOBS, EVENTS, LABELS, ENTRIES = (table_of(kind) for kind in (Job, Event, JobLabel, AuditEntry))
DEFAULTS: Mapping[str, Any] = {
    column.key: column.default.arg  # type: ignore[attr-defined]
    for column in JOBS.columns
    if column.default is not None and column.default.is_scalar
}
"""Values of a new job's columns of which nobody says anything else. Times are not among them."""
JOB_COLUMNS = (
    "id",
    "tenant_id",
    "status",
    "request",
    "method",
    "recipe",
    "model",
    "device",
    "priority",
    "traceparent",
    *DEFAULTS,
)
EVENT_COLUMNS = ("job_id", "sequence", "tenant_id", "attempt", "data")
LABEL_COLUMNS = ("job_id", "tenant_id", "name", "value")
ENTRY_COLUMNS = ("id", "tenant_id", "key_id", "action", "subject", "request_id", "details")


@dataclass(frozen=True)
class FirstRows:
    """Rows by their columns' names, without times: those are the database's.

    entry   of the audit log; None: nobody has asked for the job
    """

    job: Row
    event: Row
    labels: Sequence[Row] = field(default=())
    entry: Row | None = None


@dataclass(frozen=True)
class Stored:
    """Time of the rows, and whether the job's tenant has webhooks that are on."""

    at: datetime
    has_webhooks: bool


def store_first_rows(session: Session, rows: FirstRows) -> Stored:
    """Store the rows, and look for webhooks, within the session's transaction."""
    if session.get_bind().dialect.name == "postgresql":
        return Stored(*session.execute(_together(rows.entry is not None), _parameters(rows)).one())
    at = session.execute(_job_insert(), _named("new_job", rows.job)).scalar_one()
    session.execute(insert(EVENTS), dict(rows.event))
    if rows.labels:
        session.execute(insert(LABELS), [dict(label) for label in rows.labels])
    if rows.entry is not None:
        session.execute(insert(ENTRIES), dict(rows.entry))
    return Stored(
        at, bool(session.execute(select(_has_webhooks()), {"new_job_tenant_id": rows.job["tenant_id"]}).scalar())
    )


@lru_cache(maxsize=1)
def _job_insert() -> Any:
    """Its time is told by the database, once: all of its columns that have one have the same."""
    return _of_columns("new_job", JOBS, JOB_COLUMNS).returning(JOBS.c.created_at)


@lru_cache(maxsize=2)
def _together(with_entry: bool) -> Executable:
    job = _job_insert().cte("job_stored")
    others: list[CTE] = [
        _of_columns("new_event", EVENTS, EVENT_COLUMNS).cte("event_stored"),
        insert(LABELS).from_select(LABEL_COLUMNS, select(*map(_unnested, LABEL_COLUMNS))).cte("labels_stored"),
    ]
    if with_entry:
        others.append(_of_columns("new_entry", ENTRIES, ENTRY_COLUMNS).cte("entry_stored"))
    return select(job.c.created_at, _has_webhooks()).add_cte(*others)


def _of_columns(prefix: str, table: Table, columns: Sequence[str]) -> Insert:
    """An INSERT of one row, whose values are parameters with a prefix: two tables have columns of one name."""
    return insert(table).values({name: bindparam(f"{prefix}_{name}", type_=table.c[name].type) for name in columns})


def _unnested(name: str) -> ColumnElement[Any]:
    """A column of all labels, given as one array: any number of them, none too, is one statement."""
    return func.unnest(bindparam(f"new_labels_{name}", type_=ARRAY(String)))


def _has_webhooks() -> ColumnElement[bool]:
    mine = WebhookEndpoint.tenant_id == bindparam("new_job_tenant_id", type_=String)
    return exists().where(mine, WebhookEndpoint.disabled_at.is_(None))


def _parameters(rows: FirstRows) -> dict[str, Any]:
    labels = {f"new_labels_{name}": [label[name] for label in rows.labels] for name in LABEL_COLUMNS}
    return (
        _named("new_job", rows.job) | _named("new_event", rows.event) | labels | _named("new_entry", rows.entry or {})
    )


def _named(prefix: str, row: Row) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in row.items()}
