"""An Idempotency-Key may stand for an upload."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLE = "idempotency_key"
ID = sa.String(length=30)
REFERENCE = "fk_idempotency_key_upload_id_upload"
ONE = "ck_idempotency_key_stands_for_one"


def upgrade() -> None:
    """Apply. A process of the release before goes on: it writes and reads keys of jobs alone."""
    with op.batch_alter_table(TABLE) as table:
        table.alter_column("job_id", existing_type=ID, nullable=True)
        table.add_column(sa.Column("upload_id", ID, nullable=True))
        table.create_foreign_key(
            REFERENCE, "upload", ["upload_id"], ["id"], ondelete="CASCADE", deferrable=True, initially="DEFERRED"
        )
        table.create_check_constraint(op.f(ONE), "(job_id IS NULL) != (upload_id IS NULL)")
        table.create_index("ix_idempotency_key_upload_id", ["upload_id"])


def downgrade() -> None:
    """Undo: keys of uploads are lost."""
    op.execute("DELETE FROM idempotency_key WHERE job_id IS NULL")
    with op.batch_alter_table(TABLE) as table:
        table.drop_index("ix_idempotency_key_upload_id")
        table.drop_constraint(op.f(ONE), type_="check")
        table.drop_constraint(REFERENCE, type_="foreignkey")
        table.drop_column("upload_id")
        table.alter_column("job_id", existing_type=ID, nullable=False)
