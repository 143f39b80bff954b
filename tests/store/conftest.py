"""Every test of the store runs on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.store.keys import ensure_tenant
from app.store.session import Database
from tests import servers


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open, empty database."""
    opened = Database(database_url)
    yield opened
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
    """Each database in turn, without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    with servers.postgres_database(request.getfixturevalue("postgres")) as url:
        yield servers.text(url)
