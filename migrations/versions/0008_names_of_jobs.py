"""Jobs may have names, by which clients of a Hub read them."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Apply. A process of the release before goes on: it refuses `name`, and deletes names with their jobs."""
    op.create_table(
        "job_name",
        sa.Column("tenant_id", sa.String(length=30), nullable=False),
        sa.Column("name", sa.String(length=96), nullable=False),
        sa.Column("job_id", sa.String(length=30), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_name_job_id_job"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name=op.f("fk_job_name_tenant_id_tenant"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant_id", "name", name=op.f("pk_job_name")),
    )
    op.create_index(op.f("ix_job_name_job_id"), "job_name", ["job_id"], unique=True)


def downgrade() -> None:
    """Undo: jobs keep their names in their requests, and are read by their ids."""
    op.drop_table("job_name")
