"""The engine, the one place that commits, and the migrations."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import Session, sessionmaker

from bitwright.errors import Unavailable

BUSY_SECONDS = 30
"""Time that a write waits for another one on SQLite before it fails."""
READING = "bitwright_reading"
SCHEMA_LOCK = 0x6269_7477  # "bitw"
TO_JSON = partial(json.dumps, allow_nan=False, separators=(",", ":"))


class Database:
    """One a process: connections to the database at `url` (SQLAlchemy's form, SQLite or PostgreSQL)."""

    def __init__(self, url: str) -> None:
        self.engine = _create_engine(url)
        reader = self.engine.execution_options(**{READING: True})
        if self.engine.dialect.name == "postgresql":
            reader = reader.execution_options(postgresql_readonly=True)
        self._write = sessionmaker(self.engine, expire_on_commit=False)
        self._read = sessionmaker(reader, expire_on_commit=False, autoflush=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session whose work is committed at the end, or rolled back if the body raises.

        Raises:
            Unavailable: the database cannot be reached, or a lock was not to be had in time.
        """
        with _translated(), self._write() as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that may only read and waits for no writer.

        Raises:
            Unavailable: the database cannot be reached.
        """
        with _translated(), self._read() as session:
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def migrate(url: str) -> None:
    """Bring the database at `url` to the newest schema. Safe to run from many processes at once."""
    engine = _create_engine(url)
    try:
        with _translated(), engine.begin() as connection:
            lock_schema(connection)
            config = _alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def lock_schema(connection: Connection) -> None:
    """Let one transaction at a time migrate: SQLite's began with the write lock, PostgreSQL's takes one here.

    Alembic keeps its environment in module globals, so this also keeps threads of one process apart.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})


def schema_is_current(database: Database) -> bool:
    """True if the database has the schema that this code was written for."""
    with _translated(), database.engine.connect() as connection:
        present = MigrationContext.configure(connection).get_current_heads()
    return set(present) == set(ScriptDirectory.from_config(_alembic_config()).get_heads())


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("migrations")).replace("%", "%%"))
    return config


def _create_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.drivername in {"postgres", "postgresql"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {"json_serializer": TO_JSON, "pool_size": 5, "max_overflow": 35}
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS}, **options)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    return create_engine(parsed, connect_args={"connect_timeout": 10}, pool_pre_ping=True, **options)


def _prepare_sqlite(connection: Any, record: object) -> None:  # noqa: ARG001
    connection.isolation_level = None  # the driver must not begin transactions by itself: see _begin_sqlite
    for pragma in ("journal_mode = WAL", "foreign_keys = ON", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock at once: a transaction that first reads and then writes cannot wait for it, only fail."""
    reading = bool(connection.get_execution_options().get(READING))
    connection.exec_driver_sql(f"PRAGMA query_only = {int(reading)}")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextmanager
def _translated() -> Iterator[None]:
    """The driver's faults as `Unavailable`; what the driver says stays in the cause, out of the answer."""
    try:
        yield
    except (OperationalError, InterfaceError, TimeoutError) as error:
        raise Unavailable("the database is not available now; try again") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable("the connection to the database was lost; try again") from error
        raise
