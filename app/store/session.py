"""The engine, the one place that commits, and the migrations."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from math import inf
from time import monotonic
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError, TimeoutError
from sqlalchemy.orm import Session, sessionmaker

from bitwright.errors import Conflict, Unavailable

BUSY_SECONDS = 30.0
"""Time that a write waits for another one on SQLite before it fails."""
STEPS_BETWEEN_LOOKS = 20_000
"""Instructions of SQLite's machine, some milliseconds, after which a statement's time is looked at."""
READING = "bitwright_reading"
STATEMENT_ENDS = "bitwright_statement_ends"
QUERY_CANCELED = "57014"
INTERRUPTED = "SQLITE_INTERRUPT"
SCHEMA_LOCK = 0x6269_7477  # "bitw"
TO_JSON = partial(json.dumps, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Bounds:
    """Limits on what a process asks of the database. Seconds; None: no limit.

    busy        a write waits so long for another one
    statement   one statement may take so long; what its caller waits for is then `Unavailable`
    idle        a transaction in which nothing happens is ended (PostgreSQL alone)
    kept        connections that are kept open
    """

    busy: float = BUSY_SECONDS
    statement: float | None = None
    idle: float | None = None
    kept: int = 5


UNBOUNDED = Bounds()
REQUESTS = Bounds(busy=3.0, statement=10.0, idle=60.0, kept=16)
"""For processes that answer callers: these wait, and none of them may keep the database from the others."""


class Database:
    """One a process: connections to the database at `url` (SQLAlchemy's form, SQLite or PostgreSQL)."""

    def __init__(self, url: str, bounds: Bounds = UNBOUNDED) -> None:
        self.engine = _create_engine(url, bounds)
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


def migrate(url: str, revision: str = "head") -> None:
    """Bring the database at `url` to the newest schema, or up to a revision. Safe to run from many processes at once.

    A schema of a later release stays as it is.

    Raises:
        Conflict: this release has no such revision.
    """
    if revision != "head" and revision not in {script.revision for script in _scripts().walk_revisions()}:
        hint = "use the release that made it, or a newer one"
        raise Conflict(f"this release does not know the schema {revision}", value=revision, hint=hint)
    engine = _create_engine(url)
    try:
        with _translated(), engine.begin() as connection:
            lock_schema(connection)
            if revision == "head" and _is_later(MigrationContext.configure(connection).get_current_heads()):
                return
            config = _alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    finally:
        engine.dispose()


def lock_schema(connection: Connection) -> None:
    """Let one transaction at a time migrate: SQLite's began with the write lock, PostgreSQL's takes one here.

    Alembic keeps its environment in module globals, so this also keeps threads of one process apart.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})


def schema_serves(database: Database) -> bool:
    """True if the database has the schema that this code was written for, or that of a later release.

    Migrations are compatible with the release before, whose processes go on while they are replaced one by one.
    """
    with _translated(), database.engine.connect() as connection:
        present = MigrationContext.configure(connection).get_current_heads()
    return set(present) == set(_heads()) or _is_later(present)


def revision_of(connection: Connection) -> str:
    """The revision of a database's schema.

    Raises:
        Unavailable: it has none: nothing was migrated.
    """
    present = MigrationContext.configure(connection).get_current_heads()
    if len(present) != 1:
        raise Unavailable("the database has no schema", hint="run `bitwright migrate`")
    return str(present[0])


@lru_cache(maxsize=1)
def _heads() -> tuple[str, ...]:
    """The newest revision of this code, read once: a probe asks every few seconds."""
    return tuple(_scripts().get_heads())


def _is_later(present: tuple[str, ...]) -> bool:
    """True if a database's schema is that of a later release."""
    return len(present) == 1 and present[0] > max(_known())


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    """Every revision of this code. They are numbers of four digits, so that a later one is greater."""
    return frozenset(script.revision for script in _scripts().walk_revisions())


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_alembic_config())


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("migrations")).replace("%", "%%"))
    return config


def _create_engine(url: str, bounds: Bounds = UNBOUNDED) -> Engine:
    parsed = make_url(url)
    if parsed.drivername in {"postgres", "postgresql"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {"json_serializer": TO_JSON, "pool_size": bounds.kept, "max_overflow": 40 - bounds.kept}
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": bounds.busy}, **options)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        if bounds.statement is not None:
            _limit_statements(engine, bounds.statement)
        return engine
    connect = {"connect_timeout": 10, **_server_options(parsed, bounds)}
    return create_engine(parsed, connect_args=connect, pool_pre_ping=True, pool_use_lifo=True, **options)


def _server_options(url: URL, bounds: Bounds) -> dict[str, str]:
    """The limits as PostgreSQL's own settings, before those that the URL has."""
    limits = {
        "statement_timeout": bounds.statement,
        "lock_timeout": None if bounds.statement is None else bounds.busy,
        "idle_in_transaction_session_timeout": bounds.idle,
    }
    given = [f"-c {name}={int(seconds * 1000)}" for name, seconds in limits.items() if seconds is not None]
    if not given:
        return {}
    own = url.query.get("options", "")
    return {"options": " ".join([*given, *((own,) if isinstance(own, str) else own)]).strip()}


def _limit_statements(engine: Engine, seconds: float) -> None:
    """Interrupt a statement of SQLite that takes longer: it has no such setting of its own."""

    def watch(connection: Any, record: Any) -> None:
        ends: dict[str, float] = record.info
        connection.set_progress_handler(lambda: monotonic() > ends.get(STATEMENT_ENDS, inf), STEPS_BETWEEN_LOOKS)

    def begin(connection: Connection, *_: object) -> None:
        connection.info[STATEMENT_ENDS] = monotonic() + seconds

    event.listen(engine, "connect", watch)
    event.listen(engine, "before_cursor_execute", begin)


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
        if _took_too_long(error):
            hint = "ask for less: fewer filters, or ones that fewer things match; or try again when the service is idle"
            raise Unavailable("the database took too long for this", hint=hint) from error
        raise Unavailable("the database is not available now; try again") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable("the connection to the database was lost; try again") from error
        raise


def _took_too_long(error: SQLAlchemyError) -> bool:
    """True if a statement was ended for its time: by PostgreSQL (its state says so), or by our watch on SQLite."""
    cause = getattr(error, "orig", None)
    code = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
    return code in (QUERY_CANCELED, INTERRUPTED)
