"""Files of what an unfinished job has finished so far, for another machine to go on from."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0012"
down_revision: str | None = "0011"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Apply. A worker of the release before goes on: it keeps nothing, and a job that it ends takes its rows along."""
    op.create_table(
        "kept_file",
        sa.Column("job_id", sa.String(length=30), nullable=False),
        sa.Column("path", sa.String(length=512), nullable=False),
        sa.Column("tenant_id", sa.String(length=30), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("kept_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_kept_file_job_id_job"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name=op.f("fk_kept_file_tenant_id_tenant"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "path", name=op.f("pk_kept_file")),
    )
    op.create_index(op.f("ix_kept_file_sha256"), "kept_file", ["sha256"])
    op.create_index(op.f("ix_kept_file_tenant_id"), "kept_file", ["tenant_id"])


def downgrade() -> None:
    """Undo: a job that moves to another machine begins anew."""
    op.drop_table("kept_file")
