"""The engine, the one place that commits, and the migrations."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from math import inf
from select import POLLIN, poll
from time import monotonic, sleep
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic_core import from_json
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InvalidatePoolError,
    OperationalError,
    SQLAlchemyError,
    TimeoutError,
)
from sqlalchemy.orm import Session, sessionmaker

from bitwright.errors import Conflict, Unavailable

BUSY_SECONDS = 30.0
"""Time that a write waits for another one on SQLite before it fails."""
BETWEEN_TRIES = 0.02
"""Seconds between two tries to turn a new file to WAL."""
STEPS_BETWEEN_LOOKS = 20_000
"""Instructions of SQLite's machine, some milliseconds, after which a statement's time is looked at."""
READING = "bitwright_reading"
STATEMENT_ENDS = "bitwright_statement_ends"
USED_AT = "bitwright_used_at"
BY_VALUES: Mapping[str, bool] = {"bitwright_by_values": True}
"""Options of a statement whose plan depends on its values: PostgreSQL is to plan it for them each time.

What a connection has executed ten times it executes by a plan for any values, if that looks no dearer. Of rows that a
limit ends and indexes whose values are not equally frequent such a plan knows too little.
"""
SURE_SECONDS = 10.0
"""A connection that was used so long ago is there still, if its server has said nothing."""
READ_ONLY: Mapping[str, str] = {"default_transaction_read_only": "on"}
NO_OPTIONS: Mapping[str, str] = {}
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
        self._reader = self._reading_engine(url, bounds)
        self._write = sessionmaker(self.engine, expire_on_commit=False)
        self._read = sessionmaker(self._reader, expire_on_commit=False, autoflush=False)

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

        On PostgreSQL each of its statements sees what is committed as it begins, which is what a transaction there
        gives too, and is one round trip, not three.

        Raises:
            Unavailable: the database cannot be reached.
        """
        with _translated(), self._read() as session:
            yield session

    def close(self) -> None:
        """Close all connections."""
        self._reader.dispose()
        self.engine.dispose()

    def _reading_engine(self, url: str, bounds: Bounds) -> Engine:
        if self.engine.dialect.name == "sqlite":
            return self.engine.execution_options(**{READING: True})
        return _create_engine(url, bounds, READ_ONLY, isolation_level="AUTOCOMMIT")


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


def _create_engine(
    url: str, bounds: Bounds = UNBOUNDED, server: Mapping[str, str] = NO_OPTIONS, **given: Any
) -> Engine:
    """An engine; `server` are settings of PostgreSQL for its sessions, and `given` options of SQLAlchemy."""
    parsed = make_url(url)
    if parsed.drivername in {"postgres", "postgresql"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {"pool_size": bounds.kept, "max_overflow": 40 - bounds.kept, **given}
    options |= {"json_serializer": TO_JSON, "json_deserializer": from_json}
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": bounds.busy}, **options)
        event.listen(engine, "connect", partial(_prepare_sqlite, busy=bounds.busy))
        event.listen(engine, "begin", _begin_sqlite)
        if bounds.statement is not None:
            _limit_statements(engine, bounds.statement)
        return engine
    connect = {"connect_timeout": 10, **_server_options(parsed, bounds, server)}
    engine = create_engine(parsed, connect_args=connect, pool_use_lifo=True, **options)
    event.listen(engine, "checkin", _note_use)
    event.listen(engine, "checkout", partial(_look_after_idle, engine))
    event.listen(engine, "do_execute", _execute_by_values)
    return engine


def _execute_by_values(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    """Execute a statement that is `BY_VALUES`, unprepared; True if it was one."""
    if context is None or not BY_VALUES.items() <= context.execution_options.items():
        return False
    cursor.execute(statement, parameters, prepare=False)
    return True


def _note_use(_connection: Any, record: Any) -> None:
    record.info[USED_AT] = monotonic()


def _look_after_idle(engine: Engine, connection: Any, record: Any, _proxy: Any) -> None:
    """Ask a connection whether it still is one, if it has lain idle or its server has said something unasked.

    A server that ends says so. SQLAlchemy's own `pool_pre_ping` asks each time, which costs as much as a small query.
    The pool throws all connections away if one is none any more.
    """
    if monotonic() - record.info.get(USED_AT, inf) < SURE_SECONDS and not _has_something_to_read(connection):
        return
    try:
        alive = engine.dialect.do_ping(connection)
    except DBAPIError as error:
        raise InvalidatePoolError from error
    except engine.dialect.loaded_dbapi.Error as error:
        raise InvalidatePoolError from error
    if not alive:
        raise InvalidatePoolError


def _has_something_to_read(connection: Any) -> bool:
    watched = poll()
    watched.register(connection.fileno(), POLLIN)
    return bool(watched.poll(0))


def _server_options(url: URL, bounds: Bounds, server: Mapping[str, str]) -> dict[str, str]:
    """The limits and settings as PostgreSQL's own, before those that the URL has."""
    limits = {
        "statement_timeout": bounds.statement,
        "lock_timeout": None if bounds.statement is None else bounds.busy,
        "idle_in_transaction_session_timeout": bounds.idle,
    }
    given = [f"-c {name}={int(seconds * 1000)}" for name, seconds in limits.items() if seconds is not None]
    given += [f"-c {name}={value}" for name, value in server.items()]
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


def _prepare_sqlite(connection: Any, record: object, *, busy: float) -> None:  # noqa: ARG001
    connection.isolation_level = None  # the driver must not begin transactions by itself: see _begin_sqlite
    _write_ahead(connection, busy)
    for pragma in ("foreign_keys = ON", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: Any, busy: float) -> None:
    """Turn the file to WAL. Where another connection writes to a new one, SQLite refuses that without its `timeout`."""
    ends = monotonic() + busy
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic() > ends:
                raise
            sleep(BETWEEN_TRIES)
        else:
            return


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
