"""Jobs keep what was asked for them through OpenAI's interface."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Apply. A process of the release before goes on: it does not know the table."""
    op.create_table(
        "fine_tuning_job",
        sa.Column("job_id", sa.String(length=30), nullable=False),
        sa.Column("tenant_id", sa.String(length=30), nullable=False),
        sa.Column("asked", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_fine_tuning_job_job_id_job"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name=op.f("fk_fine_tuning_job_tenant_id_tenant"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_fine_tuning_job")),
    )
    op.create_index("ix_fine_tuning_job_tenant_id_job_id", "fine_tuning_job", ["tenant_id", "job_id"])


def downgrade() -> None:
    """Undo: the jobs stay, and OpenAI's interface does not show them."""
    op.drop_table("fine_tuning_job")
