"""INSERT ... ON CONFLICT, which both databases have under one syntax and SQLAlchemy under two names."""

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.store.models import Base


def upsert(session: Session, table: type[Base]) -> "postgresql.Insert | sqlite.Insert":
    """An INSERT into `table` that has the `on_conflict_...` methods, for the session's database."""
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)
