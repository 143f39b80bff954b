"""Time as the database sees it: aware UTC in Python, and the database's own clock in SQL.

Leases and back-off compare times of many machines, so those times come from the one clock that they share.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect, Float, SQLColumnExpression, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator


def now() -> "Now":
    """SQL: the time at the start of the statement."""
    return Now()


def seconds_from_now(seconds: float) -> "Later":
    """SQL: the time `seconds` after the start of the statement; before it if negative."""
    return Later(bindparam(None, seconds, type_=Float()))


def seconds_between(start: SQLColumnExpression[Any], end: SQLColumnExpression[Any]) -> "Between":
    """SQL: the seconds from one time to another."""
    return Between(start, end)


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime. SQLite keeps it as text of fixed width, so text order is time order."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Aware datetimes as the dialect stores them; a naive one is refused with ValueError."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone cannot be stored")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """The stored time as an aware UTC datetime."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Now(FunctionElement[datetime]):
    """See `now`."""

    type = Instant()
    inherit_cache = True


class Later(FunctionElement[datetime]):
    """See `seconds_from_now`."""

    type = Instant()
    inherit_cache = True


class Between(FunctionElement[float]):
    """See `seconds_between`."""

    type = Float()
    inherit_cache = True


@compiles(Now, "postgresql")
def _now_postgresql(element: Now, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ARG001
    return "statement_timestamp()"


@compiles(Now, "sqlite")
def _now_sqlite(element: Now, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ARG001
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


@compiles(Later, "postgresql")
def _later_postgresql(element: Later, compiler: SQLCompiler, **options: Any) -> str:
    return f"(statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **options)}))"


@compiles(Later, "sqlite")
def _later_sqlite(element: Later, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', {seconds}))"


@compiles(Between, "postgresql")
def _between_postgresql(element: Between, compiler: SQLCompiler, **options: Any) -> str:
    start, end = (compiler.process(clause, **options) for clause in element.clauses)
    return f"extract(epoch from ({end} - {start}))"


@compiles(Between, "sqlite")
def _between_sqlite(element: Between, compiler: SQLCompiler, **options: Any) -> str:
    start, end = (compiler.process(clause, **options) for clause in element.clauses)
    return f"((julianday({end}) - julianday({start})) * 86400.0)"
