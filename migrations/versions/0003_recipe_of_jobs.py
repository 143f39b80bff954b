"""A job keeps the recipe that was asked for: lists show it and filter by it."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Apply. A process of the release before goes on: it neither reads nor writes the column."""
    op.add_column("job", sa.Column("recipe", sa.String(length=64), nullable=True))


def downgrade() -> None:
    """Undo: lists show the methods alone. In place: SQLite would build the table anew, and lose what refers to it."""
    op.drop_column("job", "recipe")
