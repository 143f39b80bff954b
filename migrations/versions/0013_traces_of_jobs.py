"""A job's place in the trace of the request that made it."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0013"
down_revision: str | None = "0012"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Apply. A process of the release before goes on: jobs that it makes or runs are not traced."""
    op.add_column("job", sa.Column("traceparent", sa.String(length=55), nullable=True))


def downgrade() -> None:
    """Undo: the jobs' spans are no longer of their requests' traces. In place: SQLite would build the table anew."""
    op.drop_column("job", "traceparent")
