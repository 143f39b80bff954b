"""Every test of the store runs on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, delete

from app.store.models import AuditEntry, SweepLease, Tenant, Worker
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant
from tests import servers


@pytest.fixture(scope="session")
def shared_postgres(postgres: URL, migrated_template: str) -> Iterator[str]:
    """URL of one PostgreSQL database that tests use in turn: to empty it is faster than to make one."""
    with servers.postgres_database(postgres, migrated_template) as url:
        yield servers.text(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """An open, empty database of each kind in turn."""
    shared = request.param == "postgresql"
    opened = Database(request.getfixturevalue("shared_postgres" if shared else "sqlite_url"))
    yield opened
    if shared:
        with opened.transaction() as session:
            for owner in (Tenant, Worker, SweepLease, AuditEntry):  # all other rows belong to a tenant
                session.execute(delete(owner))
    opened.close()


@pytest.fixture
def tenant(database: Database) -> str:
    """Id of a tenant."""
    with database.transaction() as session:
        return ensure_tenant(session, "first").id


@pytest.fixture
def stranger(database: Database) -> str:
    """Id of another tenant."""
    with database.transaction() as session:
        return ensure_tenant(session, "second").id


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each kind of database in turn, without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    with servers.postgres_database(request.getfixturevalue("postgres")) as url:
        yield servers.text(url)
