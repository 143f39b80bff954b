"""A job can be held by its owner."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Apply. A process of the release before goes on: its jobs are not held; it takes those that are."""
    op.add_column("job", sa.Column("held", sa.Boolean(), server_default=sa.false(), nullable=False))


def downgrade() -> None:
    """Undo: what was held is an ordinary queued job. In place: SQLite would build the table anew."""
    op.drop_column("job", "held")
