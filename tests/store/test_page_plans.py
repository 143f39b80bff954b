"""Plans for pages of jobs: on SQLite each filter is searched in its index, on PostgreSQL each page is planned.

The service gathers no statistics of tables on SQLite, so what it plans on a small table it does on a large one.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from app.store.job_pages import JobFilters
from app.store.jobs import JobRepository
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant

BY_MODEL = "job USING INDEX ix_job_model (tenant_id=? AND <expr>=? AND status=?)"
BY_METHOD = "job USING COVERING INDEX ix_job_method (tenant_id=? AND method=? AND status=?)"
OF_ONE_JOB = "job_label_1 USING INDEX sqlite_autoindex_job_label_1 (job_id=?"
UNSELECTIVE = ("ix_job_status (tenant_id=? AND status=?)", "(tenant_id=?)")
CASES = {
    "model": (JobFilters(model="org/model"), BY_MODEL),
    "long model": (JobFilters(model="m" * 300), BY_MODEL),
    "method": (JobFilters(method="rtn"), BY_METHOD),
    "labels": (JobFilters(labels={"a": "b", "c": "d"}), OF_ONE_JOB),
    "labels and status": (JobFilters(labels={"a": "b", "c": "d"}, model="org/model"), OF_ONE_JOB),
}


@pytest.fixture
def asked(sqlite_url: str) -> Iterator[tuple[Database, list[tuple[str, Any]]]]:
    """A database, and the statements that it was asked."""
    database = Database(sqlite_url)
    statements: list[tuple[str, Any]] = []

    def note(_connection: Connection, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        statements.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    yield database, statements
    database.close()


@pytest.mark.parametrize(("filters", "wanted"), CASES.values(), ids=CASES.keys())
def test_a_filter_is_searched_in_its_own_index(
    asked: tuple[Database, list[tuple[str, Any]]], filters: JobFilters, wanted: str
) -> None:
    database, statements = asked
    with database.transaction() as session:
        tenant = ensure_tenant(session, "first").id
    with database.reading() as session:
        JobRepository(session, tenant).listed(after=None, limit=50, filters=filters)
        statement, parameters = statements[-1]
        plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    searches = [row[-1].removeprefix("SEARCH ") for row in plan if row[-1].startswith("SEARCH ")]
    assert any(search.startswith(wanted) for search in searches), searches
    assert not any(
        search.endswith(("ix_job_status (tenant_id=? AND status=?)", "(tenant_id=?)")) for search in searches
    )


def test_a_page_with_filters_is_planned_for_their_values_each_time(postgres_url: str) -> None:
    """A connection that had executed it ten times went over to a plan for any values, seven times as slow."""
    database = Database(postgres_url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "first").id
    with database.reading() as session:
        for filters in (JobFilters(), *(case for case, _ in CASES.values())):
            for _ in range(7):
                JobRepository(session, tenant).listed(after=None, limit=50, filters=filters)
        kept = session.scalars(text("SELECT statement FROM pg_prepared_statements")).all()
    database.close()
    assert [statement for statement in kept if "FROM job" in statement], "others are kept"
    assert not [s for s in kept if "job_label" in s or "UNION" in s or "job.status = " in s], kept
