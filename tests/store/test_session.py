"""Connections: what SQLite is told, what a lost database looks like, and that nothing half-done stays."""

import time
from contextlib import suppress
from dataclasses import replace

import pytest
from sqlalchemy import event, make_url, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, TimeoutError

from app.store.attempts import AttemptWriter
from app.store.events import EventRepository
from app.store.models import Tenant
from app.store.session import REQUESTS, TO_JSON, Bounds, Database
from app.store.tenancy.keys import ensure_tenant
from bitwright.errors import Unavailable
from tests.store.samples import add, block, get, progress, take, tell


def test_sqlite_is_durable_at_each_commit_and_keeps_its_references(sqlite_url: str) -> None:
    """2 is FULL: with less, the last commits may be gone after a power cut in WAL mode."""
    database = Database(sqlite_url)
    told = {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 30_000}
    with database.transaction() as writing, database.reading() as reading:
        for session, query_only in ((writing, 0), (reading, 1)):
            found = {name: session.execute(text(f"PRAGMA {name}")).scalar_one() for name in told}
            assert found == told
            assert session.execute(text("PRAGMA query_only")).scalar_one() == query_only
    database.close()


def test_a_writer_on_sqlite_holds_the_lock_from_its_start(sqlite_url: str) -> None:
    """One that first reads and then writes would fail, not wait, if another wrote between."""
    database = Database(sqlite_url)
    begun: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: begun.append(args[2]))
    with database.transaction() as session:
        session.execute(text("SELECT 1"))
    assert begun == ["PRAGMA query_only = 0", "BEGIN IMMEDIATE", "SELECT 1"]
    begun.clear()
    with database.reading() as session:
        session.execute(text("SELECT 1"))
    assert begun == ["PRAGMA query_only = 1", "BEGIN", "SELECT 1"]
    database.close()


@pytest.mark.parametrize("fault", [OperationalError, InterfaceError])
def test_a_fault_of_the_driver_is_unavailable(database: Database, fault: type[DBAPIError]) -> None:
    for opened in (database.transaction, database.reading):
        with pytest.raises(Unavailable) as caught, opened():
            raise fault("SELECT secret", {}, Exception("host 10.0.0.7"))
        assert "secret" not in caught.value.detail
        assert "10.0.0.7" not in caught.value.detail
        with pytest.raises(Unavailable), opened():
            raise TimeoutError("no connection is free")


def test_only_a_lost_connection_turns_other_faults_into_unavailable(database: Database) -> None:
    with pytest.raises(Unavailable, match="lost"), database.transaction():
        raise DBAPIError("SELECT 1", {}, Exception("gone"), connection_invalidated=True)
    with pytest.raises(IntegrityError), database.transaction():
        raise IntegrityError("INSERT", {}, Exception("twice"))


def test_a_database_that_goes_away_during_an_append_keeps_nothing_of_it(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    tell(database, held, block(0))

    def fail(connection: object) -> None:
        raise OperationalError("COMMIT", {}, Exception("server closed the connection"))

    event.listen(database.engine, "commit", fail)
    with pytest.raises(Unavailable):
        tell(database, held, progress(1), block(1))
    event.remove(database.engine, "commit", fail)
    job = get(database, tenant, job_id)
    assert (job.last_event, job.blocks_done, job.progress) == (3, 1, None)
    tell(database, held, progress(1), block(1))
    with database.reading() as session:
        stored = EventRepository(session, tenant).page(job_id, 2, 10)
    assert [(e.sequence, e.event) for e in stored] == [(3, block(0)), (4, progress(1)), (5, block(1))]


def test_a_postgresql_that_ended_the_connection_is_unavailable_once(shared_postgres: str) -> None:
    database, other = Database(shared_postgres), Database(shared_postgres)

    def end(pid: int) -> None:
        with other.transaction() as session:
            assert session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid}).scalar_one()

    with database.transaction() as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
    end(pid)  # while it waits in the pool: the next one to use it sees nothing of that
    with database.transaction() as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()

    def renew_and_lose() -> None:
        with database.transaction() as session:
            end(session.execute(text("SELECT pg_backend_pid()")).scalar_one())
            AttemptWriter(session, "job_" + "0" * 26, 1).renew(60)

    with pytest.raises(Unavailable):
        renew_and_lose()
    with database.transaction() as session:
        assert session.execute(text("SELECT pg_backend_pid()")).scalar_one() != pid
    database.close()
    other.close()


def test_stored_json_has_no_number_that_json_has_not() -> None:
    assert TO_JSON({"a": [1, "ü"]}) == '{"a":[1,"\\u00fc"]}'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            TO_JSON(value)


def test_a_body_that_fails_commits_nothing_and_frees_its_connection(database: Database, tenant: str) -> None:
    for _ in range(50):  # more than the pool holds
        with suppress(ZeroDivisionError), database.transaction() as session:
            session.execute(text("UPDATE tenant SET name = 'other'"))
            raise ZeroDivisionError
    with database.reading() as session:
        assert session.execute(text("SELECT name FROM tenant")).scalars().all() == ["first"]


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000000000) SELECT count(*) FROM n"


def test_a_statement_that_takes_too_long_is_ended(database_url: str) -> None:
    database = Database(database_url, Bounds(statement=0.3))
    for opened in (database.reading, database.transaction):
        started = time.monotonic()
        with pytest.raises(Unavailable, match="too long"), opened() as session:
            session.execute(text(ENDLESS))
        assert time.monotonic() - started < 5
        with opened() as session:  # the next statement has its own time
            assert session.execute(text("SELECT 1")).scalar_one() == 1
    database.close()


def test_a_write_that_waits_for_another_gives_up(database_url: str) -> None:
    holder, waiting = Database(database_url), Database(database_url, replace(REQUESTS, busy=0.2))
    with holder.transaction() as session:
        tenant_id = ensure_tenant(session, "t").id
    with holder.transaction() as session:
        session.execute(select(Tenant).where(Tenant.id == tenant_id).with_for_update())
        started = time.monotonic()
        with pytest.raises(Unavailable), waiting.transaction() as second:
            second.execute(update(Tenant).where(Tenant.id == tenant_id).values(name="u"))
        assert time.monotonic() - started < 5
    for opened in (holder, waiting):
        opened.close()


def test_limits_of_postgresql_go_before_those_of_its_url(postgres_url: str) -> None:
    given = make_url(postgres_url).update_query_dict({"options": "-c statement_timeout=7000 -c geqo=off"})
    database = Database(given.render_as_string(hide_password=False), REQUESTS)
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "geqo")
    with database.reading() as session:
        assert [session.execute(text(f"SHOW {name}")).scalar_one() for name in names] == ["7s", "3s", "1min", "off"]
    database.close()
