"""Alembic's entry: a connection given by `migrate`, or one to BITWRIGHT_DATABASE_URL (`-x url=...`) for people."""

import os
import warnings

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.exc import SAWarning

from app.store.models import Base
from app.store.session import Database, lock_schema
from app.store.webhooks import tables as _webhooks  # noqa: F401 (its tables are among the metadata)


def run(connection: Connection) -> None:
    """Migrate within the connection's transaction: all of it or nothing, on SQLite too."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transactional_ddl=True,
        render_as_batch=True,
        compare_type=True,
    )
    with warnings.catch_warnings(), context.begin_transaction():
        # Of SQLite an index over an expression cannot be read back; a comparison on PostgreSQL sees them all.
        warnings.filterwarnings("ignore", "Skipped unsupported reflection of expression-based index", SAWarning)
        warnings.filterwarnings("ignore", "autogenerate skipping .*ix_job_model", UserWarning)
        context.run_migrations()


def url() -> str:
    """The database that a person means."""
    given = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get("BITWRIGHT_DATABASE_URL")
    if not given:
        raise SystemExit("set BITWRIGHT_DATABASE_URL, or pass -x url=sqlite:///file.db")
    return given


if context.is_offline_mode():
    context.configure(url=url(), target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif "connection" in context.config.attributes:
    run(context.config.attributes["connection"])
else:
    database = Database(url())
    with database.engine.begin() as own:
        lock_schema(own)
        run(own)
    database.close()
