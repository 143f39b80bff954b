"""Tenants with quotas, keys that expire, Hub tokens, use by month, and an audit log that only grows."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TIME, JSON, ID = sa.DateTime(timezone=True), sa.JSON(), sa.String(length=30)
COLUMNS: tuple[tuple[str, str, sa.types.TypeEngine[Any]], ...] = (
    *(("tenant", name, TIME) for name in ("suspended_at", "served_at")),
    *(("tenant", name, JSON) for name in ("quotas", "model_roots", "allowed_models")),
    *(("api_key", name, TIME) for name in ("expires_at", "last_used_at")),
    ("api_key", "replaces", ID),
    ("attempt", "device_class", sa.String(length=8)),
    ("attempt", "devices", sa.Integer()),
    ("attempt", "price_micros", sa.BigInteger()),
)
TABLES = ("audit", "hub_token", "rate_window", "usage_month")
SIZES = ("artifact", "upload_file")
REFUSAL = "the audit log is append-only"


def upgrade() -> None:
    """Apply. A process of the release before goes on: no column that it does not write must have a value."""
    for table, name, kind in COLUMNS:
        op.add_column(table, sa.Column(name, kind, nullable=True))
    for table in SIZES:
        op.create_index(f"ix_{table}_tenant_id_size", table, ["tenant_id", "size"])
    op.create_table(
        "audit",
        sa.Column("id", ID, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("key_id", ID, nullable=True),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=True),
        sa.Column("details", JSON, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_at", "audit", ["at"])
    op.create_index("ix_audit_tenant_id_id", "audit", ["tenant_id", "id"])
    op.create_table(
        "hub_token",
        sa.Column("owner", ID, nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=True),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        _tenant_key("hub_token"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_hub_token_job_id_job", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("owner", name="pk_hub_token"),
    )
    op.create_index("ix_hub_token_tenant_id", "hub_token", ["tenant_id"])
    op.create_index("ix_hub_token_job_id", "hub_token", ["job_id"])
    op.create_table(
        "rate_window",
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("used", sa.Integer(), nullable=False),
        sa.Column("ends_at", TIME, nullable=False),
        _tenant_key("rate_window"),
        sa.PrimaryKeyConstraint("tenant_id", "name", name="pk_rate_window"),
    )
    op.create_table(
        "usage_month",
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("month", sa.String(length=7), nullable=False),
        sa.Column("jobs", sa.Integer(), nullable=False),
        sa.Column("gpu_seconds", sa.Double(), nullable=False),
        sa.Column("cpu_seconds", sa.Double(), nullable=False),
        sa.Column("uploaded_bytes", sa.BigInteger(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("downloaded_bytes", sa.BigInteger(), nullable=False),
        sa.Column("cost_micros", sa.BigInteger(), nullable=True),
        _tenant_key("usage_month"),
        sa.PrimaryKeyConstraint("tenant_id", "month", name="pk_usage_month"),
    )
    _refuse_changes_of_the_audit_log()


def downgrade() -> None:
    """Undo: quotas, Hub tokens, use and the audit log are lost."""
    for table in TABLES:
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_change_of_audit()")
    for table in SIZES:
        op.drop_index(f"ix_{table}_tenant_id_size", table)
    for table, name, _ in COLUMNS:
        op.drop_column(table, name)


def _tenant_key(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["tenant_id"], ["tenant.id"], name=f"fk_{table}_tenant_id_tenant", ondelete="CASCADE"
    )


def _refuse_changes_of_the_audit_log() -> None:
    """A trigger against UPDATE; DELETE is what retention does."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_change_of_audit() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{REFUSAL}' USING ERRCODE = 'integrity_constraint_violation'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_append_only BEFORE UPDATE ON audit "
            "FOR EACH ROW EXECUTE FUNCTION refuse_change_of_audit()"
        )
    else:
        op.execute(
            f"CREATE TRIGGER audit_append_only BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END"
        )
