"""Indexes of every filter of lists, of labels in the order of pages, and of what retention deletes."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# A model's path may be longer than an entry of a B-tree of PostgreSQL, so the index holds its start.
MODEL_START = "substr(model, 1, 256)"


def upgrade() -> None:
    """Apply. A process of the release before goes on: no column changes."""
    op.create_index("ix_job_status", "job", ["tenant_id", "status", "id"])
    op.create_index("ix_job_method", "job", ["tenant_id", "method", "status", "id"])
    op.create_index(
        "ix_job_recipe",
        "job",
        ["tenant_id", "recipe", "status", "id"],
        postgresql_where=sa.text("recipe IS NOT NULL"),
        sqlite_where=sa.text("recipe IS NOT NULL"),
    )
    op.create_index("ix_job_model", "job", ["tenant_id", sa.text(MODEL_START), "status", "id"])
    op.create_index(
        "ix_job_finished",
        "job",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
        sqlite_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index("ix_idempotency_key_expires_at", "idempotency_key", ["expires_at"])
    op.create_index("ix_job_label_value", "job_label", ["tenant_id", "name", "value", "job_id"])
    op.drop_index("ix_job_label_tenant_id_name_value", "job_label")


def downgrade() -> None:
    """Undo: lists by a filter read all jobs of the tenant again."""
    op.create_index("ix_job_label_tenant_id_name_value", "job_label", ["tenant_id", "name", "value"])
    op.drop_index("ix_job_label_value", "job_label")
    op.drop_index("ix_idempotency_key_expires_at", "idempotency_key")
    for name in ("ix_job_finished", "ix_job_model", "ix_job_recipe", "ix_job_method", "ix_job_status"):
        op.drop_index(name, "job")
